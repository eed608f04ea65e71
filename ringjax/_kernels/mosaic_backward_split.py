"""dq, and dk and dv, by kernels that agree bit for bit from run to run.

`_queries` keeps a tile of queries and makes dq; `_keys` keeps a tile of keys and makes dk and dv: seven products.
In both the last warpgroup only issues loads; each other one owns 64 rows of what the program keeps.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from ringjax._kernels.mosaic_backward_tile import (
    ROWS,
    Call,
    drain,
    key_steps,
    multiply,
    positions_of,
    query_steps,
    run,
    runs,
    staging,
    three_runs,
    weights_of,
)
from ringjax._kernels.mosaic_tile import BY_COLUMN, BY_ROW, plgpu, swizzled


def dq_dk_dv(call: Call) -> tuple[Array, Array, Array]:
    """dk and dv by one kernel, or by one each."""
    dq = _queries(call)
    if call.sizes.dk_with_dv:
        dk, dv = _keys(call, "k", "v")
    else:
        (dk,), (dv,) = _keys(call, "k"), _keys(call, "v")
    return dq, dk, dv


def _grid(call: Call, heads: int, tiles: int) -> dict[str, Any]:
    """The grid, its last axis the fastest."""
    batch = call.problem.batch
    if call.problem.window.left is None:
        # Tiles have unequal work: the longest first, or the last head's longest tile would end alone.
        return {"grid": (tiles, batch, heads), "grid_names": ("tile", "row", "head")}
    return {"grid": (heads, batch, tiles), "grid_names": ("head", "row", "tile")}


def _queries(call: Call) -> Array:
    """dq: a program keeps 64 queries per warpgroup and walks over the keys that they see; three products a tile."""
    problem, sizes, dtype, depth = call.problem, call.sizes, call.dtype, call.depth
    warpgroups, block, k_stages, v_stages = sizes.warpgroups, sizes.dq_block, sizes.dq_k_stages, sizes.dq_v_stages
    _, padded, heads, _ = call.operands["q"].shape
    tile = ROWS * warpgroups
    tiles = padded // tile
    steps_of, extra = key_steps(call, tile, block)
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
                            positions = positions_of(call, ref, row, first, k_first, (ROWS, block), 0)
                        _, slope = weights_of(problem, logits, lse, 0, positions, 0)
                        dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=0)
                        plgpu.barrier_arrive(v_free.at[v_slot])
                        return (slope * (dp - lax.broadcast_in_dim(delta, dp.shape, [0]))).astype(dtype)

                    acc = plgpu.ACC((ROWS, block), jnp.float32)
                    multiply(dq_acc, pl.run_scoped(products, acc, acc), k_smem.at[k_slot], warpgroup, rest)
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(k_free.at[k_slot])
                    return ()

                three_runs(walk, step)
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
            drain(call, walk.count, (k_free, k_stages), (v_free, v_stages))

    return run(
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
            **staging(call, block, "left"),
        },
    )


def _keys(call: Call, *wanted: str) -> list[Array]:
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
    steps_of, extra = query_steps(call, tile, block)
    own_steps_of, own_extra = query_steps(call, tile, ROWS, "own_bounds")
    if sizes.skip:
        extra = extra | own_extra
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
                            positions = positions_of(call, ref, row, query_tile * tile, first, (ROWS, tile), 1)
                        weights, slope = weights_of(problem, logits, lse, 1, positions, 1)
                        if with_v:
                            multiply(acc["v"], weights.astype(dtype), g_smem.at[g_slot], warpgroup, rest)
                        if not with_k:
                            return None
                        dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=1 if with_v else 0)
                        delta = plgpu.load(statistics.at[slot, 1], layout=BY_COLUMN)
                        return (slope * (dp - lax.broadcast_in_dim(delta, dp.shape, [1]))).astype(dtype)

                    shape = plgpu.ACC((ROWS, tile), jnp.float32)
                    d_logits = pl.run_scoped(products, *([shape] * (1 + with_k)))
                    if with_k:
                        multiply(acc["k"], d_logits, q_smem.at[slot], warpgroup, rest, "left_2")
                        plgpu.wgmma_wait(1)
                        plgpu.barrier_arrive(g_free.at[g_slot])
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(q_free.at[slot])
                    if not with_k:
                        plgpu.barrier_arrive(g_free.at[g_slot])
                    return ()

                def void(i: Any, _: Any) -> Any:
                    """A step whose queries see keys of the other warpgroup only."""
                    slot, g_slot = lax.rem(i, jnp.int32(q_stages)), lax.rem(i, jnp.int32(g_stages))
                    plgpu.barrier_wait(q_full.at[slot])
                    plgpu.barrier_wait(g_full.at[g_slot])
                    plgpu.barrier_arrive(g_free.at[g_slot])
                    plgpu.barrier_arrive(q_free.at[slot])
                    return ()

                if sizes.skip:
                    runs(call, walk, own_steps_of(ref, row, key_tile * warpgroups + warpgroup), step, void)
                elif sizes.heads_outer and group > 1:
                    lax.fori_loop(0, group, lambda h, _: three_runs(walk, step, h * walk.count), ())
                else:
                    three_runs(walk, step, 0, group)
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
            drain(call, walk.count * group, (q_free, q_stages), (g_free, g_stages))

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
        **staging(call, tile, "left", "left_2"),
    }
    if with_k:
        scratch["v_smem"] = swizzled((1, block, depth), dtype)
    return run(
        call,
        kernel,
        extra,
        out_type=[jax.ShapeDtypeStruct(call.operands[x].shape, dtype) for x in wanted],
        **_grid(call, kv_heads, padded // block),
        num_threads=warpgroups + 1,
        scratch_types=scratch,
    )
