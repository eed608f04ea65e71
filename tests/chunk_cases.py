"""Chunks that a ring cannot hold beside what they see of it: rings in random states, and what `extend` must give.

Slots that no query sees hold NaN.
"""

import zlib
from typing import NamedTuple

import cases
import jax.numpy as jnp
import numpy as np
import oracle

from ringjax._kernels.problem import Rows
from ringjax._slots import position_in_slot


class Made(NamedTuple):
    """`arguments` of `extend` after the problem; what is exact and what plain attention gives, output and lse each."""

    arguments: tuple
    exact: tuple
    plain: tuple
    seen: np.ndarray


def make(case, seed=0):
    """Of a `ring_cases.RingCase`, whose `queries` are the chunk's tokens."""
    rng = np.random.default_rng([zlib.crc32(case.name.encode()), seed])
    batch, chunk, capacity, window = case.batch, case.queries, case.capacity, case.window

    def normal(*shape):
        return np.array(jnp.asarray(rng.standard_normal(shape), case.dtype))

    q = normal(batch, chunk, case.heads, case.head_dim)
    k, v = (normal(batch, chunk, case.kv_heads, size) for size in (case.head_dim, case.value_dim))
    ring = [normal(batch, case.kv_heads, capacity, size) for size in (case.head_dim, case.value_dim)]
    sinks = rng.standard_normal(case.heads).astype(np.float32) if case.sink_logits else None
    length = np.array(rng.integers(0, 5 * capacity, batch) if case.lengths is None else case.lengths, np.int32)
    written = length.copy()
    if case.rolled_back:
        written = written + rng.integers(0, case.slack + 1, batch).astype(np.int32)
    real = rng.integers(0, chunk + 1, batch).astype(np.int32) if case.ragged else np.full(batch, chunk, np.int32)
    tokens = np.arange(chunk)[None] < real[:, None]
    q, k, v = (np.where(tokens[:, :, None, None], x, np.zeros((), x.dtype)) for x in (q, k, v))

    shape = {"sinks": window.sinks, "slack": case.slack, "capacity": capacity}
    held = position_in_slot(np.arange(capacity)[None], length[:, None], written[:, None], **shape)
    at = length[:, None] + np.arange(chunk)[None]
    what = {"left": window.left, "right": window.right, "sinks": window.sinks, "q_positions": at}
    what |= {"k_positions": np.concatenate([held, np.where(tokens, at, -1)], axis=1)}
    what |= {"q_segments": np.where(tokens, 0, 7), "k_segments": np.zeros((batch, capacity + chunk), int)}
    seen = np.broadcast_to(oracle.visible(**what), (batch, chunk, capacity + chunk))
    unseen = ~seen[:, :, :capacity].any(1)
    for x in ring:
        x[np.broadcast_to(unseen[:, None], x.shape[:3])] = np.nan
    both = [
        np.concatenate([np.moveaxis(np.nan_to_num(old.astype(np.float32)), 1, 2).astype(old.dtype), new], axis=1)
        for old, new in zip(ring, (k, v), strict=True)
    ]
    exact = oracle.attention(q, *both, sink_logits=sinks, softcap=case.softcap, **what)
    given = [jnp.asarray(x) for x in (q, *both)]
    plain = cases._plain(case.softcap, None)(*given, None if sinks is None else jnp.asarray(sinks), jnp.asarray(seen))
    rows = Rows(
        q_start=jnp.asarray(length),
        length=jnp.asarray(length),
        written=jnp.asarray(written),
        q_length=jnp.asarray(real) if case.ragged else None,
    )
    arrays = (jnp.asarray(x) for x in (q, k, v, *ring))
    return Made((rows, *arrays, None if sinks is None else jnp.asarray(sinks)), exact, plain, seen)


def check(made, out, lse):
    """Law 13, and that a query that sees nothing gets 0."""
    for name, got, exact, plain in zip(("out", "lse"), (out, lse), made.exact, made.plain, strict=True):
        cases.assert_close(got, exact, plain, name)
    assert not np.asarray(out)[~made.seen.any(-1)].any()
