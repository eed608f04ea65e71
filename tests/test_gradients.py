"""Gradients of `attention` and `attend` against float64, within law 13's bound; law 6 and law 10."""

from functools import partial

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case
from jax.test_util import check_grads

import ringjax as rj
from ringjax._kernels.tiles import Tiles

W = rj.Window

LARGE = Case("", W.causal(9), queries=70, keys=70, batch=2, heads=6, kv_heads=2, head_dim=4, value_dim=4)
PATHS = [
    LARGE.replace(name="heads-many-blocks", tiles=Tiles(4, 16, 1), sink_logits=True, softcap=2.0),
    LARGE.replace(name="heads-unbounded", window=W.causal(), tiles=Tiles(16, 16, None)),
    LARGE.replace(name="heads-sinks-beyond-a-tile", window=W(5, 2, 37), tiles=Tiles(8, 8, 3), segments="padded"),
    LARGE.replace(name="heads-bfloat16", dtype="bfloat16", tiles=Tiles(4, 16, 3), sink_logits=True),
    LARGE.replace(name="all-heads-long-window", queries=15, window=W.causal(60), tiles=Tiles(8, 4), segments="padded"),
]
# Of the table, one case for each way that a derivative can take.
TABLE = (
    "causal-1 both-sides full right-unbounded sinks-wider-than-tile sinks-both-sides odd-tiles one-kv-head value-dim"
)
TABLE += " all-logits padded more-keys-packed more-queries-both-sides one-query offset-negative offset-per-row"
TABLE += " bfloat16-all-logits bfloat16-packed float16-more-keys"


def check(runs):
    """Law 13 for `(got, exact, plain)` gradients of several runs of one case taken together; None is no gradient."""
    for name, *parts in zip(NAMES, *(zip(*x, strict=True) for x in zip(*runs, strict=True)), strict=False):
        if parts[0][0] is not None:
            cases.assert_close(*(np.concatenate([np.asarray(x) for x in part]) for part in parts), name)


NAMES = ("q", "k", "v", "sink_logits")


def gradients_of(case):
    """Jitted gradients for q, k, v and the sink logits, from cotangents for the output and the lse."""

    @jax.jit
    def gradients(arrays):
        def f(q, k, v, sink_logits):
            return cases.run(case, arrays._replace(q=q, k=k, v=v, sink_logits=sink_logits))

        return jax.vjp(f, *arrays[:4])[1]((arrays.g, arrays.g_lse))

    return gradients


@pytest.mark.parametrize("case", [*map(cases.BY_NAME.get, TABLE.split()), *PATHS], ids=str)
def test_gradients_of_attention(case):
    gradients = gradients_of(case)
    runs = []
    for seed in range(3):
        arrays = cases.arrays(case, seed)
        got, exact, plain = gradients(arrays), cases.exact_gradients(case, arrays), cases.plain_gradients(case, arrays)
        for x, a in zip(arrays[:4], got, strict=True):
            assert (a is None) == (x is None)
            assert x is None or (a.dtype == x.dtype and a.shape == x.shape)
        runs.append((got, exact, plain))
    check(runs)


def test_each_cotangent_alone():
    """With that of the other zero: an error in one could hide behind the other."""
    case = cases.BY_NAME["all-logits"]
    gradients = gradients_of(case)
    arrays = cases.arrays(case)
    for alone in (arrays._replace(g=0 * arrays.g), arrays._replace(g_lse=0 * arrays.g_lse)):
        check([(gradients(alone), cases.exact_gradients(case, alone), cases.plain_gradients(case, alone))])
    # The lse is that of the keys alone.
    np.testing.assert_array_equal(gradients(arrays._replace(g=0 * arrays.g))[3], 0.0)


def test_rows_without_a_key_have_zero_gradients():
    """Law 6, at every offset: rows before the first key, rows whose window has left the last one."""
    case = Case("empty", W.causal(3), queries=9, keys=4, sink_logits=True)
    arrays = cases.arrays(case)
    # A logit of -inf is no sink at all: beside no key, there is then nothing in the denominator.
    arrays = arrays._replace(sink_logits=arrays.sink_logits.at[0].set(-jnp.inf))

    @jax.jit
    def gradients(q_offset, g, g_lse):
        def f(q, k, v, sink_logits):
            options = cases.options(case, arrays) | {"sink_logits": sink_logits, "q_offset": q_offset}
            return rj.attention(q, k, v, case.window, return_lse=True, **options)

        (out, lse), vjp = jax.vjp(f, *arrays[:4])
        return out, lse, vjp((g, g_lse))

    for offset in range(-12, 9):
        # A cotangent for the lse of an empty row, NaN even, reaches nothing.
        positions = offset + np.arange(9)
        empty = (positions < 0) | (positions >= 6)
        g_lse = jnp.broadcast_to(jnp.where(empty, jnp.nan, 1.0)[None, None], (2, 4, 9))
        out, lse, (dq, dk, dv, d_sinks) = gradients(jnp.int32(offset), arrays.g, g_lse)
        np.testing.assert_array_equal(np.isneginf(lse), np.broadcast_to(empty, lse.shape))
        np.testing.assert_array_equal(out[:, empty], 0.0)
        np.testing.assert_array_equal(dq[:, empty], 0.0)
        assert all(np.isfinite(x).all() for x in (dq, dk, dv, d_sinks))
        if empty.all():
            assert not any(np.any(x) for x in (dk, dv, d_sinks))


def test_finite_differences():
    """Not against another derivation of ours: against differences of the outputs themselves."""
    case = cases.BY_NAME["all-logits"].replace(batch=1, queries=7, keys=7, softcap=3.0, segments="packed")
    arrays = cases.arrays(case)

    @jax.jit
    def f(*x):
        out, lse = cases.run(case, arrays._replace(q=x[0], k=x[1], v=x[2], sink_logits=x[3]))
        return out, jnp.where(jnp.isneginf(lse), 0.0, lse)

    check_grads(f, arrays[:4], order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


# Through a ring: a stream of chunks against one call on the whole.

BATCH, HEADS, KV_HEADS, DIM = 2, 4, 2, 4
CHUNK, CHUNKS = 6, 5
LENGTH = CHUNK * CHUNKS
SOFTCAP = 2.0


def stream(window, slack, q, k, v, sink_logits, lengths):
    """Outputs of `attend`, chunk by chunk in a scan, `lengths[i]` tokens of chunk i being real; and the last ring."""
    ring = rj.RingBuffer.empty(BATCH, KV_HEADS, DIM, window, slack=slack, dtype=jnp.float32)
    # What was never written may hold NaN, and no gradient comes from there.
    ring = rj.RingBuffer(ring.k + jnp.nan, ring.v + jnp.nan, ring.length, ring.written, window, slack)

    def step(ring, chunk):
        out, ring = rj.attend(*chunk[:3], ring, lengths=chunk[3], sink_logits=sink_logits, softcap=SOFTCAP)
        return ring, out

    return jax.lax.scan(jax.checkpoint(step), ring, (q, k, v, lengths))


def streams(seed):
    """Chunks of q, k, v, g [chunks, B, CHUNK, ...] of which lengths [chunks, B] are real, and the same without holes.

    Each token's place in its stream goes with it: the whole [B, LENGTH, ...] is gathered from the chunks.
    """
    rng = np.random.default_rng(seed)
    shapes = [(HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, DIM), (HEADS, DIM)]
    chunks = [rng.standard_normal((CHUNKS, BATCH, CHUNK, *shape), np.float32) for shape in shapes]
    lengths = rng.integers(0, CHUNK + 1, (CHUNKS, BATCH)).astype(np.int32)
    lengths[rng.integers(CHUNKS)] = CHUNK
    real = np.arange(CHUNK)[None, None] < lengths[..., None]
    # For each row, where its real tokens are in [CHUNKS * CHUNK], then any of the rest.
    order = np.argsort(~np.moveaxis(real, 1, 0).reshape(BATCH, -1), axis=1, kind="stable")
    return chunks, lengths, order


def whole(chunks, order):
    x = jnp.moveaxis(chunks, 1, 0)
    x = x.reshape(BATCH, LENGTH, *x.shape[3:])
    return jnp.take_along_axis(x, order[:, :, None, None], axis=1)


@jax.jit
def dense(chunks, sink_logits, mask, order):
    """The gradients that the chunks' tokens have in plain attention to the whole."""
    q, k, v, g = chunks

    def f(q, k, v, sink_logits):
        return cases.plain_attention(*(whole(x, order) for x in (q, k, v)), sink_logits, mask, softcap=SOFTCAP)[0]

    return jax.vjp(f, q, k, v, sink_logits)[1](whole(g, order))


CHUNKED = {
    "window-longer-than-a-chunk": (W.causal(9), 0),
    "window-shorter-than-a-chunk-and-sinks": (W.causal(3, sinks=2), 0),
    "sinks-longer-than-a-chunk": (W.causal(4, sinks=8), 0),
    "ring-alone-is-enough": (W.causal(5, sinks=1), CHUNK - 1),
}


@pytest.mark.parametrize("name", CHUNKED)
def test_chunked_gradients_are_those_of_the_whole(name):
    """Law 10: ragged chunks through a ring, within scan and remat, against plain attention on the stream in float64."""
    window, slack = CHUNKED[name]

    @jax.jit
    def chunked(chunks, sink_logits, lengths):
        q, k, v, g = chunks
        f = partial(stream, window, slack)
        vjp = jax.vjp(lambda *x: f(*x, lengths)[1], q, k, v, sink_logits)[1]
        return vjp(g)

    runs = []
    for seed in range(5):
        chunks, lengths, order = streams(seed)
        sink_logits = np.random.default_rng(seed).standard_normal(HEADS).astype(np.float32)
        at = np.arange(LENGTH)
        real = at[None] < lengths.sum(0)[:, None]
        mask = window.visible(at[:, None], at[None])[None] & real[:, :, None] & real[:, None, :]
        got, plain = chunked(chunks, sink_logits, lengths), dense(chunks, sink_logits, mask, order)
        with jax.enable_x64(True):
            wide = [x.astype(np.float64) for x in chunks], sink_logits.astype(np.float64)
            exact = [np.asarray(x) for x in dense(*wide, mask, order)]
        assert all(np.any(x) for x in exact)
        runs.append((got, exact, plain))
    check(runs)


@pytest.fixture(scope="module")
def two_calls():
    """Gradients of a second call for the ring's k and v and its own inputs; T tokens onto a ring of any length."""
    window = W.causal(4, sinks=1)

    def f(first, second):
        ring = rj.RingBuffer.empty(BATCH, KV_HEADS, DIM, window, dtype=jnp.float32)
        ring = ring.append(*(x[:, :4] for x in first)).append(*(x[:, 4:] for x in first))
        return rj.attend(*second, ring)[0]

    @jax.jit
    def gradients(first, second, g):
        return jax.vjp(f, first, second)[1](g)

    return window, gradients


@pytest.mark.parametrize("tokens", [1, 3])
def test_the_contents_of_a_ring_have_gradients(two_calls, tokens):
    """Those that the first tokens have in one call on all; tokens that have left the ring have none."""
    window, gradients = two_calls
    case = Case("ring", window, queries=tokens, keys=7 + tokens, heads=HEADS, kv_heads=KV_HEADS, head_dim=DIM)
    case = case.replace(value_dim=DIM)
    arrays = cases.arrays(case)
    first = (arrays.k[:, :7], arrays.v[:, :7])
    (dk, dv), (dq, dk_own, dv_own) = gradients(first, (arrays.q, arrays.k[:, 7:], arrays.v[:, 7:]), arrays.g)
    alone = arrays._replace(g_lse=0 * arrays.g_lse)
    got = dq, jnp.concatenate([dk, dk_own], 1), jnp.concatenate([dv, dv_own], 1)
    check([(got, cases.exact_gradients(case, alone)[:3], cases.plain_gradients(case, alone)[:3])])
    np.testing.assert_array_equal(dk[:, 1:4], 0.0)  # pinned 0; 1..3 are out of the window of the query at 7
    assert np.all(np.any(dk[:, [0, 4, 5, 6]], axis=(0, 2, 3)))


def test_the_lse_of_a_row_rolled_back_too_far_and_its_gradients_are_those_of_nothing():
    window = W.causal(3)
    ring = rj.RingBuffer.empty(BATCH, KV_HEADS, DIM, window, slack=1, dtype=jnp.float32)
    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((BATCH, 5, KV_HEADS, DIM), np.float32)
    ring = ring.append(tokens, tokens)
    q, x = (rng.standard_normal((BATCH, 2, heads, DIM), np.float32) for heads in (HEADS, KV_HEADS))

    @jax.jit
    def gradients(n, k, v):
        def f(q, x, k, v):
            old = rj.RingBuffer(k, v, ring.length, ring.written, window, 1).rollback(n)
            return rj.attend(q, x, x, old)[0]

        out, vjp = jax.vjp(f, q, x, k, v)
        return out, vjp(jnp.ones_like(out))

    out, found = gradients(jnp.array([1, 3]), ring.k, ring.v)
    assert np.all(np.isfinite(out)) and np.any(out[0])
    np.testing.assert_array_equal(out[1], 0.0)
    for gradient in found:
        assert np.all(np.isfinite(gradient)) and np.any(gradient[0])
        np.testing.assert_array_equal(gradient[1], 0.0)


SMALL = Case("chain", W.causal(4, sinks=1), batch=1, queries=8, keys=8, heads=2, kv_heads=1, head_dim=4, value_dim=4)


def test_decoding_has_the_gradients_of_the_whole():
    """Token by token: each key's gradient comes back through the ring from all the steps that saw it; 200 streams."""

    @jax.jit
    def decoded(q, k, v, g):
        ring = rj.RingBuffer.empty(1, 1, 4, SMALL.window, dtype=jnp.float32)

        def step(ring, token):
            out, ring = rj.attend(*(x[:, None] for x in token), ring)
            return ring, out[:, 0]

        def f(*qkv):
            tokens = tuple(jnp.moveaxis(x, 1, 0) for x in qkv)
            return jnp.moveaxis(jax.lax.scan(step, ring, tokens)[1], 0, 1)

        return jax.vjp(f, q, k, v)[1](g)

    runs = []
    for seed in range(200):
        arrays = cases.arrays(SMALL, seed)._replace(g_lse=jnp.zeros((1, 2, 8)))
        got = decoded(*arrays[:3], arrays.g)
        runs.append((got, cases.exact_gradients(SMALL, arrays)[:3], cases.plain_gradients(SMALL, arrays)[:3]))
    check(runs)
