"""`torch_bridge.RingBuffer`, a handle on a ring of ringjax's, and `torch_bridge.attend`."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import jax
import torch
from torch import Tensor
from torch.nn.functional import pad

import ringjax as rj
from torch_bridge._arguments import autocast, bucketed, check_floats, check_window, row_integers, tiles_of
from torch_bridge._dlpack import (
    TO_TORCH,
    as_jax_dtype,
    describe,
    jax_device,
    make_room,
    on_device,
    view_in_jax,
    view_in_torch,
)
from torch_bridge._held import Held, Program
from torch_bridge._ops import Tiles


class RingBuffer(Held):
    """The last keys and values of a stream, in memory that does not grow: `ringjax.RingBuffer`, as a handle.

    Unlike ringjax's, which is a value, a handle is updated: `attend` appends to it, and `rollback`, `select`, `reset`
    and `insert` change it in place and return it.
    """

    _name = "RingBuffer"
    _held = ("ring", rj.RingBuffer)

    @classmethod
    def empty(
        cls,
        batch: int,
        kv_heads: int,
        head_dim: int,
        window: rj.Window,
        *,
        slack: int = 0,
        value_dim: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> Self:
        """A ring with no tokens, as `ringjax.RingBuffer.empty`.

        Args:
          batch, kv_heads, head_dim, window, slack, value_dim: as there.
          dtype: a torch dtype.
          device: a torch device; None: torch's default.

        Raises:
          ValueError, TypeError: as there, and a device that JAX does not see.
        """
        call = "RingBuffer.empty"
        check_window(call, window)
        on = jax_device(call, torch.get_default_device() if device is None else torch.device(device))
        make_room(on)
        with jax.default_device(on):
            ring = rj.RingBuffer.empty(
                batch,
                kv_heads,
                head_dim,
                window,
                slack=slack,
                value_dim=value_dim,
                dtype=as_jax_dtype(call, dtype),
            )
        return cls(jax.device_put(ring, on), owned=True)

    @property
    def window(self) -> rj.Window:
        """What a query sees."""
        return self._facts().window

    @property
    def slack(self) -> int:
        """How many tokens can be rolled back."""
        return self._facts().slack

    @property
    def capacity(self) -> int:
        """C: slots per row."""
        return self._facts().capacity

    @property
    def dtype(self) -> torch.dtype:
        """Of the keys and values."""
        return TO_TORCH[str(self._facts().k.dtype)]

    @property
    def length(self) -> Tensor:
        """int32 [B], tokens ever appended; the next token's position. A copy."""
        return view_in_torch(self._tree().length).clone()

    def positions(self) -> Tensor:
        """int32 [B, C], the position in each slot, in storage order; -1 where a slot holds no token."""
        return view_in_torch(_positions(self._tree()))

    def export(self) -> rj.RingExport:
        """What the ring holds, oldest token first: keys, values, positions and length as tensors of their own."""
        tensors: list[Any] = [view_in_torch(x) for x in _export(self._tree())]
        return rj.RingExport(*tensors)

    @classmethod
    def restore(
        cls, exported: rj.RingExport, window: rj.Window, *, slack: int = 0, dtype: torch.dtype | None = None
    ) -> Self:
        """A ring, of any capacity, that continues the stream of an exported one, as `ringjax.RingBuffer.restore`.

        Raises:
          ValueError, TypeError: as there.
        """
        call = "RingBuffer.restore"
        check_window(call, window)
        if not isinstance(exported, rj.RingExport):
            raise TypeError(f"{call}: exported must be a RingExport, got {type(exported).__name__}.")
        tensors: list[Any] = [x.detach().clone() for x in exported]  # type: ignore[attr-defined]
        arrays = rj.RingExport(*(view_in_jax(x) for x in tensors))
        with on_device(jax_device(call, tensors[0].device)):
            wanted = None if dtype is None else as_jax_dtype(call, dtype)
            return cls(rj.RingBuffer.restore(arrays, window, slack=slack, dtype=wanted), owned=True)

    def insert(self, row: int, other: "RingBuffer") -> Self:
        """Replaces row `row`, and those after it, by the rows of `other`; in place.

        Raises:
          ValueError, TypeError: as `ringjax.RingBuffer.insert`.
        """
        theirs = other._tree() if isinstance(other, RingBuffer) else other
        return self._map(lambda ring: ring.insert(row, theirs))

    def __repr__(self) -> str:
        if self._structure is None:
            return "RingBuffer(released)"
        tree, grad = self._facts(), ", requires_grad=True" if self.requires_grad else ""
        k = f"{tree.k.dtype}[{', '.join(map(str, tree.k.shape))}]"
        return f"RingBuffer({k}, {self.window}, slack={self.slack}, device={self.device}{grad})"


_positions = jax.jit(rj.RingBuffer.positions)
_export = jax.jit(rj.RingBuffer.export)


class _Options(NamedTuple):
    softcap: float | None
    scale: float | None
    implementation: str | None
    tiles: tuple[int | None, int | None, int | None]


@functools.cache
def _attend(options: _Options) -> Program:
    softcap, scale, implementation, tiles = options

    def attend(ring: Any, q: Any, k: Any, v: Any, sink_logits: Any, lengths: Any) -> Any:
        return rj.attend(
            q,
            k,
            v,
            ring,
            lengths=lengths,
            sink_logits=sink_logits,
            softcap=softcap,
            scale=scale,
            implementation=implementation,
            config=Tiles(*tiles),
        )

    return Program(attend)


@torch.compiler.disable(reason="a ring is updated in place: only torch_bridge.attention can be traced")
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    buffer: RingBuffer,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    sink_logits: Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    implementation: str | None = None,
    config: Any = None,
    bucket: int | Sequence[int] | None = None,
) -> tuple[Tensor, RingBuffer]:
    """`ringjax.attend` on torch tensors: attention of T new tokens to themselves and to a ring, which takes them in.

    Without gradients the ring is updated in place, in memory that does not grow. With gradients (enabled, and q, k, v,
    the sink logits or the ring require them) they flow back through the ring to the chunks that wrote it.

    Args:
      q, k, v: of the new tokens: [B, T, N, H], [B, T, K, H], [B, T, K, Hv].
      buffer: the handle; it holds the ring after the new tokens when this returns, and the one before if it raises.
      lengths: integers [B], how many of the T tokens are real. On a CPU, and as a list, their values are checked.
      sink_logits, softcap, scale, implementation, config: as for `attention`.
      bucket: T is padded to a multiple of this number, or to the smallest of these lengths that holds it.

    Returns:
      Output [B, T, N, Hv], and `buffer`.

    Raises:
      ValueError, TypeError, NotImplementedError: as `ringjax.attend`, in its words.
    """
    call = "attend"
    if not isinstance(buffer, RingBuffer):
        hint = "\n  Hint: RingBuffer.from_jax makes a handle." if isinstance(buffer, rj.RingBuffer) else ""
        raise TypeError(f"{call}: buffer must be a torch_bridge.RingBuffer, got {type(buffer).__name__}.{hint}")
    q, k, v = autocast(q, k, v)
    check_floats(call, {"q": q, "k": k, "v": v}, {"sink_logits": sink_logits})
    check_on(call, buffer, q)
    lengths = token_lengths(call, lengths, q)
    queries = q.shape[1] if q.ndim == 4 else 1
    if bucket is not None and q.ndim == 4:
        more = bucketed(call, bucket, queries) - queries
        if lengths is None:
            lengths = torch.full((q.shape[0],), queries, dtype=torch.int32, device=q.device)
        q, k, v = (pad(x, (0, 0, 0, 0, 0, more)) if more else x for x in (q, k, v))
    program = _attend(_Options(softcap, scale, implementation, tiles_of(call, config)))
    out = buffer._step(call, program, (q, k, v, sink_logits, lengths))
    return (out if bucket is None else out[:, :queries]), buffer


def token_lengths(call: str, lengths: Any, q: Tensor) -> Tensor | None:
    """`lengths` as int32 on the device of q; values that can be seen without waiting for a GPU are checked."""
    if lengths is None:
        return None
    if not isinstance(lengths, Tensor):
        seen = row_integers(call, "lengths", lengths, torch.empty(0))
    else:
        seen = lengths if lengths.device.type == "cpu" else None
    if seen is not None and seen.numel() and not seen.is_floating_point() and q.ndim == 4:
        least, most = (int(x) for x in torch.aminmax(seen))
        if least < 0 or most > q.shape[1]:
            rule = f"lengths must be between 0 and {q.shape[1]}, the length of the chunk"
            raise ValueError(f"{call}: {rule}, got {seen.tolist()}.")
    return row_integers(call, "lengths", lengths, q)


def check_on(call: str, held: Held, q: Tensor) -> None:
    """Raises unless the rings are where the tensors are."""
    if held.device != q.device:
        raise ValueError(
            f"{call}: q and the rings must be on one device, got {q.device} and {held.device}.\n"
            f"  Hint: {describe(q)} and the rings move with .to(device)."
        )
