"""Where a ring keeps a position, and which position a slot holds: pure integer functions.

A ring of `capacity` slots pins positions 0..sinks-1 in slots 0..sinks-1; every later position goes around the
remaining `capacity - sinks` slots, newest over oldest. Nothing but a row's `length` (tokens appended) and `written`
(the largest length it ever had) is needed to tell what every slot holds, so no position is ever stored.

All functions take Python ints, NumPy arrays, jax arrays or values inside a kernel, and broadcast.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

NOTHING = -1
"""The position of a slot that holds no token. No window sees it."""

INVALID = np.int32(2**31 - 1)
"""`written` of a row that was rolled back too far: the only value that is more than the slack ahead of `length`."""


def namespace(*values: Any) -> Any:
    """NumPy for Python ints and NumPy values, jax.numpy otherwise."""
    return np if all(isinstance(value, int | np.ndarray | np.generic) for value in values) else jnp


def slot_of_position(position: Any, *, sinks: int, capacity: int) -> Any:
    """The slot in which a ring keeps a position (>= 0).

    Args:
      position: int or int array.
      sinks: number of pinned positions.
      capacity: number of slots, more than `sinks`.
    """
    around = sinks + (position - sinks) % (capacity - sinks)
    if sinks == 0:
        return around
    return namespace(position).where(position < sinks, position, around)


def position_in_slot(slot: Any, length: Any, written: Any, *, sinks: int, slack: int, capacity: int) -> Any:
    """The position that a slot holds, or `NOTHING`.

    Args:
      slot: int or int array, 0 <= slot < capacity.
      length: tokens ever appended to the row, less those rolled back.
      written: the largest length the row ever had. Tokens up to there went into the ring, whether or not they were
        rolled back later, so what they overwrote is gone. A row with `written - length > slack` was rolled back too
        far: it holds nothing.
      sinks, slack, capacity: of the ring.
    """
    xp = namespace(slot, length, written)
    around = capacity - sinks
    newest = length - sinks - 1  # counted from the first position that is not pinned; negative: there is none
    age = (newest - (slot - sinks)) % around
    position = sinks + newest - age
    held = (position >= sinks) & (position >= written - around)
    if sinks:
        pinned = slot < sinks
        position = xp.where(pinned, slot, position)
        held = xp.where(pinned, slot < length, held)
    return xp.where(held & (written - length <= slack), position, NOTHING)
