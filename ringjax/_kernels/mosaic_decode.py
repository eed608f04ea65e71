"""Attention of a few tokens to a ring on Hopper in Pallas Mosaic GPU, reading the ring once, in storage order.

A program has one kv head of one row and all queries of its group. The products are turned around: S^T = K Q^T and
O^T = V^T P^T, so that the keys and the head size fill WGMMA's 64 rows and the few queries are its columns (8 at least).
Nothing is padded to 64 queries, and a step's softmax works on block_size x 8 numbers. One warpgroup computes, one
loads.

The tiles of one head may be split over the programs of a thread-block cluster: their partial results go to the first
one's shared memory and are merged there, or, where there are many queries, some of each result to each of several. The
new tokens can be written by the same launch (`append_attend`): the program that reads a slot writes it first, and reads
that tile last. So can the row's counters. Such a launch may read other rings before its own, in the same softmax: the
tiles of all are split.

Of a quantised ring, nothing is widened (`mosaic_eight_bits`).
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from ringjax._kernels import mosaic_eight_bits as eight_bits
from ringjax._kernels import mosaic_ring_walk as ring_walk
from ringjax._kernels.mosaic_counters import count_in, undisturbed
from ringjax._kernels.mosaic_tile import BY_COLUMN, BY_ROW, LOG2E, pad_axis, plgpu, rounded_up, swizzled
from ringjax._kernels.problem import Memory, Problem, Rows
from ringjax._kernels.tiles import MosaicDecodeTiles, merging_programs, mosaic_decode_tiles
from ringjax._quantised import quantise
from ringjax._window import Window

LAYOUT = plgpu.Layout
PIECE = 64  # rows of a warpgroup's product
MOST_NEW = 16
"""Tokens that one launch writes."""
FLOOR = -1e30
"""Where a running maximum begins: finite, so that no exponential of a difference is NaN."""


def most_rows(problem: Problem) -> int:
    """Queries of a program; more are split over programs, each of which reads the ring."""
    most = 64 if max(problem.head_dim, problem.value_dim) <= 128 else 32  # more would spill registers
    return most // 2 if problem.quantised else most


def writes(problem: Problem, *memories: Problem) -> bool:
    """Whether `append_attend` can write the call's tokens itself: no two programs then read what one of them writes.

    And can read such memories beside: their keys and values have the ring's dtype and sizes.
    """

    def layout(problem: Problem) -> tuple[Any, ...]:
        return problem.kv_dtype, problem.kv_heads, problem.head_dim, problem.value_dim, problem.scale, problem.softcap

    together = problem.queries * problem.group <= most_rows(problem)
    alike = all(memory.q_stride == 0 and layout(memory) == layout(problem) for memory in memories)
    return together and problem.queries <= MOST_NEW and problem.q_stride == 1 and alike


def forward(
    problem: Problem,
    rows: Rows,
    q: Array,
    k: Array,
    v: Array,
    sink_logits: Array | None,
    *,
    tiles: MosaicDecodeTiles | None = None,
    interpret: Any = None,
) -> tuple[Array, Array]:
    """Output [B, T, N, Hv] in `out_dtype`, and the lse of the keys alone, float32 [B, N, T].

    Args:
      problem, rows: of the call, whose layout is a ring's.
      q: [B, T, N, H], bfloat16 or float16.
      k, v: [B, K, C, H] and [B, K, C, Hv] in storage order, of the same dtype, or of 8 bits with scales in `rows`.
      sink_logits: [N] or None.
      tiles: None: the tuned ones.
      interpret: `plgpu.InterpretGPUParams` to run on a CPU: tests do.
    """
    out, lse, _ = _launch(problem, rows, q, k, v, None, sink_logits, (), tiles, interpret)
    return out, lse


def append_attend(
    problem: Problem,
    rows: Rows,
    q: Array,
    k: Array,
    v: Array,
    ring_k: Array,
    ring_v: Array,
    sink_logits: Array | None,
    memories: Sequence[Memory] = (),
    *,
    tiles: MosaicDecodeTiles | None = None,
    interpret: Any = None,
) -> tuple[Array, Array, Array, Array, Rows]:
    """Writes T tokens and attends to the ring with them, in one launch: output, lse, the new ring and its rows.

    The ring, its counters and its scales are written in place where the caller donates them or does not use them again;
    XLA copies them otherwise.

    Args:
      problem: of the call; `writes(problem)` holds, with the memories' problems.
      rows: of the ring *before* the tokens: `q_start` is its length.
      q, k, v: of the tokens: [B, T, N, H], [B, T, K, H] and [B, T, K, Hv].
      ring_k, ring_v: [B, K, C, H] and [B, K, C, Hv] in storage order.
      sink_logits: as for `forward`.
      memories: other rings, that every query sees all of; a row whose own ring is lost sees nothing of them either.
      tiles, interpret: as for `forward`.
    """
    assert writes(problem, *(memory.problem for memory in memories))
    new = {"new_k": k, "new_v": v}
    if problem.quantised and interpret is not None:
        (k, k_scale), (v, v_scale) = (quantise(x, problem.kv_dtype) for x in (k, v))
        new = {"new_k": k, "new_v": v, "new_k_scale": k_scale, "new_v_scale": v_scale}
    in_place = ["k_scale", "v_scale"] if problem.quantised else []
    if interpret is None:
        in_place += ["length", "written"]
    refs: dict[str, Any] = {name: jax.new_ref(getattr(rows, name)) for name in in_place}
    k_ref, v_ref = jax.new_ref(ring_k), jax.new_ref(ring_v)
    rows = rows._replace(**refs)
    out, lse, rows = _launch(problem, rows, q, k_ref, v_ref, new, sink_logits, memories, tiles, interpret)
    rows = rows._replace(**{name: jax.freeze(ref) for name, ref in refs.items()})
    return out, lse, jax.freeze(k_ref), jax.freeze(v_ref), rows


@dataclasses.dataclass(frozen=True)
class _Part:
    """A program's steps through one ring.

    Attributes:
      name: of the ring: what the names of its operands end with.
      problem: of reading it.
      row, share: of what is seen of it, and of that the program's tiles.
      before: the steps through the rings before it; None: 0.
    """

    name: str
    problem: Problem
    row: ring_walk.Row
    share: ring_walk.Share
    before: Any

    def step(self, i: Any) -> Any:
        """Among all steps, the one with index i through this ring."""
        return i if self.before is None else self.before + i

    def is_seen(self, slot: Any, oldest: Any, youngest: Any, pinned: Any) -> Any:
        return ring_walk.is_seen(
            self.problem, self.row, slot, oldest, youngest, pinned, block_size=self.share.block_size
        )


def _all_of(memory: Problem) -> Problem:
    """The problem of a memory, whose queries stand at its newest token: none is to their right, pinned or not."""
    window = memory.window
    return dataclasses.replace(memory, window=Window(window.left, None, window.sinks))


def _launch(
    problem: Problem,
    rows: Rows,
    q: Array,
    k: Any,
    v: Any,
    new: dict[str, Array] | None,
    sink_logits: Array | None,
    memories: Sequence[Memory],
    tiles: MosaicDecodeTiles | None,
    interpret: Any,
) -> tuple[Array, Array, Rows]:
    """The kernel; `k` and `v` are references, written to, if there are new tokens: the rows are those after them."""
    assert new is not None or not memories
    batch, chunk, kv_heads, group = problem.batch, problem.queries, problem.kv_heads, problem.group
    dtype, out_dtype, f32 = jnp.dtype(problem.kv_dtype), jnp.dtype(problem.out_dtype), jnp.float32
    columns = 128 // dtype.itemsize  # of one load
    depth, value_depth = (rounded_up(x, columns) for x in (problem.head_dim, problem.value_dim))
    eight, sum_dtype, parts = problem.quantised, jnp.int32 if dtype == jnp.int8 else f32, 1
    unit = finer = 1.0
    if eight:  # queries and weights have two parts
        parts, unit, finer = 2, 1.0 / eight_bits.WHOLE[dtype.name], 1.0 / eight_bits.FINER[dtype.name]
    problems = [problem, *(_all_of(memory.problem) for memory in memories)]
    packed = chunk * group
    row_tiles = -(-packed // most_rows(problem))
    width = min(rounded_up(packed, 8), most_rows(problem))  # queries of a program
    tiles = tiles or mosaic_decode_tiles(
        problem.tiles,
        programs=batch * kv_heads * row_tiles,
        slots=sum(each.keys for each in problems),
        rows=width,
        head_dim=depth,
        value_dim=value_depth,
        itemsize=dtype.itemsize,
        spread=not (chunk == 1 and row_tiles == 1),
    )
    block, stages, splits = tiles.block_size, tiles.stages, tiles.splits
    pieces = range(0, block, PIECE)
    overlap = tiles.overlap and interpret is None
    # One token's queries are rows as they are: a program reads those past its group too (they belong to the next
    # head, and are zeros past the end), and writes its own only. A chunk's are put together first.
    direct = chunk == 1 and row_tiles == 1
    stride, written_rows = (group, group) if direct else (row_tiles * width, width)
    mergers = 1 if direct else merging_programs(splits, width)
    merged = width // mergers  # queries that one of them merges
    operands: dict[str, Any] = {}
    if eight:
        operands |= {"k_scale": rows.k_scale, "v_scale": rows.v_scale}
    else:
        q = pad_axis(q, 3, depth)
    if direct:
        q = q.reshape(batch * kv_heads * group, -1)
        if interpret is not None:  # whose loads end where the array does
            q = pad_axis(q, 0, q.shape[0] + width - group)
    else:
        q = jnp.moveaxis(q.reshape(batch, chunk, kv_heads, group, -1), 1, 2)
        q = pad_axis(q.reshape(batch, kv_heads, packed, -1), 2, stride).reshape(batch * kv_heads * stride, -1)
    out_rows = batch * kv_heads * stride

    operands |= {"q": q, "length": rows.length, "written": rows.written}
    if new is None:
        operands["start"] = rows.q_start
    if rows.q_length is not None:
        operands["q_length"] = rows.q_length
    if sink_logits is not None:
        by_row = jnp.tile(sink_logits.astype(f32).reshape(kv_heads, 1, group), (1, chunk, 1)) * LOG2E
        operands["sink_logits"] = pad_axis(by_row.reshape(kv_heads, packed), 1, row_tiles * width).reshape(-1)
    if new is not None:
        operands |= new
    operands |= {"k": k, "v": v}
    for i, memory in enumerate(memories, 1):
        of_memory = {"length": memory.rows.length, "written": memory.rows.written, "k": memory.k, "v": memory.v}
        if eight:
            of_memory |= {"k_scale": memory.rows.k_scale, "v_scale": memory.rows.v_scale}
        operands |= {f"{name}{i}": x for name, x in of_memory.items()}

    results = {
        "out": jax.ShapeDtypeStruct((out_rows, value_depth), out_dtype),
        "lse": jax.ShapeDtypeStruct((batch * kv_heads * row_tiles, width), f32),
    }
    if new is not None and interpret is not None:
        counts = jax.ShapeDtypeStruct((batch,), jnp.int32)
        results |= {"new_length": counts, "new_written": counts}
    readers = kv_heads * splits  # programs of one row
    quantises = eight and new is not None and interpret is None  # the tokens, itself

    def kernel(*refs: Any, **scratch: Any) -> None:
        ref = dict(zip((*operands, *results), refs, strict=True))
        p_smem = scratch["p_smem"]
        # One memory in two forms: what a load writes, what a product reads.
        (q_into, q_smem), (k_into, k_smem), (v_into, v_smem) = (
            (scratch[n], scratch[n]) if interpret is not None else scratch[n] for n in ("q_smem", "k_smem", "v_smem")
        )
        q_full, k_full, k_free = scratch["q_full"], scratch["k_full"], scratch["k_free"]
        v_full, v_free = scratch["v_full"], scratch["v_free"]
        split, row_tile, head, b, role = (lax.axis_index(n) for n in ("split", "rows", "head", "batch", "role"))
        if overlap:  # set up while the kernel before this one ends; no memory is touched before it has
            plgpu.griddepcontrol_wait()
            plgpu.griddepcontrol_launch_dependents()
        real = jnp.int32(chunk) if "q_length" not in ref else ref["q_length"][b]
        length, written = ref["length"][b], ref["written"][b]
        before = length
        if new is None:
            row = ring_walk.row(problem, ref["start"][b], real, length, written)
        else:
            was_written = undisturbed(length, written, slack=problem.slack, readers=readers)
            length = length + real
            written = jnp.maximum(was_written, length)
            row = ring_walk.row(problem, before, real, length, written)
        ring_rows = [row]
        for i, each in enumerate(problems[1:], 1):
            its_length, its_written = ref[f"length{i}"][b], ref[f"written{i}"][b]
            is_valid = written - length <= problem.slack
            ring_rows.append(ring_walk.row(each, its_length - 1, real, its_length, its_written, is_valid))
        shares = ring_walk.shares(problems, ring_rows, split=split, splits=splits, block_size=block)
        share = shares[0]
        if new is not None:  # the newest token's tile comes last: its writing hides behind the other loads
            newest_slot = ring_walk.slot_of(problem, length - 1) if problem.window.sinks else row.newest
            share = shares[0] = share.ending_with(newest_slot)
        # A program's steps: through the memories first.
        walk: list[_Part] = []
        steps: Any = None
        for i in (*range(1, len(problems)), 0):
            walk.append(_Part("" if i == 0 else str(i), problems[i], ring_rows[i], shares[i], steps))
            steps = shares[i].count if steps is None else steps + shares[i].count

        program = (b * kv_heads + head) * row_tiles + row_tile
        out_row = (b * kv_heads + head) * stride + row_tile * width

        @pl.when(role == 0)
        def _compute() -> None:
            def across(x: Any) -> Any:
                """One number per query, to [PIECE, queries]."""
                return lax.broadcast_in_dim(x, (PIECE, *x.shape), [1])

            def both(x: Any) -> Any:
                """The worth of the two parts of 64 rows."""
                first, second = x[:, :width].astype(f32), x[:, width:].astype(f32)
                return first + second * finer

            def scale_of(stage: Any, which: int, c: int) -> Any:
                """One number per key."""
                at = scratch["scales"].at[stage, which, pl.ds(c, PIECE)]
                return lax.broadcast_in_dim(plgpu.load(at, layout=BY_ROW, optimized=False), (PIECE, width), [0])

            time: Any = None  # each query's index in the chunk, where that matters
            if chunk > 1 and (problem.q_stride or "q_length" in ref):
                column = plgpu.broadcasted_iota(jnp.int32, (width,), 0, layout=BY_COLUMN) + row_tile * width
                time = lax.div(column, jnp.full_like(column, group))

            def bounds_of(part: _Part) -> tuple[Any, Any, Any]:
                """What each query sees of a ring: the oldest, the youngest age, and how many sinks."""
                row, stride = part.row, part.problem.q_stride
                oldest, youngest, pinned = jnp.minimum(row.held, row.first_oldest), row.first_youngest, row.pinned
                if time is not None:
                    shift = time * stride
                    oldest = jnp.minimum(row.first_oldest - shift, row.held)
                    oldest = across(jnp.where(time < real, oldest, -1))
                    youngest = None if youngest is None else across(youngest - shift)
                    pinned = None if pinned is None else pinned + shift
                if part.problem.window.sinks:
                    pinned = row.pinned_held if pinned is None else jnp.minimum(pinned, row.pinned_held)
                    if time is not None:
                        pinned = jnp.where(time < real, pinned, 0)
                        pinned = across(pinned)
                return oldest, youngest, pinned

            bounds = [bounds_of(part) for part in walk]

            def clear(part: _Part, step: Any, stage: Any) -> None:
                """Zeros the values that no query sees: they may be NaN, and 0 * NaN is NaN."""
                row, capacity, sinks = part.row, part.problem.keys, part.problem.window.sinks
                around = capacity - sinks
                tile_start = part.share.tile(step) * block
                top = row.newest - (tile_start - sinks)
                top = jnp.where(top < 0, top + around, top)
                # Either all slots are younger than the first, or the newest and the oldest are both in the tile.
                greatest = jnp.where(top >= block - 1, top, around - 1)
                whole = (tile_start >= sinks) & (greatest <= row.oldest) & (row.youngest == 0)
                if capacity % block:
                    whole = whole & (tile_start + block <= capacity)

                @pl.when(jnp.logical_not(whole))
                def _() -> None:
                    any_pinned = row.pinned_held
                    if row.pinned is not None:
                        last = (real - 1) * part.problem.q_stride
                        any_pinned = jnp.minimum(any_pinned, row.pinned + last)
                    if eight:
                        for j in range(value_depth // columns):
                            eight_bits.without_nan(v_smem.at[stage, j])
                        plgpu.commit_smem()
                        return
                    for c in pieces:
                        for j in range(value_depth // PIECE):
                            at = v_smem.at[stage, j, pl.ds(c, PIECE)]
                            slot = plgpu.broadcasted_iota(jnp.int32, (PIECE, PIECE), 0, layout=LAYOUT.WGMMA)
                            keep = part.is_seen(slot + (tile_start + c), row.oldest, row.youngest, any_pinned)
                            values = plgpu.load(at, layout=LAYOUT.WGMMA)
                            at[...] = jnp.where(keep, values, jnp.zeros_like(values))
                    plgpu.commit_smem()

            if "counts_read" in scratch:
                plgpu.barrier_arrive(scratch["counts_read"])
            if not eight:
                plgpu.barrier_wait(q_full)
            elif interpret is None:
                eight_bits.store_queries(ref["q"], q_smem, scratch["q_scale"], out_row, written_rows, dtype)
            else:
                halves, scratch["q_scale"][...] = eight_bits.split_queries(ref["q"][pl.ds(out_row, width)], dtype)
                for j in range(depth // columns):
                    some = halves[:, j * columns : (j + 1) * columns]
                    q_smem[j] = jnp.pad(some, ((0, 0), (0, columns - some.shape[1])))
            if eight:
                plgpu.commit_smem()

            def logits(stage: Any) -> Any:
                def product(acc: Any) -> Any:
                    for j in range(depth // columns):
                        plgpu.wgmma(acc, k_smem.at[stage, j], q_smem.at[j].T)
                    return acc[...]

                return pl.run_scoped(product, plgpu.ACC((block, parts * width), sum_dtype))

            def add_eight_bits(total: tuple[Any, ...], stage: Any) -> tuple[Any, ...]:
                found = []
                for j in range(value_depth // columns):
                    if interpret is not None:
                        values, weights = (jnp.nan_to_num(x[...].astype(f32)) for x in (v_smem.at[stage, j], p_smem))
                        product = jnp.dot(values.T, weights.T, preferred_element_type=f32)
                    else:
                        values = eight_bits.transposed_values(v_smem.at[stage, j], dtype)

                        def multiply(acc: Any, values: Any = values) -> Any:
                            plgpu.wgmma(acc, values, p_smem.T)
                            return acc[...]

                        product = pl.run_scoped(multiply, plgpu.ACC((columns, parts * width), sum_dtype))
                    found += [both(product[i : i + PIECE]) for i in range(0, columns, PIECE)]
                if interpret is not None:
                    plgpu.commit_smem()
                return tuple(x + y for x, y in zip(total, found, strict=True))

            def add_values(total: tuple[Any, ...], stage: Any) -> tuple[Any, ...]:
                if interpret is not None:
                    weights = p_smem[...].T
                    found = [
                        jnp.dot(v_smem[stage, j].T, weights, preferred_element_type=f32) for j in range(len(total))
                    ]
                    plgpu.commit_smem()
                    return tuple(x + y for x, y in zip(total, found, strict=True))

                def product(accs: Any) -> None:
                    for j, acc in enumerate(accs):
                        plgpu.wgmma(acc, v_smem.at[stage, j].T, p_smem.T)

                return pl.run_state(product)(tuple(plgpu.ACC.init(x) for x in total))

            factor = problem.scale * LOG2E if problem.softcap is None else problem.softcap * LOG2E
            if eight:
                q_scale = across(plgpu.load(scratch["q_scale"], layout=BY_COLUMN, optimized=False))

            def hidden_zero(part: _Part, i: Any) -> Any:
                """A constant stage would have the compiler keep every address in a register: 219 instead of 128."""
                return jnp.minimum(part.share.count - 1 - i, 0)

            def step(part: _Part, bounds: tuple[Any, Any, Any], i: Any, carry: Any) -> Any:
                total, largest, normaliser = carry
                stage = lax.rem(part.step(i), jnp.int32(stages)) if stages > 1 else hidden_zero(part, i)
                plgpu.barrier_wait(k_full.at[stage])
                whole = logits(stage)
                plgpu.barrier_arrive(k_free.at[stage])
                s, masks = [], []
                if eight:
                    plgpu.barrier_wait(scratch["scales_full"].at[stage])
                for c in pieces:
                    x = whole[c : c + PIECE]
                    if eight:
                        x = both(x) * (scale_of(stage, 0, c) * q_scale)
                    if problem.softcap is not None:
                        x = jnp.tanh(x * (problem.scale / problem.softcap))
                    slot = plgpu.broadcasted_iota(jnp.int32, (PIECE, width), 0, layout=LAYOUT.WGMMA)
                    mask = part.is_seen(slot + (part.share.tile(i) * block + c), *bounds)
                    if eight:  # a value's scale is a factor of its weight, which then has 1 as its bound
                        masks.append(mask)
                        x = x * factor + scale_of(stage, 1, c)
                    s.append(jnp.where(mask, x, -jnp.inf))
                s_factor = 1.0 if eight else factor
                new_largest = jnp.maximum(largest, functools.reduce(jnp.maximum, s).max(axis=0) * s_factor)
                shrink = jnp.exp2(largest - new_largest)
                p = [jnp.exp2(x * s_factor - across(new_largest)) for x in s]
                # By key until the end: summing over keys crosses the warps.
                shrink = across(shrink)
                shares = p
                if eight:
                    shares = [
                        jnp.where(mask, x * scale_of(stage, 2, c), 0.0)
                        for x, c, mask in zip(p, pieces, masks, strict=True)
                    ]
                normaliser = normaliser * shrink + functools.reduce(jnp.add, shares)
                total = tuple(x * shrink for x in total)
                for x, c in zip(p, pieces, strict=True):
                    if eight and interpret is None:
                        eight_bits.store_weights(x, p_smem, c, dtype)
                        continue
                    if eight:
                        halves = eight_bits.split(x * (1.0 / unit), dtype)
                        for n, half in enumerate(halves):
                            p_smem[pl.ds(n * width, width), pl.ds(c, PIECE)] = half.T
                        continue
                    at = p_smem.at[:, pl.ds(c, PIECE)]
                    at.T[...] = plgpu.layout_cast(x.astype(dtype), LAYOUT.WGMMA_TRANSPOSED)
                plgpu.commit_smem()
                plgpu.barrier_wait(v_full.at[stage])
                if not eight or (dtype != jnp.int8 and interpret is None):
                    clear(part, i, stage)
                total = (add_eight_bits if eight else add_values)(total, stage)
                plgpu.barrier_arrive(v_free.at[stage])
                return total, new_largest, normaliser

            zeros = plgpu.layout_cast(jnp.zeros((PIECE, width), f32), LAYOUT.WGMMA)
            total = (zeros,) * (value_depth // PIECE)
            largest = plgpu.layout_cast(jnp.full((width,), FLOOR, f32), BY_COLUMN)
            normaliser = zeros
            for part, its_bounds in zip(walk, bounds, strict=True):
                through = functools.partial(step, part, its_bounds)
                carry = total, largest, normaliser
                total, largest, normaliser = lax.fori_loop(0, part.share.count, through, carry)
            largest = across(largest)

            from_query = split * merged if mergers > 1 else 0  # of the program's, those that it merges begin here

            def share_and_lse(largest: Any, normaliser: Any) -> tuple[Any, Any]:
                """From the maximum and the sums by key, both [PIECE, queries]; the same in all rows."""
                normaliser = across(normaliser.sum(axis=0))
                found = normaliser != 0.0  # NaN shows
                sum_of_all = normaliser
                if "sink_logits" in ref:
                    first = (head * row_tiles + row_tile) * width + from_query
                    at = ref["sink_logits"].at[pl.ds(first, merged)]
                    sink = across(plgpu.load(at, layout=BY_COLUMN, optimized=False))
                    sum_of_all = sum_of_all + jnp.exp2(sink - largest)
                share = jnp.where(found, unit / sum_of_all, 0.0)
                lse = jnp.where(found, largest * (1.0 / LOG2E) + jnp.log(normaliser), -jnp.inf)
                return share, lse

            def write(pieces: list[Any], lse: Any) -> None:
                out_smem, lse_smem = scratch["out_smem"], scratch["lse_smem"]
                if eight and interpret is None:
                    for j in range(0, len(pieces), 2):
                        eight_bits.store_output(pieces[j : j + 2], out_smem, PIECE * j)
                    pieces = []
                for j, part in enumerate(pieces):
                    at = out_smem.at[pl.ds(0, merged), pl.ds(PIECE * j, PIECE)]
                    _store(at.T, plgpu.layout_cast(part.astype(out_dtype), LAYOUT.WGMMA_TRANSPOSED))
                _store(lse_smem.at[:, pl.ds(0, merged)], lse)
                plgpu.commit_smem()
                its_rows = written_rows if mergers == 1 else merged
                to = ref["out"].at[pl.ds(out_row + from_query, its_rows)]
                plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, its_rows)], to)
                to = ref["lse"].at[program, pl.ds(from_query, merged)]
                plgpu.copy_smem_to_gmem(lse_smem.at[0, pl.ds(0, merged)], to)
                plgpu.wait_smem_to_gmem(0)

            if splits == 1:
                weight, lse = share_and_lse(largest, normaliser)
                write([x * weight for x in total], lse)
                return
            peer_smem, peer_full = scratch["peer_smem"], scratch["peer_full"]

            def send() -> None:
                def put(x: Any, at: int) -> None:
                    for i in range(mergers):
                        plgpu.async_store_smem(
                            x if mergers == 1 else x[:, i * merged : (i + 1) * merged],
                            peer_smem.at[split - int(mergers == 1), pl.ds(at, PIECE)],
                            peer_full,
                            cluster_idx=jnp.int32(i),
                            cluster_dim="split",
                        )

                for j, x in enumerate(total):
                    put(x, PIECE * j)
                put(largest, value_depth)
                put(normaliser, value_depth + PIECE)

            # The one that merges all has its own part in registers; of several, each gets its queries of all parts.
            if mergers == 1:
                pl.when(split > 0)(send)
            else:
                send()

            @pl.when(split < mergers)
            def _merge() -> None:
                plgpu.barrier_wait(peer_full)

                def get(peer: int, at: int) -> Any:
                    return plgpu.load(peer_smem.at[peer, pl.ds(at, PIECE)], layout=LAYOUT.WGMMA)

                peers, held = (range(splits - 1), True) if mergers == 1 else (range(splits), False)
                maxima = [largest] * held + [get(i, value_depth) for i in peers]
                top = functools.reduce(jnp.maximum, maxima)
                weights = [jnp.exp2(x - top) for x in maxima]
                sums = [normaliser] * held + [get(i, value_depth + PIECE) for i in peers]
                weight, lse = share_and_lse(
                    top, functools.reduce(jnp.add, [w * x for w, x in zip(weights, sums, strict=True)])
                )
                weights = [w * weight for w in weights]

                def mix(j: int) -> Any:
                    found = [total[j]] * held + [get(i, PIECE * j) for i in peers]
                    return functools.reduce(jnp.add, [w * x for w, x in zip(weights, found, strict=True)])

                write([mix(j) for j in range(len(total))], lse)

        @pl.when(role == 1)
        def _load() -> None:
            zero = lax.rem(row_tile, jnp.int32(1))  # a start that is not constant may have an end past the array's

            def fetch(rows_of: Any, into: Any, full: Any) -> None:
                """Rows, 128 bytes at a time; past the end of the array or of its rows there are zeros."""
                for j in range(into.shape[0]):
                    some = rows_of.at[:, pl.ds(zero + columns * j, columns)]
                    plgpu.copy_gmem_to_smem(some, into.at[j], full)

            if not eight:
                fetch(ref["q"].at[pl.ds(out_row, width)], q_into, q_full)
            count = share.count
            ready = issue = jnp.int32(-1)  # the steps before which the new tokens are in the ring, are sent there
            if new is not None:
                new_k, new_v = scratch["new_k"], scratch["new_v"]

                def visits(t: Any) -> tuple[Any, Any]:
                    slot = ring_walk.slot_of(problem, before + t)
                    if chunk == 1:
                        return slot, jnp.where((share.turn > 0) & (real > 0), count - 1, count)
                    visit = share.visit_of(slot)
                    step = visit - share.turn
                    step = jnp.where(step < 0, step + count, step)
                    return slot, jnp.where((visit >= 0) & (visit < count) & (t < real), step, count)

                ready = count
                for t in range(chunk):
                    ready = jnp.minimum(ready, visits(jnp.int32(t))[1])
                issue = jnp.minimum(ready, stages)

                def fetch_new() -> None:
                    at = (b, pl.ds(0, chunk), head)
                    for name, into in (("new_k", new_k), ("new_v", new_v)):
                        tokens = ref[name].at[(*at, pl.ds(zero, into.shape[1]))]
                        plgpu.copy_gmem_to_smem(tokens, into, scratch["new_full"])

                if not quantises:
                    pl.when(ready < count)(fetch_new)

            def put_new() -> None:
                if quantises:
                    for name, into in (("new_k", new_k), ("new_v", new_v)):
                        eight_bits.store_tokens(ref[name], into, scratch[f"{name}_scale"], b, head, dtype)
                    plgpu.commit_smem()
                else:
                    plgpu.barrier_wait(scratch["new_full"])

                def put(t: Any, _: Any) -> Any:
                    slot, step = visits(t)

                    @pl.when(step < count)
                    def _here() -> None:
                        for name, tokens, size in (("k", new_k, problem.head_dim), ("v", new_v, problem.value_dim)):
                            plgpu.copy_smem_to_gmem(tokens.at[t, pl.ds(0, size)], ref[name].at[b, head, slot])
                            if eight:  # by every thread: each then reads what it wrote itself
                                scale = (
                                    scratch[f"new_{name}_scale"][t]
                                    if quantises
                                    else ref[f"new_{name}_scale"][b, t, head]
                                )
                                ref[f"{name}_scale"][b, head, slot] = scale

                    return ()

                if chunk == 1:
                    put(jnp.int32(0), ())
                else:
                    lax.fori_loop(0, chunk, put, ())

            def load(part: _Part, i: Any, _: Any) -> Any:
                step, slots = part.step(i), pl.ds(part.share.tile(i) * block, block)
                stage = lax.rem(step, jnp.int32(stages))
                if new is not None and part.share is share:
                    pl.when((i == issue) & (ready < count))(put_new)
                    # Written, not merely read from shared memory: the load must see it.
                    pl.when(i == ready)(lambda: plgpu.wait_smem_to_gmem(0))
                pl.when(step >= stages)(lambda: plgpu.barrier_wait(k_free.at[stage]))
                fetch(ref["k" + part.name].at[b, head, slots], k_into.at[stage], k_full.at[stage])
                pl.when(step >= stages)(lambda: plgpu.barrier_wait(v_free.at[stage]))
                fetch(ref["v" + part.name].at[b, head, slots], v_into.at[stage], v_full.at[stage])
                if eight:
                    scales = scratch["scales"].at[stage]
                    of_keys, of_values = (ref[name + part.name].at[b, head] for name in ("k_scale", "v_scale"))
                    if interpret is None:
                        at = part.share.tile(i) * block
                        eight_bits.load_scales(of_keys, of_values, scales, at, part.problem.keys)
                    else:
                        least = jnp.maximum(of_values[slots], eight_bits.LEAST)
                        scales[...] = jnp.stack([of_keys[slots], jnp.log2(least), 1.0 / least])
                    plgpu.barrier_arrive(scratch["scales_full"].at[stage])
                return ()

            for part in walk:
                lax.fori_loop(0, part.share.count, functools.partial(load, part), ())
            if new is not None and interpret is None:
                plgpu.barrier_wait(scratch["counts_read"])
                step = jnp.int32(problem.slack + 1)
                last = was_written + (readers - 1) * step
                count_in(ref["length"].at[b], ref["written"].at[b], step, last, length, written)
            elif new is not None:

                @pl.when((head == 0) & (split == 0))
                def _() -> None:
                    ref["new_length"][b] = length
                    ref["new_written"][b] = written

            if interpret is not None:  # which wants every completed phase of a barrier observed

                def drain(i: Any, _: Any) -> Any:
                    plgpu.barrier_wait(k_free.at[lax.rem(i, jnp.int32(stages))])
                    plgpu.barrier_wait(v_free.at[lax.rem(i, jnp.int32(stages))])
                    return ()

                lax.fori_loop(jnp.maximum(steps - stages, 0), steps, drain, ())

    scratch = {
        "q_smem": _two_forms((depth // columns, parts * width, columns), dtype, interpret),
        "k_smem": _two_forms((stages, depth // columns, block, columns), dtype, interpret),
        "v_smem": _two_forms((stages, value_depth // columns, block, columns), dtype, interpret),
        "p_smem": swizzled((parts * width, block), dtype),
        "out_smem": plgpu.SMEM((width, value_depth), out_dtype),
        "lse_smem": plgpu.SMEM((PIECE, width), f32),
        "q_full": plgpu.Barrier(num_arrivals=depth // columns),
        "k_full": plgpu.Barrier(num_arrivals=depth // columns, num_barriers=stages),
        "k_free": plgpu.Barrier(num_barriers=stages),
        "v_full": plgpu.Barrier(num_arrivals=value_depth // columns, num_barriers=stages),
        "v_free": plgpu.Barrier(num_barriers=stages),
    }
    if eight:
        scratch["scales"] = plgpu.SMEM((stages, 3, block), f32)
        scratch["scales_full"] = plgpu.Barrier(num_barriers=stages)
        scratch["q_scale"] = plgpu.SMEM((width,), f32)
    if new is not None:
        scratch["new_k"] = plgpu.SMEM((chunk, depth), dtype)
        scratch["new_v"] = plgpu.SMEM((chunk, value_depth), dtype)
        if quantises:
            scratch |= {f"new_{name}_scale": plgpu.SMEM((chunk,), f32) for name in ("k", "v")}
        else:
            scratch["new_full"] = plgpu.Barrier(num_arrivals=2)
        if interpret is None:
            scratch["counts_read"] = plgpu.Barrier()
    grid: dict[str, Any] = {"grid": (row_tiles, kv_heads, batch), "grid_names": ("rows", "head", "batch")}
    if splits > 1:
        # Stores into another program's shared memory want 8 floats a row: a swizzle of 32 bytes.
        transforms = (plgpu.TilingTransform((8, 8)), plgpu.SwizzleTransform(32))
        senders = splits - 1 if mergers == 1 else splits
        scratch["peer_smem"] = plgpu.SMEM((senders, value_depth + 2 * PIECE, merged), f32, transforms=transforms)
        scratch["peer_full"] = plgpu.Barrier(num_arrivals=(value_depth // PIECE + 2) * senders)
        grid |= {"cluster": (splits,), "cluster_names": ("split",)}
    else:
        grid = {"grid": (1, *grid["grid"]), "grid_names": ("split", *grid["grid_names"])}
    out, lse, *counters = plgpu.kernel(
        kernel,
        out_type=list(results.values()),
        num_threads=2,
        thread_name="role",
        scratch_types=scratch,
        # Warpgroup semantics finds no layouts for these products (jax 0.11.2). What a warp rewrites in shared memory
        # other warps have read: the maximum over keys and `commit_smem` hold barriers.
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=1024,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        **grid,
        **({} if interpret is None else {"interpret": interpret}),
    )(*operands.values())
    lse = lse.reshape(batch, kv_heads, -1)[:, :, :packed].reshape(batch, kv_heads, chunk, group)
    lse = jnp.moveaxis(lse, 2, 3).reshape(batch, problem.heads, chunk)
    out = out[:, : problem.value_dim]
    if not direct:
        out = out.reshape(batch, kv_heads, stride, -1)[:, :, :packed]
        out = jnp.moveaxis(out.reshape(batch, kv_heads, chunk, group, -1), 2, 1)
    if counters:
        rows = rows._replace(length=counters[0], written=counters[1])
    return out.reshape(batch, chunk, problem.heads, problem.value_dim), lse, rows


def _store(ref: Any, value: Any) -> None:
    """To shared memory that is not tiled, with conflicts of banks: it is little, and only once."""
    if hasattr(plgpu, "store"):  # jax >= 0.12, which refuses conflicts elsewhere
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def _two_forms(shape: tuple[int, ...], dtype: Any, interpret: Any) -> Any:
    """Shared memory for tiles of [slots, 64]: as rows, of which a load takes any, and as WGMMA's tiles.

    Both are the same bytes: 8 rows of 128 bytes are one of WGMMA's tiles. But a load into tiles would want the ring's
    capacity to be a multiple of 8.
    """
    if interpret is not None:
        return plgpu.SMEM(shape, dtype)
    return plgpu.RefUnion(plgpu.SMEM(shape, dtype, transforms=(plgpu.SwizzleTransform(128),)), swizzled(shape, dtype))
