"""The schedules against brute force: no visible tile missed, no invisible one visited, full runs as long as can be."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringjax._schedule import key_tiles, query_tiles, ring_steps
from ringjax._slots import position_in_slot
from ringjax._window import Window

SKIPPED, EDGE, FULL = 0, 1, 2


@st.composite
def calls(draw):
    """A window, and T, S, tile size, block size and offset that need not fit one another."""
    side = st.one_of(st.none(), st.integers(0, 9))
    window = Window(draw(side), draw(st.one_of(st.just(0), side)), draw(st.one_of(st.just(0), st.integers(0, 7))))
    queries, keys = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    offset = draw(st.one_of(st.just(keys - queries), st.just(0), st.integers(-25, 25)))
    return window, {
        "tile_size": draw(st.integers(1, 8)),
        "block_size": draw(st.integers(1, 8)),
        "queries": queries,
        "keys": keys,
        "q_offset": offset,
    }


def classes(window, tile_size, block_size, queries, keys, q_offset):
    """What each tile is, by looking at each of its pairs; a tile that overhangs the keys is not full."""
    p, j = q_offset + np.arange(queries)[:, None], np.arange(keys)[None]
    left, right = (np.inf if side is None else side for side in (window.left, window.right))
    seen = ((-right <= p - j) & (p - j <= left)) | ((j < window.sinks) & (j <= p + right))
    found = np.zeros((-(-queries // tile_size), -(-keys // block_size)), int)
    for i, b in np.ndindex(found.shape):
        tile = seen[i * tile_size : (i + 1) * tile_size, b * block_size : (b + 1) * block_size]
        whole = (b + 1) * block_size <= keys
        found[i, b] = FULL if tile.all() and whole else EDGE if tile.any() else SKIPPED
    return found


def by_keys(tiles, count):
    """What a `KeyTiles` says of each key tile; each is in at most one of its runs."""
    sink_full, sink_end, first, full_first, full_end, end = (int(x) for x in tiles)
    assert 0 <= sink_full <= sink_end <= first <= full_first <= full_end <= end <= max(count, first)
    found = np.full(count, SKIPPED)
    found[:sink_full], found[sink_full:sink_end] = FULL, EDGE
    found[first:full_first], found[full_first:full_end], found[full_end:end] = EDGE, FULL, EDGE
    return found


def by_queries(tiles, count):
    first, full_first, full_end, end = (int(x) for x in tiles)
    assert 0 <= first <= full_first <= full_end <= end <= max(count, first)
    found = np.full(count, SKIPPED)
    found[first:full_first], found[full_first:full_end], found[full_end:end] = EDGE, FULL, EDGE
    return found


def check(window, numbers):
    expected = classes(window, **numbers)
    rows = [by_keys(key_tiles(window, i, **numbers), expected.shape[1]) for i in range(expected.shape[0])]
    columns = [by_queries(query_tiles(window, b, **numbers), expected.shape[0]) for b in range(expected.shape[1])]
    np.testing.assert_array_equal(np.stack(rows), expected)
    np.testing.assert_array_equal(np.stack(columns, axis=1), expected)


@given(calls())
def test_tiles_are_what_their_pairs_say(call):
    """Both schedules; each being exact, one is the transpose of the other."""
    check(*call)


@pytest.mark.parametrize("sinks", [0, 1, 3, 6])
@pytest.mark.parametrize("right", [0, 2, None])
@pytest.mark.parametrize("left", [0, 1, 2, 4, 7, None])
def test_tiles_of_every_small_window(left, right, sinks):
    """Every window of the table, at square and odd tiles, with T = S, T > S and T < S."""
    window = Window(left, right, sinks)
    for tile_size, block_size in ((1, 1), (4, 4), (4, 3), (3, 5), (16, 2)):
        for queries, keys, offset in ((12, 12, 0), (9, 14, 5), (14, 9, -5), (5, 16, 4), (6, 6, 30)):
            numbers = {"tile_size": tile_size, "block_size": block_size, "queries": queries, "keys": keys}
            check(window, numbers | {"q_offset": offset})


def test_python_numpy_and_traced_integers_agree():
    """Tile index and offset may be any kind of integer; a jitted schedule is the same schedule."""
    numbers = {"tile_size": 4, "block_size": 3, "queries": 18, "keys": 23}
    index, offset = (x.ravel().astype(np.int32) for x in np.meshgrid(range(5), range(-8, 30), indexing="ij"))
    for window in (
        *(Window(5), Window(5, 2), Window(3, sinks=4), Window(4, 3, 7)),
        *(Window(None), Window(None, None), Window(2, None)),
    ):
        for schedule in (key_tiles, query_tiles):
            ints = [
                tuple(schedule(window, i, q_offset=o, **numbers))
                for i, o in zip(index.tolist(), offset.tolist(), strict=True)
            ]
            assert all(type(x) is int for tiles in ints for x in tiles)
            arrays = schedule(window, index, q_offset=offset, **numbers)
            traced = jax.jit(lambda i, o, f=schedule, w=window: f(w, i, q_offset=o, **numbers))(index, offset)
            for found in (arrays, traced):
                found = np.stack([np.broadcast_to(x, index.shape) for x in found], axis=1)
                np.testing.assert_array_equal(found, ints, f"{schedule.__name__} {window}")


@pytest.mark.parametrize("window", [Window(2**31 - 2), Window(3, 2**31 - 2), Window(2**31 - 2, 2**30, 5)], ids=str)
def test_far_sides_and_positions_do_not_overflow(window):
    """Whose sums are beyond int32: the traced schedules are those of Python's ints, which have no end."""
    numbers = {"tile_size": 4, "block_size": 3, "queries": 18, "keys": 23}
    offsets = [-30, 0, 5, 2**30, 2**31 - 30]
    index, offset = (x.ravel().astype(np.int32) for x in np.meshgrid(range(5), offsets, indexing="ij"))
    for schedule in (key_tiles, query_tiles):
        ints = [tuple(schedule(window, int(i), q_offset=int(o), **numbers)) for i, o in zip(index, offset, strict=True)]
        found = jax.jit(lambda i, o, f=schedule: f(window, i, q_offset=o, **numbers))(index, offset)
        found = np.stack([np.broadcast_to(x, index.shape) for x in found], axis=1)
        np.testing.assert_array_equal(found, ints, schedule.__name__)


def test_work_does_not_grow_with_the_keys():
    """A query tile needs as many key tiles at 1,000,000 keys as at 1,000: about (tile + W) / block, and the sinks."""
    window, sizes = Window.causal(512, sinks=4), {"tile_size": 128, "block_size": 64}
    visited = []
    for length in (4096, 1_000_000):
        tiles = key_tiles(window, length // 128 - 1, queries=length, keys=length, q_offset=0, **sizes)
        visited.append((tiles.sink_end, tiles.end - tiles.first, tiles.full_end - tiles.full_first))
    assert visited[0] == visited[1] == (1, 10, 6)


@pytest.mark.parametrize("sinks", [0, 1, 5, 9])
@pytest.mark.parametrize("block", [1, 4, 7])
@pytest.mark.parametrize("slack", [0, 3])
@pytest.mark.parametrize("shift", [0, 3])
def test_the_steps_over_a_ring_are_its_tiles(sinks, block, slack, shift):
    """By brute force over every length and rollback: no tile twice, none missing, none unmasked that needs a mask.

    A tile is needed where the first query (of a chunk after the ring) sees a slot, and full where the last sees all.
    """
    shift = min(shift, block - 1)
    for around in (slack + 1, slack + 2, 6, 11, 16):
        capacity, left = sinks + around, around - 1 - slack
        slots = np.arange(capacity)
        tiles = np.pad(slots, (shift, -(capacity + shift) % block), constant_values=-1).reshape(-1, block)
        for length in range(3 * capacity):
            for written in range(length, length + slack + 1):
                held = position_in_slot(slots, length, written, sinks=sinks, slack=slack, capacity=capacity)
                age = min(length - sinks - 1, length - written + around - 1)
                newest = sinks + max(length - sinks - 1, 0) % around
                for first, last in ((0, 0), (0, 2), (2, 5), (5, 9)):
                    seen, full = ((held >= 0) & ((length + t - held <= left) | (held < sinks)) for t in (first, last))
                    found = ring_steps(
                        newest,
                        min(age, left - 1 - first),
                        left - 1 - last,
                        min(length, sinks),
                        sinks=sinks,
                        capacity=capacity,
                        block_size=block,
                        shift=shift,
                    )
                    visited = [found.tile(step) for step in range(found.count)]
                    needed = set(((slots[seen] + shift) // block).tolist())
                    assert len(set(visited)) == len(visited) and needed <= set(visited)
                    assert len(visited) <= len(needed) + 1, "one more: of the tile that overhangs"
                    for step in range(found.mixed, found.count):
                        whole = bool(np.append(full, False)[tiles[visited[step]]].all())
                        assert whole == (step >= found.masked)


def test_steps_over_a_ring_may_be_traced():
    sizes = {"sinks": 5, "capacity": 40, "block_size": 7}
    some = [(newest, oldest, inner, 5) for newest in range(5, 40, 3) for oldest in (-1, 9, 34) for inner in (-9, 30)]
    numbers = [(*one, shift) for one in some for shift in (0, 2, 6)]

    def tiles(*numbers):
        *numbers, shift = numbers
        found = ring_steps(*numbers, **sizes, shift=shift)
        return found.masked, found.count, *(found.tile(step) for step in range(6))

    found = jax.jit(tiles)(*np.array(numbers, np.int32).T)
    np.testing.assert_array_equal(np.stack(found, axis=1), [tiles(*one) for one in numbers])
