"""Law 2, stream equals batch: a stream through a ring, in any chunks, is one call of attention on the whole.

Also laws 4 and 8 (a chunk sees the ring before it overwrites it; padding is not written) and law 9 (rollback). What is
compiled is one `attend` for each chunk length and window; lengths, partitions, rows and contents are drawn freely.
"""

import itertools
from functools import cache, partial

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case
from hypothesis import given, settings
from hypothesis import strategies as st

import ringjax as rj

BATCH, HEADS, KV_HEADS, DIM = 2, 2, 1, 4
TOKENS = 40  # of a stream: several times around the largest ring
# Chunks of one token, shorter than, equal to and longer than the windows and the rings.
CHUNKS = (1, 3, 13)
SIZES, SINKS = (1, 2, 3, 5, 8), (0, 1, 3)


@cache
def stream(window, slack, sink_logits, softcap):
    """One jitted loop that plays a script: at each step a chunk (or a rollback) of up to so many tokens per row.

    Each step's tokens are read from the rows' streams at the ring's own lengths, so a rollback reads them again.
    A script is int32 [steps, 1 + BATCH]: which of `CHUNKS` (or `ROLLBACK`), and how many tokens in each row.
    """
    wide = max(CHUNKS)

    def call(chunk, carry, counts):
        ring, out, (q, k, v), sinks = carry
        at = ring.length[:, None] + jnp.arange(chunk, dtype=jnp.int32)[None]
        real = (jnp.arange(chunk, dtype=jnp.int32)[None] < counts[:, None])[:, :, None, None]
        # Padding is NaN: it must neither be seen nor written.
        q, k, v = (
            jnp.where(real, jnp.take_along_axis(x, at[:, :, None, None], 1, mode="clip"), jnp.nan) for x in (q, k, v)
        )
        new, after = rj.attend(q, k, v, ring, lengths=counts, sink_logits=sinks, softcap=softcap)
        rows = jnp.arange(BATCH, dtype=jnp.int32)[:, None]
        out = out.at[rows, jnp.where(real[:, :, 0, 0], at, TOKENS + wide)].set(new, mode="drop")
        return after, out, carry[2], carry[3]

    def back(carry, counts):
        ring, *rest = carry
        return ring.rollback(counts), *rest

    branches = [partial(call, chunk) for chunk in CHUNKS] + [back]

    @jax.jit
    def play(script, qkv, sinks):
        ring = rj.RingBuffer.empty(BATCH, KV_HEADS, DIM, window, slack=slack, dtype=jnp.float32)
        ring = rj.RingBuffer(ring.k + jnp.nan, ring.v + jnp.nan, ring.length, ring.written, window, slack)
        carry = ring, jnp.full_like(qkv[0], jnp.nan), qkv, sinks if sink_logits else None

        def step(carry, line):
            return jax.lax.switch(line[0], branches, carry, line[1:]), None

        (ring, out, *_), _ = jax.lax.scan(step, carry, script)
        return ring, out

    return play


STEPS = TOKENS + 24
ROLLBACK = len(CHUNKS)


def script_of(rng, slack, rollbacks):
    """A random script that gives each row its `TOKENS` tokens, and no row more; idle steps fill it up."""
    lines, length, written = [], np.zeros(BATCH, int), np.zeros(BATCH, int)
    favourite = rng.integers(len(CHUNKS) + 1)  # some scripts use one chunk length only, as a decoding loop does
    while (length < TOKENS).any() and len(lines) < STEPS:
        left = TOKENS - length
        if rollbacks and slack and rng.random() < 0.3:
            most = np.minimum(slack - (written - length), length)
            counts = rng.integers(0, most + 1)
            lines.append([ROLLBACK, *counts])
            length = length - counts
            continue
        which = int(favourite) if favourite < len(CHUNKS) else int(rng.integers(len(CHUNKS)))
        if STEPS - len(lines) < 8:
            which = len(CHUNKS) - 1
        counts = np.minimum(CHUNKS[which], left)
        if rng.random() < 0.4:
            counts = np.minimum(counts, rng.integers(0, CHUNKS[which] + 1, BATCH))  # ragged
        lines.append([which, *counts])
        length = length + counts
        written = np.maximum(written, length)
    while len(lines) < STEPS:
        lines.append([0, *np.zeros(BATCH, int)])
    return np.asarray(lines, np.int32), length, written


def play(window, slack, seed, *, rollbacks=False, sink_logits=False, softcap=None):
    """A random script's outputs, the oracle's and plain attention's, up to each row's end; and the script."""
    rng = np.random.default_rng([seed, slack, window.left, window.sinks])
    case = Case("stream", window, batch=BATCH, queries=TOKENS, keys=TOKENS, heads=HEADS, kv_heads=KV_HEADS)
    case = case.replace(head_dim=DIM, value_dim=DIM, sink_logits=sink_logits, softcap=softcap)
    arrays = cases.arrays(case, seed)
    script, length, written = script_of(rng, slack, rollbacks)
    ring, out = stream(window, slack, sink_logits, softcap)(script, arrays[:3], arrays.sink_logits)
    np.testing.assert_array_equal(ring.length, length)
    (exact, _), (plain, _) = cases.exact(case, arrays), cases.plain(case, arrays)
    for row in range(BATCH):
        assert np.isnan(out[row, written[row] :]).all()
    done = np.arange(TOKENS)[None] < written[:, None]  # what was rolled back for good came out right all the same
    return [np.asarray(x)[done] for x in (out, exact, plain)], script


def check(runs):
    """Law 13 for all scripts of a ring together: a few numbers have luck, many have not."""
    cases.assert_close(*(np.concatenate(parts) for parts in zip(*runs, strict=True)))


@pytest.mark.parametrize(("size", "sinks"), list(itertools.product(SIZES, SINKS)))
def test_stream_equals_batch(size, sinks):
    """Without slack, where a chunk overwrites what its first tokens still see: 15 rings x 14 scripts."""
    check([play(rj.Window.causal(size, sinks), 0, seed)[0] for seed in range(14)])


@pytest.mark.parametrize(("size", "sinks", "slack"), [(1, 1, 2), (2, 0, 4), (5, 3, 2), (8, 1, 4)])
def test_stream_equals_batch_with_slack_and_rollbacks(size, sinks, slack):
    """Law 9: after a rollback the same tokens give the same outputs, before and after the wrap; 216 scripts."""
    runs, rolled = [], 0
    for seed in range(54):
        run, script = play(rj.Window.causal(size, sinks), slack, seed, rollbacks=True)
        runs.append(run)
        rolled += int(script[script[:, 0] == ROLLBACK, 1:].sum())
    check(runs)
    assert rolled > 100


def test_stream_equals_batch_with_sink_logits_and_softcap():
    check([play(rj.Window.causal(5, 2), 0, seed, sink_logits=True, softcap=1.5)[0] for seed in range(20)])


# A rolled-back ring and one that never had the tokens are equal in all that can be read: other tokens may follow.


@pytest.fixture(scope="module")
def forked():
    """Outputs of a chunk on a ring that appended a draft and took back some of it, and on one that did not."""
    window, slack = rj.Window.causal(5, sinks=2), 4

    @jax.jit
    def run(before, draft, after, length, keep):
        empty = rj.RingBuffer.empty(BATCH, KV_HEADS, DIM, window, slack=slack, dtype=jnp.float32)
        ring = empty.append(*before, lengths=length)
        drafted = ring.append(*draft).rollback(4 - keep)
        without = ring.append(*draft, lengths=keep)
        return [
            (rj.attend(after[0], after[0][:, :, :1], after[1], r), r.positions(), r.export())
            for r in (drafted, without)
        ]

    return run


@given(st.integers(0, 10**6), st.lists(st.integers(0, 30), min_size=2, max_size=2), st.data())
@settings(max_examples=200)
def test_rollback_is_never_having_had_the_tokens(forked, seed, length, data):
    """Law 9, per row: 4 drafted tokens of which 0..4 stay, then other ones; at every fill and wrap phase."""
    keep = data.draw(st.lists(st.integers(0, 4), min_size=2, max_size=2))
    rng = np.random.default_rng(seed)

    def tokens(n, heads=KV_HEADS):
        return rng.standard_normal((BATCH, n, heads, DIM), np.float32)

    before, draft, after = (tokens(30), tokens(30)), (tokens(4), tokens(4)), (tokens(3, HEADS), tokens(3))
    (drafted, positions, held), (without, others, _) = forked(
        before, draft, after, jnp.asarray(length, jnp.int32), jnp.asarray(keep, jnp.int32)
    )
    np.testing.assert_array_equal(drafted[0], without[0])
    np.testing.assert_array_equal(drafted[1].length, without[1].length)
    # What the draft overwrote is gone, so that the rolled-back ring may hold less, but nothing else.
    for row in range(BATCH):
        mine, other = set(np.asarray(positions[row])), set(np.asarray(others[row]))
        assert mine <= other | {-1}
        next_position = length[row] + keep[row]
        stream = np.concatenate([before[0][row, : length[row]], draft[0][row, : keep[row]]])
        at = np.asarray(held.positions[row])
        np.testing.assert_array_equal(held.k[row][at >= 0], stream[at[at >= 0]])
        assert mine >= set(range(max(0, next_position - 4), next_position))


def test_a_full_chunk_needs_no_lengths():
    """`lengths=None` takes other ways through the code than lengths that say "all"."""
    window = rj.Window.causal(5, sinks=1)
    rng = np.random.default_rng(0)
    for batch, slack, chunk in ((2, 2, 3), (1, 0, 1), (2, 0, 13)):
        ring = rj.RingBuffer.empty(batch, KV_HEADS, DIM, window, slack=slack, dtype=jnp.float32)
        q = rng.standard_normal((4, batch, chunk, HEADS, DIM), np.float32)
        k, v = rng.standard_normal((2, 4, batch, chunk, KV_HEADS, DIM), np.float32)

        def run(lengths, q=q, k=k, v=v, ring=ring):
            return jax.lax.scan(lambda r, x: rj.attend(*x, r, lengths=lengths)[::-1], ring, (q, k, v))

        ring_a, out_a = jax.jit(run)(None)
        ring_b, out_b = jax.jit(run)(jnp.full(batch, chunk, jnp.int32))
        np.testing.assert_allclose(out_a, out_b, rtol=0, atol=4 * np.finfo(np.float32).eps * np.abs(out_a).max())
        np.testing.assert_array_equal(ring_a.k, ring_b.k)
        np.testing.assert_array_equal(ring_a.length, ring_b.length)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_streams(dtype):
    """Keys and values are seen as the ring holds them: the same outputs as one call in that dtype."""
    case = Case("low", rj.Window.causal(5, sinks=1), queries=24, keys=24, dtype=dtype)
    arrays = cases.arrays(case)
    ring = rj.RingBuffer.empty(2, 2, 8, case.window, dtype=dtype)
    chunks = [jnp.stack(jnp.split(x, 4, axis=1)) for x in arrays[:3]]
    out = jax.jit(lambda chunks: jax.lax.scan(lambda r, x: rj.attend(*x, r)[::-1], ring, tuple(chunks))[1])(chunks)
    assert out.dtype == dtype
    out = jnp.concatenate(list(out), axis=1)
    cases.assert_close(out, cases.exact(case, arrays)[0], cases.plain(case, arrays)[0])


def test_queries_of_a_chunk_longer_than_the_ring_see_it_before_it_is_overwritten():
    """executorch 20346, mlx-lm 1914, EasyDeL: a chunk of 2 W on a full ring of W cut the first queries' windows.

    One-hot values show which keys were seen, and how many (transformers 39408: W + 1 of them).
    """
    size, chunk = 4, 8
    window = rj.Window.causal(size)
    ring = rj.RingBuffer.empty(1, 1, 8, window, value_dim=16, dtype=jnp.float32)
    keys = jnp.zeros((1, 16, 1, 8))
    values = jnp.eye(16)[None, :, None]

    @jax.jit
    def run(ring):
        ring = ring.append(keys[:, :8], values[:, :8])
        return rj.attend(keys[:, 8:], keys[:, 8:], values[:, 8:], ring)[0]

    out = run(ring)
    for t in range(chunk):
        seen = np.flatnonzero(np.asarray(out[0, t, 0]))
        np.testing.assert_array_equal(seen, np.arange(8 + t - size + 1, 8 + t + 1))
        np.testing.assert_allclose(out[0, t, 0, seen], 1 / size, rtol=1e-6)
