"""A window sees what its definition says, and is a value."""

import copy
import dataclasses
import itertools
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ringjax._window import Window

SIZES = [1, 2, 3, 5, 8]
SIDES = [None, 0, 1, 2, 3, 4, 5]
T = 13  # more than any window here, so that each is full in some rows
LAST = 2**31 - 1  # the last position that int32 can say


def defined(window, p, j):
    """The definition, word for word."""
    left = float("inf") if window.left is None else window.left
    right = float("inf") if window.right is None else window.right
    return j >= 0 and (-right <= p - j <= left or (0 <= j < window.sinks and j <= p + right))


def mask(window, queries=range(T), keys=range(T)):
    return np.array([[defined(window, p, j) for j in keys] for p in queries])


def positions(queries=range(T), keys=range(T)):
    return np.array(queries, np.int32)[:, None], np.array(keys, np.int32)[None, :]


# --- What is visible ---


@pytest.mark.parametrize("left", SIDES)
def test_visible_is_the_definition(left):
    """On NumPy arrays, JAX arrays and Python ints; a negative key position says that there is no token."""
    queries, keys = range(9), range(-2, 9)
    p, j = positions(queries, keys)
    for right, sinks in itertools.product(SIDES, range(4)):
        window = Window(left, right, sinks)
        expected = mask(window, queries, keys)
        seen = window.visible(p, j)
        assert seen.dtype == bool
        np.testing.assert_array_equal(seen, expected, str(window))
        np.testing.assert_array_equal(window.visible(jnp.asarray(p), jnp.asarray(j)), expected, str(window))
        ints = [[window.visible(a, b) for b in keys] for a in queries]
        assert ints == expected.tolist() and all(type(seen) is bool for row in ints for seen in row)


@pytest.mark.parametrize(
    "window",
    [Window(2), Window(2, 1), Window(2, sinks=2), Window(None), Window(None, 3), Window(3, None), Window.full()],
)
def test_visible_of_tracers(window):
    p, j = positions()
    np.testing.assert_array_equal(jax.jit(window.visible)(p, j), mask(window))
    np.testing.assert_array_equal(jax.vmap(lambda p: window.visible(p[None], j[0]))(p[:, 0]), mask(window))


@pytest.mark.parametrize(
    "window", [Window(2), Window(2, 2, 3), Window(LAST - 1, sinks=1), Window(5, LAST - 1), Window(0)]
)
@pytest.mark.parametrize("asarray", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_visible_at_the_end_of_int32(window, asarray):
    near = [-1, 0, 1, 2, 3, LAST - 4, LAST - 3, LAST - 2, LAST - 1, LAST]
    queries = [p for p in near if p >= 0]
    p, j = positions(queries, near)
    np.testing.assert_array_equal(window.visible(asarray(p), asarray(j)), mask(window, queries, near))


def test_visible_skips_what_the_window_does_not_bound():
    """An absent bound costs nothing: `causal()` compares twice, and no window at all has no difference to take."""
    p, j = positions()

    def operations(window):
        return [str(equation.primitive) for equation in jax.make_jaxpr(window.visible)(p, j).eqns]

    assert operations(Window.causal()) == ["ge", "sub", "ge", "and"]
    assert operations(Window.causal(4)) == ["ge", "sub", "le", "and", "ge", "and"]
    assert "sub" not in operations(Window.full())
    assert operations(Window.causal(sinks=2)) == operations(Window.causal())


@pytest.mark.parametrize("size", SIZES)
def test_number_of_keys(size):
    causal = Window.causal(size).visible(*positions()).sum(axis=1)
    np.testing.assert_array_equal(causal, np.minimum(np.arange(T) + 1, size))
    symmetric = Window.symmetric(size).visible(*positions(range(size, 2 * size), range(4 * size)))
    assert (symmetric.sum(axis=1) == 2 * size + 1).all()
    sunk = Window.causal(size, sinks=2).visible(*positions([20], range(21)))
    assert sunk.sum() == size + 2


def test_flash_attention_1133_a_window_as_long_as_the_sequence_is_causal():
    causal = mask(Window.causal())
    np.testing.assert_array_equal(causal, np.tril(np.ones((T, T), bool)))
    for size in (T, T + 1, 1000):
        np.testing.assert_array_equal(Window.causal(size).visible(*positions()), causal)


# --- A window is a value ---


def test_constructors():
    assert Window.causal(4) == Window(3, 0, 0) == Window(left=3)
    assert Window.causal(4, sinks=2) == Window(3, 0, 2)
    assert Window.causal() == Window(None, 0, 0)
    assert Window.symmetric(4) == Window(4, 4, 0)
    assert Window.full() == Window(None, None, 0)


def test_properties():
    assert [Window.causal(w).size for w in (1, 4, None)] == [1, 4, None]
    assert Window.causal(4).is_causal and Window.causal(sinks=1).is_causal
    assert not Window.symmetric(1).is_causal and not Window.full().is_causal


def test_equality_and_hash():
    assert Window(np.int64(3), np.int32(0), np.uint8(2)) == Window(3, 0, 2)
    assert hash(Window(np.int64(3))) == hash(Window(3))
    assert len({Window(3), Window(3, 0), Window(3, 0, 0), Window(3, 1), Window(3, 0, 1), Window(None)}) == 4
    assert all(type(number) is int for number in dataclasses.astuple(Window(np.int64(3), np.int32(1), np.uint8(2))))
    with pytest.raises(dataclasses.FrozenInstanceError):
        Window(3).left = 4


def test_sinks_beside_an_unbounded_left_are_kept():
    assert Window(None, 0, 2).sinks == 2 and Window(None, 0, 2) != Window(None)
    np.testing.assert_array_equal(Window(None, 0, 2).visible(*positions()), mask(Window(None)))


@pytest.mark.parametrize("window", [Window(3), Window(3, 1), Window(1023, sinks=3), Window(None, None, 1)])
def test_repr_pickle_copy(window):
    assert eval(repr(window)) == pickle.loads(pickle.dumps(window)) == copy.deepcopy(window) == window


def test_repr_leaves_defaults_out():
    assert [repr(w) for w in (Window(3), Window(3, 1), Window(3, 0, 2))] == [
        "Window(left=3)",
        "Window(left=3, right=1)",
        "Window(left=3, sinks=2)",
    ]


def test_static_under_jit():
    """Equal windows share one executable."""

    @chex.assert_max_traces(2)
    def count(window, p, j):
        return window.visible(p, j).sum()

    chex.clear_trace_counter()
    counted = jax.jit(count, static_argnums=0)
    assert counted(Window(3), *positions()) == counted(Window.causal(np.int64(4)), *positions())
    assert counted(Window(4), *positions()) > counted(Window(3), *positions())


# --- What it refuses, and how it says so ---

WRONG = [
    (lambda: Window(-1), ValueError, "Window: left must be an int >= 0 or None, got -1."),
    (lambda: Window(True), TypeError, "Window: left must be an int >= 0 or None, got True."),
    (lambda: Window(3.0), TypeError, "Window: left must be an int >= 0 or None, got 3.0."),
    (lambda: Window("3"), TypeError, "Window: left must be an int >= 0 or None, got '3'."),
    (
        lambda: Window(LAST),
        ValueError,
        "Window: left must be at most 2147483646 (positions are int32), got 2147483647.",
    ),
    (lambda: Window(3, -2), ValueError, "Window: right must be an int >= 0 or None, got -2."),
    (lambda: Window(3, 0, -1), ValueError, "Window: sinks must be an int >= 0, got -1."),
    (lambda: Window(3, 0, None), TypeError, "Window: sinks must be an int >= 0, got None."),
    (lambda: Window.causal(0), ValueError, "Window.causal: size must be an int >= 1 or None, got 0."),
    (lambda: Window.causal(2.5), TypeError, "Window.causal: size must be an int >= 1 or None, got 2.5."),
    (lambda: Window.symmetric(-1), ValueError, "Window.symmetric: radius must be an int >= 0, got -1."),
    (lambda: Window.symmetric(None), TypeError, "Window.symmetric: radius must be an int >= 0, got None."),
]


@pytest.mark.parametrize(("call", "error", "first_line"), WRONG, ids=[line for _, _, line in WRONG])
def test_message(call, error, first_line):
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    assert str(caught.value).split("\n")[0] == first_line


def test_hint():
    with pytest.raises(ValueError) as caught:
        Window(-1)
    assert str(caught.value).split("\n")[1:] == ["  Hint: None stands for unbounded."]
