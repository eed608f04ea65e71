"""The tiles that queries of a chunk walk over: of the ring before the chunk, read in storage order, then of the chunk.

Attention without a ring walks over its keys alone. Integers only: which tiles, and what a query sees of them.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from ringjax._kernels.mosaic_tile import BY_COLUMN, BY_ROW, Steps, plgpu
from ringjax._kernels.problem import Problem
from ringjax._schedule import RingSteps, ring_steps
from ringjax._window import Window

NOWHERE = 2**30
"""The position of what no query sees: after all of them."""


class Ring(NamedTuple):
    """One row's ring before a chunk, int32 scalars; positions count from the chunk's first token.

    Attributes:
      capacity, sinks, block_size: of the ring and its tiles.
      newest: the slot of the newest token that is not pinned.
      oldest: the greatest age that is stored and that the chunk's first query sees; the newest token's is 0.
      held: the greatest age that is stored.
      pinned: sinks that are stored.
      length: tokens before the chunk.
      real: tokens of the chunk.
      shift: slots before slot 0 with which the first tile begins; None: there are none.
    """

    capacity: int
    sinks: int
    block_size: int
    newest: Any
    oldest: Any
    held: Any
    pinned: Any
    length: Any
    real: Any
    shift: Any

    @property
    def circle(self) -> int:
        """Slots that are not pinned."""
        return self.capacity - self.sinks

    def steps(self, window: Window, first: Any, size: int) -> RingSteps:
        """The tiles that queries [first, first + size) of the chunk need."""
        assert window.left is not None
        last = jnp.minimum(first + size, self.real) - 1
        some = first < self.real
        return ring_steps(
            self.newest,
            jnp.where(some, jnp.minimum(self.held, window.left - 1 - first), -1),
            window.left - 1 - last,
            jnp.where(some, self.pinned, 0),
            sinks=self.sinks,
            capacity=self.capacity,
            block_size=self.block_size,
            shift=0 if self.shift is None else self.shift,
        )

    def first_slot(self, tile: Any) -> Any:
        """The slot with which a tile begins."""
        return tile * self.block_size - (0 if self.shift is None else self.shift)

    def position(self, slot: Any, here: Any, age: Any) -> Any:
        """Positions of slots, or of the chunk's tokens if not `here`; `NOWHERE` if older than `age` or not stored."""

        def scalar(of_ring: Any, of_chunk: Any) -> Any:
            return jnp.where(here, of_ring, of_chunk)

        newest, none = self.newest, jnp.int32(NOWHERE)
        found = slot - jnp.where(slot > scalar(newest, none), self.circle, 0) - scalar(newest + 1, jnp.int32(0))
        # As unsigned numbers, slots before the ring are behind all of it.
        kind = jnp.int32 if self.shift is None else jnp.uint32
        at = slot.astype(kind)
        stored = (found >= scalar(-1 - age, jnp.int32(0))) & (at < scalar(self.capacity, self.real).astype(kind))
        found = jnp.where(stored, found, NOWHERE)
        if self.sinks:
            pinned = jnp.where(at < self.pinned.astype(kind), slot - self.length, NOWHERE)
            found = jnp.where(at < scalar(jnp.int32(self.sinks), jnp.int32(0)).astype(kind), pinned, found)
        return found


def ring_before(problem: Problem, real: Any, length: Any, written: Any, block: int, shift: Any) -> Ring:
    """A row's ring from its `length` and `written`, in tiles of `block` slots, before a chunk of `real` tokens."""
    window, circle = problem.window, problem.keys - problem.window.sinks
    assert window.left is not None
    whole = written - length <= problem.slack
    held = jnp.where(whole, jnp.minimum(length - window.sinks - 1, length - written + circle - 1), -1)
    return Ring(
        capacity=problem.keys,
        sinks=window.sinks,
        block_size=block,
        newest=window.sinks + lax.rem(jnp.maximum(length - window.sinks - 1, 0), jnp.int32(circle)),
        oldest=jnp.minimum(held, window.left - 1),
        held=held,
        pinned=jnp.where(whole, jnp.minimum(length, window.sinks), 0),
        length=length,
        real=real,
        shift=shift,
    )


class Seen(NamedTuple):
    """What decides whether a query of a chunk's tile sees a slot of the ring, or (not `here`) a token of the chunk.

    Attributes:
      window, ring: what a query sees; the ring before the chunk.
      q_first, k_first: index of the tile's first query in the chunk, of the first slot or token.
      here: whether the tile is the ring's.
    """

    window: Window
    ring: Ring
    q_first: Any
    k_first: Any
    here: Any

    def visible(self, shape: tuple[int, int], q_axis: int) -> Any:
        """Boolean tile of `shape`, queries along `q_axis`, which is 0."""
        assert q_axis == 0
        window, ring = self.window, self.ring
        query = plgpu.broadcasted_iota(jnp.int32, (shape[0],), 0, layout=BY_ROW) + self.q_first
        slot = plgpu.broadcasted_iota(jnp.int32, (shape[1],), 0, layout=BY_COLUMN) + self.k_first
        key = lax.optimization_barrier(ring.position(slot, self.here, ring.held))
        near = key
        if window.sinks:  # however far back they are
            near = lax.optimization_barrier(jnp.where(key < window.sinks - ring.length, NOWHERE, key))
        query = lax.broadcast_in_dim(lax.optimization_barrier(query), shape, [0])
        key, near = (lax.broadcast_in_dim(x, shape, [1]) for x in (key, near))
        assert window.left is not None
        seen = query - near <= window.left
        return seen & (key < NOWHERE if window.right is None else query - key >= -window.right)


class Walk(NamedTuple):
    """The tiles of a ring (None: there is none) and then of the keys that one query tile needs, as steps.

    Steps [full_first, full_end) need no mask; `padded` is 1 if any of the tiles may hold padding, else 0.
    """

    ring: RingSteps | None
    keys: Steps
    full_first: Any
    full_end: Any
    count: Any
    padded: Any

    def tile(self, step: Any) -> Any:
        """The tile of a step, of the ring or of the keys."""
        if self.ring is None:
            return self.keys.tile(step)
        return jnp.where(self.of_ring(step), self.ring.tile(step), self.keys.tile(step - self.ring.count))

    def of_ring(self, step: Any) -> Any:
        assert self.ring is not None
        return step < self.ring.count


def walk_over(ring: RingSteps | None, keys: Steps, padded: Any = 0) -> Walk:
    """The walk over a ring's tiles, if there is one, and then the keys'."""
    # A loop masks the weights of a step together with the values of the step before: where these may have to be
    # cleared, one more step than must be has a mask, so that none is left for the loop that looks at nothing.
    if ring is None:
        return Walk(None, keys, keys.full_first + padded, keys.full_end, keys.count, padded)
    # Where the ring has full tiles, the window's left edge is not among the chunk's keys.
    full_first = ring.masked + keys.full_first
    return Walk(ring, keys, full_first + 1, ring.count + keys.full_end, ring.count + keys.count, padded)
