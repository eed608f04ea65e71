"""How many pairs are visible, how many tiles hold them, and how many pairs an implementation computes.

Counted from runs of integers, never from an array of T x S: 131072 queries take milliseconds. All counts are those of
one head.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from ringjax._kernels.problem import Problem, Walk
from ringjax._kernels.tiles import Tiles
from ringjax._schedule import KeyTiles, key_tiles
from ringjax._slots import position_in_slot


class Row(NamedTuple):
    """The integers of one row of the batch, as one source sees it."""

    start: int  # position of query 0
    queries: int  # real ones
    keys: int = 0  # linear: real ones
    kv_start: int = 0  # linear: position of key 0
    length: int = 0  # ring
    written: int = 0  # ring


def _held(problem: Problem, row: Row) -> Any:
    """Positions of the keys of a row; -1: none."""
    if not problem.is_ring:
        return row.kv_start + np.arange(row.keys)
    slots = np.arange(problem.keys)
    sizes = {"sinks": problem.window.sinks, "slack": problem.slack, "capacity": problem.keys}
    return position_in_slot(slots, row.length, row.written, **sizes)


def visible_pairs(problem: Problem, row: Row) -> int:
    """Pairs that see each other: for each key, the length of the run of queries that see it."""
    window, at = problem.window, _held(problem, row)
    at = at[at >= 0]
    end = row.start + row.queries
    first, last = np.full_like(at, row.start), np.full_like(at, end - 1)
    if window.right is not None:
        first = np.maximum(first, at - window.right)
    if window.left is not None:
        last = np.where(at < window.sinks, last, np.minimum(last, at + window.left))
    return int(np.maximum(last - first + 1, 0).sum())


def full_and_edge_tiles(problem: Problem, row: Row, sizes: Tiles) -> tuple[int, int]:
    """Full and edge tiles of a row."""
    tile, block = sizes.tile_size, sizes.block_size
    assert tile is not None and block is not None
    if problem.is_ring:
        full = edge = 0
        for some, every in _sight(problem, row, tile):
            # An overhanging tile is never full, as in `_schedule`.
            every = np.pad(every, [(0, 0), (0, -problem.keys % block)])
            some = np.logical_or.reduceat(some, np.arange(0, problem.keys, block), axis=1)
            whole = np.logical_and.reduceat(every, np.arange(0, problem.keys, block), axis=1)
            full, edge = full + int(whole.sum()), edge + int((some & ~whole).sum())
        return full, edge
    if not row.queries or not row.keys:
        return 0, 0
    # The schedule counts positions from key 0, and so the sinks too.
    window = dataclasses.replace(problem.window, sinks=max(0, problem.window.sinks - row.kv_start))
    index = np.arange(-(-row.queries // tile))
    offset = row.start - row.kv_start
    sides = {"tile_size": tile, "block_size": block, "queries": row.queries, "keys": row.keys}
    t = KeyTiles(*np.broadcast_arrays(*key_tiles(window, index, q_offset=offset, **sides), index)[:-1])
    full = t.sink_full + t.full_end - t.full_first
    edge = t.sink_end - t.sink_full + t.full_first - t.first + t.end - t.full_end
    return int(full.sum()), int(edge.sum())


def _sight(problem: Problem, row: Row, tile: int) -> Iterator[tuple[Any, Any]]:
    """For query tiles of a ring, some at a time: which slots some query sees, which every query; bool [tiles, C]."""
    window, at = problem.window, _held(problem, row)[None]
    assert window.left is not None
    end = row.start + row.queries
    for begin in range(0, row.queries, 256 * tile):
        first = row.start + np.arange(begin, min(begin + 256 * tile, row.queries), tile)[:, None]
        last = np.minimum(first + tile, end) - 1
        some, every = (at >= 0) & (last >= row.start), (at >= 0) & (last >= row.start)
        if window.right is not None:
            some, every = some & (at - last <= window.right), every & (at - first <= window.right)
        pinned = at < window.sinks
        yield some & ((first - at <= window.left) | pinned), every & ((last - at <= window.left) | pinned)


def computed_pairs(problem: Problem, walk: Walk, rows: list[Row]) -> int:
    """Pairs that an implementation computes in all rows."""
    tile, size = walk.sizes.tile_size, walk.sizes.block_size
    assert tile is not None and size is not None
    if walk.on_grid:
        tiles = (sum(full_and_edge_tiles(problem, row, walk.sizes)) * times for row, times in Counter(rows).items())
        return tile * size * sum(tiles)
    count = -(-problem.queries // tile)
    together = [[row] for row in rows] if walk.rows_apart else [rows]
    computed = 0
    for group, times in Counter(map(tuple, together)).items():
        if problem.is_ring:
            keys = _ring_slots(problem, walk, list(dict.fromkeys(group)), count)
        else:
            blocks = np.ones(count, int)
            if walk.blocks > 1:
                window = dataclasses.replace(problem.window, sinks=0)
                sides = {"tile_size": tile, "block_size": 1, "queries": problem.queries, "keys": problem.keys}
                offsets = np.array(sorted({row.start - row.kv_start for row in group}))[:, None]
                t = key_tiles(window, np.arange(count)[None], q_offset=offsets, **sides)
                first, end = (np.broadcast_to(x, (len(offsets), count)) for x in (t.first, t.end))
                reach = end.max(0) - np.maximum(first, walk.sinks).min(0)
                blocks = np.maximum(-(-reach // size), 0)
            if walk.sinks == problem.keys:
                blocks = np.zeros(count, int)
            keys = int((walk.sinks + blocks * size).sum())
        computed += tile * keys * len(group) * times
    return computed


def _ring_slots(problem: Problem, walk: Walk, rows: list[Row], count: int) -> int:
    """Slots that the query tiles of rows that run together multiply with, all tiles of one row."""
    tile, size = walk.sizes.tile_size, walk.sizes.block_size
    assert tile is not None and size is not None
    starts = np.arange(walk.sinks, problem.keys, size)
    if walk.sinks:
        starts = np.concatenate([[0], starts])
    wanted = np.zeros((count, len(starts)), bool)
    filled = 0
    for row in rows:
        if row.written - row.length <= problem.slack:
            filled = max(filled, problem.keys if row.written > problem.keys else row.length)
        at = 0
        for some, _ in _sight(problem, row, tile):
            wanted[at : at + len(some)] |= np.logical_or.reduceat(some, starts, axis=1)
            at += len(some)
    if walk.one_pass is not None and walk.one_pass(filled):
        return count * problem.keys
    widths = np.full(len(starts), size)
    if walk.sinks:
        widths[0] = walk.sinks
    visited = starts < max(filled, walk.sinks) if walk.blocks > 1 else np.ones(len(starts), bool)
    if walk.skips:
        return int((wanted & visited) @ widths @ np.ones(count, int))
    return count * int((visited * widths).sum())
