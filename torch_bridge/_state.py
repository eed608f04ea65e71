"""`torch_bridge.BufferState`, a handle on the three rings of a stream, and its two phases, `encode` and `decode`."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

import ringjax as rj
from torch_bridge._arguments import autocast, bucketed, check_floats, row_integers
from torch_bridge._buffer import check_on, token_lengths
from torch_bridge._dlpack import as_jax_dtype, jax_device, make_room, view_in_torch
from torch_bridge._held import Held, Program


class BufferState(Held):
    """The three rings of a stream, `ringjax.BufferState`, as a handle: `encode` and `decode` update it.

    Make one with `init_state`, or let a `RingBufferAttention` make it.
    """

    _name = "BufferState"
    _held = ("state", rj.BufferState)

    def _take(self, tree: Any, *, owned: bool) -> None:
        super()._take(tree, owned=owned)
        # What a decoder's position is checked against, kept on the host too, so that no step waits for a GPU.
        self._seen: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def config(self) -> rj.RingBufferConfig:
        """Sizes and options."""
        return self._facts().config

    @property
    def last_calculated(self) -> Tensor:
        """int32 [B]: the decoder's last position whose output exists; -1 at the start. A copy."""
        return view_in_torch(self._tree().last_calculated).clone()

    def _positions(self) -> tuple[np.ndarray, np.ndarray]:
        if self._seen is None:
            state = self._tree()
            self._seen = np.array(state.last_calculated), np.array(state.feedback.written)
        return self._seen

    def _writes(self, ring: str) -> tuple[int, ...]:
        """Which float leaves are the keys and values of a ring."""
        paths, _ = jax.tree.flatten_with_path(self._facts())
        return tuple(i for i in self._floats if paths[i][0][0].name == ring)

    def __repr__(self) -> str:
        if self._structure is None:
            return "BufferState(released)"
        grad = ", requires_grad=True" if self.requires_grad else ""
        return f"BufferState(batch={self.batch}, {self.config}, device={self.device}{grad})"


def init_state(
    config: rj.RingBufferConfig,
    batch: int,
    *,
    kv_heads: int,
    head_dim: int,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
) -> BufferState:
    """Three empty rings, as `ringjax.init_state`, with a torch dtype on a torch device (None: torch's default).

    Raises:
      ValueError, TypeError: as there, and a device that JAX does not see.
    """
    call = "init_state"
    on = jax_device(call, torch.get_default_device() if device is None else torch.device(device))
    wanted = as_jax_dtype(call, dtype)
    make_room(on)
    with jax.default_device(on):
        state = rj.init_state(config, batch, kv_heads=kv_heads, head_dim=head_dim, value_dim=value_dim, dtype=wanted)
    # Each ring gets memory of its own: what is given to a step must not be given twice.
    return BufferState(jax.device_put(state, on, may_alias=False), owned=True)


@functools.cache
def _encode(requires_grad: bool) -> Program:
    def encode(state: Any, q: Any, k: Any, v: Any, sink_logits: Any, lengths: Any) -> Any:
        return rj.encode(q, k, v, state, requires_grad=requires_grad, lengths=lengths, sink_logits=sink_logits)

    return Program(encode)


@torch.compiler.disable(reason="the rings are updated in place: only torch_bridge.attention can be traced")
def encode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: BufferState,
    *,
    requires_grad: bool = False,
    lengths: Tensor | Sequence[int] | None = None,
    sink_logits: Tensor | None = None,
    bucket: int | Sequence[int] | None = None,
) -> tuple[Tensor, BufferState]:
    """`ringjax.encode` on torch tensors: T tokens see themselves and what their ring holds, and are appended to it.

    Args:
      q, k, v: of the tokens.
      state: the handle; it is updated.
      requires_grad: whether gradients are to flow back through the ring: writes `backward`, else `forward`.
      lengths: integers [B], how many of the T tokens are real; None: all.
      sink_logits: a learned logit per query head.
      bucket: as for `attend`.

    Returns:
      Output [B, T, N, Hv], and `state`.

    Raises:
      ValueError, TypeError, NotImplementedError: as `ringjax.encode`, in its words; `requires_grad` without torch
        recording gradients.
    """
    call = "encode"
    q, k, v = autocast(q, k, v)
    _check(call, q, k, v, state, sink_logits)
    if not isinstance(requires_grad, bool):
        raise TypeError(f"{call}: requires_grad must be a bool, got {type(requires_grad).__name__}.")
    if requires_grad and not torch.is_grad_enabled():
        raise ValueError(
            f"{call}: requires_grad=True needs torch to record gradients, got a call under no_grad or inference_mode.\n"
            "  Hint: leave requires_grad away there."
        )
    lengths = token_lengths(call, lengths, q)
    length = q.shape[1] if q.ndim == 4 else 1
    if bucket is not None and q.ndim == 4:
        more = bucketed(call, bucket, length) - length
        if lengths is None:
            lengths = torch.full((q.shape[0],), length, dtype=torch.int32, device=q.device)
        q, k, v = (pad(x, (0, 0, 0, 0, 0, more)) if more else x for x in (q, k, v))
    written = state._writes("backward") if requires_grad else ()
    out = state._step(call, _encode(requires_grad), (q, k, v, sink_logits, lengths), written=written)
    return (out if bucket is None else out[:, :length]), state


@functools.cache
def _decode(continues: bool) -> Program:
    def decode(state: Any, q: Any, k: Any, v: Any, sink_logits: Any, lengths: Any, position: Any) -> Any:
        position = state.last_calculated + 1 if continues else position
        return rj.decode(q, k, v, state, position=position, lengths=lengths, sink_logits=sink_logits)

    return Program(decode)


@torch.compiler.disable(reason="the rings are updated in place: only torch_bridge.attention can be traced")
def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: BufferState,
    *,
    position: int | Tensor | Sequence[int] | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    sink_logits: Tensor | None = None,
) -> tuple[Tensor, BufferState]:
    """`ringjax.decode` on torch tensors: one softmax over what the encoder left and the decoder's own past.

    Args:
      q, k, v: of the decoder's tokens at positions `position + t`.
      state: the handle; it is updated.
      position: the decoder's position of the first token, one number or integers [B]; None: `last_calculated + 1`.
        A smaller one rolls back to it. Numbers, lists and CPU tensors are compared without waiting for a GPU.
      lengths: integers [B], how many of the T tokens are real; None: all.
      sink_logits: a learned logit per query head.

    Returns:
      Output [B, T, N, Hv], and `state`.

    Raises:
      ValueError: a position beyond `last_calculated + 1`, below 0, or farther back than the slack; the state is as
        it was.
      ValueError, TypeError, NotImplementedError: as `ringjax.decode`, in its words.
    """
    call = "decode"
    q, k, v = autocast(q, k, v)
    _check(call, q, k, v, state, sink_logits)
    last, written = state._positions()
    at = last + 1 if position is None else _positions(call, position, state.batch)
    _check_position(call, at, last, written, state.config.slack)
    counts = _counts(lengths, q)
    lengths = token_lengths(call, lengths, q)
    continues = bool((at == last + 1).all())
    where = None if continues else torch.tensor(at, dtype=torch.int32).to(q.device)
    arrays = (q, k, v, sink_logits, lengths, where)
    out = state._step(call, _decode(continues), arrays, written=state._writes("feedback"))
    state._seen = None if counts is None else (at + counts - 1, np.maximum(written, at + counts))
    return out, state


def _check(call: str, q: Any, k: Any, v: Any, state: Any, sink_logits: Any) -> None:
    if not isinstance(state, BufferState):
        hint = "\n  Hint: BufferState.from_jax makes a handle." if isinstance(state, rj.BufferState) else ""
        raise TypeError(f"{call}: state must be a torch_bridge.BufferState, got {type(state).__name__}.{hint}")
    check_floats(call, {"q": q, "k": k, "v": v}, {"sink_logits": sink_logits})
    check_on(call, state, q)


def _counts(lengths: Any, q: Tensor) -> Any:
    """How many tokens each row gets, if that can be told without waiting for a GPU; else None."""
    if lengths is None:
        return q.shape[1] if q.ndim == 4 else 1
    if isinstance(lengths, Tensor):
        return lengths.numpy() if lengths.device.type == "cpu" else None
    return np.asarray(lengths)


def _positions(call: str, position: Any, batch: int) -> np.ndarray:
    given = row_integers(call, "position", position, torch.empty(0, device=getattr(position, "device", "cpu")))
    assert given is not None
    if given.ndim and tuple(given.shape) != (batch,):
        got = f"int32{list(given.shape)}"
        raise ValueError(f"{call}: position must be an int or int32[{batch}], one per row, got {got}.")
    return np.broadcast_to(given.cpu().numpy(), (batch,))


def _check_position(call: str, at: np.ndarray, last: np.ndarray, written: np.ndarray, slack: int) -> None:
    """As `ringjax.decode` does outside jit; here every call is jitted."""
    facts = f"\n  position:        {at.tolist()}\n  last_calculated: {last.tolist()}"
    if (at < 0).any():
        raise ValueError(f"{call}: position must be at least 0, got {at.min()}.{facts}")
    if (at > last + 1).any():
        row = int(np.argmax(at - last))
        first = f"{call}: position must be at most last_calculated + 1 = {last[row] + 1}, got {at[row]}."
        raise ValueError(f"{first}{facts}\n  Hint: decode the positions in between first.")
    depth = written - at
    if (depth > slack).any():
        row = int(np.argmax(depth))
        first = f"{call}: position may go back by at most slack = {slack} tokens, got {depth[row]}."
        raise ValueError(f"{first}{facts}\n  Hint: give RingBufferConfig more slack.")
