"""Attention forward on Hopper in Pallas Mosaic GPU, warp-specialised (FlashAttention-3, Shah et al., 2024).

A program keeps a tile of queries of one head, 64 rows for each compute warpgroup, and walks over the key tiles that
the window leaves; the last warpgroup only issues loads. The grid is persistent: while the compute warpgroups finish a
tile, the loader already fetches the next one's keys. Queries are [B, T, N, D], keys and values [B, S, K, D].

Queries of a chunk are attended to a ring too, the one before the chunk: its tiles come first, read in storage order
where they are (`extend`). Softmax does not care about order, so the tiles that need a mask stand at the front.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from ringjax._kernels.mosaic_chunk_walk import NOWHERE, Ring, Seen, Walk, ring_before, walk_over
from ringjax._kernels.mosaic_tile import (
    BY_COLUMN,
    BY_ROW,
    LOG2E,
    Positions,
    hold_padding,
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


MOST_CAPPED = 60.0
"""Softcap up to which the sum of a million exponentials, times values up to 1e6, is a float32 and a bfloat16."""
ROUND = 1.5 * 2**23
"""A float32 plus this, minus this, is a whole number, which stands in the sum's last bits."""
EXP2 = (0.99992807, 0.69326099, 0.24261112, 0.05517166)
"""2**x for |x| <= 1/2, to 1e-4: a twentieth of what rounding the weights to bfloat16 costs."""
PARTS = 8  # columns among which a row's sum of bounded weights is split: those of WGMMA's layout


def extend(
    problem: Problem,
    rows: Rows,
    q: Array,
    k: Array,
    v: Array,
    ring_k: Array,
    ring_v: Array,
    sink_logits: Array | None,
    *,
    tiles: MosaicForwardTiles | None = None,
    interpret: Any = None,
) -> tuple[Array, Array]:
    """Attention of a chunk to a ring as it was before it, and to itself: output [B, T, N, D] and lse [B, N, T].

    Args:
      problem: of the call on the ring.
      rows: of the ring before the chunk: `q_start` is its length.
      q, k, v: of the chunk, as for `forward`, and zero where they are padding.
      ring_k, ring_v: [B, K, C, D] in storage order.
      sink_logits, tiles, interpret: as for `forward`.
    """
    depth = q.shape[3]
    block = (tiles or mosaic_forward_tiles(problem.tiles, head_dim=depth, group=problem.group)).block_size
    ring = tuple(_rows_of(x, block, interpret) for x in (ring_k, ring_v))
    return _launch(problem, rows, q, k, v, ring, sink_logits, tiles, interpret)


def _rows_of(ring: Array, block: int, interpret: Any) -> Array:
    """A ring as TMA can take it apart into WGMMA's tiles, which are of 8 rows.

    [B, K, C, D] with C a multiple of 8, or else the rows of all heads one after the other, [B K C, D]: tiles then begin
    up to 7 slots early, with the end of the head before. Neither is a copy, unless B K C is no multiple of 8.
    """
    past = 0 if interpret is None else block  # the interpreter loads nothing past an array's end
    if ring.shape[2] % 8 == 0:
        return pad_axis(ring, 2, rounded_up(ring.shape[2], max(past, 8)))
    flat = ring.reshape(-1, ring.shape[3])
    return pad_axis(flat, 0, rounded_up(flat.shape[0], 8) + past)


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
    """Output [B, T, N, D] in `out_dtype`, and the lse of the keys alone, float32 [B, N, T].

    Args:
      problem, rows: of the call; `problem.head_dim` and `value_dim` are both D, a multiple of 64 up to 256.
      q, k, v: bfloat16 or float16.
      sink_logits: [N] or None.
      tiles: None: the tuned ones.
      interpret: `plgpu.InterpretGPUParams` to run on a CPU: tests do.
    """
    return _launch(problem, rows, q, k, v, None, sink_logits, tiles, interpret)


def _launch(
    problem: Problem,
    rows: Rows,
    q: Array,
    k: Array,
    v: Array,
    ring_arrays: Any,
    sink_logits: Array | None,
    tiles: MosaicForwardTiles | None,
    interpret: Any,
) -> tuple[Array, Array]:
    batch, queries, heads, depth = q.shape
    keys, group, dtype, out_dtype = k.shape[1], problem.group, q.dtype, jnp.dtype(problem.out_dtype)
    tiles = tiles or mosaic_forward_tiles(problem.tiles, head_dim=depth, group=group, softcap=problem.softcap)
    block, stages, warpgroups = tiles.block_size, tiles.stages, tiles.warpgroups
    tile = ROWS * warpgroups
    q = pad_axis(q, 1, rounded_up(queries, tile))
    k, v = (pad_axis(x, 1, rounded_up(keys, block)) for x in (k, v))
    query_tiles, key_tile_count = q.shape[1] // tile, k.shape[1] // block
    items = heads * query_tiles * batch
    programs = min(items, streaming_multiprocessors(problem.device_kind)) if tiles.persistent else items
    # At 256 the output leaves through the queries' shared memory; in float32, by parts that fit beside the rest.
    own_output = depth <= 128 or out_dtype != dtype
    out_columns = depth if out_dtype == dtype else 64 if depth <= 128 else 32
    window = problem.window
    # Exponentials of logits that a softcap keeps so small can be summed as they are: no maximum, no rescaling.
    bounded = problem.softcap is not None and problem.softcap <= MOST_CAPPED and dtype == jnp.bfloat16
    # Sinks that are no constant keys of the array: those of its keys whose positions are so small.
    moving = window.sinks > 0 and (ring_arrays is not None or rows.kv_start is not None)
    plain = dataclasses.replace(window, sinks=0) if moving else window
    sizes = {"tile_size": tile, "block_size": block, "queries": queries, "keys": keys}

    def bounds(query_tile: Any, offset: Any, real: Any, kv_start: Any) -> tuple[Any, ...]:
        """End of the sink tiles, then first, full_first, full_end and end of the others; of scalars or arrays."""
        found = key_tiles(plain, query_tile, q_offset=offset, **sizes)
        sinks, end = found.sink_end, found.end
        if moving:
            sinks = jnp.minimum((jnp.clip(window.sinks - kv_start, 0, keys) + block - 1) // block, found.first)
        if real is not None:  # nothing for a tile of padding
            some = query_tile * tile < real
            sinks, end = jnp.where(some, sinks, 0), jnp.where(some, end, found.first)
        full_end = found.full_end if real is None else jnp.minimum(found.full_end, end)
        return sinks, found.first, jnp.minimum(found.full_first, full_end), full_end, end

    operands: dict[str, Array] = {"q": q, "k": k, "v": v}
    if sink_logits is not None:
        operands["sink_logits"] = sink_logits.astype(jnp.float32)
    flat_ring = ring_arrays is not None and ring_arrays[0].ndim == 2
    if ring_arrays is not None:
        assert rows.length is not None and rows.written is not None
        operands |= {"ring_k": ring_arrays[0], "ring_v": ring_arrays[1]}
        operands |= {"length": rows.length, "written": rows.written}
    elif rows.q_start is not None:
        operands["q_start"] = rows.q_start
    if rows.q_length is not None:
        operands["q_length"] = rows.q_length
    if rows.kv_start is not None and (moving or rows.q_start is not None):
        operands["kv_start"] = rows.kv_start
    if rows.q_segments is not None and rows.kv_segments is not None:
        operands["q_segments"] = pad_axis(rows.q_segments, 1, q.shape[1], -1)
        operands["kv_segments"] = pad_axis(rows.kv_segments, 1, k.shape[1], -1)
        operands["bounds"] = _segment_bounds(problem, rows, operands, bounds, query_tiles, tile, block)
    with_segments = "bounds" in operands
    snake = window.left is None and tiles.heads_inner

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

        def of_row(name: str, row: Any) -> Any:
            return ref[name][row] if name in ref else None

        def offset_of(row: Any) -> Any:
            """Position of query 0, key 0 being at 0."""
            if ring_arrays is not None:
                return 0
            if "q_start" not in ref:
                return problem.q_offset
            return ref["q_start"][row] - (ref["kv_start"][row] if "kv_start" in ref else 0)

        def kv_start_of(row: Any) -> Any:
            """Position of key 0, where sinks need it."""
            return of_row("kv_start" if ring_arrays is None else "length", row) if moving else None

        def ring_start(row: Any, head: Any) -> Any:
            """The row of the flat ring with which a head begins."""
            return (row * problem.kv_heads + lax.div(head, jnp.int32(group))) * problem.keys

        def ring_of(row: Any, head: Any) -> Ring:
            real = of_row("q_length", row)
            real = jnp.int32(queries) if real is None else real
            shift = ring_start(row, head) & 7 if flat_ring else None
            return ring_before(problem, real, ref["length"][row], ref["written"][row], block, shift)

        def walk_of(row: Any, head: Any, query_tile: Any) -> Walk:
            real = of_row("q_length", row)
            if with_segments:
                found = tuple(ref["bounds"][row, query_tile, i] for i in range(5))
            else:
                found = bounds(query_tile, offset_of(row), real, kv_start_of(row))
            own = steps(*found, tiles=key_tile_count)
            if ring_arrays is None:
                return walk_over(None, own, ref["bounds"][row, query_tile, 5] if with_segments else 0)
            return walk_over(ring_of(row, head).steps(window, query_tile * tile, tile), own)

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

            def exp2(x: Any, finite: bool) -> Any:
                """2**x; of some columns by a polynomial, while the special function unit has the others."""
                split = block - tiles.polynomial
                if split == block or not finite:
                    return jnp.exp2(x)
                x, y = x[:, :split], x[:, split:]
                y = y if bounded else jnp.maximum(y, -126.0)
                rounded = y + ROUND
                y = y - (rounded - ROUND)
                power = (EXP2[3] * y + EXP2[2]) * y
                power = (power + EXP2[1]) * y + EXP2[0]
                exponent = lax.bitcast_convert_type(rounded, jnp.int32) << 23
                y = lax.bitcast_convert_type(lax.bitcast_convert_type(power, jnp.int32) + exponent, jnp.float32)
                return jnp.concatenate([jnp.exp2(x), y], axis=1)

            def softmax(logits: Any, largest: Any, normaliser: Any, positions: Any) -> tuple[Any, ...]:
                """A tile's weights, the new maximum and sum, and the factor on what was summed before."""
                factor = problem.scale * LOG2E
                if problem.softcap is not None:
                    logits = jnp.tanh(logits * (problem.scale / problem.softcap))
                    factor = problem.softcap * LOG2E
                mask = None if positions is None else positions.visible((ROWS, block), 0)
                if mask is not None:
                    logits = jnp.where(mask, logits, -jnp.inf)
                if bounded:
                    weights = exp2(logits * factor, mask is None)
                    # Sums of every eighth column: those of whole rows would pass numbers from thread to thread.
                    parts = [weights[:, c : c + PARTS] for c in range(0, block, PARTS)]
                    return weights, largest, normaliser + functools.reduce(operator.add, parts), None
                new_largest = jnp.maximum(largest, logits.max(axis=1) * factor)
                finite = new_largest if mask is None else jnp.where(new_largest == -jnp.inf, 0.0, new_largest)
                shrink = jnp.exp2(largest - finite)
                weights = exp2(logits * factor - lax.broadcast_in_dim(finite, logits.shape, [0]), mask is None)
                return weights, new_largest, normaliser * shrink + weights.sum(axis=1), shrink

            def ids_of(k_slot: Any) -> Any:
                """Segments of a tile's keys; None: there are none."""
                if not with_segments:
                    return None
                ids = plgpu.load(scratch["ids_smem"].at[k_slot], layout=BY_COLUMN)
                plgpu.commit_smem()  # TMA writes there next
                return ids

            def first_logits(k_slot: Any) -> tuple[Any, Any]:
                await_turn()
                plgpu.barrier_wait(k_full.at[k_slot])

                def product(acc: Any) -> Any:
                    plgpu.wgmma(acc, q_mine, k_smem.at[k_slot].T)
                    pass_turn()
                    return acc[...]

                logits = pl.run_scoped(product, plgpu.ACC((ROWS, block), jnp.float32))
                k_segments = ids_of(k_slot)
                plgpu.barrier_arrive(k_free.at[k_slot])
                return logits, k_segments

            def add_values(total_acc: Any, total: Any, weights: Any, v_slot: Any, wait: bool = True) -> Any:
                """Issues total += weights @ values; the interpreter has no products with a register operand."""
                if wait:
                    plgpu.barrier_wait(v_full.at[v_slot])
                if interpret is None:
                    plgpu.wgmma(total_acc, weights, v_smem.at[v_slot])
                    return None
                total = total + jnp.dot(weights, v_smem[v_slot], preferred_element_type=jnp.float32)
                plgpu.commit_smem()
                return total

            def clear(v_slot: Any, seen_from: Callable[[int], Any]) -> None:
                """Zeros the values that nobody sees, by rows of the tile: they may be NaN, and 0 * NaN is NaN."""
                pieces = [(r, c) for r in range(0, block, ROWS) for c in range(0, depth, ROWS)]
                for w in range(warpgroups):

                    @pl.when(warpgroup == w)
                    def _(mine: Any = pieces[w::warpgroups]) -> None:
                        for r, c in mine:
                            piece = v_smem.at[v_slot, pl.ds(r, ROWS), pl.ds(c, ROWS)]
                            seen = seen_from(r)
                            values = plgpu.load(piece, layout=plgpu.Layout.WGMMA)
                            piece[...] = jnp.where(seen, values, jnp.zeros_like(values))

                plgpu.commit_smem()
                plgpu.barrier_arrive(scratch["cleared"])
                plgpu.barrier_wait(scratch["cleared"])

            def run_item(number: Any, done: Any) -> Any:
                row, head, query_tile = item(number)
                walk = walk_of(row, head, query_tile)
                here = pl.ds(query_tile * tile + warpgroup * ROWS, ROWS)
                q_first = query_tile * tile + warpgroup * ROWS + offset_of(row)
                q_segments = None
                if with_segments:
                    q_segments = plgpu.load(ref["q_segments"].at[row, here], layout=BY_ROW, optimized=False)

                held = None if ring_arrays is None else ring_of(row, head)

                def again() -> tuple[Ring, Walk]:
                    """The ring and the walk, anew: kept from step to step their numbers would spill (200 -> 50 B)."""
                    assert held is not None
                    crowded = depth > 128 or window.sinks > 0 or flat_ring
                    ring = ring_of(*map(lax.optimization_barrier, (row, head))) if crowded else held
                    first = lax.optimization_barrier(query_tile) * tile
                    return ring, walk._replace(ring=ring.steps(window, first, tile))

                def positions(step: Any, k_segments: Any) -> Positions | Seen:
                    if held is not None:
                        ring, anew = again()
                        here = anew.of_ring(step)
                        k_first = anew.tile(step) * block
                        if flat_ring:
                            k_first = jnp.where(here, ring.first_slot(anew.tile(step)), k_first)
                        return Seen(window, ring, q_first, k_first, here)
                    k_first = walk.tile(step) * block
                    overhang = keys if keys % block else None
                    sinks = window.sinks - kv_start_of(row) if moving else None
                    return Positions(window, overhang, q_first - k_first, k_first, q_segments, k_segments, sinks)

                def real_from(step: Any, r: int) -> Any:
                    """Which keys of a step, from row r on, are no padding."""
                    at = ref["kv_segments"].at[row, pl.ds(walk.tile(step) * block + r, ROWS)]
                    ids = plgpu.load(at, layout=BY_ROW, optimized=False)
                    return lax.broadcast_in_dim(ids, (ROWS, ROWS), [0]) >= 0

                def wait_and_clear(step: Any) -> None:
                    """The values of a step are there, and what nobody sees of them is zero."""
                    v_slot = slot_of(done + step)
                    plgpu.barrier_wait(v_full.at[v_slot])
                    if with_segments:
                        pl.when(walk.padded > 0)(lambda: clear(v_slot, lambda r: real_from(step, r)))
                        return
                    ring, anew = again()
                    assert anew.ring is not None
                    start = ring.first_slot(anew.ring.tile(step))
                    greatest = ring.newest - start
                    greatest = jnp.where(greatest < 0, greatest + ring.circle, greatest)
                    unseen = (step < anew.ring.mixed) | (greatest > ring.oldest)

                    def seen_from(r: int) -> Any:
                        slot = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=BY_ROW) + (start + r)
                        at = ring.position(slot, jnp.bool_(True), ring.oldest)
                        return lax.broadcast_in_dim(at, (ROWS, ROWS), [0]) != NOWHERE

                    pl.when(anew.of_ring(step) & unseen)(lambda: clear(v_slot, seen_from))

                plgpu.barrier_wait(q_full.at[warpgroup])
                last = walk.count - 1
                full_first = jnp.clip(walk.full_first - 1, 0, last)
                full_end = jnp.clip(walk.full_end - 1, full_first, last)

                def body(total_acc: Any) -> tuple[Any, Any, Any]:
                    nothing = None
                    if interpret is not None:
                        nothing = plgpu.layout_cast(jnp.zeros((ROWS, depth), jnp.float32), plgpu.Layout.WGMMA)
                    no_weights = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), BY_ROW)
                    if bounded:
                        no_weights = plgpu.layout_cast(jnp.zeros((ROWS, PARTS), jnp.float32), plgpu.Layout.WGMMA)
                    logits, k_segments = first_logits(slot_of(done))
                    weights, largest, normaliser, _ = softmax(
                        logits,
                        plgpu.layout_cast(jnp.full((ROWS,), 0.0 if bounded else -jnp.inf, jnp.float32), BY_ROW),
                        no_weights,
                        positions(jnp.int32(0), k_segments),
                    )

                    def step(i: Any, carry: _Carry, *, masked: bool, clears: bool = False) -> _Carry:
                        """Adds the values of step i while the softmax of step i + 1 is computed."""
                        v_slot, k_slot = slot_of(done + i), slot_of(done + i + 1)
                        if clears:
                            wait_and_clear(i)
                        await_turn()
                        plgpu.barrier_wait(k_full.at[k_slot])

                        def products(logits_acc: Any) -> tuple[Any, ...]:
                            plgpu.wgmma(logits_acc, q_mine, k_smem.at[k_slot].T)
                            total = add_values(total_acc, carry.total, carry.weights, v_slot, wait=not clears)
                            pass_turn()
                            logits = plgpu.wgmma_accumulator_load(logits_acc, wait_n=1 if interpret is None else 0)
                            k_segments = ids_of(k_slot) if masked else None
                            plgpu.barrier_arrive(k_free.at[k_slot])
                            where = positions(i + 1, k_segments) if masked else None
                            return total, *softmax(logits, carry.largest, carry.normaliser, where)

                        total, weights, largest, normaliser, shrink = pl.run_scoped(
                            products, plgpu.ACC((ROWS, block), jnp.float32)
                        )
                        if interpret is None:
                            total = None if bounded else plgpu.wgmma_accumulator_load(total_acc)
                            if bounded:
                                plgpu.wgmma_wait(0)
                            # Not before the product is done may its operand's registers change, or ptxas serialises all
                            # products (C7513).
                            weights = lax.optimization_barrier(weights)
                        plgpu.barrier_arrive(v_free.at[v_slot])
                        if not bounded:
                            total = total * lax.broadcast_in_dim(shrink, total.shape, [0])
                            if interpret is None:
                                total_acc[...] = total
                                total = None
                        return _Carry(total, weights.astype(dtype), largest, normaliser)

                    carry = _Carry(nothing, weights.astype(dtype), largest, normaliser)
                    first_run = functools.partial(step, masked=True, clears=held is not None or with_segments)
                    carry = lax.fori_loop(0, full_first, first_run, carry)
                    carry = lax.fori_loop(full_first, full_end, functools.partial(step, masked=False), carry)
                    last_run = functools.partial(step, masked=True, clears=with_segments)
                    carry = lax.fori_loop(full_end, last, last_run, carry)
                    if own_output:
                        plgpu.barrier_arrive(q_free.at[warpgroup])
                    v_slot = slot_of(done + last)
                    if with_segments:
                        wait_and_clear(last)
                    total = add_values(total_acc, carry.total, carry.weights, v_slot, wait=not with_segments)
                    if interpret is None:
                        total = plgpu.wgmma_accumulator_load(total_acc)
                    plgpu.barrier_arrive(v_free.at[v_slot])
                    return total, carry.largest, carry.normaliser.sum(axis=1) if bounded else carry.normaliser

                total, largest, normaliser = pl.run_scoped(body, plgpu.ACC((ROWS, depth), jnp.float32))
                seen = normaliser > 0.0
                if "q_length" in ref:
                    query = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=BY_ROW)
                    seen = seen & (query + (query_tile * tile + warpgroup * ROWS) < ref["q_length"][row])
                finite = jnp.where(seen, largest, 0.0)
                sum_of_all = normaliser
                if "sink_logits" in ref:
                    sum_of_all = sum_of_all + jnp.exp2(ref["sink_logits"][head] * LOG2E - finite)
                share = jnp.where(seen, 1.0 / sum_of_all, 0.0)
                lse = jnp.where(seen, finite * (1.0 / LOG2E) + jnp.log(normaliser), -jnp.inf)
                if own_output:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                shared = total * lax.broadcast_in_dim(share, total.shape, [0])
                if with_segments:  # a query that sees nothing may have met padding, and 0 * NaN is NaN
                    shared = jnp.where(lax.broadcast_in_dim(seen, total.shape, [0]), shared, 0.0)
                out_of_all = shared.astype(out_dtype)
                lse_mine[...] = lse
                for start in range(0, depth, out_columns):
                    columns = pl.ds(start, out_columns)
                    if start:
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    out_mine[...] = out_of_all if out_columns == depth else out_of_all[:, start : start + out_columns]
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(out_mine, ref["out"].at[row, here, head, columns])
                    if start == 0:
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
                walk = walk_of(row, head, query_tile)
                kv_head = lax.div(head, jnp.int32(group))
                for w in range(warpgroups):
                    pl.when(number > 0)(functools.partial(plgpu.barrier_wait, q_free.at[w]))
                    here = pl.ds(query_tile * tile + w * ROWS, ROWS)
                    plgpu.copy_gmem_to_smem(ref["q"].at[row, here, head], q_smem.at[w], q_full.at[w])

                def load(i: Any, _: Any) -> Any:
                    slot = slot_of(done + i)
                    here = pl.ds(walk.tile(i) * block, block)

                    def fetch(name: str, into: Any, full: Any) -> None:
                        def of_keys() -> None:
                            plgpu.copy_gmem_to_smem(ref[name].at[row, here, kv_head], into.at[slot], full.at[slot])

                        def of_ring() -> None:
                            if flat_ring:
                                start = pl.multiple_of((ring_start(row, head) & -8) + walk.tile(i) * block, 8)
                                at = ref[f"ring_{name}"].at[pl.ds(start, block)]
                            else:
                                at = ref[f"ring_{name}"].at[row, kv_head, here]
                            plgpu.copy_gmem_to_smem(at, into.at[slot], full.at[slot])

                        if walk.ring is None:
                            of_keys()
                        else:
                            pl.when(walk.of_ring(i))(of_ring)
                            pl.when(jnp.logical_not(walk.of_ring(i)))(of_keys)

                    pl.when(done + i >= stages)(lambda: plgpu.barrier_wait(k_free.at[slot]))
                    fetch("k", k_smem, k_full)
                    if with_segments:
                        ids = ref["kv_segments"].at[row, here]
                        plgpu.copy_gmem_to_smem(ids, scratch["ids_smem"].at[slot], k_full.at[slot])
                    pl.when(done + i >= stages)(lambda: plgpu.barrier_wait(v_free.at[slot]))
                    fetch("v", v_smem, v_full)
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
        "k_full": plgpu.Barrier(num_arrivals=1 + with_segments, num_barriers=stages),
        "v_full": plgpu.Barrier(num_barriers=stages),
        "k_free": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
        "v_free": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
    }
    if own_output:
        scratch["out_smem"] = swizzled((warpgroups, ROWS, out_columns), out_dtype)
    if with_segments:
        scratch["ids_smem"] = plgpu.SMEM((stages, block), jnp.int32)
    if ring_arrays is not None or with_segments:
        scratch["cleared"] = plgpu.Barrier(num_arrivals=warpgroups)
    out, lse = plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct(q.shape, out_dtype),
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
    problem: Problem, rows: Rows, operands: dict[str, Array], bounds: Any, query_tiles: int, tile: int, block: int
) -> Array:
    """int32 [B, query tiles, 6]: end of the sink tiles, then first, full_first, full_end and end of the others.

    The last is 1 if any of them holds padding, else 0.
    """
    offset: Any = problem.q_offset
    if rows.q_start is not None:
        offset = (rows.q_start - (0 if rows.kv_start is None else rows.kv_start))[:, None]
    real, kv_start = (None if x is None else x[:, None] for x in (rows.q_length, rows.kv_start))
    found = bounds(jnp.arange(query_tiles, dtype=jnp.int32)[None], offset, real, kv_start)
    shape = (problem.batch, query_tiles)
    sinks, *others = (jnp.broadcast_to(jnp.asarray(x, jnp.int32), shape) for x in found)
    q_tiles = operands["q_segments"].reshape(problem.batch, -1, tile)
    k_tiles = operands["kv_segments"].reshape(problem.batch, -1, block)
    first, *inner, end = within_segments(tuple(others), q_tiles, k_tiles)
    padded = hold_padding(sinks, first, end, k_tiles)
    return jnp.stack([sinks, first, *inner, end, padded], axis=-1)
