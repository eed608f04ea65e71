"""The three rings of an encoder-decoder, and its two phases."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int

from ringjax import _inputs
from ringjax._attend import attend_to_all, attend_with_lse
from ringjax._buffer import RingBuffer
from ringjax._quantised import LARGEST, is_quantised
from ringjax._window import Window


@dataclasses.dataclass(frozen=True)
class RingBufferConfig:
    """Sizes and options of an attention with rings; static and hashable. The same fields and defaults in torch_bridge.

    Attributes:
      buffer_size: W, the keys that a ring keeps in view.
      block_size: keys in a tile; None: the implementation's tuned choice.
      tile_size: queries in a tile; None: likewise.
      head_tile_size: query heads that one program handles together; None: likewise.
      prefill_size: tokens in a chunk of a prompt.
      causal: whether the encoder sees only backward; if not, it sees `buffer_size - 1` keys on each side.
      sinks: first positions of a row that stay in view for ever.
      slack: how many tokens can be rolled back.
      softcap: bound of the logits; None: none.
      scale: factor on the logits; None: `head_dim ** -0.5`.
      implementation: the name of one implementation; None: the first that can run.
      forward_dtype: dtype of the ring that carries no gradient, such as "int8"; None: that of the others.

    Raises:
      ValueError, TypeError: a field out of its range or of the wrong kind.
    """

    buffer_size: int = 2048
    block_size: int | None = 128
    tile_size: int | None = 32
    head_tile_size: int | None = 4
    prefill_size: int = 512
    causal: bool = True
    sinks: int = 0
    slack: int = 0
    softcap: float | None = None
    scale: float | None = None
    implementation: str | None = None
    forward_dtype: Any = None

    def __post_init__(self) -> None:
        call = "RingBufferConfig"
        for name, least in (("buffer_size", 1), ("prefill_size", 1), ("sinks", 0), ("slack", 0)):
            object.__setattr__(self, name, _inputs.as_int(call, name, getattr(self, name), least=least))
        for name in ("block_size", "tile_size", "head_tile_size"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _inputs.as_int(call, name, getattr(self, name), least=1))
        for name in ("softcap", "scale"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _inputs.as_positive(call, name, getattr(self, name)))
        if self.forward_dtype is not None:  # by its name, which is hashable whatever was given
            dtype = _inputs.as_dtype(call, "forward_dtype", self.forward_dtype, also=tuple(LARGEST))
            object.__setattr__(self, "forward_dtype", dtype.name)
        if not isinstance(self.causal, bool):
            raise TypeError(f"{call}: causal must be a bool, got {self.causal!r}.")

    @property
    def window(self) -> Window:
        """What a query of the encoder sees."""
        return Window(self.buffer_size - 1, 0 if self.causal else self.buffer_size - 1, self.sinks)

    @property
    def feedback_window(self) -> Window:
        """What a query of the decoder sees of the decoder's own past."""
        return Window.causal(self.buffer_size, self.sinks)


RINGS = ("forward", "backward", "feedback")


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[*RINGS, "last_calculated"],
    meta_fields=["config"],
)
@dataclasses.dataclass(frozen=True)
class BufferState:
    """The three rings of a stream; an immutable pytree of fixed size. Make one with `init_state`.

    `forward` and `backward` are two memories of an encoder, each with a stream of its own: `encode` writes the one
    that its `requires_grad` names, and a decoder sees both. Normally one of them is empty, and that costs nothing.

    Attributes:
      forward: what the encoder saw when no gradient was wanted; no gradient flows through it.
      backward: what the encoder saw when gradients were wanted; they flow back through it, chunk by chunk.
      feedback: what the decoder itself put out.
      last_calculated: int32 [B], the decoder's last position whose output exists; -1 at the start.
      config: sizes and options.
    """

    forward: RingBuffer
    backward: RingBuffer
    feedback: RingBuffer
    last_calculated: Array
    config: RingBufferConfig

    def select(self, rows: Int[Array, " R"]) -> "BufferState":
        """The state whose row i is this one's row `rows[i]`, as for `RingBuffer.select`."""
        rings = {name: getattr(self, name).select(rows) for name in RINGS}
        last = jnp.take(self.last_calculated, jnp.asarray(rows), axis=0, mode="clip")
        return dataclasses.replace(self, last_calculated=last, **rings)

    def insert(self, row: int | Int[Array, ""], other: "BufferState") -> "BufferState":
        """The state with row `row` (and those after it) replaced by the rows of `other`, as for `RingBuffer.insert`."""
        _inputs.check_type("BufferState.insert", "other", other, BufferState)
        rings = {name: getattr(self, name).insert(row, getattr(other, name)) for name in RINGS}
        last = lax.dynamic_update_slice_in_dim(self.last_calculated, other.last_calculated, jnp.asarray(row), axis=0)
        return dataclasses.replace(self, last_calculated=last, **rings)

    def reset(self, rows: Array | None = None) -> "BufferState":
        """The state with rows emptied, as for `RingBuffer.reset`."""
        rings = {name: getattr(self, name).reset(rows) for name in RINGS}
        last = jnp.full_like(self.last_calculated, -1)
        last = last if rows is None else jnp.where(rows, last, self.last_calculated)
        return dataclasses.replace(self, last_calculated=last, **rings)

    def rollback(self, n: int | Int[Array, " B"]) -> "BufferState":
        """The state before the decoder's last n positions, as for `RingBuffer.rollback`."""
        feedback = self.feedback.rollback(n)
        return dataclasses.replace(self, feedback=feedback, last_calculated=feedback.length - 1)


def rings_of(state: Any) -> list[Any]:
    """The `RingBuffer` and `BufferState` nodes of a state."""
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, RingBuffer | BufferState))
    return [node for node in nodes if isinstance(node, RingBuffer | BufferState)]


def rolled_back(state: Any, n: Array) -> Any:
    """A state whose rings are without their last n tokens, int32 [B]; all else in it stays."""

    def back(node: Any) -> Any:
        return node.rollback(n) if isinstance(node, RingBuffer | BufferState) else node

    return jax.tree.map(back, state, is_leaf=lambda x: isinstance(x, RingBuffer | BufferState))


def init_state(
    config: RingBufferConfig,
    batch: int,
    *,
    kv_heads: int,
    head_dim: int,
    value_dim: int | None = None,
    dtype: Any = jnp.bfloat16,
) -> BufferState:
    """Three empty rings.

    Args:
      config: sizes and options.
      batch: B, rows.
      kv_heads: K, key and value heads.
      head_dim: H of the keys.
      value_dim: H of the values; None: `head_dim`.
      dtype: of the rings, as for `RingBuffer.empty`; `config.forward_dtype` goes before it.

    Raises:
      ValueError, TypeError: as for `RingBuffer.empty`.
    """
    _inputs.check_type("init_state", "config", config, RingBufferConfig)

    def ring(window: Window, dtype: Any = dtype) -> RingBuffer:
        return RingBuffer.empty(batch, kv_heads, head_dim, window, slack=config.slack, value_dim=value_dim, dtype=dtype)

    return BufferState(
        forward=ring(config.window, dtype if config.forward_dtype is None else config.forward_dtype),
        backward=ring(config.window),
        feedback=ring(config.feedback_window),
        last_calculated=jnp.full(batch, -1, jnp.int32),
        config=config,
    )


def encode(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    state: BufferState,
    *,
    requires_grad: bool = False,
    lengths: Int[Array, " B"] | None = None,
    sink_logits: Float[Array, " N"] | None = None,
) -> tuple[Array, BufferState]:
    """The encoder's phase: T tokens see themselves and what their ring still holds, and are appended to it.

    A causal encoder takes more than `prefill_size` tokens in chunks of that size, which changes nothing but the
    memory in use. One that sees both sides takes its tokens at once: no chunk sees the one after it.

    Args:
      q, k, v: of the tokens.
      state: the three rings.
      requires_grad: whether gradients are to flow back through the ring: writes `backward`, else `forward`.
      lengths: int32 [B], how many of the T tokens are real; None: all.
      sink_logits: a learned logit per query head in the softmax's denominator.

    Returns:
      Output [B, T, N, Hv] in the queries' dtype, and the state after the tokens.

    Raises:
      ValueError, TypeError, NotImplementedError: as for `attend`.
    """
    call = "encode"
    _inputs.check_type(call, "state", state, BufferState, "init_state(config, batch, ...) makes one.")
    if not isinstance(requires_grad, bool):
        raise TypeError(f"{call}: requires_grad must be a bool, got {_inputs.describe(requires_grad)}.")
    config = state.config
    ring = state.backward if requires_grad else state.forward
    if requires_grad and is_quantised(ring.k.dtype):
        first = f"{call}: requires_grad needs a backward ring of float32, bfloat16 or float16, got {ring.k.dtype}."
        hint = (
            "no gradient goes through a quantised ring: RingBufferConfig(forward_dtype=...) quantises `forward` only."
        )
        raise ValueError(_inputs.message(first, hint=hint))

    def chunk(ring: RingBuffer, q: Any, k: Any, v: Any, lengths: Any) -> tuple[RingBuffer, Array]:
        out, _, ring = attend_with_lse(
            call, q, k, v, ring, lengths, sink_logits, config.softcap, config.scale, config.implementation, config
        )
        return (ring if requires_grad else _without_gradient(ring)), out

    _inputs.check_qkv(call, q, k, v)
    # Here, because a chunk is cut out of whatever there is.
    texts = {"q": _inputs.describe(q), "k": _inputs.describe(k)}
    _inputs.check_agree(call, "length", {"q": (q.shape[1], texts["q"]), "k": (k.shape[1], texts["k"])})
    size, length = config.prefill_size, q.shape[1]
    if not config.causal or length <= size:
        ring, out = chunk(ring, q, k, v, lengths)
    else:
        lengths = _inputs.as_row_integers(call, "lengths", lengths, q.shape[0])
        _inputs.check_lengths(call, lengths, length)

        def step(ring: RingBuffer, i: Array) -> tuple[RingBuffer, Array]:
            q_i, k_i, v_i = (lax.dynamic_slice_in_dim(jnp.asarray(x), i * size, size, axis=1) for x in (q, k, v))
            part_lengths = None if lengths is None else jnp.clip(lengths - i * size, 0, size)
            return chunk(ring, q_i, k_i, v_i, part_lengths)

        whole = length // size
        ring, outs = lax.scan(step, ring, jnp.arange(whole, dtype=jnp.int32))
        out = jnp.moveaxis(outs, 0, 1).reshape(q.shape[0], whole * size, *outs.shape[3:])
        if length > whole * size:
            q, k, v = (x[:, whole * size :] for x in (q, k, v))
            rest_lengths = None if lengths is None else jnp.clip(lengths - whole * size, 0, length - whole * size)
            ring, out_rest = chunk(ring, q, k, v, rest_lengths)
            out = jnp.concatenate([out, out_rest], axis=1)
    if requires_grad:
        return out, dataclasses.replace(state, backward=ring)
    return out, dataclasses.replace(state, forward=ring)


def _without_gradient(ring: RingBuffer) -> RingBuffer:
    return jax.tree.map(lax.stop_gradient, ring)


def decode(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    state: BufferState,
    *,
    position: int | Int[Array, " B"],
    lengths: Int[Array, " B"] | None = None,
    sink_logits: Float[Array, " N"] | None = None,
) -> tuple[Array, BufferState]:
    """The decoder's phase: one softmax over all that the encoder's rings keep in view and the decoder's own past.

    Both are read in place, in one launch where an implementation offers that, else merged by their logsumexps; the
    decoder's keys and values are appended to `feedback`.

    Args:
      q, k, v: of the decoder's tokens at positions `position + t`.
      state: the three rings.
      position: the decoder's position of the first token, one number or int32 [B]. `last_calculated + 1` continues;
        a smaller one first rolls back to it, by at most `slack` tokens.
      lengths: int32 [B], how many of the T tokens are real; None: all.
      sink_logits: a learned logit per query head in the softmax's denominator.

    Returns:
      Output [B, T, N, Hv] in the queries' dtype, and the state after the tokens.

    Raises:
      ValueError: outside jit, a position beyond `last_calculated + 1`, below 0, or farther back than the slack;
        or a row that such a position made invalid inside jit: there it raises nothing, and the row's outputs are 0.
      ValueError, TypeError, NotImplementedError: as for `attend`.
    """
    call = "decode"
    _inputs.check_type(call, "state", state, BufferState, "init_state(config, batch, ...) makes one.")
    config = state.config
    _inputs.check_qkv(call, q, k, v)
    rows = state.last_calculated.shape[0]
    at = _inputs.as_row_integers(call, "position", position, rows, scalar=True)
    if at is None:
        raise TypeError(f"{call}: position must be integers, got None.")
    back = state.last_calculated + 1 - at
    if _inputs.is_concrete(back, state.feedback.written):
        _check_position(call, np.asarray(at), state)
    rolled = state.feedback.rollback(back)
    # Where it is certain that a position continues (`last_calculated + 1`), XLA drops the rollback: a kernel or two.
    length = jnp.where(back == 0, state.feedback.length, rolled.length)
    written = jnp.where(back == 0, state.feedback.written, rolled.written)
    feedback = dataclasses.replace(rolled, length=length, written=written)

    memories, options = (state.forward, state.backward), (config.softcap, config.scale, config.implementation, config)
    out, feedback = attend_to_all(call, q, k, v, feedback, memories, lengths, sink_logits, *options)
    return out, dataclasses.replace(state, feedback=feedback, last_calculated=feedback.length - 1)


def _check_position(call: str, at: np.ndarray, state: BufferState) -> None:
    last, written = np.asarray(state.last_calculated), np.asarray(state.feedback.written)
    facts = {"position": at.tolist(), "last_calculated": last.tolist()}
    if not (valid := np.asarray(state.feedback.valid)).all():
        first = f"{call}: every row must be valid, got row {int(np.argmin(valid))} lost inside jit."
        hint = "a position too far forward or back made the row empty; `select` other rows, or begin anew."
        raise ValueError(_inputs.message(first, facts, hint))
    if (at < 0).any():
        raise ValueError(_inputs.message(f"{call}: position must be at least 0, got {at.min()}.", facts))
    if (at > last + 1).any():
        row = int(np.argmax(at - last))
        first = f"{call}: position must be at most last_calculated + 1 = {last[row] + 1}, got {at[row]}."
        raise ValueError(_inputs.message(first, facts, "decode the positions in between first."))
    depth = written - at
    if (depth > state.feedback.slack).any():
        row = int(np.argmax(depth))
        first = f"{call}: position may go back by at most slack = {state.feedback.slack} tokens, got {depth[row]}."
        raise ValueError(_inputs.message(first, facts, "give RingBufferConfig more slack."))
