"""What one row's queries see of a ring, and which of its tiles a program of the decode kernel reads, in which order."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from ringjax._kernels.problem import Problem
from ringjax._schedule import slot_tiles
from ringjax._slots import slot_of_position


class Row(NamedTuple):
    """What one row of the batch sees of a ring: int32 scalars.

    Attributes:
      newest: the age of slot `sinks`, the newest token's being 0.
      oldest: the greatest age that any query sees; -1: none.
      youngest: the least age that any query sees.
      first_oldest, first_youngest: of query 0, were it alone; those of query t are less by t.
      held: the greatest age that the ring still holds; -1: none.
      pinned: sinks that query 0 sees on its left and up to the window's right, stored or not; None: all.
      pinned_held: sinks that are stored.
    """

    newest: Any
    oldest: Any
    youngest: Any
    first_oldest: Any
    first_youngest: Any
    held: Any
    pinned: Any
    pinned_held: Any


def row(problem: Problem, start: Any, real: Any, length: Any, written: Any, valid: Any = True) -> Row:
    """Of a row with `real` queries from position `start` on; if it is not `valid`, they see nothing."""
    window, around = problem.window, problem.keys - problem.window.sinks
    assert window.left is not None
    whole = (written - length <= problem.slack) & (real > 0)
    if valid is not True:
        whole = whole & valid
    newest = length - window.sinks - 1
    held = jnp.where(whole, jnp.minimum(newest, length - written + around - 1), -1)
    last = (real - 1) * problem.q_stride
    first_oldest = length - 1 - start + window.left
    first_youngest = pinned = None
    youngest = jnp.int32(0)
    pinned_held = jnp.where(whole, jnp.minimum(length, window.sinks), 0)
    if window.right is not None:
        first_youngest = length - 1 - start - window.right
        youngest = jnp.maximum(first_youngest - last, 0)
        pinned = start + window.right + 1
    return Row(
        newest=lax.rem(jnp.maximum(newest, 0), jnp.int32(around)),
        oldest=jnp.minimum(held, first_oldest),
        youngest=youngest,
        first_oldest=first_oldest,
        first_youngest=first_youngest,
        held=held,
        pinned=pinned,
        pinned_held=pinned_held,
    )


class Share(NamedTuple):
    """The tiles of a ring that one program reads: `count` from the place `start` on, in the order of their slots.

    A ring's visible tiles are in two runs, [0, low) and [first, ...); a tile's place is its index among them.

    Attributes:
      low, first: the end of the first run, the start of the second.
      start, count: of the program's places.
      turn: where among them it begins; it then goes around.
      block_size: slots in a tile.
    """

    low: Any
    first: Any
    start: Any
    count: Any
    turn: Any
    block_size: int

    def visit_of(self, slot: Any) -> Any:
        """The place of a slot's tile among the program's; not in [0, count): another program has it."""
        tile = lax.div(slot, jnp.int32(self.block_size))
        return jnp.where(tile < self.low, tile, self.low + tile - self.first) - self.start

    def tile(self, step: Any) -> Any:
        """The tile of one of the program's steps through this ring."""
        place = step + self.turn
        place = self.start + jnp.where(place >= self.count, place - self.count, place)
        return jnp.where(place < self.low, place, self.first + place - self.low)

    def ending_with(self, slot: Any) -> "Share":
        """The same tiles, that of the slot last if it is among them."""
        last_visit = self.visit_of(slot)
        return self._replace(turn=jnp.where((last_visit >= 0) & (last_visit < self.count), last_visit + 1, 0))


def shares(problems: list[Problem], rows: list[Row], *, split: Any, splits: int, block_size: int) -> list[Share]:
    """What program `split` of `splits` reads of each ring: the rings' tiles, one ring after the other, in equal parts.

    Args:
      problems: of reading each ring.
      rows: what is seen of each.
      split: 0..splits - 1.
      splits: programs that share them.
      block_size: slots in a tile.
    """
    tiles, counts = [], []
    for problem, row in zip(problems, rows, strict=True):
        sinks = problem.window.sinks
        facts = {"sinks": sinks, "capacity": problem.keys, "block_size": block_size}
        low, first, end = slot_tiles(sinks + row.newest, row.oldest + 1, row.pinned_held, **facts)
        tiles.append((low, first))
        counts.append(low + end - first)
    total = sum(counts[1:], start=counts[0])
    part = lax.div(total + (splits - 1), jnp.int32(splits))
    start = jnp.minimum(split * part, total)
    count = jnp.minimum(part, total - start)
    turn = jnp.int32(0)
    if len(tiles) == 1:
        return [Share(*tiles[0], start, count, turn, block_size)]
    found = []
    for (low, first), here in zip(tiles, counts, strict=True):
        begin, end = (jnp.minimum(jnp.maximum(x, 0), here) for x in (start, start + count))
        found.append(Share(low, first, begin, end - begin, turn, block_size))
        start = start - here
    return found


def is_seen(problem: Problem, row: Row, slot: Any, oldest: Any, youngest: Any, pinned: Any, *, block_size: int) -> Any:
    """Whether the token in a slot is seen.

    Args:
      problem: of reading the ring.
      row: of the ring's.
      slot: int32, any shape.
      oldest, youngest: ages between which a query sees; `youngest` None: 0.
      pinned: sinks that it sees.
      block_size: slots in a tile.
    """
    sinks, around = problem.window.sinks, problem.keys - problem.window.sinks
    age = row.newest - (slot - sinks)
    age = jnp.where(age < 0, age + around, age)
    found = age <= oldest
    if youngest is not None:
        found = found & (age >= youngest)
    if sinks:
        found = jnp.where(slot < sinks, slot < pinned, found)
    if problem.keys % block_size:
        found = found & (slot < problem.keys)
    return found


def slot_of(problem: Problem, position: Any) -> Any:
    """Scalar, for positions that may be negative: those of rows without tokens, whose slot nobody uses."""
    return slot_of_position(jnp.maximum(position, 0), sinks=problem.window.sinks, capacity=problem.keys)
