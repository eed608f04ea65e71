"""A decoder's call: a ring and its new tokens, as of `ring_cases`, and memories, in one softmax.

Slots of the memories that no query sees hold NaN, and so do their scales.
"""

import zlib
from typing import NamedTuple

import cases
import jax.numpy as jnp
import numpy as np
import oracle
import ring_cases

from ringjax import _quantised
from ringjax._kernels.problem import Memory, Rows
from ringjax._slots import INVALID, position_in_slot


class Made(NamedTuple):
    """`own` is of the call without memories; `seen` [B, T, S], `out` and `lse` of all slots, the memories' first."""

    own: ring_cases.Made
    memories: tuple[Memory, ...]
    seen: np.ndarray
    out: np.ndarray
    lse: np.ndarray
    plain_out: np.ndarray
    plain_lse: np.ndarray


def problems(memories):
    return tuple(memory.problem for memory in memories)


def make(case, memories, seed=0):
    """Of a `RingCase` and those of its memories, in random states: empty, in part filled, wrapped, rolled back."""
    rng = np.random.default_rng([zlib.crc32(case.name.encode()), 1, seed])
    own = ring_cases.make(case, seed)
    sees = own.rows_after.written - own.rows_after.length <= case.slack
    real = np.full(case.batch, case.queries) if own.rows_after.q_length is None else own.rows_after.q_length
    asks = (np.arange(case.queries)[None] < np.asarray(real)[:, None]) & np.asarray(sees)[:, None]
    made, seen, meant = [], [], []
    for memory in memories:
        rows, k, v, visible, numbers = _memory(memory, rng)
        rows = rows._replace(q_length=own.rows_after.q_length)
        made.append(Memory(memory.problem, rows, k, v))
        seen.append(asks[:, :, None] & visible[:, None])
        meant.append(numbers)
    seen = np.concatenate([*seen, own.seen], axis=2)
    meant.append(_meant(case, *own.after, own.rows_after))
    k, v = (np.concatenate(stores, axis=2) for stores in zip(*meant, strict=True))
    read = seen.any(1)[:, None, :, None]
    k, v = (np.moveaxis(np.where(read, x, 0), 1, 2) for x in (k, v))
    alone = [x.reshape(-1, 1, *x.shape[2:]) for x in (own.q, *(np.repeat(x, case.queries, axis=0) for x in (k, v)))]
    alone[1:] = [x.reshape(-1, *k.shape[1:3], x.shape[-1]) for x in alone[1:]]
    at = np.where(seen, np.arange(seen.shape[2]), -1).reshape(-1, seen.shape[2])
    what = {"left": None, "right": None, "sinks": 0, "q_positions": [0], "k_positions": at}
    exact = oracle.attention(*alone, sink_logits=own.sinks, softcap=case.softcap, **what)
    arrays = (jnp.asarray(x, case.dtype) for x in (own.q, k, v))
    sinks = None if own.sinks is None else jnp.asarray(own.sinks)
    plain = cases._plain(case.softcap, None)(*arrays, sinks, jnp.asarray(seen))
    out = exact[0].reshape(case.batch, case.queries, case.heads, case.value_dim)
    lse = np.moveaxis(exact[1].reshape(case.batch, case.queries, case.heads), 1, 2)
    return Made(own, tuple(made), seen, out, lse, *map(np.asarray, plain))


def _memory(case, rng):
    """Rows, keys, values, what of it is seen, bool [B, C], and its numbers in float32."""
    batch, capacity, window = case.batch, case.capacity, case.window
    length = rng.choice([0, *rng.integers(1, capacity + 1, batch), *rng.integers(capacity, 9 * capacity, batch)], batch)
    length = (length if case.lengths is None else np.array(case.lengths)).astype(np.int32)
    written = length.copy()
    if case.rolled_back:
        written = written + rng.integers(0, case.slack + 1, batch).astype(np.int32)
        written[-1] = INVALID
    shape = {"sinks": window.sinks, "slack": case.slack, "capacity": capacity}
    held = position_in_slot(np.arange(capacity)[None], length[:, None], written[:, None], **shape)
    what = {"left": window.left, "right": window.right, "sinks": window.sinks}
    seen = np.concatenate(
        [oracle.visible(**what, q_positions=[n - 1], k_positions=p) for n, p in zip(length, held, strict=True)]
    )
    sizes = ((batch, case.kv_heads, capacity, size) for size in (case.head_dim, case.value_dim))
    stores = [jnp.asarray(rng.standard_normal(size), case.dtype) for size in sizes]
    scales = {}
    if case.kv_dtype is not None:
        (k, k_scale), (v, v_scale) = (_quantised.quantise(x, case.kv_dtype) for x in stores)
        stores, scales = [k, v], {"k_scale": np.array(k_scale), "v_scale": np.array(v_scale)}
    k, v = map(np.array, stores)
    for store in (k, v, *scales.values()):
        store[~np.broadcast_to(seen[:, 0][:, None], store.shape[:3])] = ring_cases._poison(store)
    counts = {"q_start": length - 1, "length": length, "written": written}
    rows = Rows(**{name: jnp.asarray(x) for name, x in (counts | scales).items()})
    return rows, jnp.asarray(k), jnp.asarray(v), seen[:, 0], _meant(case, k, v, rows)


def _meant(case, k, v, rows):
    if case.kv_dtype is None:
        return np.float32(k), np.float32(v)
    scaled = ((k, rows.k_scale), (v, rows.v_scale))
    return tuple(np.asarray(_quantised.dequantise(jnp.asarray(x), scale)) for x, scale in scaled)


def check(made, out, lse):
    """Law 13, and that a query that sees nothing gets 0."""
    cases.assert_close(out, made.out, made.plain_out, "out")
    cases.assert_close(lse, made.lse, made.plain_lse, "lse")
    assert not np.asarray(out)[~made.seen.any(-1)].any()
