"""The laws of attention with a bounded memory, each on at least 200 random cases.

| law | where |
| --- | --- |
| 1 visibility is decided by positions | here: `test_a_shift_of_positions...`, `test_slots_do_not_matter` |
| 2 stream equals batch | test_decode.py |
| 3 append is associative | here |
| 4 a chunk sees what it overwrites | test_decode.py |
| 5 constant memory, one executable, no copy | test_transforms.py |
| 6 empty rows | here; their gradients: test_gradients.py |
| 7 nothing unread leaks | here |
| 8 padding is never written | here; test_decode.py |
| 9 rollback | test_decode.py; beyond the slack: here |
| 10 gradients through the ring | test_gradients.py |
| 11 order of operations | here |
| 12 T != S aligns bottom-right | here |
| 13 within twice the error of plain attention | test_attention.py, and everywhere `cases.assert_close` |

Equal means equal but for sixteen roundings of the largest element to float32, unless said otherwise: logits reach 16
here, and the rounding of one moves its weight by as many.
"""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case
from hypothesis import given
from hypothesis import strategies as st

import ringjax as rj
from ringjax._kernels.tiles import Tiles

B, T, N, K, H = 2, 11, 4, 2, 4
W = rj.Window
TILES = Tiles(block_size=4, tile_size=4)
SEEDS = st.integers(0, 2**32 - 1)


def draw(seed, queries=T, keys=T):
    rng = np.random.default_rng(seed)
    shapes = (B, queries, N, H), (B, keys, K, H), (B, keys, K, H)
    return rng, *(2 * rng.standard_normal(shape, np.float32) for shape in shapes)


def attention(q, k, v, window, **options):
    return rj.attention(q, k, v, window, return_lse=True, config=TILES, **options)


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        np.testing.assert_array_equal(np.isneginf(x), np.isneginf(y))
        x, y = (np.where(np.isneginf(z), 0, z) for z in (x, y))
        atol = 16 * float(np.finfo(np.float32).eps) * max(1.0, np.abs(x).max(initial=0))
        np.testing.assert_allclose(x, y, rtol=0, atol=atol)


@jax.jit
def wide_and_causal(q, k, v, offset):
    windows = (W.causal(), W.causal(T), W.causal(3 * T, sinks=2), W(2, 0, T), W(None, 0, 3))
    return [attention(q, k, v, window, q_offset=offset) for window in windows]


@given(SEEDS)
def test_a_window_as_wide_as_the_keys_is_causal(seed):
    """flash-attention 1133, 2199: a window of all keys was not causal. Sinks for all keys are a wide window too."""
    rng, q, k, v = draw(seed)
    causal, *others = wide_and_causal(q, k, v, rng.integers(-T, 1, B).astype(np.int32))
    for other in others:
        same(other, causal)


@jax.jit
def windows_of_one(q, k, v):
    return rj.attention(q, k, v, W.causal(1), config=TILES), rj.attention(q, k, v, W(0, 0), softcap=2.0, scale=3.0)


@given(SEEDS)
def test_a_window_of_one_returns_the_value(seed):
    """Bit for bit: the only weight is 1."""
    _, q, k, v = draw(seed)
    for out in windows_of_one(q, k, v):
        np.testing.assert_array_equal(out, np.repeat(v, N // K, axis=2))


@jax.jit
def grouped_and_repeated(q, k, v, sink_logits):
    repeated = (jnp.repeat(x, N // K, axis=2) for x in (k, v))
    options = {"sink_logits": sink_logits}
    return attention(q, k, v, W(3, 1, 2), **options), attention(q, *repeated, W(3, 1, 2), **options)


@given(SEEDS)
def test_grouped_heads_are_repeated_heads(seed):
    rng, q, k, v = draw(seed)
    same(*grouped_and_repeated(q, k, v, rng.standard_normal(N, np.float32)))


ROOM = 9


@jax.jit
def shifted(q, k, v, offset, shift):
    """The same keys, `shift` further on in an array whose other keys are of another segment, and NaN."""
    window = W(4, 1)
    start = jnp.int32(0), shift, jnp.int32(0), jnp.int32(0)
    room = jnp.full((B, T + ROOM, K, H), jnp.nan)
    k_far, v_far = (jax.lax.dynamic_update_slice(room, x, start) for x in (k, v))
    segments = jnp.full((B, T + ROOM), -1, jnp.int32)
    segments = jax.lax.dynamic_update_slice(segments, jnp.zeros((B, T), jnp.int32), start[:2])
    mine = jnp.zeros((B, T), jnp.int32)
    moved = attention(q, k_far, v_far, window, q_offset=offset + shift, segment_ids=mine, kv_segment_ids=segments)
    return attention(q, k, v, window, q_offset=offset), moved


@given(SEEDS, st.integers(0, ROOM))
def test_a_shift_of_positions_changes_nothing(seed, shift):
    """Law 1: only differences of positions matter (sinks apart)."""
    rng, q, k, v = draw(seed)
    same(*shifted(q, k, v, rng.integers(-4, T + 6, B).astype(np.int32), jnp.int32(shift)))


PAST = 25
SLACKS = (0, 1, 4, 7)


@jax.jit
def rings_of_all_capacities(past_k, past_v, lengths, q, k, v):
    """The same stream in rings of several capacities, which it has gone around differently often."""
    outs = []
    for slack in SLACKS:
        ring = rj.RingBuffer.empty(B, K, H, W.causal(5, sinks=2), slack=slack, dtype=jnp.float32)
        ring = ring.append(past_k, past_v, lengths=lengths)
        outs.append((rj.attend(q, k, v, ring, config=TILES)[0], ring.length % (ring.capacity - 2)))
    return outs


@given(SEEDS)
def test_slots_do_not_matter(seed):
    """Law 1: the same visible tokens in other slots, other wrap phases, give the same output."""
    rng, q, k, v = draw(seed, 2, 2)
    past_k, past_v = rng.standard_normal((2, B, PAST, K, H), np.float32)
    lengths = rng.integers(0, PAST + 1, B).astype(np.int32)
    (first, _), *others = rings_of_all_capacities(past_k, past_v, lengths, q, k, v)
    for out, _ in others:
        same(out, first)


def test_the_rings_of_the_test_above_are_in_different_phases():
    """Else it would compare a ring with itself."""
    zeros = np.zeros((B, PAST, K, H), np.float32)
    q, new = np.zeros((B, 2, N, H), np.float32), np.zeros((B, 2, K, H), np.float32)
    outs = rings_of_all_capacities(zeros, zeros, np.array([19, 24], np.int32), q, new, new)
    assert len({tuple(np.asarray(phase)) for _, phase in outs}) > 2


@jax.jit
def together_and_alone(q, k, v, offset, segments, past, lengths):
    """Both rows of a batch; and each row beside another row, which is all zeros, at 0, of length 0."""

    def run(mine):
        def keep(x):
            return jnp.where(mine.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.zeros_like(x))

        x = [keep(y) for y in (q, k, v)]
        out = attention(*x, W(3, 1, 1), q_offset=keep(offset), segment_ids=keep(segments))
        ring = rj.RingBuffer.empty(B, K, H, W.causal(3, sinks=1), dtype=jnp.float32)
        ring = ring.append(keep(past), keep(past), lengths=keep(lengths))
        return out, rj.attend(*x, ring, lengths=keep(lengths % (T + 1)), config=TILES)[0]

    return jax.lax.map(run, jnp.array([[True, True], [True, False], [False, True]]))


@given(SEEDS)
def test_rows_are_independent(seed):
    """A row's answer does not depend on its neighbours (mlx-lm 439: batches mixed)."""
    rng, q, k, v = draw(seed)
    offset, lengths = (rng.integers(0, 20, B).astype(np.int32) for _ in range(2))
    segments = rng.integers(-1, 2, (B, T)).astype(np.int32)
    past = rng.standard_normal((B, 20, K, H), np.float32)
    for x in jax.tree.leaves(together_and_alone(q, k, v, offset, segments, past, lengths)):
        for row in range(B):
            same(x[0, row], x[1 + row, row])


@jax.jit
def in_one_and_in_parts(k, v, first, second):
    """`first + second` tokens at once, and the first of them before the others.

    A chunk rewrites a ring that is not twice as long, and is scattered into a longer one: 7, 15 and 29 slots.
    """
    rings = []
    for window, slack in ((W.causal(4, sinks=2), 0), (W.causal(14), 1), (W.causal(24, sinks=3), 2)):
        ring = rj.RingBuffer.empty(B, K, H, window, slack=slack, dtype=jnp.float32)
        at = first[:, None] + jnp.arange(T, dtype=jnp.int32)[None]
        later = [jnp.take_along_axis(x, at[:, :, None, None], axis=1, mode="clip") for x in (k, v)]
        parts = ring.append(k[:, :T], v[:, :T], lengths=first).append(*later, lengths=second)
        one = ring.append(k, v, lengths=first + second)
        rings.append((one, parts, one.positions()))
    return rings


@given(SEEDS)
def test_append_is_associative(seed):
    """Law 3: slot for slot, also across the end of the ring, where a write that is not split gets clamped."""
    rng, _, k, v = draw(seed, T, 2 * T)
    first, second = (rng.integers(0, T + 1, B).astype(np.int32) for _ in range(2))
    for one, parts, positions in in_one_and_in_parts(k, v, first, second):
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(parts), strict=True):
            np.testing.assert_array_equal(a, b)
        for row in range(B):
            n, window, capacity = first[row] + second[row], one.window, one.capacity
            kept = {p for p in range(n) if p < window.sinks or p >= n - (capacity - window.sinks)}
            assert set(np.asarray(positions[row])) - {-1} == kept


EMPTY = Case("empty", W(2, 1, 1), batch=B, queries=T, keys=7, heads=N, kv_heads=K, head_dim=H, value_dim=H)


@jax.jit
def with_segments(q, k, v, offset, segments, kv_segments):
    options = {"segment_ids": segments, "kv_segment_ids": kv_segments, "sink_logits": jnp.full(N, 3.0)}
    return attention(q, k, v, EMPTY.window, q_offset=offset, **options)


@given(SEEDS)
def test_empty_rows(seed):
    """Law 6: exactly the rows that see no key give 0 and -inf, with sink logits too; no NaN (mlxcel 413)."""
    rng, q, k, v = draw(seed, T, 7)
    offset = rng.integers(-T, 12, B)
    segments, kv_segments = (rng.integers(-1, 3, (B, n)).astype(np.int32) for n in (T, 7))
    case = EMPTY.replace(q_offset=tuple(offset))
    arrays = cases.Arrays(q, k, v, None, segments, kv_segments, None, None)
    empty = ~cases.seen(case, arrays).any(-1)
    out, lse = with_segments(q, k, v, offset.astype(np.int32), segments, kv_segments)
    np.testing.assert_array_equal(np.isneginf(lse), np.broadcast_to(empty[:, None], lse.shape))
    assert np.isfinite(out).all()
    np.testing.assert_array_equal(np.asarray(out)[empty], 0.0)


@jax.jit
def on_clean_and_dirty(past, lengths, n, q, k, v, new):
    """`attend` where nothing unread is anything but zero, and where it is all NaN."""
    window, slack = W.causal(4, sinks=2), 2
    real = (jnp.arange(T, dtype=jnp.int32)[None] < new[:, None])[:, :, None, None]
    ring = rj.RingBuffer.empty(B, K, H, window, slack=slack, dtype=jnp.float32)
    ring = ring.append(past, past, lengths=lengths).rollback(n)
    unread = (ring.positions() < 0)[:, None, :, None]  # never written, or taken back

    def run(dirt):
        dirty = [jnp.where(unread, dirt, x) for x in (ring.k, ring.v)]
        old = rj.RingBuffer(*dirty, ring.length, ring.written, window, slack)
        x = [jnp.where(real, y, dirt) for y in (q, k, v)]
        chunk = rj.attend(*x, old, lengths=new, config=TILES)[0]
        # One token, which takes the other way: the ring alone.
        return chunk, rj.attend(*(y[:, :1] for y in x), old, lengths=jnp.minimum(new, 1))[0]

    # One program for both, so that a difference can only come from the dirt.
    return jax.lax.map(run, jnp.array([0.0, jnp.nan]))


@given(SEEDS)
def test_nothing_unread_leaks(seed):
    """Law 7 (gpt-fast 233), of the ring and of the padding: NaN there, or zero."""
    rng, q, k, v = draw(seed)
    past = rng.standard_normal((B, PAST, K, H), np.float32)
    lengths, new = (rng.integers(0, n + 1, B).astype(np.int32) for n in (PAST, T))
    n = np.minimum(rng.integers(0, 3, B), lengths).astype(np.int32)
    for clean, dirty in on_clean_and_dirty(past, lengths, n, q, k, v, new):
        assert np.isfinite(clean).all()
        same(dirty, clean)


@jax.jit
def ragged_and_one_by_one(past, lengths, q, k, v, new):
    def run(past, lengths, q, k, v, new):
        ring = rj.RingBuffer.empty(q.shape[0], K, H, W.causal(4, sinks=1), slack=1, dtype=jnp.float32)
        ring = ring.append(past, past, lengths=lengths)
        out, ring = rj.attend(q, k, v, ring, lengths=new, config=TILES)
        return out, ring.export()

    rows = [run(*(x[i : i + 1] for x in (past, lengths, q, k, v, new))) for i in range(B)]
    return run(past, lengths, q, k, v, new), jax.tree.map(lambda *x: jnp.concatenate(x), *rows)


@given(SEEDS)
def test_a_ragged_batch_is_its_rows(seed):
    """Law 8: what is stored and what comes out are those of each row alone; padding evicts nothing."""
    rng, q, k, v = draw(seed)
    past = rng.standard_normal((B, PAST, K, H), np.float32)
    lengths, new = (rng.integers(0, n + 1, B).astype(np.int32) for n in (PAST, T))
    batch, rows = ragged_and_one_by_one(past, lengths, q, k, v, new)
    same(batch[0], rows[0])
    for a, b in zip(batch[1], rows[1], strict=True):
        np.testing.assert_array_equal(a, b)


@jax.jit
def rolled_back(past, lengths, n, m, q, k, v):
    ring = rj.RingBuffer.empty(B, K, H, W.causal(4, sinks=1), slack=3, dtype=jnp.float32)
    ring = ring.append(past, past, lengths=lengths).rollback(n).rollback(m)
    chunk, after = rj.attend(q, k, v, ring, config=TILES)
    token, _ = rj.attend(q[:, :1], k[:, :1], v[:, :1], ring)
    return ring.valid, ring.positions(), chunk, token, after.valid, after.positions()


@given(SEEDS)
def test_a_row_rolled_back_too_far_reads_as_empty(seed):
    """Law 9, inside jit: never wrong keys; twice a little too far counts as too far; neighbours are not touched."""
    rng, q, k, v = draw(seed)
    past = rng.standard_normal((B, PAST, K, H), np.float32)
    lengths = rng.integers(0, PAST + 1, B).astype(np.int32)
    n, m = (rng.integers(-1, 4, B).astype(np.int32) for _ in range(2))
    wrong = (n < 0) | (m < 0) | (n + m > 3) | (n + m > lengths)
    valid, positions, chunk, token, after_valid, after_positions = map(
        np.asarray, rolled_back(past, lengths, n, m, q, k, v)
    )
    np.testing.assert_array_equal(valid, ~wrong)
    np.testing.assert_array_equal(after_valid, ~wrong)
    for row in range(B):
        for out in (chunk, token):
            assert np.isfinite(out[row]).all()
            assert np.any(out[row]) != wrong[row]
        for held in (positions, after_positions):
            assert not wrong[row] or (held[row] == -1).all()
        if not wrong[row]:
            now = lengths[row] - n[row] - m[row]
            assert set(range(max(0, now - 3), now)) <= set(positions[row])
            assert positions[row].max() < now


LOGITS = Case("logits", W.causal(5, sinks=2), batch=B, queries=T, keys=T, heads=N, kv_heads=K, head_dim=H, value_dim=H)
LOGITS = LOGITS.replace(sink_logits=True, softcap=2.0, scale=0.9, tiles=TILES)


@jax.jit
def in_order(arrays):
    return cases.run(LOGITS, arrays)


def test_order_of_operations():
    """Law 11: scale, cap, mask, sink logits, softmax. Logits beyond the cap, so that any other order shows."""
    runs = []
    for seed in range(200):
        arrays = cases.arrays(LOGITS, seed)
        arrays = arrays._replace(q=4 * arrays.q)
        runs.append((in_order(arrays), cases.exact(LOGITS, arrays), cases.plain(LOGITS, arrays)))
    for which, what in enumerate(("out", "lse")):
        # All together: of a few numbers, plain attention may get each right by luck.
        cases.assert_close(*(np.concatenate([np.asarray(run[i][which]) for run in runs]) for i in range(3)), what)


@jax.jit
def with_and_without_sink_logits(q, k, v, sink_logits):
    return attention(q, k, v, W.causal(5)), attention(q, k, v, W.causal(5), sink_logits=sink_logits)


@given(SEEDS)
def test_sink_logits_take_their_share_and_leave_the_lse(seed):
    """Law 11: they are neither scaled, nor capped, nor part of the lse."""
    rng, q, k, v = draw(seed)
    sink_logits = 3 * rng.standard_normal(N, np.float32)
    (out, lse), (shared, same_lse) = with_and_without_sink_logits(q, k, v, sink_logits)
    np.testing.assert_array_equal(lse, same_lse)
    share = 1 / (1 + np.exp(sink_logits[None, :, None] - np.asarray(lse, np.float64)))
    same(shared, np.moveaxis(share, 1, 2)[..., None] * np.asarray(out, np.float64))


@jax.jit
def last_queries(q, k, v):
    window = W.causal(4, sinks=2)
    whole = attention(q, k, v, window)
    parts = [(n, attention(q[:, -n:], k, v, window)) for n in (1, 3, 8)]
    return [((whole[0][:, -n:], whole[1][:, :, -n:]), part) for n, part in parts]


@given(SEEDS)
def test_fewer_queries_than_keys_are_the_last_ones(seed):
    """Law 12 (lalamo 200, keras-hub 1738: masks aligned top-left)."""
    for whole, part in last_queries(*draw(seed)[1:]):
        same(part, whole)


@jax.jit
def more_queries(q, k, v):
    return attention(q, k[:, -6:], v[:, -6:], W.causal(4)), attention(q[:, -6:], k[:, -6:], v[:, -6:], W.causal(4))


@given(SEEDS)
def test_queries_before_the_first_key_see_nothing(seed):
    """Law 12 with T > S (flash-attention 1778)."""
    (out, lse), last = more_queries(*draw(seed)[1:])
    same((out[:, -6:], lse[:, :, -6:]), last)
    np.testing.assert_array_equal(out[:, :-6], 0.0)
    np.testing.assert_array_equal(lse[:, :, :-6], -np.inf)


@jax.jit
def with_another_future(q, k, v, other_k, other_v, at):
    later = (jnp.arange(T)[None] > at[:, None])[:, :, None, None]
    mixed = [jnp.where(later, y, x) for x, y in ((k, other_k), (v, other_v))]
    windows = (W.causal(4, sinks=2), W.causal(4), W.causal())
    return [(attention(q, k, v, w), attention(q, *mixed, w)) for w in windows]


@given(SEEDS)
def test_the_future_changes_nothing(seed):
    """jax 39576, litgpt 2182: keys after a query were seen. Bit for bit."""
    rng, q, k, v = draw(seed)
    at = rng.integers(0, T, B)
    other = rng.standard_normal((2, B, T, K, H), np.float32)
    for (out, lse), (other_out, other_lse) in with_another_future(q, k, v, *other, at.astype(np.int32)):
        for row in range(B):
            np.testing.assert_array_equal(out[row, : at[row] + 1], other_out[row, : at[row] + 1])
            np.testing.assert_array_equal(lse[row, :, : at[row] + 1], other_lse[row, :, : at[row] + 1])


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_a_window_of_w_sees_w_keys(size):
    """transformers 39408, maxtext 4289, TransformerEngine 1197: one key too many or too few. One-hot values count."""
    q, k, v = jnp.zeros((1, 12, 1, H)), jnp.zeros((1, 12, 1, H)), jnp.eye(12)[None, :, None]
    out = np.asarray(rj.attention(q, k, v, W.causal(size), config=TILES))[0, :, 0]
    for t in range(12):
        np.testing.assert_array_equal(np.flatnonzero(out[t]), np.arange(max(0, t - size + 1), t + 1))
