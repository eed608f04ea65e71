"""Rows that come, go and change places in a batch of fixed shape: each is what it would be alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import DIM, HEADS, KV_HEADS, LAYERS, VOCABULARY, parameters, prompts, rings, step

import ringjax as rj

PARAMETERS = parameters()
SLOTS, LONGEST = 3, 9
# Logits reach 50. In 8 bits a number between two steps may go to either.
ROUNDING = {"float32": 1e-3, "int8": 0.3}
run = jax.jit(lambda tokens, state, lengths: step(PARAMETERS, tokens, state, lengths=lengths))
insert = jax.jit(lambda state, row, one: [ring.insert(row, x) for ring, x in zip(state, one, strict=True)])
select = jax.jit(lambda state, rows: [ring.select(rows) for ring in state])
reset = jax.jit(lambda state, rows: [ring.reset(rows) for ring in state])


@pytest.mark.parametrize("dtype", ["int8"])  # floats: test_examples.py, in a server's loop
def test_rows_that_come_and_go_are_what_they_are_alone(dtype):
    """Prompts of any length into any row at any time, rows that wait, leave, and trade places; across many wraps.

    Beside the batch each request has a batch of its own, of one row; the executables are as many as the functions.
    """
    rng = np.random.default_rng(0)
    state, alone = rings(SLOTS, dtype=dtype), [None] * SLOTS
    before = [f._cache_size() for f in (run, insert, select, reset)]
    decoded = longest = 0
    for turn in range(80):
        row = int(rng.integers(SLOTS))
        if turn % 8 == 0:
            length = np.array([rng.integers(1, LONGEST + 1)], np.int32)
            _, one = run(prompts(turn, 1, LONGEST), rings(1, dtype=dtype), length)
            state, alone[row] = insert(state, np.int32(row), one), one
        elif turn % 17 == 5:
            state, alone[row] = reset(state, np.arange(SLOTS) == row), None
        elif turn % 11 == 4:
            rows = rng.permutation(SLOTS).astype(np.int32)
            state, alone = select(state, rows), [alone[i] for i in rows]
        else:
            tokens = prompts(turn, SLOTS, 1)
            active = np.array([one is not None and rng.random() < 0.9 for one in alone])
            logits, state = run(tokens, state, active.astype(np.int32))
            for i in np.flatnonzero(active):
                exact, alone[i] = run(tokens[i : i + 1], alone[i], np.ones(1, np.int32))
                np.testing.assert_allclose(logits[i], exact[0], rtol=0, atol=ROUNDING[dtype])
                decoded += 1
            lengths = [0 if one is None else int(one[0].length[0]) for one in alone]
            assert state[0].length.tolist() == lengths
            longest = max(longest, *lengths)
    assert decoded > 60 and longest > 3 * LAYERS[1].size
    after = [f._cache_size() for f in (run, insert, select, reset)]
    assert [b - a for a, b in zip(before, after, strict=True)] == [3, 1, 1, 1]  # a prompt, a batch, a row alone


def test_a_beam_search_reorders_its_rings():
    """Against one that computes every hypothesis anew: transformers 46612 skipped the reordering, silently."""
    width, steps, prompt = 3, 14, prompts(0, 1, LONGEST)

    def best(scores, logits):
        total = scores[:, None] + np.asarray(jax.nn.log_softmax(logits, axis=-1), np.float64)
        order = np.argsort(-total.ravel(), kind="stable")[:width]
        return total.ravel()[order], (order // VOCABULARY).astype(np.int32), (order % VOCABULARY).astype(np.int32)

    # All hypotheses begin alike: but for one, they do not count at first.
    start = np.where(np.arange(width) == 0, 0.0, -np.inf)
    logits, one = run(prompt, rings(1), np.array([LONGEST], np.int32))
    state, found, scores = select(one, np.zeros(width, np.int32)), np.zeros((width, 0), np.int32), start
    logits = jnp.repeat(logits[:, -1], width, axis=0)
    reordered = 0
    for _ in range(steps):
        scores, parents, tokens = best(scores, logits)
        reordered += parents.tolist() != list(range(width))
        found = np.concatenate([found[parents], tokens[:, None]], axis=1)
        logits, state = run(tokens[:, None], select(state, parents), np.ones(width, np.int32))
        logits = logits[:, -1]
    assert reordered > steps // 4

    wanted, sums = np.zeros((width, 0), np.int32), start
    for count in range(steps):
        rows = np.zeros((width, LONGEST + steps), np.int32)
        rows[:, :LONGEST], rows[:, LONGEST : LONGEST + count] = prompt, wanted
        logits, _ = run(rows, rings(width), np.full(width, LONGEST + count, np.int32))
        sums, parents, tokens = best(sums, logits[:, LONGEST + count - 1])
        wanted = np.concatenate([wanted[parents], tokens[:, None]], axis=1)
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_allclose(scores, sums, rtol=0, atol=1e-3)


def test_rows_of_a_state_with_three_rings():
    """`select`, `insert` and `reset` take all three rings and the decoder's positions along."""
    config = rj.RingBufferConfig(buffer_size=4, sinks=1, slack=2)

    def made(batch):
        return rj.init_state(config, batch, kv_heads=KV_HEADS, head_dim=DIM, dtype=jnp.float32)

    def tokens(seed, length, batch=SLOTS):
        rng = np.random.default_rng(seed)
        return [rng.standard_normal((batch, length, n, DIM)).astype(np.float32) for n in (HEADS, KV_HEADS, KV_HEADS)]

    @jax.jit
    def decode(state, q, k, v):
        return rj.decode(q, k, v, state, position=state.last_calculated + 1)

    encode = jax.jit(rj.encode)
    state, source = made(SLOTS), tokens(0, 7)
    _, state = encode(*source, state, lengths=np.array([7, 2, 5], np.int32))
    for seed in range(6):
        _, state = decode(state, *tokens(seed, 1))
    new = tokens(9, 1)
    exact, _ = decode(state, *new)
    rows = np.array([2, 0, 0], np.int32)
    moved, _ = decode(jax.jit(rj.BufferState.select)(state, rows), *(x[rows] for x in new))
    np.testing.assert_allclose(moved, exact[rows], rtol=0, atol=1e-6)
    # Row 1 anew: emptied, or taken by a request that was encoded alone.
    emptied = jax.jit(rj.BufferState.reset)(state, np.array([False, True, False]))
    assert emptied.last_calculated.tolist() == [5, -1, 5]
    assert [getattr(emptied, name).length.tolist() for name in ("forward", "backward", "feedback")] == [
        [7, 0, 5],
        [0, 0, 0],
        [6, 0, 6],
    ]
    assert jax.jit(rj.BufferState.reset)(state).last_calculated.tolist() == [-1] * SLOTS
    _, one = encode(*(x[1:2] for x in source), made(1), lengths=np.array([4], np.int32))
    both, _ = decode(jax.jit(rj.BufferState.insert)(emptied, np.int32(1), one), *new)
    np.testing.assert_allclose(np.delete(both, 1, 0), np.delete(exact, 1, 0), rtol=0, atol=1e-6)
    _, alone = encode(*source, made(SLOTS), lengths=np.array([0, 4, 0], np.int32))
    np.testing.assert_allclose(both[1], decode(alone, *new)[0][1], rtol=0, atol=1e-6)
    with pytest.raises(TypeError) as raised:
        state.insert(0, state.forward)
    assert str(raised.value) == "BufferState.insert: other must be a BufferState, got RingBuffer."
