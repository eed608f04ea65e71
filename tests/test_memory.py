"""A stream of a million tokens in memory that does not grow by a byte."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle

import ringjax as rj

WINDOW, HEADS, DIM = rj.Window.causal(16, sinks=2), 2, 8
TOKENS, SLICE = 1_000_000, 50_000
# Token p is the sum of a row of each table: no two positions within 97 * 101 are alike.
TABLES = [np.random.default_rng(n).standard_normal((n, HEADS + 2, DIM)).astype(np.float32) for n in (97, 101)]


def token(position):
    """Query [1, 1, N, H], key and value [1, 1, 1, H] at a position."""
    rows = sum(jnp.asarray(table)[position % len(table)] for table in TABLES)[None, None]
    return rows[:, :, :HEADS], rows[:, :, HEADS : HEADS + 1], rows[:, :, HEADS + 1 :]


@partial(jax.jit, donate_argnums=0)
def advance(state):
    def body(_, carry):
        ring, _ = carry
        out, ring = rj.attend(*token(ring.length[0]), ring)
        return ring, out

    return jax.lax.fori_loop(0, SLICE, body, state)


def live_bytes():
    return sum(x.nbytes for x in jax.live_arrays())


def test_a_million_tokens():
    """Law 5: live bytes flat, one executable, donated rings; and after them all the answer is still attention."""
    ring = rj.RingBuffer.empty(1, 1, DIM, WINDOW, dtype=jnp.float32)
    state = (ring, jnp.zeros((1, 1, HEADS, DIM)))
    planned = advance.lower(state).compile().memory_analysis()
    state_bytes = sum(x.nbytes for x in jax.tree.leaves(state))
    assert planned.alias_size_in_bytes == planned.output_size_in_bytes - planned_table(state)
    assert planned.temp_size_in_bytes < 4 * state_bytes

    before = live_bytes()
    seen = set()
    for _ in range(TOKENS // SLICE):
        state = advance(state)
        jax.block_until_ready(state)
        seen.add(live_bytes() - before)
    assert seen == {0}
    assert advance._cache_size() == 1

    ring, out = state
    assert int(ring.length[0]) == TOKENS
    held = np.array([0, 1, *range(TOKENS - 16, TOKENS)])
    np.testing.assert_array_equal(np.sort(np.asarray(ring.positions())[0]), held)
    rows = sum(table[held % len(table)] for table in TABLES)[None]
    wanted, _ = oracle.attention(
        rows[:, -1:, :HEADS],
        rows[:, :, HEADS : HEADS + 1],
        rows[:, :, HEADS + 1 :],
        left=None,
        right=None,
        sinks=0,
        q_positions=[0],
        k_positions=np.arange(len(held)),
    )
    np.testing.assert_allclose(out, wanted, rtol=0, atol=1e-5)


def planned_table(state):
    """Bytes of the table of pointers by which XLA's CPU client returns a tuple."""
    return 8 * len(jax.tree.leaves(state)) if jax.default_backend() == "cpu" else 0
