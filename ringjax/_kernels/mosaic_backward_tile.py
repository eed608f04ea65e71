"""What the backward kernels share: a call's operands, the tiles that a key or query tile meets, the weights of a tile.

Queries are [B, T, N, D], keys and values [B, S, K, D], row statistics [B, N, 2, T]: lse in base 2, and delta.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from ringjax._kernels.mosaic_tile import (
    BY_COLUMN,
    BY_ROW,
    LOG2E,
    Positions,
    Steps,
    plgpu,
    steps,
    swizzled,
    within_segments,
)
from ringjax._kernels.problem import Problem, Rows
from ringjax._kernels.tiles import MosaicBackwardTiles
from ringjax._schedule import key_tiles, query_tiles

ROWS = 64  # of a warpgroup's product


class Call(NamedTuple):
    """A problem, its padded operands by name, and the sizes of its tiles."""

    problem: Problem
    rows: Rows
    operands: dict[str, Array]
    sizes: MosaicBackwardTiles
    interpret: Any

    @property
    def dtype(self) -> Any:
        return self.operands["q"].dtype

    @property
    def depth(self) -> int:
        return self.operands["q"].shape[-1]


def offset(call: Call, ref: dict[str, Any], row: Any) -> Any:
    return ref["q_start"][row] if "q_start" in ref else call.problem.q_offset


def positions_of(
    call: Call,
    ref: dict[str, Any],
    row: Any,
    q_first: Any,
    k_first: Any,
    shape: tuple[int, int],
    q_axis: int,
    ids: tuple[Any, Any] | None = None,
) -> Positions:
    """Of a tile of `shape` from query index `q_first` and key index `k_first` on.

    `ids`: the queries' and the keys' segments in shared memory; None: they are read from global memory.
    """
    problem, q_segments, k_segments = call.problem, None, None
    if "q_segments" in ref:
        layouts = (BY_ROW, BY_COLUMN)
        at: Any = ids
        if ids is None:
            q_at = ref["q_segments"].at[row, pl.ds(q_first, shape[q_axis])]
            at = q_at, ref["kv_segments"].at[row, pl.ds(k_first, shape[1 - q_axis])]
        q_segments = plgpu.load(at[0], layout=layouts[q_axis], optimized=ids is not None)
        k_segments = plgpu.load(at[1], layout=layouts[1 - q_axis], optimized=ids is not None)
    distance = q_first + offset(call, ref, row) - k_first
    overhang = problem.keys if problem.keys % 128 else None
    return Positions(problem.window, overhang, distance, k_first, q_segments, k_segments)


def ids_by_tile(ids: Array, tile: int) -> Array:
    """Segment ids [B, T] as int32 [B, tiles, 2, tile]: those of a tile, and whether it holds padding, 1 or 0."""
    tiles = ids.reshape(ids.shape[0], -1, tile)
    padded = (tiles.min(-1, keepdims=True) < 0).astype(jnp.int32)
    return jnp.stack([tiles, jnp.broadcast_to(padded, tiles.shape)], axis=2)


def clear(piece: Any, ids: Any) -> None:
    """Zeros those of 64 rows of 64 numbers in shared memory that are padding: they may be NaN, and 0 * NaN is NaN."""
    values = plgpu.load(piece, layout=plgpu.Layout.WGMMA)
    real = lax.broadcast_in_dim(plgpu.load(ids, layout=BY_ROW), (ROWS, ROWS), [0]) >= 0
    piece[...] = jnp.where(real, values, jnp.zeros_like(values))


def weights_of(
    problem: Problem, logits: Any, lse: Any, lse_axis: int, positions: Positions | None, q_axis: int
) -> tuple[Any, Any]:
    """The weights of a tile, and the weights times the cap's slope: the cotangent of the logits is a multiple of it."""
    factor, slope = problem.scale * LOG2E, None
    if problem.softcap is not None:
        capped = jnp.tanh(logits * (problem.scale / problem.softcap))
        logits, factor, slope = capped, problem.softcap * LOG2E, 1.0 - capped * capped
    weights = jnp.exp2(logits * factor - lax.broadcast_in_dim(lse, logits.shape, [lse_axis]))
    # Masked after the exponential: before it, the mask would cost registers (432 -> 220 B of spills).
    mask = None if positions is None else positions.visible(logits.shape, q_axis)
    if mask is not None:
        weights = jnp.where(mask, weights, 0.0)
    return weights, weights if slope is None else weights * slope


def three_runs(walk: Steps, step: Callable[..., Any], first: Any = 0, each: int = 1) -> tuple[()]:
    """Runs `step` on edge, full and edge tiles, `each` steps a tile, from step `first` on."""
    a, b, c = (first + x * each for x in (walk.full_first, walk.full_end, walk.count))
    lax.fori_loop(first, a, functools.partial(step, masked=True), ())
    lax.fori_loop(a, b, functools.partial(step, masked=False), ())
    lax.fori_loop(b, c, functools.partial(step, masked=True), ())
    return ()


def runs(call: Call, walk: Steps, own: Steps, step: Callable[..., Any], void: Callable[..., Any]) -> None:
    """Runs `step` on a warpgroup's `own` query tiles of those that its program walks over, `void` on the others.

    Beside the work that it saves (1 step in 18 at W = 1024), this sets the two warpgroups a step apart: one's
    exponentials then run behind the other's products.
    """
    window, group = call.problem.window, call.problem.group
    outer = call.sizes.heads_outer and group > 1
    # Counted as the walk's steps are.
    shift = own.first - walk.first
    bounds = [jnp.clip(shift + x, 0, walk.count) for x in (0, own.full_first, own.full_end, own.count)]
    for i in range(1, 4):  # a warpgroup without keys has them in disorder
        bounds[i] = jnp.maximum(bounds[i - 1], bounds[i])
    segments = "q_segments" in call.operands
    begins_void, ends_void = window.right is not None or segments, window.left is not None or segments
    if walk.descending:
        bounds = [walk.count - x for x in reversed(bounds)]
        begins_void, ends_void = ends_void, begins_void
    each = 1 if outer else group

    def of_head(start: Any) -> None:
        end = start + walk.count * each
        a, b, c, d = (start + x * each for x in bounds)
        if begins_void:
            lax.fori_loop(start, a, void, ())
        lax.fori_loop(a if begins_void else start, b, functools.partial(step, masked=True), ())
        lax.fori_loop(b, c, functools.partial(step, masked=False), ())
        lax.fori_loop(c, d if ends_void else end, functools.partial(step, masked=True), ())
        if ends_void:
            lax.fori_loop(d, end, void, ())

    if outer:

        def head(h: Any, _: Any) -> Any:
            of_head(h * walk.count)
            return ()

        lax.fori_loop(0, group, head, ())
    else:
        of_head(0)


def key_steps(call: Call, tile: int, block: int) -> tuple[Callable[..., Steps], dict[str, Array]]:
    """The key tiles of a query tile: a function for the kernel, and what it reads."""
    problem = call.problem
    count = call.operands["k"].shape[1] // block
    bounds_of = functools.partial(
        key_tiles, problem.window, tile_size=tile, block_size=block, queries=problem.queries, keys=problem.keys
    )
    extra = {}
    if "q_segments" in call.operands:
        found = bounds_of(_all_tiles(call.operands["q"].shape[1] // tile), q_offset=_offsets(call))
        extra["bounds"] = _segment_bounds(
            call, found.sink_end, (found.first, found.full_first, found.full_end, found.end), "q", tile, block
        )

    def of(ref: dict[str, Any], row: Any, query_tile: Any) -> Steps:
        if "bounds" in ref:
            return steps(*(ref["bounds"][row, query_tile, i] for i in range(5)), tiles=count)
        found = bounds_of(query_tile, q_offset=offset(call, ref, row))
        return steps(found.sink_end, found.first, found.full_first, found.full_end, found.end, tiles=count)

    return of, extra


def query_steps(
    call: Call, tile: int, block: int, name: str = "bounds"
) -> tuple[Callable[..., Steps], dict[str, Array]]:
    """The query tiles of a key tile: a function for the kernel, and what it reads, `name` among it."""
    problem = call.problem
    count = call.operands["q"].shape[1] // tile
    bounds_of = functools.partial(
        query_tiles, problem.window, tile_size=tile, block_size=block, queries=problem.queries, keys=problem.keys
    )
    extra = {}
    if "q_segments" in call.operands:
        found = bounds_of(_all_tiles(call.operands["k"].shape[1] // block), q_offset=_offsets(call))
        extra[name] = _segment_bounds(call, 0, tuple(found), "kv", block, tile)

    def of(ref: dict[str, Any], row: Any, key_tile: Any) -> Steps:
        if name in ref:
            return steps(0, *(ref[name][row, key_tile, i] for i in range(1, 5)), tiles=count)
        return steps(0, *bounds_of(key_tile, q_offset=offset(call, ref, row)), tiles=count)

    return of, extra


def _all_tiles(count: int) -> Array:
    return jnp.arange(count, dtype=jnp.int32)[None]


def _offsets(call: Call) -> Any:
    return call.problem.q_offset if call.rows.q_start is None else call.rows.q_start[:, None]


def _segment_bounds(call: Call, sinks: Any, bounds: Any, side: str, tile: int, other_tile: int) -> Array:
    """int32 [B, tiles, 5]: end of the sink tiles, then first, full_first, full_end and end, of tiles of one side."""
    batch = call.problem.batch
    other = "q" if side == "kv" else "kv"
    mine = call.operands[f"{side}_segments"].reshape(batch, -1, tile)
    others = call.operands[f"{other}_segments"].reshape(batch, -1, other_tile)
    sinks, *bounds = (jnp.broadcast_to(jnp.asarray(x, jnp.int32), mine.shape[:2]) for x in (sinks, *bounds))
    return jnp.stack([sinks, *within_segments(tuple(bounds), mine, others)], axis=-1)


def run(call: Call, kernel: Any, extra: dict[str, Array], **options: Any) -> Any:
    interpret = {} if call.interpret is None else {"interpret": call.interpret}
    return plgpu.kernel(
        kernel,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        **options,
        **interpret,
    )(*call.operands.values(), *extra.values())


def staging(call: Call, columns: int, *names: str) -> dict[str, Any]:
    """Shared memory for register operands: the interpreter multiplies from there only."""
    if call.interpret is None:
        return {}
    return {name: swizzled((call.sizes.warpgroups, ROWS, columns), call.dtype) for name in names}


def multiply(acc: Any, left: Any, right: Any, warpgroup: Any, staging: dict[str, Any], name: str = "left") -> None:
    """acc += left @ right with left in registers."""
    if name in staging:
        staging[name].at[warpgroup][...] = left
        plgpu.commit_smem()
        left = staging[name].at[warpgroup]
    plgpu.wgmma(acc, left, right)


def drain(call: Call, count: Any, *barriers: tuple[Any, int]) -> None:
    """Waits for the slots still in use: the interpreter wants every completed phase of a barrier observed."""
    if call.interpret is not None:
        for free, stages in barriers:

            def wait(i: Any, _: Any, free: Any = free, stages: int = stages) -> Any:
                plgpu.barrier_wait(free.at[lax.rem(i, jnp.int32(stages))])
                return ()

            lax.fori_loop(jnp.maximum(count - stages, 0), count, wait, ())
