"""Rings in random states, what attention to them must give, and how far from it one may be.

Slots that no query sees hold NaN, and so do, before a call that writes tokens, the slots that these go to. Of a
quantised ring, the scales do (int8 has no NaN).
"""

import dataclasses
import zlib
from typing import NamedTuple

import cases
import jax.numpy as jnp
import numpy as np
import oracle

from ringjax import Window, _quantised
from ringjax._kernels.problem import Problem, Rows
from ringjax._slots import position_in_slot, slot_of_position


@dataclasses.dataclass(frozen=True)
class RingCase:
    """A call on a ring. `lengths` are those before the call's tokens; None: random ones, empty and wrapped."""

    name: str
    window: Window
    slack: int = 0
    queries: int = 1
    batch: int = 3
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    value_dim: int = 64
    dtype: str = "bfloat16"
    kv_dtype: str | None = None
    out_dtype: str | None = None
    softcap: float | None = None
    sink_logits: bool = False
    ragged: bool = False
    memory: bool = False
    lengths: tuple[int, ...] | None = None
    rolled_back: bool = False

    def __str__(self):
        return self.name

    def replace(self, **changes):
        return dataclasses.replace(self, **changes)

    @property
    def capacity(self):
        return self.window.sinks + self.window.size + self.slack

    @property
    def problem(self):
        return Problem(
            batch=self.batch,
            queries=self.queries,
            keys=self.capacity,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            value_dim=self.value_dim,
            q_dtype=self.dtype,
            kv_dtype=self.kv_dtype or self.dtype,
            out_dtype=self.out_dtype or self.dtype,
            window=self.window,
            layout="ring",
            slack=self.slack,
            q_offset=None,
            q_stride=0 if self.memory else 1,
            scale=self.head_dim**-0.5,
            softcap=self.softcap,
            sink_logits=self.sink_logits,
            ragged=self.ragged,
            platform="gpu",
            device_kind="NVIDIA H200",
        )


class Made(NamedTuple):
    """`before` and `after` the tokens `k` and `v`; a call that only reads is given the ring after them.

    Of a quantised ring, the rows have the scales.
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    sinks: np.ndarray | None
    before: tuple[np.ndarray, np.ndarray]
    after: tuple[np.ndarray, np.ndarray]
    rows_before: Rows
    rows_after: Rows
    seen: np.ndarray
    out: np.ndarray
    lse: np.ndarray
    plain_out: np.ndarray
    plain_lse: np.ndarray


def make(case, seed=0):
    rng = np.random.default_rng([zlib.crc32(case.name.encode()), seed])
    batch, chunk, capacity, sinks = case.batch, case.queries, case.capacity, case.window.sinks

    def normal(*shape):
        return np.array(jnp.asarray(rng.standard_normal(shape), case.dtype))

    q = normal(batch, chunk, case.heads, case.head_dim)
    k = normal(batch, chunk, case.kv_heads, case.head_dim)
    v = normal(batch, chunk, case.kv_heads, case.value_dim)
    sink_logits = rng.standard_normal(case.heads).astype(np.float32) if case.sink_logits else None
    if case.lengths is not None:
        length = np.array(case.lengths, np.int32)
    else:
        kinds = [0, *rng.integers(1, capacity + 1, batch), *rng.integers(capacity, 9 * capacity, batch)]
        length = rng.choice(kinds, batch).astype(np.int32)
    written = length.copy()
    if case.rolled_back:  # by no more than the slack; the last row by too much
        written = written + rng.integers(0, case.slack + 1, batch).astype(np.int32)
        written[-1] = 2**31 - 1
    real = rng.integers(0, chunk + 1, batch).astype(np.int32) if case.ragged else np.full(batch, chunk, np.int32)
    new_length = length + real
    new_written = np.maximum(written, new_length)
    shape = {"sinks": sinks, "slack": case.slack, "capacity": capacity}
    held = position_in_slot(np.arange(capacity)[None], new_length[:, None], new_written[:, None], **shape)
    after = [normal(batch, case.kv_heads, capacity, size) for size in (case.head_dim, case.value_dim)]
    tokens = [k, v]
    if case.kv_dtype is not None:
        after, tokens = (
            [np.array(y) for x in some for y in _quantised.quantise(jnp.asarray(x), case.kv_dtype)]
            for some in (after, tokens)
        )
    before = [x.copy() for x in after]
    for b in range(batch):
        for t in range(real[b]):
            slot = slot_of_position(int(length[b]) + t, sinks=sinks, capacity=capacity)
            for store, store_after, x in zip(before, after, tokens, strict=True):
                store[b, :, slot] = _poison(store)
                store_after[b, :, slot] = x[b, t]
    start = new_length - 1 if case.memory else length
    at = start[:, None] + (0 if case.memory else np.arange(chunk)[None]) + np.zeros((1, chunk), np.int64)
    what = {"left": case.window.left, "right": case.window.right, "sinks": sinks}
    what |= {"q_positions": at, "k_positions": held}
    if case.ragged:  # padding sees nothing
        what |= {
            "q_segments": np.where(np.arange(chunk)[None] < real[:, None], 0, 7),
            "k_segments": np.zeros((batch, capacity), int),
        }
    seen = np.broadcast_to(oracle.visible(**what), (batch, chunk, capacity))
    for array in (*before, *after):
        array[~np.broadcast_to(seen.any(1)[:, None], array.shape[:3])] = _poison(array)
    scales = [{}, {}]
    meant = after
    if case.kv_dtype is not None:
        scales = [{"k_scale": jnp.asarray(x[1]), "v_scale": jnp.asarray(x[3])} for x in (before, after)]
        meant = [np.asarray(_quantised.dequantise(*map(jnp.asarray, after[i : i + 2]))) for i in (0, 2)]
        before, after = before[::2], after[::2]
    keys, values = (np.moveaxis(np.nan_to_num(x.astype(np.float32)), 1, 2).astype(x.dtype) for x in meant)
    out, lse = oracle.attention(q, keys, values, sink_logits=sink_logits, softcap=case.softcap, **what)
    arrays = (jnp.asarray(x, case.dtype) for x in (q, keys, values))
    sinks_array = None if sink_logits is None else jnp.asarray(sink_logits)
    plain = cases._plain(case.softcap, None)(*arrays, sinks_array, jnp.asarray(seen))
    rows = {"q_start": jnp.asarray(start, jnp.int32), "q_length": jnp.asarray(real) if case.ragged else None}
    rows_before = Rows(**rows, **scales[0], length=jnp.asarray(length), written=jnp.asarray(written))
    rows_after = Rows(**rows, **scales[1], length=jnp.asarray(new_length), written=jnp.asarray(new_written))
    return Made(
        q,
        k,
        v,
        sink_logits,
        tuple(before),
        tuple(after),
        rows_before,
        rows_after,
        seen,
        out,
        lse,
        *map(np.asarray, plain),
    )


def _poison(array):
    return 77 if array.dtype == np.int8 else np.nan


def check(made, out, lse):
    """Law 13, and that a query that sees nothing gets 0."""
    cases.assert_close(out, made.out, made.plain_out, "out")
    cases.assert_close(lse, made.lse, made.plain_lse, "lse")
    assert not np.asarray(out)[~made.seen.any(-1)].any()


def check_ring(made, ring_k, ring_v, rows):
    """The ring after the tokens, bit for bit; nothing but their slots was touched."""
    np.testing.assert_array_equal(rows.length, made.rows_after.length)
    np.testing.assert_array_equal(rows.written, made.rows_after.written)
    stores = list(zip((ring_k, ring_v), made.before, made.after, strict=True))
    if made.rows_before.k_scale is not None:
        stores += [
            tuple(np.asarray(getattr(x, name)) for x in (rows, made.rows_before, made.rows_after))
            for name in ("k_scale", "v_scale")
        ]
    for got, before, after in stores:
        poison = after == 77 if after.dtype == np.int8 else np.isnan(after.astype(np.float32))
        exact = np.where(poison, before, after)
        bits = f"u{after.dtype.itemsize}"
        np.testing.assert_array_equal(np.asarray(got).view(bits), exact.view(bits))


def dense(q, k, v, k_positions, position, window):
    """Output of one query [B, 1, N, H] at a position to keys at given positions: exact, and plain."""
    what = {"left": window.left, "right": window.right, "sinks": window.sinks}
    what |= {"q_positions": np.array([position]), "k_positions": k_positions}
    out, _ = oracle.attention(q, k, v, **what)
    mask = np.broadcast_to(oracle.visible(**what), (len(q), 1, len(k_positions)))
    plain, _ = cases._plain(None, None)(*(jnp.asarray(x) for x in (q, k, v)), None, jnp.asarray(mask))
    return out, np.asarray(plain)
