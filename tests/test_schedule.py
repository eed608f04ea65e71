"""The schedules against brute force: no visible tile missed, no invisible one visited, full runs as long as can be."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringjax._schedule import key_tiles, query_tiles
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


def test_work_does_not_grow_with_the_keys():
    """A query tile needs as many key tiles at 1,000,000 keys as at 1,000: about (tile + W) / block, and the sinks."""
    window, sizes = Window.causal(512, sinks=4), {"tile_size": 128, "block_size": 64}
    visited = []
    for length in (4096, 1_000_000):
        tiles = key_tiles(window, length // 128 - 1, queries=length, keys=length, q_offset=0, **sizes)
        visited.append((tiles.sink_end, tiles.end - tiles.first, tiles.full_end - tiles.full_first))
    assert visited[0] == visited[1] == (1, 10, 6)
