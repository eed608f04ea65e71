"""Wrong calls: what is raised, the exact first line of its message, and that no ring was touched.

One row per wrong call, here or in wrong_calls.py and wrong_state_calls.py. A new public function adds its rows to a
list of its own and that list to `WRONG`. `x` holds what rows share: see `fixtures`.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from wrong_calls import ATTEND, ATTENTION, MERGE, F, Q, Wrong
from wrong_state_calls import CONFIG, STATES

import ringjax as rj


@pytest.fixture(scope="module")
def fixtures():
    """Arrays that fit each other and a ring that has wrapped, all with B=2, T=3, N=4, K=2, H=8, Hv=4."""
    q, k, v = jnp.ones((2, 3, 4, 8)), jnp.ones((2, 3, 2, 8)), jnp.ones((2, 3, 2, 4))
    window = rj.Window.causal(4, sinks=1)
    ring = rj.RingBuffer.empty(2, 2, 8, window, slack=2, value_dim=4, dtype=jnp.float32)
    tokens = np.random.default_rng(0).standard_normal((2, 9, 2, 8)).astype(np.float32)
    ring = ring.append(tokens, tokens[..., :4], lengths=jnp.array([9, 5]))
    return types.SimpleNamespace(q=q, k=k, v=v, window=window, ring=ring, exported=ring.export(), out=q, lse=q[..., 0])


EMPTY = [
    Wrong(
        lambda x: rj.RingBuffer.empty(0, 2, 8, x.window),
        ValueError,
        "RingBuffer.empty: batch must be at least 1, got 0.",
    ),
    Wrong(
        lambda x: rj.RingBuffer.empty(1, 1.0, 8, x.window),
        TypeError,
        "RingBuffer.empty: kv_heads must be an int, got float.",
    ),
    Wrong(
        lambda x: rj.RingBuffer.empty(1, 1, True, x.window),
        TypeError,
        "RingBuffer.empty: head_dim must be an int, got True.",
    ),
    Wrong(
        lambda x: rj.RingBuffer.empty(1, 1, 8, x.window, value_dim=0),
        ValueError,
        "RingBuffer.empty: value_dim must be at least 1, got 0.",
    ),
    Wrong(
        lambda x: rj.RingBuffer.empty(1, 1, 8, x.window, slack=-1),
        ValueError,
        "RingBuffer.empty: slack must be at least 0, got -1.",
    ),
    Wrong(
        lambda x: rj.RingBuffer.empty(1, 1, 8, 4),
        TypeError,
        "RingBuffer.empty: window must be a Window, got int.",
    ),
    Wrong(
        lambda x: rj.RingBuffer.empty(1, 1, 8, rj.Window.full()),
        ValueError,
        "RingBuffer.empty: window must be bounded on the left, got Window(left=None, right=None).",
    ),
    Wrong(
        lambda x: rj.RingBuffer.empty(1, 1, 8, x.window, dtype=jnp.int16),
        TypeError,
        f"RingBuffer.empty: dtype must be one of {F}, {Q}, got int16.",
    ),
    Wrong(
        lambda x: rj.RingBuffer.empty(1, 1, 8, x.window, dtype="fp8"),
        TypeError,
        f"RingBuffer.empty: dtype must be one of {F}, {Q}, got 'fp8'.",
    ),
    Wrong(
        lambda x: rj.RingBuffer.empty(1, 1, 8, x.window, dtype=None),
        TypeError,
        f"RingBuffer.empty: dtype must be one of {F}, {Q}, got None.",
    ),
]

METHODS = [
    Wrong(
        lambda x: x.ring.append(x.k[0], x.v[0]),
        ValueError,
        "RingBuffer.append: k must have 4 axes [B, T, K, H], got float32[3, 2, 8].",
    ),
    Wrong(
        lambda x: x.ring.append(x.k[:1], x.v),
        ValueError,
        "RingBuffer.append: k and buffer must agree on batch, got 1 and 2.",
    ),
    Wrong(
        lambda x: x.ring.append(x.k, x.v[:, :, :1]),
        ValueError,
        "RingBuffer.append: v and buffer must agree on kv heads, got 1 and 2.",
    ),
    Wrong(
        lambda x: x.ring.append(x.k, x.k),
        ValueError,
        "RingBuffer.append: v and buffer must agree on value_dim, got 8 and 4.",
    ),
    Wrong(
        lambda x: x.ring.append(x.k, x.v[:, :2]),
        ValueError,
        "RingBuffer.append: k and v must agree on length, got 3 and 2.",
    ),
    Wrong(
        lambda x: x.ring.append(x.k.astype(jnp.int32), x.v),
        TypeError,
        f"RingBuffer.append: k must be one of {F}, got int32[2, 3, 2, 8].",
    ),
    Wrong(
        lambda x: x.ring.append(x.k, x.v, lengths=jnp.array([9, 0])),
        ValueError,
        "RingBuffer.append: lengths must be between 0 and 3, the length of the chunk, got [9, 0].",
    ),
    Wrong(
        lambda x: x.ring.append(x.k, x.v, lengths=jnp.array([[1, 0]])),
        ValueError,
        "RingBuffer.append: lengths must be int32[2], one per row, got int32[1, 2].",
    ),
    Wrong(
        lambda x: x.ring.rollback(-1),
        ValueError,
        "RingBuffer.rollback: n must be between 0 and the slack, 2, and the length, got [-1, -1].",
    ),
    Wrong(
        lambda x: x.ring.rollback(jnp.array([0, 3])),
        ValueError,
        "RingBuffer.rollback: n must be between 0 and the slack, 2, and the length, got [0, 3].",
    ),
    # All rollbacks since the farthest token count together.
    Wrong(
        lambda x: x.ring.rollback(2).rollback(1),
        ValueError,
        "RingBuffer.rollback: n must be between 0 and the slack, 2, and the length, got [1, 1].",
    ),
    Wrong(
        lambda x: x.ring.reset().rollback(1),  # more than there are
        ValueError,
        "RingBuffer.rollback: n must be between 0 and the slack, 2, and the length, got [1, 1].",
    ),
    Wrong(lambda x: x.ring.rollback(1.0), TypeError, "RingBuffer.rollback: n must be integers, got float."),
    Wrong(lambda x: x.ring.rollback(None), TypeError, "RingBuffer.rollback: n must be integers, got NoneType."),
    Wrong(
        lambda x: x.ring.rollback(jnp.array([1, 1, 1])),
        ValueError,
        "RingBuffer.rollback: n must be an int or int32[2], one per row, got int32[3].",
    ),
    Wrong(
        lambda x: x.ring.rollback(2**32 + 1),  # cast to int32 it would be 1
        ValueError,
        f"RingBuffer.rollback: n must fit int32, got {2**32 + 1}.",
    ),
    Wrong(
        lambda x: x.ring.select(jnp.array([0, 2])),
        ValueError,
        "RingBuffer.select: rows must be between 0 and 1, got [0, 2].",
    ),
    Wrong(
        lambda x: x.ring.select([-1]),
        ValueError,
        "RingBuffer.select: rows must be between 0 and 1, got [-1].",
    ),
    Wrong(
        lambda x: x.ring.select(1),
        ValueError,
        "RingBuffer.select: rows must be integers of one axis, got int.",
    ),
    Wrong(
        lambda x: x.ring.select([[0], [0, 1]]),
        TypeError,
        "RingBuffer.select: rows must be integers of one axis, got list.",
    ),
    Wrong(
        lambda x: x.ring.select(jnp.array([True, False])),
        TypeError,
        "RingBuffer.select: rows must be integers of one axis, got bool[2].",
    ),
    Wrong(
        lambda x: x.ring.insert(0, 3),
        TypeError,
        "RingBuffer.insert: other must be a RingBuffer, got int.",
    ),
    Wrong(
        lambda x: x.ring.insert(0, rj.RingBuffer.empty(1, 2, 8, x.window, value_dim=4, dtype=jnp.float32)),
        ValueError,
        "RingBuffer.insert: both rings must have the same window, slack, heads, dims and dtype.",
    ),
    Wrong(
        lambda x: x.ring.insert(0, x.ring.select([0, 1, 1])),
        ValueError,
        "RingBuffer.insert: other must have at most 2 rows, got 3.",
    ),
    Wrong(
        lambda x: x.ring.insert(2, x.ring.select([0])),
        ValueError,
        "RingBuffer.insert: row must be between 0 and 1, got 2.",
    ),
    Wrong(
        lambda x: x.ring.insert(None, x.ring),
        TypeError,
        "RingBuffer.insert: row must be one integer, got NoneType.",
    ),
    Wrong(
        lambda x: x.ring.reset(jnp.array([0, 1])),
        ValueError,
        "RingBuffer.reset: rows must be bool[2], one per row, got int32[2].",
    ),
    Wrong(
        lambda x: x.ring.reset([True, False]),
        ValueError,
        "RingBuffer.reset: rows must be bool[2], one per row, got list.",
    ),
]

RESTORE = [
    Wrong(
        lambda x: rj.RingBuffer.restore(x.ring, x.window),
        TypeError,
        "RingBuffer.restore: exported must be a RingExport, got RingBuffer.",
    ),
    Wrong(
        lambda x: rj.RingBuffer.restore(x.exported, rj.Window.causal(40)),
        ValueError,
        "RingBuffer.restore: the export must hold every token that the window still sees, got Window(left=39).",
    ),
    Wrong(
        lambda x: rj.RingBuffer.restore(x.exported, 4),
        TypeError,
        "RingBuffer.restore: window must be a Window, got int.",
    ),
    Wrong(
        lambda x: rj.RingBuffer.restore(x.exported, x.window, slack=-1),
        ValueError,
        "RingBuffer.restore: slack must be at least 0, got -1.",
    ),
    Wrong(
        lambda x: rj.RingBuffer.restore(x.exported._replace(positions=x.exported.positions[:, :3]), x.window),
        ValueError,
        "RingBuffer.restore: exported.positions must have shape [2, 7], got int32[2, 3].",
    ),
    Wrong(
        lambda x: rj.RingBuffer.restore(x.exported._replace(length=x.exported.length[:1]), x.window),
        ValueError,
        "RingBuffer.restore: exported.length must have shape [2], got int32[1].",
    ),
    Wrong(
        lambda x: rj.RingBuffer.restore(x.exported._replace(v=x.exported.v[:, :3]), x.window),
        ValueError,
        "RingBuffer.restore: exported.v must have shape [2, 7, 2, 4], got float32[2, 3, 2, 4].",
    ),
]

WINDOW = [
    Wrong(lambda x: rj.Window(-1), ValueError, "Window: left must be an int >= 0 or None, got -1."),
    Wrong(lambda x: rj.Window("3"), TypeError, "Window: left must be an int >= 0 or None, got '3'."),
    Wrong(lambda x: rj.Window(1.5), TypeError, "Window: left must be an int >= 0 or None, got 1.5."),
    Wrong(lambda x: rj.Window(True), TypeError, "Window: left must be an int >= 0 or None, got True."),
    Wrong(lambda x: rj.Window(1, -2), ValueError, "Window: right must be an int >= 0 or None, got -2."),
    Wrong(lambda x: rj.Window(1, 0, None), TypeError, "Window: sinks must be an int >= 0, got None."),
    Wrong(
        lambda x: rj.Window(2**31),
        ValueError,
        f"Window: left must be at most {2**31 - 2} (positions are int32), got {2**31}.",
    ),
    Wrong(lambda x: rj.Window.causal(0), ValueError, "Window.causal: size must be an int >= 1 or None, got 0."),
    Wrong(lambda x: rj.Window.causal(4, -1), ValueError, "Window: sinks must be an int >= 0, got -1."),
    Wrong(lambda x: rj.Window.symmetric(-1), ValueError, "Window.symmetric: radius must be an int >= 0, got -1."),
]

# Add the next function's list here: encode, decode, prefill, generate, the flax modules.
WRONG = [*ATTENTION, *ATTEND, *MERGE, *EMPTY, *METHODS, *RESTORE, *WINDOW, *CONFIG, *STATES]


@pytest.mark.parametrize("wrong", WRONG, ids=[wrong.first_line for wrong in WRONG])
def test_a_wrong_call_says_what_is_wrong_and_touches_no_ring(wrong, fixtures):
    before = [np.array(leaf) for leaf in jax.tree.leaves(fixtures.ring)]
    with pytest.raises(wrong.error) as raised:
        wrong.call(fixtures)
    assert type(raised.value) is wrong.error
    assert str(raised.value).splitlines()[0] == wrong.first_line
    for old, leaf in zip(before, jax.tree.leaves(fixtures.ring), strict=True):
        assert old.dtype == leaf.dtype
        assert old.tobytes() == np.asarray(leaf).tobytes()


# What shapes, dtypes and static values tell is said of traced arrays too.
TRACED = [wrong for wrong in [*ATTENTION, *ATTEND, *MERGE] if "must be between" not in wrong.first_line]


@pytest.mark.parametrize("wrong", TRACED, ids=[wrong.first_line for wrong in TRACED])
def test_the_message_is_the_same_under_jit(wrong, fixtures):
    arrays = {name: x for name, x in vars(fixtures).items() if name != "window"}
    with pytest.raises(wrong.error) as raised:
        jax.eval_shape(lambda arrays: wrong.call(types.SimpleNamespace(window=fixtures.window, **arrays)), arrays)
    assert str(raised.value).splitlines()[0] == wrong.first_line


def test_messages_give_the_facts_and_a_hint(fixtures):
    x = fixtures
    with pytest.raises(ValueError) as raised:
        rj.attend(x.q[..., :4], x.k[..., :4], x.v, x.ring)
    assert str(raised.value).splitlines() == [
        "attend: k and buffer must agree on head_dim, got 4 and 8.",
        "  k:      float32[2, 3, 2, 4]",
        "  buffer: float32[2, 2, 7, 8], values float32[2, 2, 7, 4], Window(left=3, sinks=1), slack 2",
    ]
    with pytest.raises(TypeError) as raised:
        rj.attention(x.q, x.k, x.v, 4)
    assert str(raised.value).splitlines()[1:] == ["  Hint: Window.causal(size) sees the last `size` keys."]


def test_values_of_traced_arrays_are_not_looked_at(fixtures):
    """Lengths, rows and rollbacks out of range raise outside jit only; inside, they must at least not fail to trace."""
    x = fixtures
    traced = jnp.array([7, -3])
    jax.eval_shape(lambda n: x.ring.rollback(n), traced)
    jax.eval_shape(lambda n: x.ring.select(n), traced)
    jax.eval_shape(lambda n: x.ring.insert(n[0], x.ring.select([0])), traced)
    jax.eval_shape(lambda n: rj.attend(x.q, x.k, x.v, x.ring, lengths=n), traced)
