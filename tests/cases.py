"""The table of small attention calls that all tests share, their arrays, and how far from exact an answer may be."""

import dataclasses
import zlib
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle

import ringjax as rj
from ringjax._kernels.tiles import Tiles

SMALL_TILES = Tiles(block_size=8, tile_size=8)


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of `attention`. `segments` is "packed" or "padded" or None; `q_offset` may be one number per row."""

    name: str
    window: rj.Window
    queries: int = 21
    keys: int = 21
    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    value_dim: int = 8
    q_offset: int | tuple[int, ...] | None = None
    sink_logits: bool = False
    softcap: float | None = None
    scale: float | None = None
    segments: str | None = None
    dtype: str = "float32"
    tiles: Tiles | None = SMALL_TILES

    def __str__(self):
        return self.name

    def replace(self, **changes):
        return dataclasses.replace(self, **changes)


class Arrays(NamedTuple):
    """`g` and `g_lse` are cotangents of the output and of the lse (0 where the lse is -inf)."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    sink_logits: jax.Array | None
    segment_ids: jax.Array | None
    kv_segment_ids: jax.Array | None
    g: jax.Array
    g_lse: jax.Array


W = rj.Window
CASES = [
    # Windows: each off-by-one shows at a small size.
    *[Case(f"causal-{size}", W.causal(size)) for size in (1, 2, 3, 5, 8)],
    Case("causal", W.causal()),
    Case("causal-wider-than-keys", W.causal(64)),
    Case("symmetric-2", W.symmetric(2)),
    Case("both-sides", W(3, 1)),
    Case("right-only", W(0, 4)),
    Case("left-unbounded", W(None, 2)),
    Case("right-unbounded", W(2, None)),
    Case("full", W.full()),
    Case("sinks", W.causal(4, sinks=3)),
    Case("sinks-one", W.causal(1, sinks=1)),
    Case("sinks-wider-than-tile", W.causal(3, sinks=10)),
    Case("sinks-both-sides", W(2, 2, 3)),
    # Tiles: the implementation's own, and ones that do not divide anything.
    Case("own-tiles", W.causal(5, sinks=2), tiles=None),
    Case("odd-tiles", W.causal(5, sinks=2), tiles=Tiles(block_size=5, tile_size=3)),
    # Heads.
    Case("one-kv-head", W.causal(5), kv_heads=1),
    Case("as-many-kv-heads", W.causal(5), kv_heads=4),
    Case("value-dim", W.causal(5), value_dim=5),
    # Logits.
    Case("softcap", W.causal(5), softcap=1.5),
    Case("scale", W.causal(5), scale=0.7),
    Case("sink-logits", W.causal(5), sink_logits=True),
    Case("all-logits", W.causal(5, sinks=2), sink_logits=True, softcap=2.0, scale=0.6),
    # Segments.
    Case("packed", W.causal(5), segments="packed"),
    Case("padded", W.causal(8, sinks=2), segments="padded", sink_logits=True),
    Case("packed-both-sides", W.symmetric(3), segments="packed"),
    # T != S.
    Case("more-keys", W.causal(5), queries=7),
    Case("more-keys-sinks", W.causal(5, sinks=3), queries=7, sink_logits=True),
    Case("more-keys-packed", W.causal(5), queries=7, segments="padded"),
    Case("more-queries", W.causal(5), keys=7),
    Case("more-queries-both-sides", W(2, 2, 1), keys=7, sink_logits=True),
    Case("one-query", W.causal(5, sinks=2), queries=1),
    Case("one-key", W.causal(3), keys=1),
    Case("offset", W.causal(5, sinks=2), queries=7, q_offset=9),
    Case("offset-negative", W(5, 1), queries=7, q_offset=-3),
    Case("offset-beyond", W.causal(5), queries=7, q_offset=19),
    Case("offset-per-row", W.causal(5, sinks=2), queries=7, q_offset=(2, 12)),
    # Dtypes.
    Case("bfloat16", W.causal(5, sinks=2), dtype="bfloat16"),
    Case("bfloat16-all-logits", W.causal(8), sink_logits=True, softcap=2.0, dtype="bfloat16"),
    Case("bfloat16-packed", W.causal(5), segments="packed", dtype="bfloat16"),
    Case("float16", W.causal(5, sinks=2), dtype="float16"),
    Case("float16-more-keys", W(3, 1), queries=7, value_dim=5, sink_logits=True, dtype="float16"),
]
BY_NAME = {case.name: case for case in CASES}


def arrays(case, seed=0):
    """Reproducible arrays for a case; another `seed`, other ones."""
    rng = np.random.default_rng([zlib.crc32(case.name.encode()), seed])
    b, t, s = case.batch, case.queries, case.keys

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), case.dtype)

    q = normal(b, t, case.heads, case.head_dim)
    k, v = normal(b, s, case.kv_heads, case.head_dim), normal(b, s, case.kv_heads, case.value_dim)
    sink_logits = normal(case.heads) if case.sink_logits else None
    g = normal(b, t, case.heads, case.value_dim)
    segment_ids = kv_segment_ids = None
    if case.segments:
        # Each row packs three sequences of lengths of its own; queries are the last of the keys.
        cuts = np.sort(rng.integers(1, s, (b, 2)), axis=1)
        kv_segment_ids = (np.arange(s)[None] >= cuts[:, :1]).astype(np.int32) + (np.arange(s)[None] >= cuts[:, 1:])
        if case.segments == "padded":
            kv_segment_ids[0, -3:] = -1
            kv_segment_ids[-1, :2] = -5
        segment_ids = jnp.asarray(kv_segment_ids[:, -t:], jnp.int32)
        kv_segment_ids = jnp.asarray(kv_segment_ids, jnp.int32)
    made = Arrays(q, k, v, sink_logits, segment_ids, kv_segment_ids, g, jnp.zeros((b, case.heads, t)))
    some = seen(case, made).any(axis=-1)[:, None]
    return made._replace(g_lse=jnp.asarray(np.where(some, rng.standard_normal((b, case.heads, t)), 0), jnp.float32))


def what_is_seen(case, arrays):
    """The arguments that tell the oracle what each query sees."""
    offset = case.keys - case.queries if case.q_offset is None else case.q_offset
    return {
        "left": case.window.left,
        "right": case.window.right,
        "sinks": case.window.sinks,
        "q_positions": np.reshape(offset, (-1, 1)) + np.arange(case.queries)[None],
        "k_positions": np.arange(case.keys),
        "q_segments": arrays.segment_ids,
        "k_segments": arrays.kv_segment_ids,
    }


def seen(case, arrays):
    """bool [B, T, S]."""
    return np.broadcast_to(oracle.visible(**what_is_seen(case, arrays)), (case.batch, case.queries, case.keys))


def options(case, arrays):
    """The keyword arguments of `attention` for a case, `return_lse` apart."""
    return {
        "segment_ids": arrays.segment_ids,
        "kv_segment_ids": arrays.kv_segment_ids,
        "sink_logits": arrays.sink_logits,
        "softcap": case.softcap,
        "scale": case.scale,
        "q_offset": case.q_offset if isinstance(case.q_offset, int | None) else jnp.asarray(case.q_offset, jnp.int32),
        "config": case.tiles,
    }


def run(case, arrays, implementation=None):
    """Output and lse of `attention`."""
    return rj.attention(
        *arrays[:3], case.window, return_lse=True, implementation=implementation, **options(case, arrays)
    )


def exact(case, arrays):
    """Output and lse of the oracle, in float64."""
    return oracle.attention(
        *arrays[:3],
        sink_logits=arrays.sink_logits,
        softcap=case.softcap,
        scale=case.scale,
        **what_is_seen(case, arrays),
    )


def plain_attention(q, k, v, sink_logits, mask, *, softcap=None, scale=None):
    """Attention as everybody writes it first: dense, products in the inputs' dtype, softmax in float32 (or float64).

    `mask` is bool [B or 1, T, S]. The measure of law 13; in float64 and differentiated, that of gradients.
    """
    wide = q.dtype if q.dtype == np.float64 else jnp.float32
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    product = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    logits = product("btnh,bsnh->bnts", q, k).astype(wide) * (q.shape[3] ** -0.5 if scale is None else scale)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    logits = jnp.where(mask[:, None], logits, -jnp.inf)
    largest = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    largest = jnp.where(largest == -jnp.inf, 0.0, largest)
    weights = jnp.where(mask[:, None], jnp.exp(jnp.where(mask[:, None], logits - largest, 0.0)), 0.0)
    total = weights.sum(axis=-1, keepdims=True)
    empty = total == 0.0
    lse = jnp.where(empty, -jnp.inf, largest + jnp.log(jnp.where(empty, 1.0, total)))[..., 0]
    if sink_logits is not None:
        total = total + jnp.exp(sink_logits.astype(wide)[None, :, None, None] - largest)
    weights = (weights / jnp.where(total == 0.0, 1.0, total)).astype(v.dtype)
    return product("bnts,bsnh->btnh", weights, v), lse


@cache
def _plain(softcap, scale):
    return jax.jit(partial(plain_attention, softcap=softcap, scale=scale))


@cache
def _plain_gradients(softcap, scale):
    def gradients(q, k, v, sink_logits, mask, g, g_lse):
        f = partial(plain_attention, mask=mask, softcap=softcap, scale=scale)
        (_, lse), vjp = jax.vjp(f, q, k, v, sink_logits)
        return vjp((g, jnp.where(jnp.isneginf(lse), 0.0, g_lse)))

    return jax.jit(gradients)


def plain(case, arrays):
    """Output and lse of plain attention in the case's dtype."""
    return _plain(case.softcap, case.scale)(*arrays[:4], seen(case, arrays))


def plain_gradients(case, arrays):
    """Gradients for q, k, v and the sink logits (or None) of plain attention in the case's dtype."""
    return _plain_gradients(case.softcap, case.scale)(*arrays[:4], seen(case, arrays), arrays.g, arrays.g_lse)


def exact_gradients(case, arrays):
    """The same gradients in float64, as NumPy arrays."""
    with jax.enable_x64(True):
        wide = [None if x is None else np.asarray(x).astype(np.float64) for x in (*arrays[:4], arrays.g, arrays.g_lse)]
        found = _plain_gradients(case.softcap, case.scale)(*wide[:4], seen(case, arrays), *wide[4:])
        return tuple(None if x is None else np.asarray(x) for x in found)


def assert_close(got, exact, plain, what=""):
    """Law 13: an error of at most twice that of plain attention, in the largest element.

    FlashAttention's bound. What is exact but for one rounding to the dtype always passes, and so do four roundings of
    the largest element to float32: where plain attention happens to be exact, twice its error says nothing.
    """
    dtype = jnp.asarray(got).dtype
    got, plain = (np.asarray(x).astype(np.float64) for x in (got, plain))
    nothing = np.isneginf(exact)
    np.testing.assert_array_equal(np.isneginf(got), nothing, f"{what}: other rows are empty")
    got, exact, plain = (np.where(nothing, 0.0, x) for x in (got, exact, plain))
    largest = max(1.0, np.abs(exact).max(initial=0.0))
    floor = largest * max(float(jnp.finfo(dtype).eps) / 2, 4 * float(jnp.finfo(jnp.float32).eps))
    bound = 2 * np.abs(plain - exact).max(initial=0.0) + floor
    error = np.abs(got - exact).max(initial=0.0)
    assert error <= bound, f"{what}: error {error:.3g}, bound {bound:.3g}"  # a NaN fails too
