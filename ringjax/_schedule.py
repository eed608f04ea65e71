"""Which tiles of the queries x keys plane hold a visible pair: pure integer functions.

Queries t = 0..T-1 stand at positions `q_offset + t`, keys j = 0..S-1 at positions j. The plane is cut into tiles of
`tile_size` queries by `block_size` keys. For one row of tiles (or, transposed, one column) the visible ones are a
contiguous run, plus the tiles that hold pinned sinks to its left; the tiles in which every pair is visible are a
contiguous run inside it. Kernels loop over these bounds: edge, full, edge; only edge tiles need a mask.

The functions take Python ints, NumPy arrays, jax arrays or values inside a kernel.
"""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax

from ringjax._slots import namespace
from ringjax._window import Window

_FAR = 2**16  # a side that is nearer costs kernels no care; positions end at 2**31


class KeyTiles(NamedTuple):
    """Key tiles that one query tile needs; half-open ranges of tile indices, `sink_full <= sink_end <= first`.

    Tiles [0, sink_full) and [full_first, full_end) are full. Tiles [sink_full, sink_end), [first, full_first) and
    [full_end, end) are edges. All others are skipped.
    """

    sink_full: Any
    sink_end: Any
    first: Any
    full_first: Any
    full_end: Any
    end: Any


class QueryTiles(NamedTuple):
    """Query tiles that one key tile needs: [full_first, full_end) are full, the rest of [first, end) are edges."""

    first: Any
    full_first: Any
    full_end: Any
    end: Any


def _static(*values: Any) -> bool:
    return all(isinstance(value, int) for value in values)


def _least(a: Any, b: Any) -> Any:
    return min(a, b) if _static(a, b) else namespace(a, b).minimum(a, b)


def _greatest(a: Any, b: Any) -> Any:
    return max(a, b) if _static(a, b) else namespace(a, b).maximum(a, b)


def _where(condition: Any, a: Any, b: Any) -> Any:
    return (a if condition else b) if isinstance(condition, bool) else namespace(condition, a, b).where(condition, a, b)


def _clip(value: Any, low: Any, high: Any) -> Any:
    return _greatest(low, _least(value, high))


def ahead(position: Any, side: int, most: int) -> Any:
    """`position + side`, which for a far side is `most` at most: in int32 the sum could overflow."""
    return position + side if side < _FAR else _least(position, most - side) + side


def behind(position: Any, side: int, least: int) -> Any:
    """`position - side`, which for a far side is `least` at least: in int32 the difference could overflow."""
    return position - side if side < _FAR else _greatest(position, least + side) - side


def _nested(first: Any, full_first: Any, full_end: Any, end: Any) -> tuple[Any, Any, Any, Any]:
    """The same runs with first <= full_first <= full_end <= end."""
    end = _greatest(first, end)
    full_first = _clip(full_first, first, end)
    return first, full_first, _clip(full_end, full_first, end), end


def key_tiles(
    window: Window, query_tile: Any, *, tile_size: int, block_size: int, queries: int, keys: int, q_offset: Any
) -> KeyTiles:
    """The key tiles that queries [query_tile * tile_size, ...) need.

    Args:
      window: what a query sees.
      query_tile: index of the query tile; its queries beyond `queries` are overhang and need nothing.
      tile_size, block_size: queries and keys in a tile.
      queries, keys: T and S.
      q_offset: position of query 0 (key 0 is at position 0).
    """
    q_first = query_tile * tile_size + q_offset
    q_last = _least(query_tile * tile_size + tile_size, queries) - 1 + q_offset

    def tiles_up_to(key: Any) -> Any:  # that hold a key <= `key`
        return (_clip(key, -1, keys - 1) + block_size) // block_size

    def whole_tiles_up_to(key: Any) -> Any:  # all of whose slots hold a key <= `key`; overhang is nobody's key
        return (_clip(key, -1, keys - 1) + 1) // block_size

    end = whole = -(-keys // block_size)
    if keys % block_size:
        whole -= 1
    if window.right is not None:
        end = tiles_up_to(ahead(q_last, window.right, keys))
        whole = whole_tiles_up_to(ahead(q_first, window.right, keys))
    if window.left is None:
        return KeyTiles(0, 0, *_nested(0, 0, whole, end))

    lowest = behind(q_first, window.left, -1)
    first = _where(lowest >= keys, end, _least(_clip(lowest, 0, keys) // block_size, end))
    # Every query of the tile sees every key from `inner` on (up to the right edge).
    inner = behind(q_last, window.left, -1)
    full_first = (_clip(inner, 0, keys) + block_size - 1) // block_size
    if not window.sinks:
        return KeyTiles(0, 0, *_nested(first, full_first, whole, end))

    # Sinks are seen from everywhere: where they reach `inner`, nothing on the left is masked at all.
    joined = inner <= window.sinks
    sink_end = _where(joined, 0, _least(-(-min(window.sinks, keys) // block_size), end))
    sink_full = _least(_least(window.sinks // block_size, whole), sink_end)
    first = _where(joined, 0, _greatest(first, sink_end))
    full_first = _where(joined, 0, full_first)
    return KeyTiles(sink_full, sink_end, *_nested(first, full_first, whole, end))


def query_tiles(
    window: Window, key_tile: Any, *, tile_size: int, block_size: int, queries: int, keys: int, q_offset: Any
) -> QueryTiles:
    """The query tiles that keys [key_tile * block_size, ...) need: the transpose of `key_tiles`.

    A key tile that overhangs `keys` has no full tile. Arguments as in `key_tiles`.
    """
    k_first = key_tile * block_size
    k_last = _least(k_first + block_size, keys) - 1
    overhangs = k_first + block_size > keys

    # From here on keys are numbered like the queries: query t stands at key `t`.
    from_first, from_last = k_first - q_offset, k_last - q_offset
    last_tile = -(-queries // tile_size)
    first = full_first = 0
    end = full_end = last_tile
    if window.right is not None:
        least = behind(from_first, window.right, -1)
        first = _clip(least, 0, queries) // tile_size
        full_first = (_clip(behind(from_last, window.right, -1), 0, queries) + tile_size - 1) // tile_size
        # A tile that starts beyond the queries holds none.
        first = _where(least >= queries, end, first)
    if window.left is not None:
        left = window.left

        def whole_tiles_seeing(key: Any) -> Any:  # all of whose queries have the key in their window's left side
            reach = _clip(ahead(key, left, queries), -1, queries - 1) + 1
            return _where(reach >= queries, last_tile, reach // tile_size)

        end = (_clip(ahead(from_last, left, queries), -1, queries - 1) + tile_size) // tile_size
        full_end = whole_tiles_seeing(from_first)
        if window.sinks:
            end = _where(k_first < window.sinks, last_tile, end)
            # The first key of the tile that is not pinned is the one that leaves the window first.
            full_end = whole_tiles_seeing(_greatest(k_first, min(window.sinks, keys)) - q_offset)
            full_end = _where(k_last < window.sinks, last_tile, full_end)
    full_end = _where(overhangs, full_first, full_end)
    return QueryTiles(*_nested(first, full_first, full_end, end))


class SlotTiles(NamedTuple):
    """Tiles of a ring's slots, in two half-open ranges of tile indices: [0, low) and [first, end), low <= first."""

    low: Any
    first: Any
    end: Any


def _quotient(value: Any, divisor: int) -> Any:
    """`value // divisor` of a value that is not negative: in a kernel, a shift and no more."""
    return lax.div(value, np.int32(divisor)) if isinstance(value, jax.Array) else value // divisor


def slot_tiles(newest: Any, count: Any, pinned: Any, *, sinks: int, capacity: int, block_size: int) -> SlotTiles:
    """The tiles that hold the last `count` tokens of a ring and the first `pinned` sinks.

    Args:
      newest: the slot of the newest token that is not pinned.
      count: tokens up to it, at most `capacity - sinks`; none if it is not positive.
      pinned: sinks, 0..sinks.
      sinks, capacity: of the ring.
      block_size: slots in a tile.
    """
    oldest = newest - count + 1
    wraps = oldest < sinks
    some = count > 0
    pinned_end = _quotient(pinned + block_size - 1, block_size)
    newest_end = _quotient(newest, block_size) + 1
    low = _where(some & wraps, newest_end, pinned_end)
    first = _greatest(_quotient(_where(wraps, oldest + capacity - sinks, oldest), block_size), low)
    end = _where(wraps, -(-capacity // block_size), newest_end)
    return SlotTiles(low, _where(some, first, low), _where(some, _greatest(first, end), low))


class RingSteps(NamedTuple):
    """The tiles of a ring that one query tile of a chunk needs, as steps: those that need a mask come first.

    Attributes:
      pinned, tail, seam: tiles at the front that hold sinks; 1 if the last tile overhangs and is needed; 1 if the tile
        in which the newest token has the oldest one for a neighbour is needed. Each of them may hold slots that nobody
        sees.
      edges, full: tiles of the rest with the oldest tokens, in part seen; all of whose slots all queries see.
      start, around: where the rest begins, counted backwards in time, and how many tiles it goes around.
      first: the tile at which it goes around.
      newest: the slot of the newest token.
      capacity, block_size: of the ring. Slots are counted from where the first tile begins.
    """

    pinned: Any
    tail: Any
    seam: Any
    edges: Any
    full: Any
    start: Any
    around: Any
    first: Any
    newest: Any
    capacity: Any
    block_size: int

    @property
    def mixed(self) -> Any:
        """Steps whose tiles are not all of one run of positions."""
        return self.pinned + self.tail + self.seam

    @property
    def masked(self) -> Any:
        """Steps that need a mask; they come first."""
        return self.mixed + self.edges

    @property
    def count(self) -> Any:
        return self.masked + self.full

    def tile(self, step: Any) -> Any:
        """The tile of a step."""
        back = step - self.mixed
        back = self.start - 1 - _where(back < self.edges, back + self.full, back - self.edges)
        tile = self.first + _where(back < 0, back + self.around, back)
        tile = _where(step < self.mixed, _quotient(self.newest, self.block_size), tile)
        tile = _where(step < self.pinned + self.tail, _quotient(self.capacity, self.block_size), tile)
        return _where(step < self.pinned, step, tile)


def ring_steps(
    newest: Any,
    oldest: Any,
    inner: Any,
    pinned: Any,
    *,
    sinks: int,
    capacity: int,
    block_size: int,
    shift: Any = 0,
) -> RingSteps:
    """The tiles of a ring that queries after all of its tokens need.

    Args:
      newest: the slot of the newest token that is not pinned.
      oldest: the greatest age (0: the newest) that any of the queries sees, at most what is stored; negative: none.
      inner: the greatest age that all of them see.
      pinned: sinks that are stored and seen, 0..sinks; if there are sinks, none of them means nothing else either.
      sinks, capacity: of the ring.
      block_size: slots in a tile.
      shift: slots before slot 0 with which the first tile begins, less than a tile; they hold nothing.
    """
    circle = capacity - sinks
    pinned = pinned if _static(shift) and shift == 0 else _where(pinned > 0, pinned + shift, 0)
    newest, pinned_end, capacity = newest + shift, sinks + shift, capacity + shift  # as if the shift were sinks
    first = _quotient(pinned_end + block_size - 1, block_size)
    last = _quotient(capacity, block_size)
    end = _greatest(last, first)
    around = end - first
    gap = circle - around * block_size  # slots of tiles that are mixed wherever the newest token is
    at = _quotient(newest, block_size)
    some = oldest >= 0
    start = _clip(at - first, 0, around)
    youngest = newest - (first + start) * block_size + 1  # age in the first tile back in time
    is_seam = (at >= first) & (at < end)
    tiles = around - _where(is_seam, 1, 0)

    def older(age: Any) -> Any:
        """How many tiles back in time hold a token of at most this age."""
        before = _clip(_quotient(_greatest(age - youngest + block_size, 0), block_size), 0, start)
        after = _clip(_quotient(_greatest(age - youngest - gap + block_size, 0), block_size), start, tiles)
        return _where(before < start, before, _least(after, tiles))

    seen = older(oldest)
    full = older(_least(oldest, inner) - (block_size - 1))
    tail: Any = 0
    overhangs = (capacity != last * block_size) & (last >= first)
    if overhangs is not False:
        in_tail = (at >= end) | (newest - (capacity - 1) + circle <= oldest)
        tail = _where((some & in_tail) if overhangs is True else (some & in_tail & overhangs), 1, 0)
    if not sinks and not (_static(shift) and shift == 0):  # the first tile is needed as the last one is
        head_end = _least(first * block_size, capacity)
        pinned = _where(some & ((at < first) | (newest - (head_end - 1) <= oldest)), shift, 0)
    return RingSteps(
        pinned=_quotient(pinned + block_size - 1, block_size),
        tail=tail,
        seam=_where(some & is_seam, 1, 0),
        edges=_where(some, seen - _least(full, seen), 0),
        full=_where(some, _least(full, seen), 0),
        start=start,
        around=around,
        first=first,
        newest=newest,
        capacity=capacity,
        block_size=block_size,
    )
