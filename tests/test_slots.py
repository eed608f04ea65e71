"""Where a ring keeps a position: the arithmetic against a list of slots that is written one token at a time."""

import itertools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ringjax._slots import NOTHING, position_in_slot, slot_of_position

SHAPES = list(itertools.product([0, 1, 2, 5], [1, 2, 3, 5], [0, 1, 3]))  # sinks, window size, slack


class Slots:
    """A ring as one would write it on paper: every slot says which position it holds, or None."""

    def __init__(self, sinks, size, slack):
        self.sinks, self.slack, self.capacity = sinks, slack, sinks + size + slack
        self.held = [None] * self.capacity
        self.stored = [None] * self.capacity  # rolled back or not
        self.next_around = sinks
        self.length = self.written = 0

    def append(self):
        slot = self.slot()
        self.held[slot] = self.stored[slot] = self.length
        self.length += 1
        self.written = max(self.written, self.length)

    def slot(self):
        """The slot of the next token: its own if it is a sink, else the one after the last, back to the first."""
        if self.length < self.sinks:
            return self.length
        slot = self.sinks
        for _ in range(self.length - self.sinks):
            slot = slot + 1 if slot + 1 < self.capacity else self.sinks
        return slot

    def rollback(self, n):
        self.length -= n
        self.held = [None if p is None or p >= self.length else p for p in self.held]

    def expected(self):
        if self.written - self.length > self.slack:
            return [NOTHING] * self.capacity
        return [NOTHING if p is None else p for p in self.held]

    def computed(self, asarray):
        """What the arithmetic says, on NumPy or JAX arrays."""
        return position_in_slot(
            asarray(np.arange(self.capacity, dtype=np.int32)),
            asarray(np.int32(self.length)),
            asarray(np.int32(self.written)),
            sinks=self.sinks,
            slack=self.slack,
            capacity=self.capacity,
        )


@pytest.mark.parametrize(("sinks", "size", "slack"), SHAPES)
def test_position_in_slot_of_a_growing_stream(sinks, size, slack):
    """Every length from the empty ring to three times around."""
    ring = Slots(sinks, size, slack)
    for _ in range(3 * ring.capacity + 2):
        found = ring.computed(np.asarray)
        np.testing.assert_array_equal(found, ring.expected())
        assert found.dtype == np.int32
        ring.append()


@pytest.mark.parametrize(("sinks", "size", "slack"), SHAPES)
def test_position_in_slot_after_rollbacks(sinks, size, slack):
    """Random appends and rollbacks; a token that a rolled-back one overwrote never comes back."""
    draw = random.Random(f"{sinks} {size} {slack}")
    for _ in range(20):
        ring = Slots(sinks, size, slack)
        for _ in range(40):
            allowed = min(ring.length, slack - (ring.written - ring.length))
            if allowed and draw.random() < 0.3:
                ring.rollback(draw.randint(1, allowed))
            else:
                ring.append()
            found = ring.computed(np.asarray)
            np.testing.assert_array_equal(found, ring.expected())
            # What the next query sees is there, whatever was rolled back.
            seen = set(range(min(sinks, ring.length))) | set(range(max(0, ring.length - size + 1), ring.length))
            assert seen <= set(found.tolist())


def test_a_row_rolled_back_too_far_holds_nothing():
    ring = Slots(2, 3, 2)
    for _ in range(11):
        ring.append()
    ring.rollback(2)
    assert (ring.computed(np.asarray) >= 0).any()
    ring.rollback(1)
    assert (ring.computed(np.asarray) == NOTHING).all()
    # Not even the pinned sinks, and not after more tokens: `written` stays.
    never = position_in_slot(np.arange(7), np.arange(40)[:, None], 2**31 - 1, sinks=2, slack=2, capacity=7)
    assert (never == NOTHING).all()


@pytest.mark.parametrize(("sinks", "size", "slack"), SHAPES)
def test_slot_of_position_is_where_the_next_token_goes(sinks, size, slack):
    ring = Slots(sinks, size, slack)
    positions = np.arange(3 * ring.capacity, dtype=np.int32)
    expected = []
    for _ in positions:
        expected.append(ring.slot())
        ring.append()
    numbers = {"sinks": sinks, "capacity": ring.capacity}
    found = slot_of_position(positions, **numbers)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(slot_of_position(jnp.asarray(positions), **numbers), expected)
    assert found.dtype == np.int32
    assert [int(slot_of_position(p, **numbers)) for p in positions.tolist()] == expected
    # No two tokens of any `capacity - sinks` in a row meet, and none meets a sink.
    for start in range(len(expected) - ring.capacity):
        window = expected[max(start, sinks) : max(start, sinks) + ring.capacity - sinks]
        assert len(set(window)) == len(window) and min(window) >= sinks


@pytest.mark.parametrize(("sinks", "size", "slack"), SHAPES)
def test_position_in_slot_inverts_slot_of_position(sinks, size, slack):
    capacity = sinks + size + slack
    length = np.arange(4 * capacity)[:, None]
    held = position_in_slot(np.arange(capacity), length, length, sinks=sinks, slack=slack, capacity=capacity)
    slots = slot_of_position(np.maximum(held, 0), sinks=sinks, capacity=capacity)
    own = np.broadcast_to(np.arange(capacity), held.shape)
    np.testing.assert_array_equal(slots[held >= 0], own[held >= 0])
    assert ((held >= 0).sum(axis=1) == np.minimum(length[:, 0], capacity)).all()


def test_python_numpy_and_jax_agree():
    numbers = {"sinks": 2, "slack": 1, "capacity": 8}
    slot, length, written = (x.ravel() for x in np.meshgrid(range(8), range(20), range(20), indexing="ij"))
    possible = length <= written
    slot, length, written = (x[possible].astype(np.int32) for x in (slot, length, written))
    numpy = position_in_slot(slot, length, written, **numbers)
    traced = jax.jit(lambda *x: position_in_slot(*x, **numbers))(slot, length, written)
    assert isinstance(numpy, np.ndarray) and isinstance(traced, jax.Array)
    assert numpy.dtype == traced.dtype == np.int32
    np.testing.assert_array_equal(numpy, traced)
    ints = [
        int(position_in_slot(*x, **numbers)) for x in zip(slot.tolist(), length.tolist(), written.tolist(), strict=True)
    ]
    assert ints == numpy.tolist()


def test_int32_reaches_to_the_last_position():
    """Positions near 2**31 are kept as exactly as small ones."""
    last = 2**31 - 2
    for sinks, capacity in ((0, 7), (3, 11)):
        slots = np.arange(capacity, dtype=np.int32)
        held = position_in_slot(slots, np.int32(last), np.int32(last), sinks=sinks, slack=0, capacity=capacity)
        around = range(last - (capacity - sinks), last)
        assert sorted(held.tolist()) == [*range(sinks), *around]
        again = slot_of_position(held, sinks=sinks, capacity=capacity)
        np.testing.assert_array_equal(again, slots)
