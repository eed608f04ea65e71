"""RingBuffer: the last keys and values of a stream, in memory that does not grow."""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int

from ringjax import _explicit, _inputs
from ringjax._quantised import LARGEST, dequantise, is_quantised, quantise
from ringjax._slots import INVALID, NOTHING, position_in_slot, slot_of_position
from ringjax._window import Window
from ringjax._writing import scatter, write


class RingExport(NamedTuple):
    """What a ring holds, oldest token first, without its storage order.

    Attributes:
      k, v: [B, C, K, H] and [B, C, K, Hv], of a quantised ring in float32; zero where there is no token.
      positions: int32 [B, C], ascending; -1 (all at the end) where there is no token.
      length: int32 [B], tokens ever appended.
    """

    k: Array
    v: Array
    positions: Array
    length: Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["k", "v", "length", "written", "k_scale", "v_scale"],
    meta_fields=["window", "slack"],
)
@dataclasses.dataclass(frozen=True)
class RingBuffer:
    """Keys and values of the last tokens of each row, newest over oldest; an immutable pytree of fixed size.

    A ring holds the tokens that `window` can still see, `slack` more, and the window's pinned sinks. Its storage order
    is private: read it with `positions` or `export`. All methods return new buffers and run under `jit`; donate the
    old one, or carry it through `lax.scan`, and XLA updates it in place.

    Attributes:
      k, v: [B, K, C, H] and [B, K, C, Hv], in storage order. Private.
      length: int32 [B], tokens ever appended, less those rolled back; the next token's position.
      written: int32 [B], the largest length so far. Private.
      window: what a query sees.
      slack: how many tokens can be rolled back.
      k_scale, v_scale: float32 [B, K, C], of a quantised ring, what a slot's numbers are multiplied by; else None.
        Private.
    """

    k: Array
    v: Array
    length: Array
    written: Array
    window: Window
    slack: int
    k_scale: Array | None = None
    v_scale: Array | None = None

    @classmethod
    def empty(
        cls,
        batch: int,
        kv_heads: int,
        head_dim: int,
        window: Window,
        *,
        slack: int = 0,
        value_dim: int | None = None,
        dtype: Any = jnp.bfloat16,
    ) -> "RingBuffer":
        """A ring with no tokens: `sinks + size + slack` slots per row.

        Args:
          batch: B, rows.
          kv_heads: K, key and value heads.
          head_dim: H of the keys.
          window: must be bounded on the left.
          slack: spare slots: how many tokens can be rolled back.
          value_dim: H of the values; None: `head_dim`.
          dtype: float32, bfloat16 or float16; or int8 or float8_e4m3fn, with one float32 scale per token and kv head
            for the keys and one for the values. Such a quantised ring is for inference: no gradient goes through it.

        Raises:
          ValueError: a size below 1, a window without a left bound, a negative slack.
          TypeError: an argument of the wrong kind.
        """
        return cls._empty("RingBuffer.empty", batch, kv_heads, head_dim, window, slack, value_dim, dtype)

    @classmethod
    def _empty(
        cls,
        call: str,
        batch: Any,
        kv_heads: Any,
        head_dim: Any,
        window: Any,
        slack: Any,
        value_dim: Any,
        dtype: Any,
    ) -> "RingBuffer":
        batch = _inputs.as_int(call, "batch", batch, least=1)
        kv_heads = _inputs.as_int(call, "kv_heads", kv_heads, least=1)
        head_dim = _inputs.as_int(call, "head_dim", head_dim, least=1)
        value_dim = head_dim if value_dim is None else _inputs.as_int(call, "value_dim", value_dim, least=1)
        slack = _inputs.as_int(call, "slack", slack, least=0)
        _inputs.check_type(call, "window", window, Window, "Window.causal(size) sees the last `size` keys.")
        if window.size is None:
            first = f"{call}: window must be bounded on the left, got {window}."
            hint = (
                "memory that does not grow cannot hold every key; for full attention give the longest stream's length."
            )
            raise ValueError(_inputs.message(first, hint=hint))
        dtype = _inputs.as_dtype(call, "dtype", dtype, also=tuple(LARGEST))
        capacity = window.sinks + window.size + slack
        scales: list[Any] = [None, None]
        if is_quantised(dtype):
            scales = [jnp.zeros((batch, kv_heads, capacity), jnp.float32) for _ in range(2)]
        return cls(
            k=jnp.zeros((batch, kv_heads, capacity, head_dim), dtype),
            v=jnp.zeros((batch, kv_heads, capacity, value_dim), dtype),
            length=jnp.zeros(batch, jnp.int32),
            written=jnp.zeros(batch, jnp.int32),
            window=window,
            slack=slack,
            k_scale=scales[0],
            v_scale=scales[1],
        )

    @property
    def capacity(self) -> int:
        """C: slots per row."""
        return self.k.shape[2]

    @property
    def valid(self) -> Array:
        """bool [B]: False in rows that were rolled back by more than the slack inside jit; they read as empty."""
        return self.written - self.length <= self.slack

    def positions(self) -> Int[Array, "B C"]:
        """The position in each slot, in storage order; -1 where a slot holds no token."""
        return position_in_slot(
            jnp.arange(self.capacity, dtype=jnp.int32)[None],
            self.length[:, None],
            self.written[:, None],
            sinks=self.window.sinks,
            slack=self.slack,
            capacity=self.capacity,
        )

    def append(
        self, k: Float[Array, "B T K H"], v: Float[Array, "B T K Hv"], *, lengths: Int[Array, " B"] | None = None
    ) -> "RingBuffer":
        """The ring after T more tokens per row, of any number, cast (or quantised) to the ring's dtype.

        Args:
          k, v: the tokens' keys and values.
          lengths: int32 [B], how many of them are real; the rest is padding and is not written. None: all.

        Raises:
          ValueError: shapes that are not the ring's; outside jit, lengths that are not in 0..T.
        """
        call = "RingBuffer.append"
        _check_tokens(call, self, k, v)
        lengths = _inputs.as_row_integers(call, "lengths", lengths, self.k.shape[0])
        _inputs.check_lengths(call, lengths, k.shape[1])
        return _explicit.run_like(self, _append, self, jnp.asarray(k), jnp.asarray(v), lengths)

    def rollback(self, n: int | Int[Array, " B"]) -> "RingBuffer":
        """The ring before its last n tokens: what the next query saw then, it sees again.

        Args:
          n: tokens to take back, one number for all rows or int32 [B]; at most `slack`, all rollbacks since the
            farthest token counted together.

        Raises:
          ValueError: outside jit, n < 0, beyond the slack or more than there are. Inside jit such a row becomes
            invalid: it reads as empty, whatever is appended, until `insert` or `reset` replaces it.
        """
        call = "RingBuffer.rollback"
        if n is None:
            raise TypeError(f"{call}: n must be integers, got NoneType.")
        count = _inputs.as_row_integers(call, "n", n, self.k.shape[0], scalar=True)
        assert count is not None
        depth = self.written - self.length + count
        wrong = (count < 0) | (count > self.length) | (depth > self.slack)
        if _inputs.is_concrete(wrong) and bool(wrong.any()):
            facts = {"length": self.length.tolist(), "rolled back before": (self.written - self.length).tolist()}
            hint = "give the ring more slack: RingBuffer.empty(..., slack=...)."
            first = f"{call}: n must be between 0 and the slack, {self.slack}, and the length, got {count.tolist()}."
            raise ValueError(_inputs.message(first, facts, hint))
        length = jnp.clip(self.length - count, 0, self.length)
        return dataclasses.replace(self, length=length, written=jnp.where(wrong, INVALID, self.written))

    def select(self, rows: Int[Array, " R"]) -> "RingBuffer":
        """The ring whose row i is this one's row `rows[i]`: beam search, forks, another batch size.

        Raises:
          ValueError: rows of more or less than one axis; outside jit, rows that do not exist.
          TypeError: rows that are not integers.
        """
        index = _inputs.as_index("RingBuffer.select", "rows", rows, axes=1)
        _check_rows("RingBuffer.select", "rows", index, self.k.shape[0])

        def take(ring: RingBuffer, index: Array) -> RingBuffer:
            return jax.tree.map(lambda x: jnp.take(x, index, axis=0, mode="clip"), ring)

        return _explicit.placed_like(self, _explicit.run_like(self, take, self, index))

    def insert(self, row: int | Int[Array, ""], other: "RingBuffer") -> "RingBuffer":
        """The ring with row `row` (and those after it) replaced by the rows of `other`.

        Raises:
          ValueError: `other` differs in anything but its batch, or has more rows; outside jit, a row that does not
            exist.
          TypeError: an argument of the wrong kind.
        """
        call = "RingBuffer.insert"
        _inputs.check_type(call, "other", other, RingBuffer)
        mine, theirs = _outline(self), _outline(other)
        if mine != theirs:
            first = f"{call}: both rings must have the same window, slack, heads, dims and dtype."
            raise ValueError(_inputs.message(first, {"ring": _text(self), "other": _text(other)}))
        if other.k.shape[0] > self.k.shape[0]:
            first = f"{call}: other must have at most {self.k.shape[0]} rows, got {other.k.shape[0]}."
            raise ValueError(_inputs.message(first, {"ring": _text(self), "other": _text(other)}))
        index = _inputs.as_index(call, "row", row, axes=0)
        _check_rows(call, "row", index, self.k.shape[0] - other.k.shape[0] + 1)

        def put(ring: RingBuffer, other: RingBuffer, index: Array) -> RingBuffer:
            return jax.tree.map(lambda x, y: lax.dynamic_update_slice_in_dim(x, y, index, axis=0), ring, other)

        return _explicit.run_like(self, put, self, other, index)

    def reset(self, rows: Array | None = None) -> "RingBuffer":
        """The ring with rows emptied: those where the bool [B] `rows` is True; None: all."""
        if rows is None:
            rows = jnp.ones(self.k.shape[0], bool)
        if str(getattr(rows, "dtype", None)) != "bool" or rows.shape != self.length.shape:
            raise ValueError(
                f"RingBuffer.reset: rows must be bool[{self.k.shape[0]}], one per row, got {_inputs.describe(rows)}."
            )
        zero = jnp.zeros_like(self.length)
        return dataclasses.replace(
            self, length=jnp.where(rows, zero, self.length), written=jnp.where(rows, zero, self.written)
        )

    def export(self) -> RingExport:
        """What the ring holds, oldest token first; of a quantised ring, the float32 numbers that are meant."""
        positions = self.positions()
        order = jnp.argsort(jnp.where(positions < 0, INVALID, positions), axis=1)
        positions = jnp.take_along_axis(positions, order, axis=1)

        def logical(x: Array) -> Array:
            rest = (1,) * (x.ndim - 2)
            x = jnp.take_along_axis(jnp.moveaxis(x, 1, 2), order.reshape(*order.shape, *rest), axis=1)
            return jnp.where((positions >= 0).reshape(*order.shape, *rest), x, jnp.zeros((), x.dtype))

        k, v = logical(self.k), logical(self.v)
        if self.k_scale is not None and self.v_scale is not None:
            k, v = dequantise(k, logical(self.k_scale)), dequantise(v, logical(self.v_scale))
        # A copy: an export outlives the ring, whose arrays a caller may donate.
        return RingExport(k, v, positions, jnp.copy(self.length))

    @classmethod
    def restore(cls, exported: RingExport, window: Window, *, slack: int = 0, dtype: Any = None) -> "RingBuffer":
        """A ring, of any capacity, that continues the stream of an exported one.

        Args:
          exported: what `export` gave.
          window: what a query sees; not more than it saw before.
          slack: spare slots.
          dtype: as for `empty`; None: that of the exported keys. A quantised ring, exported and restored into its own
            dtype, is the same bit for bit.

        Raises:
          ValueError: outside jit, the export lacks tokens that `window` still sees. Inside jit such a row is invalid.
        """
        call = "RingBuffer.restore"
        _inputs.check_type(call, "exported", exported, RingExport)
        k, v, positions, length = (jnp.asarray(x) for x in exported)
        _inputs.check_array(call, "exported.k", k, "B C K H")
        _inputs.check_array(call, "exported.v", v, "B C K Hv")
        batch, slots, kv_heads, head_dim = k.shape
        for name, x, wanted in (
            ("v", v, (batch, slots, kv_heads, v.shape[3])),
            ("positions", positions, (batch, slots)),
            ("length", length, (batch,)),
        ):
            if x.shape != wanted:
                first = f"{call}: exported.{name} must have shape {list(wanted)}, got {_inputs.describe(x)}."
                raise ValueError(_inputs.message(first, {"exported.k": _inputs.describe(k)}))
        if (mesh := _explicit.mesh_of(exported)) is not None:
            plain: list[Any] = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v, positions, length)]
            again = partial(cls.restore, window=window, slack=slack, dtype=dtype)
            rows, heads = _explicit.rows_and_heads(call, {"exported.k": (k, "BCKH"), "exported.v": (v, "BCKH")})
            ring = jax.eval_shape(again, RingExport(*plain))
            results = jax.tree.map(lambda x: P(rows) if x.ndim == 1 else P(rows, heads), ring)
            return _explicit.run(mesh, results, again, exported)
        dtype = k.dtype if dtype is None else dtype
        ring = cls._empty(call, batch, kv_heads, head_dim, window, slack, v.shape[3], dtype)
        around = ring.capacity - window.sinks
        fits = (positions >= 0) & ((positions < window.sinks) | (positions >= length[:, None] - around))
        into = slot_of_position(jnp.maximum(positions, 0), sinks=window.sinks, capacity=ring.capacity)
        ring = _with_stores(ring, scatter(_stores(ring), _stored(ring, k, v), jnp.where(fits, into, NOTHING)))
        # A token that was lost counts as overwritten, which bounds how far the new ring can be rolled back.
        held = jnp.sort(jnp.where(positions < 0, INVALID, positions), axis=1)
        pinned = jnp.arange(held.shape[1], dtype=jnp.int32)[None] < jnp.minimum(window.sinks, length)[:, None]
        index = jnp.arange(held.shape[1], dtype=jnp.int32)[None]
        lost_sinks = (pinned & (held != index)).any(1) | (jnp.minimum(window.sinks, length) > held.shape[1])
        # Of the tokens that another ring had pinned, those cut off from the newest by a gap do not count.
        unbroken = held == (length - (held != INVALID).sum(1, dtype=jnp.int32))[:, None] + index
        oldest = jnp.min(jnp.where(unbroken & (held >= window.sinks), held, INVALID), axis=1)
        oldest = jnp.minimum(oldest, jnp.maximum(length, window.sinks))
        written = jnp.where(oldest > window.sinks, jnp.maximum(length, oldest + around), length)
        lost = lost_sinks | (written - length > slack)
        if _inputs.is_concrete(lost) and bool(lost.any()):
            first = f"{call}: the export must hold every token that the window still sees, got {window}."
            facts = {"export": f"{_inputs.describe(exported.k)}, of streams of length {length.tolist()}"}
            hint = "a ring can only be restored into a window that is not larger than its own."
            raise ValueError(_inputs.message(first, facts, hint))
        return dataclasses.replace(ring, length=length, written=jnp.where(lost, INVALID, written))


def _outline(ring: RingBuffer) -> Any:
    return ring.window, ring.slack, ring.k.shape[1:], ring.v.shape[1:], ring.k.dtype


def _text(ring: RingBuffer) -> str:
    slack = f", slack {ring.slack}" if ring.slack else ""
    values = f", values {_inputs.describe(ring.v)}" if ring.v.shape != ring.k.shape else ""
    return f"{_inputs.describe(ring.k)}{values}, {ring.window}{slack}"


def _check_rows(call: str, name: str, rows: Any, count: int) -> None:
    if _inputs.is_concrete(rows):
        values = np.asarray(rows)
        if ((values < 0) | (values >= count)).any():
            raise ValueError(f"{call}: {name} must be between 0 and {count - 1}, got {values.tolist()}.")


def _check_tokens(call: str, ring: RingBuffer, k: Any, v: Any) -> None:
    _inputs.check_array(call, "k", k, "B T K H")
    _inputs.check_array(call, "v", v, "B T K Hv")
    texts = {"k": _inputs.describe(k), "v": _inputs.describe(v), "buffer": _text(ring)}
    _inputs.check_agree(call, "length", {"k": (k.shape[1], texts["k"]), "v": (v.shape[1], texts["v"])})
    for what, name, x, mine in (
        ("batch", "k", k.shape[0], ring.k.shape[0]),
        ("batch", "v", v.shape[0], ring.k.shape[0]),
        ("kv heads", "k", k.shape[2], ring.k.shape[1]),
        ("kv heads", "v", v.shape[2], ring.k.shape[1]),
        ("head_dim", "k", k.shape[3], ring.k.shape[3]),
        ("value_dim", "v", v.shape[3], ring.v.shape[3]),
    ):
        _inputs.check_agree(call, what, {name: (x, texts[name]), "buffer": (mine, texts["buffer"])})


def _stores(ring: RingBuffer) -> list[Array]:
    """The arrays that hold the tokens."""
    return [x for x in (ring.k, ring.v, ring.k_scale, ring.v_scale) if x is not None]


def _with_stores(ring: RingBuffer, stores: list[Array]) -> RingBuffer:
    k, v, *scales = stores
    k_scale, v_scale = scales or (None, None)
    return dataclasses.replace(ring, k=k, v=v, k_scale=k_scale, v_scale=v_scale)


def _stored(ring: RingBuffer, k: Array, v: Array) -> list[Array]:
    """Keys and values [B, T, K, ...] as the ring's arrays hold them."""
    if ring.k_scale is None:
        return [k.astype(ring.k.dtype), v.astype(ring.v.dtype)]
    k, k_scale = quantise(k, ring.k.dtype)
    v, v_scale = quantise(v, ring.v.dtype)
    return [k, v, k_scale, v_scale]


def _as_seen(ring: RingBuffer, k: Array, v: Array) -> tuple[Array, Array]:
    """Keys and values [B, T, K, ...] as a query will read them from the ring, in its dtype or, quantised, in theirs."""
    if ring.k_scale is None:
        return k.astype(ring.k.dtype), v.astype(ring.v.dtype)
    # Behind the barrier: XLA takes a conversion to float8 and back for none.
    k, v = (dequantise(*lax.optimization_barrier(quantise(x, ring.k.dtype))).astype(x.dtype) for x in (k, v))
    return k, v


def _append(ring: RingBuffer, k: Array, v: Array, lengths: Array | None) -> RingBuffer:
    if k.shape[1] == 0:
        return ring
    sizes = {"sinks": ring.window.sinks, "slack": ring.slack}
    new = _with_stores(ring, write(_stores(ring), _stored(ring, k, v), ring.length, lengths, **sizes))
    length = ring.length + (k.shape[1] if lengths is None else lengths)
    return dataclasses.replace(new, length=length, written=jnp.maximum(ring.written, length))
