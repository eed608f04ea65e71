"""dq, dk and dv in one kernel: five products a tile; dq is summed in global memory in an order that varies.

A program keeps a tile of keys, 64 of them for each computing warpgroup, and walks over the query tiles that see them;
the last warpgroup only issues loads.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from ringjax._kernels.mosaic_backward_tile import (
    ROWS,
    Call,
    clear,
    drain,
    ids_by_tile,
    multiply,
    positions_of,
    query_steps,
    run,
    runs,
    staging,
    weights_of,
)
from ringjax._kernels.mosaic_tile import BY_COLUMN, plgpu, streaming_multiprocessors, swizzled


def item_order(call: Call, tiles: int) -> tuple[int, Callable[[Any], tuple[Any, Any, Any]]]:
    """The number of items, and which kv head, row of the batch and key tile an item is.

    What is near in this order runs at the same time: neighbouring tiles of one head, which share queries in the cache,
    and the tiles with little work last, so that programs end together.
    """
    units = call.problem.kv_heads * call.problem.batch
    window, block = call.problem.window, ROWS * call.sizes.warpgroups

    def of_unit(unit: Any, tile: Any) -> tuple[Any, Any, Any]:
        return lax.div(unit, jnp.int32(call.problem.batch)), lax.rem(unit, jnp.int32(call.problem.batch)), tile

    if window.left is None:
        # The fewest that keep all multiprocessors busy: of two heads, the queries stay in the cache (5% on shape E).
        enough = min(units, -(-128 // tiles))
        together = next(n for n in range(enough, units + 1) if units % n == 0)

        def side_by_side(index: Any) -> tuple[Any, Any, Any]:
            group, index = lax.div(index, jnp.int32(together * tiles)), lax.rem(index, jnp.int32(together * tiles))
            return of_unit(group * together + lax.rem(index, jnp.int32(together)), lax.div(index, jnp.int32(together)))

        return units * tiles, side_by_side
    short = min(tiles - 1, -(-window.left // block))
    long = tiles - short

    def short_last(index: Any) -> tuple[Any, Any, Any]:
        late = index - units * long
        is_late = late >= 0
        unit = jnp.where(is_late, lax.rem(late, jnp.int32(units)), lax.div(index, jnp.int32(long)))
        tile = jnp.where(is_late, long + lax.div(late, jnp.int32(units)), lax.rem(index, jnp.int32(long)))
        return of_unit(unit, tile)

    return units * tiles, short_last


def zeros(call: Call, shape: tuple[int, ...]) -> Array:
    """Float32 zeros, by TMA: 4.0 TB/s, where XLA's fill writes 3.2."""
    rows, depth = math.prod(shape[:-1]), shape[-1]
    chunk = 64  # rows; queries are padded to more
    programs = streaming_multiprocessors(call.problem.device_kind)

    def kernel(out: Any, nothing: Any) -> None:
        program = lax.axis_index("program")
        layout = plgpu.Layout.WG_STRIDED((chunk, depth), 4)
        nothing[...] = plgpu.layout_cast(jnp.zeros((chunk, depth), jnp.float32), layout)
        plgpu.commit_smem()

        def fill(i: Any, _: Any) -> Any:
            plgpu.copy_smem_to_gmem(nothing, out.at[pl.ds((program + i * programs) * chunk, chunk)])
            return ()

        whole, rest = divmod(rows // chunk, programs)
        lax.fori_loop(0, whole + (program < rest).astype(jnp.int32), fill, ())
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((rows, depth), jnp.float32),
        grid=(programs,),
        grid_names=("program",),
        scratch_types={"nothing": plgpu.SMEM((chunk, depth), jnp.float32)},
    )().reshape(shape)


def dq_dk_dv(call: Call) -> tuple[Array, Array, Array]:
    """dq of a step is made in the next step, so that no warpgroup waits for the other's cotangents of the logits."""
    problem, sizes, dtype, depth = call.problem, call.sizes, call.dtype, call.depth
    warpgroups, tile, q_stages, g_stages = sizes.warpgroups, sizes.tile_size, sizes.q_stages, sizes.g_stages
    batch, padded, _, _ = call.operands["k"].shape
    padded_queries, heads = call.operands["q"].shape[1:3]
    block, group = ROWS * warpgroups, problem.group
    tiles = padded // block
    halves_q, halves_d = tile // ROWS, depth // ROWS
    assert halves_q * halves_d == warpgroups, "one 64 x 64 piece of dq per warpgroup"
    items, item_at = item_order(call, tiles)
    steps_of, extra = query_steps(call, tile, block)
    own_steps_of, own_extra = query_steps(call, tile, ROWS, "own_bounds")
    extra = extra | own_extra
    if with_segments := "q_segments" in call.operands:
        extra["q_ids"] = ids_by_tile(call.operands["q_segments"], tile)
        extra["kv_ids"] = ids_by_tile(call.operands["kv_segments"], ROWS)
    names = (*call.operands, *extra, "dq", "dk", "dv")
    # The interpreter has no reduction: there, each key tile's share of dq stays apart.
    apart = call.interpret is not None

    def kernel(*refs: Any, k_smem, v_smem, q_smem, g_smem, statistics, d_smem, dq_smem, **rest):  # type: ignore[no-untyped-def]
        ref = dict(zip(names, refs, strict=True))
        kv_full, q_full, g_full = rest["kv_full"], rest["q_full"], rest["g_full"]
        q_ids: Any = rest.get("q_ids")
        k_ids: Any = rest.get("k_ids")
        q_free, g_free, d_full = rest["q_free"], rest["g_free"], rest["d_full"]
        kv_head, row, key_tile = item_at(lax.axis_index("item"))
        warpgroup = lax.axis_index("warpgroup")
        walk = steps_of(ref, row, key_tile)
        # Under a causal mask without bound the end is a constant; hidden, or 188 B of registers spill.
        walk = walk._replace(count=lax.optimization_barrier(walk.count))
        walk = walk.reversed() if sizes.descending else walk
        total = walk.count * group

        def where(i: Any) -> tuple[Any, Any]:
            """Query tile and head of a step."""
            if sizes.heads_outer:
                # Neighbouring programs then meet a query tile two steps apart, while it is in L2 (8% on shape A).
                return walk.tile(lax.rem(i, walk.count)), kv_head * group + lax.div(i, walk.count)
            return walk.tile(lax.div(i, jnp.int32(group))), kv_head * group + lax.rem(i, jnp.int32(group))

        def q_slot(i: Any) -> Any:
            return lax.rem(i, jnp.int32(q_stages))

        def g_slot(i: Any) -> Any:
            return lax.rem(i, jnp.int32(g_stages))

        @pl.when(warpgroup < warpgroups)
        def _compute() -> None:
            plgpu.set_max_registers(sizes.registers, action="increase")
            mine_rows = pl.ds(warpgroup * ROWS, ROWS)
            # This warpgroup's 64 x 64 piece of a tile of dq.
            q_half, d_half = (warpgroup, 0) if halves_d == 1 else (0, warpgroup)
            first = key_tile * block + warpgroup * ROWS

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
                if apart:
                    plgpu.copy_smem_to_gmem(dq_smem.at[warpgroup], ref["dq"].at[(key_tile, *at)])
                else:
                    plgpu.copy_smem_to_gmem(dq_smem.at[warpgroup], ref["dq"].at[at], reduction_op="add")

            def add_dq_before(i: Any) -> None:
                if apart:
                    pl.when(i > 0)(lambda: add_dq(i - 1))
                else:  # at step 0 zeros; a branch costs up to 300 B of spills
                    add_dq(jnp.maximum(i - 1, 0))

            def write_d(i: Any, d_logits: Any) -> None:
                for h in range(halves_q):
                    part = d_logits[:, h * ROWS : (h + 1) * ROWS] if halves_q > 1 else d_logits
                    d_smem.at[d_slot(i), h, mine_rows][...] = part

            def await_tiles(i: Any) -> None:
                """The queries and cotangents of a step are there, and zero where they are padding."""
                slot, slot_of_g = q_slot(i), g_slot(i)
                plgpu.barrier_wait(q_full.at[slot])
                plgpu.barrier_wait(g_full.at[slot_of_g])

                def clear_both() -> None:
                    pieces = [(x, r, c) for x in range(2) for r in range(halves_q) for c in range(halves_d)]
                    for w in range(warpgroups):

                        @pl.when(warpgroup == w)
                        def _(mine: Any = pieces[w::warpgroups]) -> None:
                            for x, r, c in mine:
                                at = (slot, slot_of_g)[x], pl.ds(r * ROWS, ROWS), pl.ds(c * ROWS, ROWS)
                                clear((q_smem, g_smem)[x].at[at], q_ids.at[slot, 0, pl.ds(r * ROWS, ROWS)])

                    plgpu.commit_smem()
                    plgpu.barrier_arrive(rest["cleared"])
                    plgpu.barrier_wait(rest["cleared"])

                pl.when(q_ids[slot, 1, 0] > 0)(clear_both)

            def nothing() -> Any:
                return plgpu.layout_cast(jnp.zeros((ROWS, tile), dtype), plgpu.Layout.WGMMA)

            def finish(i: Any, zero: Any, d_logits: Any, before: Callable[[], None]) -> None:
                """Stores d_logits of step i, and makes dq of the step before."""

                def dq_before(dq_acc: Any) -> Any:
                    start_dq(dq_acc, i - 1, zero)
                    write_d(i, d_logits)  # to the other slot
                    dq = dq_acc[...]  # dv is done too
                    before()
                    return dq

                stage_dq(pl.run_scoped(dq_before, plgpu.ACC((ROWS, ROWS), jnp.float32)))
                plgpu.commit_smem()  # one for d_logits and dq (two cost 4%)
                # d_logits of this step are there, and dq of the step before no longer reads its slot.
                plgpu.barrier_arrive(d_full)

            def write_out(value: Any, target: Any) -> None:
                """By way of this warpgroup's rows of V: K's are still read by the other warpgroup's dq."""
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                v_smem.at[0, mine_rows][...] = value.astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(v_smem.at[0, mine_rows], target.at[row, pl.ds(first, ROWS), kv_head])

            if with_segments:
                plgpu.barrier_wait(kv_full)

                @pl.when(k_ids[warpgroup, 1, 0] > 0)
                def _clear() -> None:
                    for h in range(halves_d):
                        for piece in (k_smem.at[0, h, mine_rows], v_smem.at[0, mine_rows, pl.ds(h * ROWS, ROWS)]):
                            clear(piece, k_ids.at[warpgroup, 0])

            # Step -1 does not exist: its d_logits are zero, so that the loop needs no first step of its own.
            write_d(-1, nothing())
            plgpu.commit_smem()
            plgpu.barrier_arrive(d_full)
            if not with_segments:
                plgpu.barrier_wait(kv_full)

            def body(dk_acc: Any, dv_acc: Any) -> Any:
                def step(i: Any, _: Any, *, masked: bool) -> Any:
                    query_tile, _ = where(i)
                    slot, slot_of_g = q_slot(i), g_slot(i)
                    # Unknown to be 0, it keeps the addresses of K and V out of registers that live across the loop
                    # (220 -> 0 B of spills).
                    zero = lax.optimization_barrier(jnp.int32(0))
                    if clears := masked and with_segments:
                        await_tiles(i)
                    else:
                        plgpu.barrier_wait(q_full.at[slot])

                    def products(logits_acc: Any, dp_acc: Any) -> Any:
                        for h in range(halves_d):
                            half = pl.ds(h * ROWS, ROWS)
                            plgpu.wgmma(logits_acc, k_smem.at[zero, h, mine_rows], q_smem.at[slot, :, half].T)
                        if not clears:
                            plgpu.barrier_wait(g_full.at[slot_of_g])
                        plgpu.wgmma(dp_acc, v_smem.at[zero, mine_rows], g_smem.at[slot_of_g].T)
                        # dk of the step before is done too.
                        logits = plgpu.wgmma_accumulator_load(logits_acc, wait_n=1)
                        # At step 0 a dummy that the loader expects.
                        plgpu.barrier_arrive(q_free.at[q_slot(i + q_stages - 1)])
                        lse = plgpu.load(statistics.at[slot, 0], layout=BY_COLUMN)
                        positions = None
                        if masked:
                            ids = (q_ids.at[slot, 0], k_ids.at[warpgroup, 0]) if with_segments else None
                            positions = positions_of(call, ref, row, query_tile * tile, first, (ROWS, tile), 1, ids)
                        weights, slope = weights_of(problem, logits, lse, 1, positions, 1)
                        # Behind the arithmetic below.
                        multiply(dv_acc, weights.astype(dtype), g_smem.at[slot_of_g], warpgroup, rest)
                        dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=1)
                        delta = plgpu.load(statistics.at[slot, 1], layout=BY_COLUMN)  # this late, or 380 B spill
                        return (slope * (dp - lax.broadcast_in_dim(delta, dp.shape, [1]))).astype(dtype)

                    acc = plgpu.ACC((ROWS, tile), jnp.float32)
                    d_logits = pl.run_scoped(products, acc, acc)
                    finish(i, zero, d_logits, lambda: plgpu.barrier_arrive(g_free.at[slot_of_g]))
                    for h in range(halves_q):  # in flight into the next step; from registers it cannot be (C7512)
                        q_rows = q_smem.at[slot, pl.ds(h * ROWS, ROWS)]
                        plgpu.wgmma(dk_acc, d_smem.at[d_slot(i), h, mine_rows], q_rows)
                    add_dq_before(i)
                    return ()

                def void(i: Any, _: Any) -> Any:
                    """A step whose queries see keys of the other warpgroup only."""
                    slot, slot_of_g = q_slot(i), g_slot(i)
                    zero = lax.optimization_barrier(jnp.int32(0))
                    plgpu.wgmma_wait(0)  # dk of the step before
                    if with_segments:
                        await_tiles(i)
                    else:
                        plgpu.barrier_wait(q_full.at[slot])
                    plgpu.barrier_arrive(q_free.at[q_slot(i + q_stages - 1)])
                    if not with_segments:
                        plgpu.barrier_wait(g_full.at[slot_of_g])
                    finish(i, zero, nothing(), lambda: plgpu.barrier_arrive(g_free.at[slot_of_g]))
                    add_dq_before(i)
                    return ()

                runs(call, walk, own_steps_of(ref, row, key_tile * warpgroups + warpgroup), step, void)

                write_out(dv_acc[...], ref["dv"])

                def last(dq_acc: Any) -> None:
                    start_dq(dq_acc, total - 1, 0)
                    stage_dq(dq_acc[...])
                    plgpu.commit_smem()
                    add_dq(total - 1)

                pl.run_scoped(last, plgpu.ACC((ROWS, ROWS), jnp.float32))
                write_out(dk_acc[...] * problem.scale, ref["dk"])

            acc = plgpu.ACC((ROWS, depth), jnp.float32)
            pl.run_scoped(body, acc, acc)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == warpgroups)
        def _load() -> None:
            plgpu.set_max_registers(sizes.loader_registers, action="decrease")

            here = pl.ds(key_tile * block, block)
            for h in range(halves_d):
                half = ref["k"].at[row, here, kv_head, pl.ds(h * ROWS, ROWS)]
                plgpu.copy_gmem_to_smem(half, k_smem.at[0, h], kv_full)
            plgpu.copy_gmem_to_smem(ref["v"].at[row, here, kv_head], v_smem.at[0], kv_full)
            if with_segments:
                own = pl.ds(key_tile * warpgroups, warpgroups)
                plgpu.copy_gmem_to_smem(ref["kv_ids"].at[row, own], k_ids, kv_full)

            def load(i: Any, _: Any) -> Any:
                query_tile, head = where(i)
                slot, slot_of_g = q_slot(i), g_slot(i)
                here = pl.ds(query_tile * tile, tile)
                pl.when(i >= q_stages - 1)(lambda: plgpu.barrier_wait(q_free.at[slot]))
                plgpu.copy_gmem_to_smem(ref["q"].at[row, here, head], q_smem.at[slot], q_full.at[slot])
                plgpu.copy_gmem_to_smem(ref["statistics"].at[row, head, :, here], statistics.at[slot], q_full.at[slot])
                if with_segments:
                    plgpu.copy_gmem_to_smem(ref["q_ids"].at[row, query_tile], q_ids.at[slot], q_full.at[slot])
                pl.when(i >= g_stages)(lambda: plgpu.barrier_wait(g_free.at[slot_of_g]))
                plgpu.copy_gmem_to_smem(ref["g"].at[row, here, head], g_smem.at[slot_of_g], g_full.at[slot_of_g])
                return ()

            lax.fori_loop(0, total, load, ())
            if call.interpret is not None:  # which wants every completed phase of a barrier observed

                def drain_q(i: Any, _: Any) -> Any:
                    plgpu.barrier_wait(q_free.at[q_slot(i)])
                    return ()

                # A slot is freed a step late, and one more was at step 0.
                lax.fori_loop(jnp.maximum(total, q_stages - 1), total + q_stages - 1, drain_q, ())
                drain(call, total, (g_free, g_stages))

    ids_smem: dict[str, Any] = {}
    if with_segments:
        ids_smem["q_ids"] = plgpu.SMEM((q_stages, 2, tile), jnp.int32)
        ids_smem["k_ids"] = plgpu.SMEM((warpgroups, 2, ROWS), jnp.int32)
        ids_smem["cleared"] = plgpu.Barrier(num_arrivals=warpgroups)
    shape = (batch, heads, padded_queries, depth)
    sums: Any = jax.new_ref(jnp.zeros((tiles, *shape), jnp.float32) if apart else zeros(call, shape))
    dk, dv = run(
        call,
        kernel,
        {**extra, "dq": sums},
        out_type=[jax.ShapeDtypeStruct(call.operands[x].shape, dtype) for x in ("k", "v")],
        grid=(items,),
        grid_names=("item",),
        num_threads=warpgroups + 1,
        scratch_types={
            "k_smem": swizzled((1, halves_d, block, ROWS), dtype),
            "v_smem": swizzled((1, block, depth), dtype),
            "q_smem": swizzled((q_stages, tile, depth), dtype),
            "g_smem": swizzled((g_stages, tile, depth), dtype),
            "statistics": plgpu.SMEM((q_stages, 2, tile), jnp.float32),
            "d_smem": swizzled((2, halves_q, block, ROWS), dtype),
            "dq_smem": swizzled((warpgroups, ROWS, ROWS), jnp.float32),
            "kv_full": plgpu.Barrier(num_arrivals=halves_d + 1 + with_segments),
            "q_full": plgpu.Barrier(num_arrivals=2 + with_segments, num_barriers=q_stages),
            "g_full": plgpu.Barrier(num_barriers=g_stages),
            "q_free": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=q_stages),
            "g_free": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=g_stages),
            "d_full": plgpu.Barrier(num_arrivals=warpgroups),
            **ids_smem,
            **staging(call, tile, "left"),
        },
    )
    dq = jax.freeze(sums)
    dq = dq.sum(0) if apart else dq
    return (dq * problem.scale).astype(dtype).transpose(0, 2, 1, 3), dk, dv
