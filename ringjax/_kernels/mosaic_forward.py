"""Attention forward on Hopper in Pallas Mosaic GPU, warp-specialised (FlashAttention-3, Shah et al., 2024).

A program keeps a tile of queries of one head, 64 rows for each compute warpgroup, and walks over the key tiles that
the window leaves; the last warpgroup only issues loads. The grid is persistent: while the compute warpgroups finish a
tile, the loader already fetches the next one's keys. Queries are [B, T, N, D], keys and values [B, S, K, D].
"""

import functools
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
    streaming_multiprocessors,
    swizzled,
    within_segments,
)
from ringjax._kernels.problem import Problem, Rows
from ringjax._kernels.tiles import MosaicForwardTiles, mosaic_forward_tiles
from ringjax._schedule import key_tiles

ROWS = 64  # of a warpgroup's product


class _Carry(NamedTuple):
    """One warpgroup's online softmax.

    The sum of values (None: it is in the accumulator), the weights that wait for theirs, the maximum (base 2), the sum
    of weights.
    """

    total: Any
    weights: Any
    largest: Any
    normaliser: Any


def forward(
    problem: Problem,
    rows: Rows,
    q: Array,
    k: Array,
    v: Array,
    sink_logits: Array | None,
    *,
    tiles: MosaicForwardTiles | None = None,
    interpret: Any = None,
) -> tuple[Array, Array]:
    """Output [B, T, N, D] in the dtype of q, and the lse of the keys alone, float32 [B, N, T].

    Args:
      problem, rows: of the call; `problem.head_dim` and `value_dim` are both D, a multiple of 64 up to 256.
      q, k, v: bfloat16 or float16.
      sink_logits: [N] or None.
      tiles: None: the tuned ones.
      interpret: `plgpu.InterpretGPUParams` to run on a CPU: tests do.
    """
    batch, queries, heads, depth = q.shape
    keys, group, dtype = problem.keys, problem.group, q.dtype
    tiles = tiles or mosaic_forward_tiles(problem.tiles, head_dim=depth, group=group)
    block, stages, warpgroups = tiles.block_size, tiles.stages, tiles.warpgroups
    tile = ROWS * warpgroups
    q = pad_axis(q, 1, rounded_up(queries, tile))
    k, v = (pad_axis(x, 1, rounded_up(keys, block)) for x in (k, v))
    query_tiles, key_tile_count = q.shape[1] // tile, k.shape[1] // block
    items = heads * query_tiles * batch
    programs = min(items, streaming_multiprocessors(problem.device_kind)) if tiles.persistent else items
    own_output = depth <= 128  # at 256 the output leaves through the queries' shared memory
    window = problem.window
    snake = window.left is None and tiles.heads_inner
    bounds_of = functools.partial(key_tiles, window, tile_size=tile, block_size=block, queries=queries, keys=keys)

    operands: dict[str, Array] = {"q": q, "k": k, "v": v}
    if sink_logits is not None:
        operands["sink_logits"] = sink_logits.astype(jnp.float32)
    if rows.q_start is not None:
        operands["q_start"] = rows.q_start
    if rows.q_segments is not None and rows.kv_segments is not None:
        operands["q_segments"] = pad_axis(rows.q_segments, 1, q.shape[1], -1)
        operands["kv_segments"] = pad_axis(rows.kv_segments, 1, k.shape[1], -1)
        operands["bounds"] = _segment_bounds(problem, rows, operands, bounds_of, query_tiles, tile, block)

    def kernel(*refs: Any, **scratch: Any) -> None:
        ref = dict(zip((*operands, "out", "lse"), refs, strict=True))
        q_smem, k_smem, v_smem = scratch["q_smem"], scratch["k_smem"], scratch["v_smem"]
        out_smem, lse_smem = scratch["out_smem"] if own_output else q_smem, scratch["lse_smem"]
        q_full, q_free, turn = scratch["q_full"], scratch["q_free"], scratch["turn"]
        k_full, k_free, v_full, v_free = (scratch[n] for n in ("k_full", "k_free", "v_full", "v_free"))
        program, warpgroup = lax.axis_index("program"), lax.axis_index("warpgroup")
        whole, rest = divmod(items, programs)
        # Every other round runs backwards: where the tiles of a round get shorter, the first program would always have
        # the longest.
        last_place = programs - 1 - program if whole % 2 and snake else program
        mine = whole + (last_place < rest).astype(jnp.int32)

        def item(number: Any) -> tuple[Any, Any, Any]:
            """Row of the batch, head, query tile."""
            place = program
            if snake:
                place = jnp.where(lax.rem(number, jnp.int32(2)) == 0, program, programs - 1 - program)
            index = place + number * programs
            if tiles.heads_inner:
                head, index = lax.rem(index, jnp.int32(heads)), lax.div(index, jnp.int32(heads))
                query_tile, row = lax.rem(index, jnp.int32(query_tiles)), lax.div(index, jnp.int32(query_tiles))
            else:
                query_tile, index = lax.rem(index, jnp.int32(query_tiles)), lax.div(index, jnp.int32(query_tiles))
                head, row = lax.rem(index, jnp.int32(heads)), lax.div(index, jnp.int32(heads))
            if window.left is None:
                query_tile = query_tiles - 1 - query_tile  # longest first, so that programs end together
            return row, head, query_tile

        def offset_of(row: Any) -> Any:
            return problem.q_offset if "q_start" not in ref else ref["q_start"][row]

        def steps_of(row: Any, query_tile: Any) -> Steps:
            if "bounds" in ref:
                sinks, first, full_first, full_end, end = (ref["bounds"][row, query_tile, i] for i in range(5))
            else:
                found = bounds_of(query_tile, q_offset=offset_of(row))
                sinks, first, full_first = found.sink_end, found.first, found.full_first
                full_end, end = found.full_end, found.end
            return steps(sinks, first, full_first, full_end, end, tiles=key_tile_count)

        def slot_of(step: Any) -> Any:
            return lax.rem(step, jnp.int32(stages))

        @pl.when(warpgroup < warpgroups)
        def _compute() -> None:
            plgpu.set_max_registers(tiles.registers, action="increase")
            after = lax.rem(warpgroup + 1, jnp.int32(warpgroups))
            q_mine, out_mine, lse_mine = q_smem.at[warpgroup], out_smem.at[warpgroup], lse_smem.at[warpgroup]

            # Warpgroups take turns at the tensor cores: one's softmax runs behind another's products.
            def await_turn() -> None:
                if tiles.take_turns:
                    plgpu.barrier_wait(turn.at[warpgroup])

            def pass_turn() -> None:
                if tiles.take_turns:
                    plgpu.barrier_arrive(turn.at[after])

            pl.when(warpgroup == warpgroups - 1)(pass_turn)

            def softmax(logits: Any, largest: Any, normaliser: Any, positions: Positions | None) -> tuple[Any, ...]:
                """A tile's weights, the new maximum and sum, and the factor on what was summed before."""
                factor = problem.scale * LOG2E
                if problem.softcap is not None:
                    logits = jnp.tanh(logits * (problem.scale / problem.softcap))
                    factor = problem.softcap * LOG2E
                mask = None if positions is None else positions.visible((ROWS, block), 0)
                if mask is not None:
                    logits = jnp.where(mask, logits, -jnp.inf)
                new_largest = jnp.maximum(largest, logits.max(axis=1) * factor)
                finite = new_largest if mask is None else jnp.where(new_largest == -jnp.inf, 0.0, new_largest)
                shrink = jnp.exp2(largest - finite)
                weights = jnp.exp2(logits * factor - lax.broadcast_in_dim(finite, logits.shape, [0]))
                return weights, new_largest, normaliser * shrink + weights.sum(axis=1), shrink

            def first_logits(k_slot: Any) -> Any:
                await_turn()
                plgpu.barrier_wait(k_full.at[k_slot])

                def product(acc: Any) -> Any:
                    plgpu.wgmma(acc, q_mine, k_smem.at[k_slot].T)
                    pass_turn()
                    return acc[...]

                logits = pl.run_scoped(product, plgpu.ACC((ROWS, block), jnp.float32))
                plgpu.barrier_arrive(k_free.at[k_slot])
                return logits

            def add_values(total_acc: Any, total: Any, weights: Any, v_slot: Any) -> Any:
                """Issues total += weights @ values; the interpreter has no products with a register operand."""
                plgpu.barrier_wait(v_full.at[v_slot])
                if interpret is None:
                    plgpu.wgmma(total_acc, weights, v_smem.at[v_slot])
                    return None
                total = total + jnp.dot(weights, v_smem[v_slot], preferred_element_type=jnp.float32)
                plgpu.commit_smem()
                return total

            def run_item(number: Any, done: Any) -> Any:
                row, head, query_tile = item(number)
                walk = steps_of(row, query_tile)
                here = pl.ds(query_tile * tile + warpgroup * ROWS, ROWS)
                q_first = query_tile * tile + warpgroup * ROWS + offset_of(row)
                q_segments = None
                if "q_segments" in ref:
                    q_segments = plgpu.load(ref["q_segments"].at[row, here], layout=BY_ROW, optimized=False)

                def positions(step: Any) -> Positions:
                    k_first = walk.tile(step) * block
                    k_segments = None
                    if "q_segments" in ref:
                        at = ref["kv_segments"].at[row, pl.ds(k_first, block)]
                        k_segments = plgpu.load(at, layout=BY_COLUMN, optimized=False)
                    overhang = keys if keys % block else None
                    return Positions(window, overhang, q_first - k_first, k_first, q_segments, k_segments)

                plgpu.barrier_wait(q_full.at[warpgroup])
                last = walk.count - 1
                full_first, full_end = jnp.clip(walk.full_first - 1, 0, last), jnp.clip(walk.full_end - 1, 0, last)

                def body(total_acc: Any) -> tuple[Any, Any, Any]:
                    nothing = None
                    if interpret is not None:
                        nothing = plgpu.layout_cast(jnp.zeros((ROWS, depth), jnp.float32), plgpu.Layout.WGMMA)
                    weights, largest, normaliser, _ = softmax(
                        first_logits(slot_of(done)),
                        plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), BY_ROW),
                        plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), BY_ROW),
                        positions(jnp.int32(0)),
                    )

                    def step(i: Any, carry: _Carry, *, masked: bool) -> _Carry:
                        """Adds the values of step i while the softmax of step i + 1 is computed."""
                        v_slot, k_slot = slot_of(done + i), slot_of(done + i + 1)
                        await_turn()
                        plgpu.barrier_wait(k_full.at[k_slot])

                        def products(logits_acc: Any) -> tuple[Any, ...]:
                            plgpu.wgmma(logits_acc, q_mine, k_smem.at[k_slot].T)
                            total = add_values(total_acc, carry.total, carry.weights, v_slot)
                            pass_turn()
                            logits = plgpu.wgmma_accumulator_load(logits_acc, wait_n=1 if interpret is None else 0)
                            plgpu.barrier_arrive(k_free.at[k_slot])
                            where = positions(i + 1) if masked else None
                            return total, *softmax(logits, carry.largest, carry.normaliser, where)

                        total, weights, largest, normaliser, shrink = pl.run_scoped(
                            products, plgpu.ACC((ROWS, block), jnp.float32)
                        )
                        if interpret is None:
                            total = plgpu.wgmma_accumulator_load(total_acc)
                            # Not before the product is done may its operand's registers change, or ptxas serialises all
                            # products (C7513).
                            weights = lax.optimization_barrier(weights)
                        plgpu.barrier_arrive(v_free.at[v_slot])
                        total = total * lax.broadcast_in_dim(shrink, total.shape, [0])
                        if interpret is None:
                            total_acc[...] = total
                            total = None
                        return _Carry(total, weights.astype(dtype), largest, normaliser)

                    carry = _Carry(nothing, weights.astype(dtype), largest, normaliser)
                    carry = lax.fori_loop(0, full_first, functools.partial(step, masked=True), carry)
                    carry = lax.fori_loop(full_first, full_end, functools.partial(step, masked=False), carry)
                    carry = lax.fori_loop(full_end, last, functools.partial(step, masked=True), carry)
                    if own_output:
                        plgpu.barrier_arrive(q_free.at[warpgroup])
                    v_slot = slot_of(done + last)
                    total = add_values(total_acc, carry.total, carry.weights, v_slot)
                    if interpret is None:
                        total = plgpu.wgmma_accumulator_load(total_acc)
                    plgpu.barrier_arrive(v_free.at[v_slot])
                    return total, carry.largest, carry.normaliser

                total, largest, normaliser = pl.run_scoped(body, plgpu.ACC((ROWS, depth), jnp.float32))
                seen = normaliser > 0.0
                finite = jnp.where(seen, largest, 0.0)
                sum_of_all = normaliser
                if "sink_logits" in ref:
                    sum_of_all = sum_of_all + jnp.exp2(ref["sink_logits"][head] * LOG2E - finite)
                share = jnp.where(seen, 1.0 / sum_of_all, 0.0)
                lse = jnp.where(seen, finite * (1.0 / LOG2E) + jnp.log(normaliser), -jnp.inf)
                if own_output:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                out_mine[...] = (total * lax.broadcast_in_dim(share, total.shape, [0])).astype(dtype)
                lse_mine[...] = lse
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_mine, ref["out"].at[row, here, head])
                plgpu.copy_smem_to_gmem(lse_mine, ref["lse"].at[row, head, here])
                if not own_output:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    plgpu.barrier_arrive(q_free.at[warpgroup])
                return done + walk.count

            lax.fori_loop(0, mine, run_item, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)
            # One turn was passed on and not taken: the interpreter wants to see it observed.
            pl.when(warpgroup == 0)(await_turn)

        @pl.when(warpgroup == warpgroups)
        def _load() -> None:
            plgpu.set_max_registers(tiles.loader_registers, action="decrease")

            def run_item(number: Any, done: Any) -> Any:
                row, head, query_tile = item(number)
                walk = steps_of(row, query_tile)
                kv_head = lax.div(head, jnp.int32(group))
                for w in range(warpgroups):
                    pl.when(number > 0)(functools.partial(plgpu.barrier_wait, q_free.at[w]))
                    here = pl.ds(query_tile * tile + w * ROWS, ROWS)
                    plgpu.copy_gmem_to_smem(ref["q"].at[row, here, head], q_smem.at[w], q_full.at[w])

                def load(i: Any, _: Any) -> Any:
                    slot = slot_of(done + i)
                    at = (row, pl.ds(walk.tile(i) * block, block), kv_head)
                    pl.when(done + i >= stages)(lambda: plgpu.barrier_wait(k_free.at[slot]))
                    plgpu.copy_gmem_to_smem(ref["k"].at[at], k_smem.at[slot], k_full.at[slot])
                    pl.when(done + i >= stages)(lambda: plgpu.barrier_wait(v_free.at[slot]))
                    plgpu.copy_gmem_to_smem(ref["v"].at[at], v_smem.at[slot], v_full.at[slot])
                    return ()

                lax.fori_loop(0, walk.count, load, ())
                return done + walk.count

            done = lax.fori_loop(0, mine, run_item, jnp.int32(0))
            if interpret is not None:  # which wants every completed phase of a barrier observed

                def drain(i: Any, _: Any) -> Any:
                    plgpu.barrier_wait(k_free.at[slot_of(i)])
                    plgpu.barrier_wait(v_free.at[slot_of(i)])
                    return ()

                lax.fori_loop(jnp.maximum(done - stages, 0), done, drain, ())
                for w in range(warpgroups):
                    plgpu.barrier_wait(q_free.at[w])

    scratch = {
        "q_smem": swizzled((warpgroups, ROWS, depth), dtype),
        "k_smem": swizzled((stages, block, depth), dtype),
        "v_smem": swizzled((stages, block, depth), dtype),
        "lse_smem": plgpu.SMEM((warpgroups, ROWS), jnp.float32),
        "q_full": plgpu.Barrier(num_barriers=warpgroups),
        "q_free": plgpu.Barrier(num_barriers=warpgroups),
        "turn": plgpu.Barrier(num_barriers=warpgroups),
        "k_full": plgpu.Barrier(num_barriers=stages),
        "v_full": plgpu.Barrier(num_barriers=stages),
        "k_free": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
        "v_free": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
    }
    if own_output:
        scratch["out_smem"] = swizzled((warpgroups, ROWS, depth), dtype)
    out, lse = plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct(q.shape, dtype),
            jax.ShapeDtypeStruct((batch, heads, q.shape[1]), jnp.float32),
        ],
        grid=(programs,),
        grid_names=("program",),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        **({} if interpret is None else {"interpret": interpret}),
    )(*operands.values())
    return out[:, :queries], lse[:, :, :queries]


def _segment_bounds(
    problem: Problem, rows: Rows, operands: dict[str, Array], bounds_of: Any, query_tiles: int, tile: int, block: int
) -> Array:
    """int32 [B, query tiles, 5]: end of the sink tiles, then first, full_first, full_end and end of the others."""
    offset: Any = problem.q_offset
    if rows.q_start is not None:
        offset = rows.q_start[:, None]
    found = bounds_of(jnp.arange(query_tiles, dtype=jnp.int32)[None], q_offset=offset)
    shape = (problem.batch, query_tiles)
    sinks, *bounds = (
        jnp.broadcast_to(jnp.asarray(x, jnp.int32), shape)
        for x in (found.sink_end, found.first, found.full_first, found.full_end, found.end)
    )
    q_tiles = operands["q_segments"].reshape(problem.batch, -1, tile)
    k_tiles = operands["kv_segments"].reshape(problem.batch, -1, block)
    return jnp.stack([sinks, *within_segments(tuple(bounds), q_tiles, k_tiles)], axis=-1)
