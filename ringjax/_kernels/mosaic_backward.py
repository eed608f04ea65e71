"""Attention backward on Hopper in Pallas Mosaic GPU: two deterministic kernels, or a faster one that is not.

With x the logits, p = exp(x - lse) and dx = p * (g . v - delta), the cotangents are dv = p^T g, dk = scale dx^T q and
dq = scale dx k (FlashAttention-2, Dao, 2023). `_queries` keeps a tile of queries and makes dq; `_keys` keeps a tile of
keys and makes dk and dv: seven products a tile, and two runs agree bit for bit. `_fused` keeps a tile of keys, needs
five, and adds its share of dq to float32 in global memory by TMA reduction, in an order that varies from run to run.

In every kernel the last warpgroup only issues loads; each other one owns 64 rows of what the program keeps.
Queries are [B, T, N, D], keys and values [B, S, K, D], row statistics [B, N, 2, T]: lse in base 2, and delta.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from ringjax._kernels.mosaic_tile import (
    BY_COLUMN,
    BY_ROW,
    LOG2E,
    Positions,
    Steps,
    pad_axis,
    plgpu,
    rounded_up,
    steps,
    swizzled,
    within_segments,
)
from ringjax._kernels.problem import Problem, Rows
from ringjax._kernels.tiles import MosaicBackwardTiles, mosaic_backward_tiles
from ringjax._schedule import key_tiles, query_tiles

ROWS = 64  # of a warpgroup's product


class _Call(NamedTuple):
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


def backward(
    problem: Problem,
    rows: Rows,
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    lse: Array,
    delta: Array,
    *,
    tiles: MosaicBackwardTiles | None = None,
    interpret: Any = None,
) -> tuple[Array, Array, Array]:
    """Cotangents of q, k and v; arguments as for `xla.backward`, with D = 64, 128 or 256."""
    sizes = tiles or mosaic_backward_tiles(
        problem.tiles, head_dim=q.shape[-1], window=problem.window, group=problem.group
    )
    if problem.deterministic:
        sizes = sizes._replace(fused=False)
    queries, keys = problem.queries, problem.keys
    padded_queries, padded_keys = rounded_up(queries, 128), rounded_up(keys, 128)
    # An empty row's weights are exp(x - inf) = 0, and so are those of the padding.
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse * LOG2E)
    # Kept apart, or XLA fuses delta's sum over D into the concatenation, and that is 5 times slower.
    lse, delta = lax.optimization_barrier((lse, delta))
    lse, delta = pad_axis(lse, 2, padded_queries, jnp.inf), pad_axis(delta, 2, padded_queries)
    operands = {
        "q": pad_axis(q, 1, padded_queries),
        "k": pad_axis(k, 1, padded_keys),
        "v": pad_axis(v, 1, padded_keys),
        "g": pad_axis(g, 1, padded_queries),
        "statistics": jnp.stack([lse, delta], axis=2),
    }
    if rows.q_start is not None:
        operands["q_start"] = rows.q_start
    if rows.q_segments is not None and rows.kv_segments is not None:
        operands["q_segments"] = pad_axis(rows.q_segments, 1, padded_queries, -1)
        operands["kv_segments"] = pad_axis(rows.kv_segments, 1, padded_keys, -1)
    call = _Call(problem, rows, operands, sizes, interpret)
    if sizes.fused:
        dq, dk, dv = _fused(call)
    else:
        dq = _queries(call)
        if sizes.dk_with_dv:
            dk, dv = _keys(call, "k", "v")
        else:
            (dk,), (dv,) = _keys(call, "k"), _keys(call, "v")
    return dq[:, :queries], dk[:, :keys], dv[:, :keys]


def _offset(call: _Call, ref: dict[str, Any], row: Any) -> Any:
    return ref["q_start"][row] if "q_start" in ref else call.problem.q_offset


def _positions(
    call: _Call, ref: dict[str, Any], row: Any, q_first: Any, k_first: Any, shape: tuple[int, int], q_axis: int
) -> Positions:
    """Of a tile of `shape` from query index `q_first` and key index `k_first` on."""
    problem, q_segments, k_segments = call.problem, None, None
    if "q_segments" in ref:
        layouts = (BY_ROW, BY_COLUMN)
        q_at = ref["q_segments"].at[row, pl.ds(q_first, shape[q_axis])]
        k_at = ref["kv_segments"].at[row, pl.ds(k_first, shape[1 - q_axis])]
        q_segments = plgpu.load(q_at, layout=layouts[q_axis], optimized=False)
        k_segments = plgpu.load(k_at, layout=layouts[1 - q_axis], optimized=False)
    distance = q_first + _offset(call, ref, row) - k_first
    overhang = problem.keys if problem.keys % 128 else None
    return Positions(problem.window, overhang, distance, k_first, q_segments, k_segments)


def _weights(
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


def _three_runs(walk: Steps, step: Callable[..., Any], first: Any = 0, each: int = 1) -> tuple[()]:
    """Runs `step` on edge, full and edge tiles, `each` steps a tile, from step `first` on."""
    a, b, c = (first + x * each for x in (walk.full_first, walk.full_end, walk.count))
    lax.fori_loop(first, a, functools.partial(step, masked=True), ())
    lax.fori_loop(a, b, functools.partial(step, masked=False), ())
    lax.fori_loop(b, c, functools.partial(step, masked=True), ())
    return ()


def _key_steps(call: _Call, tile: int, block: int) -> tuple[Callable[..., Steps], dict[str, Array]]:
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
        found = bounds_of(query_tile, q_offset=_offset(call, ref, row))
        return steps(found.sink_end, found.first, found.full_first, found.full_end, found.end, tiles=count)

    return of, extra


def _query_steps(call: _Call, tile: int, block: int) -> tuple[Callable[..., Steps], dict[str, Array]]:
    """The query tiles of a key tile: a function for the kernel, and what it reads."""
    problem = call.problem
    count = call.operands["q"].shape[1] // tile
    bounds_of = functools.partial(
        query_tiles, problem.window, tile_size=tile, block_size=block, queries=problem.queries, keys=problem.keys
    )
    extra = {}
    if "q_segments" in call.operands:
        found = bounds_of(_all_tiles(call.operands["k"].shape[1] // block), q_offset=_offsets(call))
        extra["bounds"] = _segment_bounds(call, 0, tuple(found), "kv", block, tile)

    def of(ref: dict[str, Any], row: Any, key_tile: Any) -> Steps:
        if "bounds" in ref:
            return steps(0, *(ref["bounds"][row, key_tile, i] for i in range(1, 5)), tiles=count)
        return steps(0, *bounds_of(key_tile, q_offset=_offset(call, ref, row)), tiles=count)

    return of, extra


def _all_tiles(count: int) -> Array:
    return jnp.arange(count, dtype=jnp.int32)[None]


def _offsets(call: _Call) -> Any:
    return call.problem.q_offset if call.rows.q_start is None else call.rows.q_start[:, None]


def _segment_bounds(call: _Call, sinks: Any, bounds: Any, side: str, tile: int, other_tile: int) -> Array:
    """int32 [B, tiles, 5]: end of the sink tiles, then first, full_first, full_end and end, of tiles of one side."""
    batch = call.problem.batch
    other = "q" if side == "kv" else "kv"
    mine = call.operands[f"{side}_segments"].reshape(batch, -1, tile)
    others = call.operands[f"{other}_segments"].reshape(batch, -1, other_tile)
    sinks, *bounds = (jnp.broadcast_to(jnp.asarray(x, jnp.int32), mine.shape[:2]) for x in (sinks, *bounds))
    return jnp.stack([sinks, *within_segments(tuple(bounds), mine, others)], axis=-1)


def _run(call: _Call, kernel: Any, extra: dict[str, Array], **options: Any) -> Any:
    interpret = {} if call.interpret is None else {"interpret": call.interpret}
    return plgpu.kernel(
        kernel,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        **options,
        **interpret,
    )(*call.operands.values(), *extra.values())


def _grid(call: _Call, heads: int, tiles: int) -> dict[str, Any]:
    """The grid, its last axis the fastest."""
    batch = call.problem.batch
    if call.problem.window.left is None:
        # Tiles have unequal work: the longest first, or the last head's longest tile would end alone.
        return {"grid": (tiles, batch, heads), "grid_names": ("tile", "row", "head")}
    return {"grid": (heads, batch, tiles), "grid_names": ("head", "row", "tile")}


def _queries(call: _Call) -> Array:
    """dq: a program keeps 64 queries per warpgroup and walks over the keys that they see; three products a tile."""
    problem, sizes, dtype, depth = call.problem, call.sizes, call.dtype, call.depth
    warpgroups, block, k_stages, v_stages = sizes.warpgroups, sizes.dq_block, sizes.dq_k_stages, sizes.dq_v_stages
    _, padded, heads, _ = call.operands["q"].shape
    tile = ROWS * warpgroups
    tiles = padded // tile
    steps_of, extra = _key_steps(call, tile, block)
    names = (*call.operands, *extra, "dq")

    def kernel(*refs: Any, q_smem, g_smem, statistics, k_smem, v_smem, q_full, k_full, v_full, k_free, v_free, **rest):  # type: ignore[no-untyped-def]
        ref = dict(zip(names, refs, strict=True))
        head, row, query_tile = lax.axis_index("head"), lax.axis_index("row"), tiles - 1 - lax.axis_index("tile")
        warpgroup = lax.axis_index("warpgroup")
        walk = steps_of(ref, row, query_tile)

        @pl.when(warpgroup < warpgroups)
        def _compute() -> None:
            plgpu.set_max_registers(sizes.registers, action="increase")
            first = query_tile * tile + warpgroup * ROWS
            here = pl.ds(first, ROWS)
            full = q_full.at[warpgroup]
            plgpu.copy_gmem_to_smem(ref["q"].at[row, here, head], q_smem.at[warpgroup], full)
            plgpu.copy_gmem_to_smem(ref["g"].at[row, here, head], g_smem.at[warpgroup], full)
            plgpu.copy_gmem_to_smem(ref["statistics"].at[row, head, :, here], statistics.at[warpgroup], full)
            plgpu.barrier_wait(full)
            lse = plgpu.load(statistics.at[warpgroup, 0], layout=BY_ROW)
            delta = plgpu.load(statistics.at[warpgroup, 1], layout=BY_ROW)

            def body(dq_acc: Any) -> Any:
                def step(i: Any, _: Any, *, masked: bool) -> Any:
                    k_slot, v_slot = lax.rem(i, jnp.int32(k_stages)), lax.rem(i, jnp.int32(v_stages))
                    # Behind a barrier the addresses of Q and g stay out of registers that live across the loop.
                    here = lax.optimization_barrier(warpgroup)

                    def products(logits_acc: Any, dp_acc: Any) -> Any:
                        plgpu.barrier_wait(k_full.at[k_slot])
                        plgpu.wgmma(logits_acc, q_smem.at[here], k_smem.at[k_slot].T)
                        plgpu.barrier_wait(v_full.at[v_slot])
                        plgpu.wgmma(dp_acc, g_smem.at[here], v_smem.at[v_slot].T)
                        logits = plgpu.wgmma_accumulator_load(logits_acc, wait_n=1)
                        positions = None
                        if masked:
                            k_first = walk.tile(i) * block
                            positions = _positions(call, ref, row, first, k_first, (ROWS, block), 0)
                        _, slope = _weights(problem, logits, lse, 0, positions, 0)
                        dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=0)
                        plgpu.barrier_arrive(v_free.at[v_slot])
                        return (slope * (dp - lax.broadcast_in_dim(delta, dp.shape, [0]))).astype(dtype)

                    acc = plgpu.ACC((ROWS, block), jnp.float32)
                    _multiply(dq_acc, pl.run_scoped(products, acc, acc), k_smem.at[k_slot], warpgroup, rest)
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(k_free.at[k_slot])
                    return ()

                _three_runs(walk, step)
                return dq_acc[...]

            dq = pl.run_scoped(body, plgpu.ACC((ROWS, depth), jnp.float32))
            q_smem.at[warpgroup][...] = (dq * problem.scale).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_smem.at[warpgroup], ref["dq"].at[row, here, head])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == warpgroups)
        def _load() -> None:
            plgpu.set_max_registers(sizes.loader_registers, action="decrease")
            kv_head = lax.div(head, jnp.int32(problem.group))

            def load(i: Any, _: Any) -> Any:
                k_slot, v_slot = lax.rem(i, jnp.int32(k_stages)), lax.rem(i, jnp.int32(v_stages))
                at = (row, pl.ds(walk.tile(i) * block, block), kv_head)
                pl.when(i >= k_stages)(lambda: plgpu.barrier_wait(k_free.at[k_slot]))
                plgpu.copy_gmem_to_smem(ref["k"].at[at], k_smem.at[k_slot], k_full.at[k_slot])
                pl.when(i >= v_stages)(lambda: plgpu.barrier_wait(v_free.at[v_slot]))
                plgpu.copy_gmem_to_smem(ref["v"].at[at], v_smem.at[v_slot], v_full.at[v_slot])
                return ()

            lax.fori_loop(0, walk.count, load, ())
            _drain(call, walk.count, (k_free, k_stages), (v_free, v_stages))

    return _run(
        call,
        kernel,
        extra,
        out_type=jax.ShapeDtypeStruct(call.operands["q"].shape, dtype),
        **_grid(call, heads, tiles),
        num_threads=warpgroups + 1,
        scratch_types={
            "q_smem": swizzled((warpgroups, ROWS, depth), dtype),
            "g_smem": swizzled((warpgroups, ROWS, depth), dtype),
            "statistics": plgpu.SMEM((warpgroups, 2, ROWS), jnp.float32),
            "k_smem": swizzled((k_stages, block, depth), dtype),
            "v_smem": swizzled((v_stages, block, depth), dtype),
            "q_full": plgpu.Barrier(num_arrivals=3, num_barriers=warpgroups),
            "k_full": plgpu.Barrier(num_barriers=k_stages),
            "v_full": plgpu.Barrier(num_barriers=v_stages),
            "k_free": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=k_stages),
            "v_free": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=v_stages),
            **_staging(call, block, "left"),
        },
    )


def _staging(call: _Call, columns: int, *names: str) -> dict[str, Any]:
    """Shared memory for register operands: the interpreter multiplies from there only."""
    if call.interpret is None:
        return {}
    return {name: swizzled((call.sizes.warpgroups, ROWS, columns), call.dtype) for name in names}


def _multiply(acc: Any, left: Any, right: Any, warpgroup: Any, staging: dict[str, Any], name: str = "left") -> None:
    """acc += left @ right with left in registers."""
    if name in staging:
        staging[name].at[warpgroup][...] = left
        plgpu.commit_smem()
        left = staging[name].at[warpgroup]
    plgpu.wgmma(acc, left, right)


def _drain(call: _Call, count: Any, *barriers: tuple[Any, int]) -> None:
    """Waits for the slots still in use: the interpreter wants every completed phase of a barrier observed."""
    if call.interpret is not None:
        for free, stages in barriers:

            def wait(i: Any, _: Any, free: Any = free, stages: int = stages) -> Any:
                plgpu.barrier_wait(free.at[lax.rem(i, jnp.int32(stages))])
                return ()

            lax.fori_loop(jnp.maximum(count - stages, 0), count, wait, ())


def _keys(call: _Call, *wanted: str) -> list[Array]:
    """dk and dv, or one of them: a program keeps 64 keys per warpgroup and walks over the queries that see them.

    All heads of the group pass by, so that no sum over them is left. Four products a tile (for dv alone two, for dk
    alone three, at D = 256, where two accumulators do not fit into the registers).
    """
    problem, sizes, dtype, depth = call.problem, call.sizes, call.dtype, call.depth
    warpgroups, tile, q_stages, g_stages = sizes.warpgroups, sizes.tile_size, sizes.q_stages, sizes.g_stages
    if wanted == ("v",):
        g_stages = q_stages
    _, padded, kv_heads, _ = call.operands["k"].shape
    block = ROWS * warpgroups
    group = problem.group
    steps_of, extra = _query_steps(call, tile, block)
    names = (*call.operands, *extra, *(f"d{x}" for x in wanted))
    with_k, with_v = "k" in wanted, "v" in wanted

    def kernel(*refs: Any, k_smem, q_smem, g_smem, statistics, kv_full, q_full, g_full, q_free, g_free, **rest):  # type: ignore[no-untyped-def]
        ref = dict(zip(names, refs, strict=True))
        kv_head, row, key_tile = lax.axis_index("head"), lax.axis_index("row"), lax.axis_index("tile")
        warpgroup = lax.axis_index("warpgroup")
        walk = steps_of(ref, row, key_tile)
        v_smem: Any = rest.get("v_smem")

        def where(i: Any) -> tuple[Any, Any]:  # step -> query tile, head
            if sizes.heads_outer:
                return walk.tile(lax.rem(i, walk.count)), kv_head * group + lax.div(i, walk.count)
            return walk.tile(lax.div(i, jnp.int32(group))), kv_head * group + lax.rem(i, jnp.int32(group))

        @pl.when(warpgroup < warpgroups)
        def _compute() -> None:
            plgpu.set_max_registers(sizes.registers, action="increase")
            mine = pl.ds(warpgroup * ROWS, ROWS)
            first = key_tile * block + warpgroup * ROWS
            plgpu.barrier_wait(kv_full)

            def body(*accs: Any) -> Any:
                acc = dict(zip(wanted, accs, strict=True))

                def step(i: Any, _: Any, *, masked: bool) -> Any:
                    query_tile, _ = where(i)
                    slot, g_slot = lax.rem(i, jnp.int32(q_stages)), lax.rem(i, jnp.int32(g_stages))
                    # Unknown to be 0, it keeps the addresses of K and V out of registers that live across the loop.
                    zero = lax.optimization_barrier(jnp.int32(0))
                    plgpu.barrier_wait(q_full.at[slot])

                    def products(logits_acc: Any, dp_acc: Any = None) -> Any:
                        plgpu.wgmma(logits_acc, k_smem.at[zero, mine], q_smem.at[slot].T)
                        plgpu.barrier_wait(g_full.at[g_slot])
                        if with_k:
                            plgpu.wgmma(dp_acc, v_smem.at[zero, mine], g_smem.at[g_slot].T)
                        logits = plgpu.wgmma_accumulator_load(logits_acc, wait_n=1 if with_k else 0)
                        lse = plgpu.load(statistics.at[slot, 0], layout=BY_COLUMN)
                        positions = None
                        if masked:
                            positions = _positions(call, ref, row, query_tile * tile, first, (ROWS, tile), 1)
                        weights, slope = _weights(problem, logits, lse, 1, positions, 1)
                        if with_v:
                            _multiply(acc["v"], weights.astype(dtype), g_smem.at[g_slot], warpgroup, rest)
                        if not with_k:
                            return None
                        dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=1 if with_v else 0)
                        delta = plgpu.load(statistics.at[slot, 1], layout=BY_COLUMN)
                        return (slope * (dp - lax.broadcast_in_dim(delta, dp.shape, [1]))).astype(dtype)

                    shape = plgpu.ACC((ROWS, tile), jnp.float32)
                    d_logits = pl.run_scoped(products, *([shape] * (1 + with_k)))
                    if with_k:
                        _multiply(acc["k"], d_logits, q_smem.at[slot], warpgroup, rest, "left_2")
                        plgpu.wgmma_wait(1)
                        plgpu.barrier_arrive(g_free.at[g_slot])
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(q_free.at[slot])
                    if not with_k:
                        plgpu.barrier_arrive(g_free.at[g_slot])
                    return ()

                if sizes.heads_outer and group > 1:
                    lax.fori_loop(0, group, lambda h, _: _three_runs(walk, step, h * walk.count), ())
                else:
                    _three_runs(walk, step, 0, group)
                return [x[...] for x in accs]

            found = pl.run_scoped(body, *([plgpu.ACC((ROWS, depth), jnp.float32)] * len(wanted)))
            # Nobody else reads this warpgroup's rows of K: the results leave through them.
            for name, value in zip(wanted, found, strict=True):
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                k_smem.at[0, mine][...] = (value * problem.scale if name == "k" else value).astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(k_smem.at[0, mine], ref[f"d{name}"].at[row, pl.ds(first, ROWS), kv_head])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == warpgroups)
        def _load() -> None:
            plgpu.set_max_registers(sizes.loader_registers, action="decrease")
            here = pl.ds(key_tile * block, block)
            plgpu.copy_gmem_to_smem(ref["k"].at[row, here, kv_head], k_smem.at[0], kv_full)
            if with_k:
                plgpu.copy_gmem_to_smem(ref["v"].at[row, here, kv_head], v_smem.at[0], kv_full)

            def load(i: Any, _: Any) -> Any:
                query_tile, head = where(i)
                slot, g_slot = lax.rem(i, jnp.int32(q_stages)), lax.rem(i, jnp.int32(g_stages))
                here = pl.ds(query_tile * tile, tile)
                pl.when(i >= q_stages)(lambda: plgpu.barrier_wait(q_free.at[slot]))
                plgpu.copy_gmem_to_smem(ref["q"].at[row, here, head], q_smem.at[slot], q_full.at[slot])
                plgpu.copy_gmem_to_smem(ref["statistics"].at[row, head, :, here], statistics.at[slot], q_full.at[slot])
                pl.when(i >= g_stages)(lambda: plgpu.barrier_wait(g_free.at[g_slot]))
                plgpu.copy_gmem_to_smem(ref["g"].at[row, here, head], g_smem.at[g_slot], g_full.at[g_slot])
                return ()

            lax.fori_loop(0, walk.count * group, load, ())
            _drain(call, walk.count * group, (q_free, q_stages), (g_free, g_stages))

    scratch = {
        "k_smem": swizzled((1, block, depth), dtype),
        "q_smem": swizzled((q_stages, tile, depth), dtype),
        "g_smem": swizzled((g_stages, tile, depth), dtype),
        "statistics": plgpu.SMEM((q_stages, 2, tile), jnp.float32),
        "kv_full": plgpu.Barrier(num_arrivals=1 + with_k),
        "q_full": plgpu.Barrier(num_arrivals=2, num_barriers=q_stages),
        "g_full": plgpu.Barrier(num_barriers=g_stages),
        "q_free": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=q_stages),
        "g_free": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=g_stages),
        **_staging(call, tile, "left", "left_2"),
    }
    if with_k:
        scratch["v_smem"] = swizzled((1, block, depth), dtype)
    return _run(
        call,
        kernel,
        extra,
        out_type=[jax.ShapeDtypeStruct(call.operands[x].shape, dtype) for x in wanted],
        **_grid(call, kv_heads, padded // block),
        num_threads=warpgroups + 1,
        scratch_types=scratch,
    )


def _fused(call: _Call) -> tuple[Array, Array, Array]:
    """dq, dk and dv by five products a tile: a program keeps a tile of keys; dq is summed in global memory.

    dq of a step is made in the next step, so that no warpgroup waits for the other's share of the logits' cotangents.
    """
    problem, sizes, dtype, depth = call.problem, call.sizes, call.dtype, call.depth
    warpgroups, tile, q_stages, g_stages = sizes.warpgroups, sizes.tile_size, sizes.q_stages, sizes.g_stages
    batch, padded, kv_heads, _ = call.operands["k"].shape
    padded_queries, heads = call.operands["q"].shape[1:3]
    block, group = ROWS * warpgroups, problem.group
    halves_q, halves_d = tile // ROWS, depth // ROWS
    assert halves_q * halves_d == warpgroups, "one 64 x 64 piece of dq per warpgroup"
    steps_of, extra = _query_steps(call, tile, block)
    names = (*call.operands, *extra, "dq", "dk", "dv")

    def kernel(  # type: ignore[no-untyped-def]
        *refs: Any,
        k_smem,
        v_smem,
        q_smem,
        g_smem,
        statistics,
        d_smem,
        dq_smem,
        kv_full,
        q_full,
        g_full,
        q_free,
        g_free,
        d_full,
    ):
        ref = dict(zip(names, refs, strict=True))
        kv_head, row, key_tile = lax.axis_index("head"), lax.axis_index("row"), lax.axis_index("tile")
        warpgroup = lax.axis_index("warpgroup")
        walk = steps_of(ref, row, key_tile)
        # Under a causal mask without bound the end is a constant; hidden, or 188 B of registers spill.
        walk = walk._replace(count=lax.optimization_barrier(walk.count))
        walk = walk.reversed() if sizes.descending else walk
        total = walk.count * group

        def where(i: Any) -> tuple[Any, Any]:  # step -> query tile, head
            if sizes.heads_outer:
                # Neighbouring programs then meet a query tile two steps apart, while it is in L2 (8% on shape A).
                return walk.tile(lax.rem(i, walk.count)), kv_head * group + lax.div(i, walk.count)
            return walk.tile(lax.div(i, jnp.int32(group))), kv_head * group + lax.rem(i, jnp.int32(group))

        @pl.when(warpgroup < warpgroups)
        def _compute() -> None:
            plgpu.set_max_registers(sizes.registers, action="increase")
            mine = pl.ds(warpgroup * ROWS, ROWS)
            first = key_tile * block + warpgroup * ROWS
            # This warpgroup's 64 x 64 piece of a tile of dq.
            q_half, d_half = (warpgroup, 0) if halves_d == 1 else (0, warpgroup)

            def d_slot(i: Any) -> Any:
                return lax.rem(i + 2, jnp.int32(2))

            def start_dq(dq_acc: Any, i: Any, zero: Any) -> None:
                """Once every warpgroup's d_logits of step i are in shared memory."""
                plgpu.barrier_wait(d_full)
                plgpu.wgmma(dq_acc, d_smem.at[d_slot(i), q_half].T, k_smem.at[zero, d_half])

            def stage_dq(dq: Any) -> None:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                dq_smem.at[warpgroup][...] = dq

            def add_dq(i: Any) -> None:
                query_tile, head = where(i)
                at = (row, head, pl.ds(query_tile * tile + q_half * ROWS, ROWS), pl.ds(d_half * ROWS, ROWS))
                plgpu.copy_smem_to_gmem(dq_smem.at[warpgroup], ref["dq"].at[at], reduction_op="add")

            def write_d(i: Any, d_logits: Any) -> None:
                for h in range(halves_q):
                    part = d_logits[:, h * ROWS : (h + 1) * ROWS] if halves_q > 1 else d_logits
                    d_smem.at[d_slot(i), h, mine][...] = part

            # Step -1 does not exist: its d_logits are zero, so that the loop needs no first step of its own.
            write_d(-1, plgpu.layout_cast(jnp.zeros((ROWS, tile), dtype), plgpu.Layout.WGMMA))
            plgpu.commit_smem()
            plgpu.barrier_arrive(d_full)
            plgpu.barrier_wait(kv_full)

            def body(dk_acc: Any, dv_acc: Any) -> Any:
                def step(i: Any, _: Any, *, masked: bool) -> Any:
                    query_tile, _ = where(i)
                    slot, g_slot = lax.rem(i, jnp.int32(q_stages)), lax.rem(i, jnp.int32(g_stages))
                    # Unknown to be 0, it keeps the addresses of K and V out of registers that live across the loop
                    # (220 -> 0 B of spills).
                    zero = lax.optimization_barrier(jnp.int32(0))
                    plgpu.barrier_wait(q_full.at[slot])

                    def products(logits_acc: Any, dp_acc: Any) -> Any:
                        for h in range(halves_d):
                            plgpu.wgmma(
                                logits_acc, k_smem.at[zero, h, mine], q_smem.at[slot, :, pl.ds(h * ROWS, ROWS)].T
                            )
                        plgpu.barrier_wait(g_full.at[g_slot])
                        plgpu.wgmma(dp_acc, v_smem.at[zero, mine], g_smem.at[g_slot].T)
                        logits = plgpu.wgmma_accumulator_load(logits_acc, wait_n=1)  # dk of the step before is done too
                        # At step 0 a dummy that the loader expects.
                        plgpu.barrier_arrive(q_free.at[lax.rem(i + q_stages - 1, jnp.int32(q_stages))])
                        lse = plgpu.load(statistics.at[slot, 0], layout=BY_COLUMN)
                        positions = None
                        if masked:
                            positions = _positions(call, ref, row, query_tile * tile, first, (ROWS, tile), 1)
                        weights, slope = _weights(problem, logits, lse, 1, positions, 1)
                        plgpu.wgmma(dv_acc, weights.astype(dtype), g_smem.at[g_slot])  # behind the arithmetic below
                        dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=1)
                        delta = plgpu.load(statistics.at[slot, 1], layout=BY_COLUMN)  # this late, or 380 B spill
                        return (slope * (dp - lax.broadcast_in_dim(delta, dp.shape, [1]))).astype(dtype)

                    acc = plgpu.ACC((ROWS, tile), jnp.float32)
                    d_logits = pl.run_scoped(products, acc, acc)

                    def dq_before(dq_acc: Any) -> Any:
                        start_dq(dq_acc, i - 1, zero)
                        write_d(i, d_logits)  # to the other slot
                        dq = dq_acc[...]  # dv is done too
                        plgpu.barrier_arrive(g_free.at[g_slot])
                        return dq

                    stage_dq(pl.run_scoped(dq_before, plgpu.ACC((ROWS, ROWS), jnp.float32)))
                    plgpu.commit_smem()  # one for d_logits and dq (two cost 4%)
                    # d_logits of this step are there, and dq of the step before no longer reads its slot.
                    plgpu.barrier_arrive(d_full)
                    for h in range(halves_q):  # in flight into the next step; from registers it could not be (C7512)
                        plgpu.wgmma(dk_acc, d_smem.at[d_slot(i), h, mine], q_smem.at[slot, pl.ds(h * ROWS, ROWS)])
                    add_dq(jnp.maximum(i - 1, 0))
                    return ()

                if sizes.heads_outer and group > 1:
                    lax.fori_loop(0, group, lambda h, _: _three_runs(walk, step, h * walk.count), ())
                else:
                    _three_runs(walk, step, 0, group)

                def last(dq_acc: Any) -> None:
                    start_dq(dq_acc, total - 1, 0)
                    stage_dq(dq_acc[...])
                    plgpu.commit_smem()
                    add_dq(total - 1)

                pl.run_scoped(last, plgpu.ACC((ROWS, ROWS), jnp.float32))
                return dk_acc[...], dv_acc[...]

            acc = plgpu.ACC((ROWS, depth), jnp.float32)
            dk, dv = pl.run_scoped(body, acc, acc)
            # Both leave through this warpgroup's rows of V: K's are still read by the other warpgroup's dq.
            for value, target in ((dv, ref["dv"]), (dk * problem.scale, ref["dk"])):
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                v_smem.at[0, mine][...] = value.astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(v_smem.at[0, mine], target.at[row, pl.ds(first, ROWS), kv_head])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == warpgroups)
        def _load() -> None:
            plgpu.set_max_registers(sizes.loader_registers, action="decrease")
            here = pl.ds(key_tile * block, block)
            for h in range(halves_d):
                half = ref["k"].at[row, here, kv_head, pl.ds(h * ROWS, ROWS)]
                plgpu.copy_gmem_to_smem(half, k_smem.at[0, h], kv_full)
            plgpu.copy_gmem_to_smem(ref["v"].at[row, here, kv_head], v_smem.at[0], kv_full)

            def load(i: Any, _: Any) -> Any:
                query_tile, head = where(i)
                slot, g_slot = lax.rem(i, jnp.int32(q_stages)), lax.rem(i, jnp.int32(g_stages))
                here = pl.ds(query_tile * tile, tile)
                pl.when(i >= q_stages - 1)(lambda: plgpu.barrier_wait(q_free.at[slot]))
                plgpu.copy_gmem_to_smem(ref["q"].at[row, here, head], q_smem.at[slot], q_full.at[slot])
                plgpu.copy_gmem_to_smem(ref["statistics"].at[row, head, :, here], statistics.at[slot], q_full.at[slot])
                pl.when(i >= g_stages)(lambda: plgpu.barrier_wait(g_free.at[g_slot]))
                plgpu.copy_gmem_to_smem(ref["g"].at[row, here, head], g_smem.at[g_slot], g_full.at[g_slot])
                return ()

            lax.fori_loop(0, total, load, ())

    sums: Any = jax.new_ref(jnp.zeros((batch, heads, padded_queries, depth), jnp.float32))
    dk, dv = _run(
        call,
        kernel,
        {**extra, "dq": sums},
        out_type=[jax.ShapeDtypeStruct(call.operands[x].shape, dtype) for x in ("k", "v")],
        **_grid(call, kv_heads, padded // block),
        num_threads=warpgroups + 1,
        scratch_types={
            "k_smem": swizzled((1, halves_d, block, ROWS), dtype),
            "v_smem": swizzled((1, block, depth), dtype),
            "q_smem": swizzled((q_stages, tile, depth), dtype),
            "g_smem": swizzled((g_stages, tile, depth), dtype),
            "statistics": plgpu.SMEM((q_stages, 2, tile), jnp.float32),
            "d_smem": swizzled((2, halves_q, block, ROWS), dtype),
            "dq_smem": swizzled((warpgroups, ROWS, ROWS), jnp.float32),
            "kv_full": plgpu.Barrier(num_arrivals=halves_d + 1),
            "q_full": plgpu.Barrier(num_arrivals=2, num_barriers=q_stages),
            "g_full": plgpu.Barrier(num_barriers=g_stages),
            "q_free": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=q_stages),
            "g_free": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=g_stages),
            "d_full": plgpu.Barrier(num_arrivals=warpgroups),
        },
    )
    return (jax.freeze(sums) * problem.scale).astype(dtype).transpose(0, 2, 1, 3), dk, dv
