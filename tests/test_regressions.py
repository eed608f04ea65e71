"""Bugs of other projects that could occur here: one test each, named after what went wrong.

Not here, since they concern generation, the encoder-decoder state or layers: Rapid-MLX PR 1124 (test_generation.py),
vLLM PR 51756 (test_layers_in_a_loop.py), transformers 45521 (test_state.py) and 46612 (test_continuous_batching.py).
"""

from functools import cache

import cases
import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import ringjax as rj

W = rj.Window
SIZES = pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
HEADS, KV_HEADS, HEAD_DIM, LENGTH = 4, 2, 8, 27
attend = jax.jit(rj.attend)
attention = jax.jit(rj.attention, static_argnames=("window", "q_offset", "return_lse"))
append = jax.jit(rj.RingBuffer.append)
rollback = jax.jit(rj.RingBuffer.rollback)


@cache
def tokens(batch=1, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(HEADS, HEAD_DIM), (KV_HEADS, HEAD_DIM), (KV_HEADS, HEAD_DIM)]
    return [rng.standard_normal((batch, LENGTH, *shape)).astype(np.float32) for shape in shapes]


def empty(window, slack=0, batch=1):
    return rj.RingBuffer.empty(batch, KV_HEADS, HEAD_DIM, window, slack=slack, dtype="float32")


def stream(ring, chunks, arrays):
    """Outputs of a stream that comes in chunks of these lengths, and the ring after it."""
    outs, at = [], int(ring.length[0])
    for length in chunks:
        out, ring = attend(*(x[:, at : at + length] for x in arrays), ring)
        outs.append(out)
        at += length
    return jnp.concatenate(outs, axis=1), ring


plain = jax.jit(cases.plain_attention)


def assert_exact(out, arrays, window, positions, what=""):
    """The outputs at these positions are those of the oracle on the whole stream, within law 13's bound."""
    q, k, v = arrays[0][:, positions], arrays[1], arrays[2]
    sides = {"left": window.left, "right": window.right, "sinks": window.sinks}
    seen = {"q_positions": np.asarray(positions), "k_positions": np.arange(LENGTH)}
    exact, _ = oracle.attention(q, k, v, **sides, **seen)
    # Plain attention to every position: one shape, one compilation.
    mask = oracle.visible(**sides, q_positions=np.arange(LENGTH), k_positions=np.arange(LENGTH))
    cases.assert_close(out, exact, np.asarray(plain(*arrays, None, mask)[0])[:, positions], what)


def held(ring, row=0):
    return sorted(p for p in np.asarray(ring.positions())[row].tolist() if p >= 0)


# --- How many keys ---


@SIZES
def test_a_window_sees_as_many_keys_as_it_says(size):
    """transformers 39408, maxtext PR 4289, Megatron-Bridge PR 2656, onnxruntime PR 25927, zml PR 763: W + 1 keys.

    Also TransformerEngine 1197: implementations that differed by one key passed, as the tests' windows were too large.
    The values are one-hot, so that the output says which keys were seen; W is small.
    """
    _, k, _ = tokens()
    q, v = np.zeros((1, LENGTH, HEADS, HEAD_DIM), np.float32), np.eye(LENGTH, dtype=np.float32)[None, :, None]
    v = np.repeat(v, KV_HEADS, axis=2)
    out = np.asarray(attention(q, k, v, W.causal(size)))
    ring = rj.RingBuffer.empty(1, KV_HEADS, HEAD_DIM, W.causal(size), value_dim=LENGTH, dtype="float32")
    streamed = []
    for t in range(LENGTH):
        one, ring = attend(q[:, t : t + 1], k[:, t : t + 1], v[:, t : t + 1], ring)
        streamed.append(np.asarray(one))
    for found in (out, np.concatenate(streamed, axis=1)):
        for t in range(LENGTH):
            seen = np.flatnonzero(found[0, t, 0]).tolist()
            assert seen == list(range(max(0, t - size + 1), t + 1))
            np.testing.assert_allclose(found[0, t, 0, seen], 1 / len(seen), rtol=1e-6)


@pytest.mark.parametrize("total", [4, 5, 6])
def test_a_prompt_exactly_as_long_as_the_window(total):
    """transformers 37574: at a total length of W the cache evicted one key too early. W is 5."""
    out, _ = stream(empty(W.causal(5)), [total, 1, 1], tokens())
    assert_exact(out, tokens(), W.causal(5), range(total + 2))


@SIZES
def test_a_ring_that_is_not_exactly_full_or_has_just_wrapped(size):
    """transformers PR 47708: the start index `past % W` was wrong there."""
    ring = empty(W.causal(size))
    for t in range(2 * size + 2):
        assert held(ring) == list(range(max(0, t - size), t))
        ring = append(ring, *(x[:, t : t + 1] for x in tokens()[1:]))


def test_a_window_as_wide_as_the_keys_is_causal():
    """flash-attention 1133: a window of (S - 1, 0) was not causal attention."""
    causal = attention(*tokens(), W.causal())
    for size in (LENGTH, LENGTH + 1, 1000):
        np.testing.assert_allclose(attention(*tokens(), W.causal(size)), causal, rtol=0, atol=1e-6)
    assert_exact(causal, tokens(), W.causal(), range(LENGTH))


def test_a_window_needs_no_mask():
    """jax 32300: without a mask `local_window_size` was ignored. Here nothing else is ever given."""
    assert_exact(attention(*tokens(), W(2, 2)), tokens(), W(2, 2), range(LENGTH))
    assert float(jnp.abs(attention(*tokens(), W(2, 2)) - attention(*tokens(), W.full())).max()) > 0.1


@pytest.mark.parametrize("window", [W.causal(5), W(LENGTH, 0), W.causal(), W.causal(3, sinks=2)], ids=str)
def test_the_future_is_not_seen(window):
    """jax PR 39576: with (L, 0) cuDNN saw every later key, forward and backward."""
    q, k, v = (jnp.asarray(x) for x in tokens())
    now = 11

    @jax.jit
    def past(q, k, v):
        return rj.attention(q, k, v, window)[:, : now + 1]

    clean, vjp = jax.vjp(past, q, k, v)
    other = [x.at[:, now + 1 :].add(7.0) for x in (q, k, v)]
    np.testing.assert_array_equal(past(*other), clean)
    for dx in vjp(jnp.ones_like(clean)):
        assert not dx[:, now + 1 :].any() and bool(dx[:, now - 1].any())


# --- Rows that see nothing ---


def test_rows_that_see_nothing_are_zero():
    """flash-attention 2199, 1778 (T > S), 1947 and 334: NaN where a row of queries has no key, mostly backward."""
    q, k, v = (jnp.asarray(x) for x in tokens())
    k, v = k[:, :5], v[:, :5]  # the first 22 queries come before key 0

    def loss(q, k, v):
        out, lse = rj.attention(q, k, v, W.causal(3), return_lse=True)
        return (out**2).sum() + jnp.where(lse == -jnp.inf, 0.0, lse).sum(), (out, lse)

    (dq, dk, dv), (out, lse) = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    assert not out[:, :22].any() and bool(out[:, 22:].any(axis=(2, 3)).all())
    assert bool((lse[:, :, :22] == -jnp.inf).all()) and bool(jnp.isfinite(lse[:, :, 22:]).all())
    chex.assert_tree_all_finite((dq, dk, dv))
    assert not dq[:, :22].any() and bool(dq[:, 23:].any(axis=(2, 3)).all())


def test_a_chunk_longer_than_the_window_in_the_middle_of_a_stream():
    """mlxcel 413: with an offset and a chunk longer than W, rows were masked altogether: NaN, then `<pad>`."""
    for chunks in ([3, 9], [7, 20]):
        out, _ = stream(empty(W.causal(4)), chunks, tokens())
        assert_exact(out, tokens(), W.causal(4), range(sum(chunks)), str(chunks))


# --- Chunks and wraps ---


@pytest.mark.parametrize("length", [2, 3, 5, 7])
def test_more_than_one_token_on_a_full_ring(length):
    """litgpt 2182: T > W broke causality; the workaround that it shipped, T <= W, broke it on a full ring.

    Also transformers PR 40893: more than one token after the static cache was full.
    """
    out, _ = stream(empty(W.causal(5)), [11, length, length], tokens())
    assert_exact(out, tokens(), W.causal(5), range(11 + 2 * length))


def test_a_prompt_longer_than_the_window_returns_all_of_its_outputs():
    """transformers 30642: a prefill longer than W saw only its own last W keys."""
    for sinks in (0, 2):
        out, ring = stream(empty(W.causal(5, sinks)), [LENGTH], tokens())
        assert_exact(out, tokens(), W.causal(5, sinks), range(LENGTH))
        assert held(ring) == [*range(sinks), *range(LENGTH - 5, LENGTH)]


def test_a_chunk_as_long_as_the_ring_leaves_its_first_queries_their_windows():
    """executorch PR 20346: a chunk of 2 W on a ring of 2 W overwrote what its first queries see."""
    out, _ = stream(empty(W.causal(5), slack=5), [7, 10, 10], tokens())
    assert_exact(out, tokens(), W.causal(5), range(LENGTH))


def test_a_chunk_longer_than_the_ring_has_no_duplicate_slots():
    """executorch PR 19213: `index_copy` with a slot twice keeps either token."""
    for length in (9, 10, 17, LENGTH):
        ring = append(empty(W.causal(4), slack=1), *(x[:, :length] for x in tokens()[1:]))
        exported = ring.export()
        np.testing.assert_array_equal(exported.k, tokens()[1][:, length - 5 : length])
        np.testing.assert_array_equal(exported.v, tokens()[2][:, length - 5 : length])


def test_an_append_that_crosses_the_end_of_the_ring():
    """EasyDeL 0.3.0: 6 tokens and then 4 into 8 slots left two slots that were never written and counted as valid.

    Also google-deepmind/gemma with chunks of 6, 4 and 2 into 8 slots: positions out of order.
    """
    ring = empty(W.causal(8))
    for chunk, expected in ((slice(0, 6), (0, 6)), (slice(6, 10), (2, 10)), (slice(10, 12), (4, 12))):
        ring = append(ring, *(x[:, chunk] for x in tokens()[1:]))
        assert held(ring) == list(range(*expected))
        np.testing.assert_array_equal(ring.export().k[:, : len(held(ring))], tokens()[1][:, slice(*expected)])
    out, _ = stream(empty(W.causal(8)), [6, 4, 2], tokens())
    assert_exact(out, tokens(), W.causal(8), range(12))


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_the_last_queries_stand_at_the_last_keys(count):
    """lalamo PR 200, keras-hub PR 1738, executorch PR 21749: masks built as if the queries began at key 0."""
    q, k, v = tokens()
    out = attention(q[:, -count:], k, v, W.causal(5, sinks=1))
    assert_exact(out, tokens(), W.causal(5, sinks=1), range(LENGTH - count, LENGTH))


# --- Rolling back ---


def test_trimming_after_the_wrap():
    """mlx-lm 0.32.2, mlx-swift-lm 424, ollama PR 14912: after 12 tokens (W = 8), 2 back and 1 more, 11 was there."""
    window, other = W.causal(8), tokens(seed=1)
    ring = append(empty(window, slack=2), *(x[:, :12] for x in tokens()[1:]))
    ring = rollback(ring, 2)
    assert ring.length.tolist() == [10] and held(ring) == list(range(2, 10))
    changed = [np.concatenate([a[:, :10], b[:, 10:]], axis=1) for a, b in zip(tokens(), other, strict=True)]
    out, ring = stream(ring, [1, 1, 1], changed)
    assert_exact(out, changed, window, range(10, 13))
    assert held(ring) == list(range(3, 13))


def test_trimming_without_room_is_refused():
    """mlx-lm again: `trim` returned 2 although the cache was not trimmable. Here: an error, or in jit an empty row."""
    ring = append(empty(W.causal(8)), *(x[:, :12] for x in tokens()[1:]))
    with pytest.raises(ValueError, match="rollback: n must be between 0 and the slack, 0"):
        ring.rollback(2)
    assert held(rollback(ring, 2)) == []


def test_positions_after_a_partial_removal():
    """llama.cpp 29045, 13194 and PR 13833: the stream's end after a removal, and room for it past the window."""
    ring = append(empty(W.causal(4, sinks=1), slack=3), *(x[:, :20] for x in tokens()[1:]))
    assert held(ring) == [0, *range(13, 20)]
    for n in (1, 2):
        ring = rollback(ring, n)
    assert ring.length.tolist() == [17] and held(ring) == [0, *range(13, 17)]
    out, _ = stream(ring, [2, 6], tokens())
    assert_exact(out, tokens(), W.causal(4, sinks=1), range(17, 25))


# --- Storage ---


def test_an_export_is_in_logical_order():
    """mlx-vlm 1715: reuse of a prefix sliced the ring's storage by logical length."""
    for total in (3, 8, 21):
        ring = append(empty(W.causal(5, sinks=2), slack=1), *(x[:, :total] for x in tokens()[1:]))
        exported = ring.export()
        positions = [p for p in exported.positions[0].tolist() if p >= 0]
        assert positions == sorted(positions) == held(ring)
        np.testing.assert_array_equal(exported.k[:, : len(positions)], tokens()[1][:, positions])
        again = rj.RingBuffer.restore(exported, W.causal(5, sinks=2), slack=4)
        for same in (ring, again):
            out, _ = stream(same, [3], tokens())
            assert_exact(out, tokens(), W.causal(5, sinks=2), range(total, total + 3))


def test_a_ragged_batch_is_its_rows_one_by_one():
    """mlx-lm 439 and PR 738: padding was stored, took the place of tokens, and mixed the rows of a batch."""
    window, real = W.causal(4, sinks=1), [[5, 11, 0], [1, 0, 7], [6, 3, 11]]
    arrays = tokens(batch=3)
    ring, at = empty(window, slack=1, batch=3), np.zeros(3, int)
    for lengths in real:
        chunk = [np.full((3, 11, *x.shape[2:]), np.nan, np.float32) for x in arrays]
        for padded, x in zip(chunk, arrays, strict=True):
            for row, n in enumerate(lengths):
                padded[row, :n] = x[row, at[row] : at[row] + n]
        out, ring = attend(*chunk, ring, lengths=np.array(lengths, np.int32))
        for row, n in enumerate(lengths):
            if n:
                single = [x[row : row + 1] for x in arrays]
                assert_exact(out[row : row + 1, :n], single, window, range(at[row], at[row] + n), f"row {row}")
            assert not out[row, n:].any()
        at += lengths
    assert ring.length.tolist() == at.tolist()


def test_slots_never_written_are_not_attended():
    """gpt-fast 233: uninitialised slots were seen. NaN also shows updates that multiply by a one-hot vector."""
    ring = empty(W.causal(8, sinks=2), slack=2)
    ring = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan) if x.ndim == 4 else x, ring)
    out, ring = stream(ring, [1, 1, 4, 1], tokens())
    assert_exact(out, tokens(), W.causal(8, sinks=2), range(7))
    assert int(jnp.isnan(ring.k).any(axis=(1, 3)).sum()) == ring.capacity - 7


def test_the_ring_does_not_grow():
    """mlx-lm 1914, SGLang 33805, VeloxQuant-MLX 274: appends of many tokens never evicted, while `len` said otherwise.

    google-deepmind/gemma PR 648: local layers kept the whole stream. Bytes on the device are counted, not lengths.
    """
    ring = empty(W.causal(5, sinks=1), slack=2)
    expected = 2 * KV_HEADS * (1 + 5 + 2) * HEAD_DIM * 4 + 2 * 4
    _, k, v = tokens()

    def held_bytes():
        return sum(x.nbytes for x in jax.tree.leaves(ring))

    live = None
    for step in range(40):
        length = (1, 9, 2)[step % 3]
        ring = rollback(append(ring, k[:, :length], v[:, :length]), step % 2)
        assert held_bytes() == expected and ring.capacity == 8
        if step >= 6:
            found = sum(x.nbytes for x in jax.live_arrays())
            live = live or found
            assert found == live
    assert ring.length.tolist() == [14 * 1 + 13 * 9 + 13 * 2 - 20]


# --- Compilation ---


def test_one_executable_serves_every_step():
    """transformers 44609, tt-xla 3688: a length that was a Python int compiled anew at every step. 3 W steps here."""
    step = jax.jit(chex.assert_max_traces(rj.attend, n=1))
    ring, size = empty(W.causal(8, sinks=1), slack=2), 8
    for t in range(3 * size):
        _, ring = step(*(x[:, t : t + 1] for x in tokens()), ring)
        ring = rollback(ring, 0)
    assert step._cache_size() == 1 and ring.length.tolist() == [3 * size]


@pytest.mark.parametrize("batch", [1, 2])
def test_no_step_of_a_loop_copies_the_ring(batch):
    """jax 17845 and 40101, xla 45912: an update inside a loop copied the whole buffer, or donation did not alias it."""
    ring = rj.RingBuffer.empty(batch, KV_HEADS, 64, W.causal(4096), dtype="float32")
    one = jax.ShapeDtypeStruct((batch, 1, KV_HEADS, 64), jnp.float32)

    def decode(ring, q, k, v):
        def step(carry, _):
            ring, q = carry
            q, ring = rj.attend(q, k, v, ring)
            return (ring, q), None

        return jax.lax.scan(step, (ring, q), None, length=16)[0]

    for function in (decode, rj.attend):
        arguments, donated = ((ring, one, one, one), 0) if function is decode else ((one, one, one, ring), 3)
        compiled = jax.jit(function, donate_argnums=donated).lower(*arguments).compile()
        memory = compiled.memory_analysis()
        assert memory.alias_size_in_bytes >= ring.k.nbytes + ring.v.nbytes
        assert memory.temp_size_in_bytes < ring.k.nbytes / 2  # blocks of keys and values, and no ring


# --- Serving ---


def test_a_quantised_ring_past_its_window():
    """mlx-lm 1573 and 1583, transformers' QuantizedCache: rings in 8 bits were refused; ik_llama 1205: wrong past W.

    The outputs after the first wrap are as near as those before it.
    """
    window = W.causal(5, sinks=1)
    ring = rj.RingBuffer.empty(1, KV_HEADS, HEAD_DIM, window, slack=1, dtype="int8")
    out, _ = stream(ring, [1] * LENGTH, tokens())
    index = np.arange(LENGTH)
    sides = {"left": window.left, "right": 0, "sinks": 1, "q_positions": index, "k_positions": index}
    exact, _ = oracle.attention(*tokens(), **sides)
    error = np.sqrt(((out - exact) ** 2).sum((0, 2, 3)) / (exact**2).sum((0, 2, 3)))
    assert error[:5].max() < 0.02 and error[5:].max() < 0.02


def test_a_row_takes_no_room_from_another():
    """ollama PR 12543, llama.cpp 14097: what one row no longer saw was not freed, until no other found a slot."""
    window = W.causal(5, sinks=1)
    ring, (_, k, v) = empty(window, batch=2), tokens(batch=2)
    for turn in range(6):
        # Row 0 goes on and on, row 1 is a new stream each time.
        ring = append(ring.reset(np.array([False, True])), k, v, lengths=np.array([LENGTH, 1 + turn], np.int32))
        assert held(ring, 1) == list(range(1 + turn))
        total = LENGTH * (turn + 1)
        assert held(ring, 0) == [0, *range(total - 5, total)] and ring.capacity == 6


def test_sinks_do_not_drift():
    """transformers 35350 and 33691: SinkCache rotated its sinks again at every step, and lost their positions.

    Keys are rotated once, at their true positions; 20,000 steps later the sinks are the same bit for bit.
    """
    window = W.causal(4, sinks=2)
    rotate = jax.jit(rj.apply_rotary)
    q, k, v = tokens()
    rotated = [np.asarray(rotate(x, np.arange(LENGTH, dtype=np.int32))) for x in (q, k)] + [v]
    ring, outs = empty(window), []
    for t in range(LENGTH):
        at = ring.length[:, None]
        new = (rotate(q[:, t : t + 1], at), rotate(k[:, t : t + 1], at), v[:, t : t + 1])
        out, ring = attend(*new, ring)
        outs.append(out)
    assert_exact(jnp.concatenate(outs, axis=1), rotated, window, range(LENGTH))

    @jax.jit
    def far(ring):
        def step(ring, _):
            return ring.append(rj.apply_rotary(k[:, :1], ring.length[:, None]), v[:, :1]), None

        return jax.lax.scan(step, ring, length=20_000)[0]

    before, after = ring.export(), far(ring).export()
    assert after.positions[0].tolist() == [0, 1, *range(LENGTH + 20_000 - 4, LENGTH + 20_000)]
    np.testing.assert_array_equal(after.k[:, :2], before.k[:, :2])
    last = rotate(k[:, :1], np.array([LENGTH + 20_000 - 1], np.int32))
    np.testing.assert_allclose(after.k[:, -1:], last, rtol=0, atol=1e-5)


def test_what_can_be_reused_is_what_every_layer_still_has():
    """TensorRT-LLM PR 2983 and 3424: whether a prefix could be reused was asked of the largest window only."""

    def step(tokens, state):
        x = jnp.broadcast_to(tokens[..., None, None], (*tokens.shape, 1, 1)).astype(jnp.float32)
        return x[..., 0], [rj.attend(x, x, x, ring)[1] for ring in state]

    def layers(*slacks):
        sizes = (100, 4)
        return [
            rj.RingBuffer.empty(1, 1, 1, W.causal(n), slack=s, dtype="float32")
            for n, s in zip(sizes, slacks, strict=True)
        ]

    prompt = np.arange(12, dtype=np.int32)[None]
    for slacks in ((9, 9), (9, 3), (0, 9)):
        _, state = rj.prefill(step, layers(*slacks), prompt, prefill_size=12)
        if min(slacks) < 6:
            with pytest.raises(ValueError, match=f"need slack of at least 6, got {min(slacks)}"):
                rj.prefill(step, state, prompt[:, :7], prefill_size=12)
        else:
            _, state = rj.prefill(step, state, prompt[:, :7], prefill_size=12)
            assert [ring.length.tolist() for ring in state] == [[7], [7]]
            assert held(state[1])[-4:] == [3, 4, 5, 6]
