"""Attention in plain XLA: tiled, skipping, for every device. The reference that the kernels are held to.

Work is O(T (W + tile)) and temporaries are O(T): no array of T x S ever exists, forward or backward. For each tile of
queries, blocks of keys between the first and the last visible one go through an online softmax (Milakov and
Gimelshein, 2018; FlashAttention, Dao et al., 2022). The keys' storage is cut in two: where the pinned sinks are, and
the rest. Inside a tile queries are [B, K, G, t, H], keys and values [B, K, s, H].
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from ringjax._kernels.problem import Problem, Rows, Walk, key_positions, query_positions
from ringjax._kernels.tiles import MANY_ROWS, Tiles, XlaTiles, xla_tiles
from ringjax._schedule import ahead, behind, key_tiles

name = "xla"

_MASKED = -1e30  # finite, so that the difference of two masked logits is 0 and not NaN


def unsupported(problem: Problem) -> list[str]:
    """Reasons why this implementation cannot run the problem: there are none."""
    return []


class _Plan(NamedTuple):
    problem: Problem
    rows: Rows
    sizes: XlaTiles
    sinks: int  # storage indices [0, sinks) are visited on their own
    blocks: int  # the most blocks that one query tile can need


def _plan(problem: Problem, rows: Rows) -> _Plan:
    window = problem.window
    span = None if window.left is None or window.right is None else window.left + window.right + 1
    sizes = xla_tiles(
        problem.tiles,
        queries=problem.queries,
        keys=problem.keys,
        group=problem.group,
        span=span,
        ring=problem.is_ring,
    )
    sinks = min(window.sinks, problem.keys) if window.left is not None else 0
    reach = problem.keys - sinks
    # Rows at positions of their own, taken together, may need blocks that are far apart.
    apart = problem.q_offset is None and not _head_by_head(problem)
    if span is not None and not problem.is_ring and not apart:
        reach = min(reach, sizes.tile_size + span - 1)
    return _Plan(problem, rows, sizes, sinks, max(1, -(-reach // sizes.block_size)))


def walk(problem: Problem) -> Walk:
    """Which pairs are computed."""
    plan = _plan(problem, Rows())
    return Walk(
        Tiles(plan.sizes.block_size, plan.sizes.tile_size, plan.sizes.head_tile_size),
        sinks=plan.sinks,
        blocks=plan.blocks,
        rows_apart=_head_by_head(problem),
        skips=_skips(plan),
        one_pass=partial(_dense, problem) if _reads_whole(plan) else None,
    )


def _key_range(plan: _Plan, query_tile: Any) -> tuple[Any, Any]:
    """First and end of the storage indices, past the sinks, that any row of a query tile needs."""
    problem, rows = plan.problem, plan.rows
    if problem.is_ring:
        assert rows.length is not None and rows.written is not None
        filled = jnp.where(rows.written > problem.keys, problem.keys, rows.length)
        filled = jnp.where(rows.written - rows.length > problem.slack, 0, filled)
        return plan.sinks, filled.max()
    offset: Any = problem.q_offset
    if rows.q_start is not None:
        offset = rows.q_start if rows.kv_start is None else rows.q_start - rows.kv_start
    tiles = key_tiles(
        dataclasses.replace(problem.window, sinks=0),
        query_tile,
        tile_size=plan.sizes.tile_size,
        block_size=1,
        queries=problem.queries,
        keys=problem.keys,
        q_offset=offset,
    )
    first, end = jnp.maximum(tiles.first, plan.sinks), jnp.asarray(tiles.end)
    return first.min(), end.max()


def _compute_dtype(problem: Problem) -> Any:
    # CPUs have no fast product of 16-bit numbers; elsewhere the products take them as they are.
    if problem.platform == "cpu":
        return jnp.float32
    # Every 8-bit number is one of 16 bits too.
    return jnp.result_type(problem.q_dtype, problem.q_dtype if problem.quantised else problem.kv_dtype)


def _product(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """Batched product of [B, K, ..., i, j] by contraction of the axes -2 or -1 of each, in float32.

    One batch axis, one row axis, one contracted axis: with more, XLA's CPU backend writes out a transposed copy.
    """

    def flat(x: Array) -> Array:
        batch, kv_heads, *rows, last = x.shape
        return x.reshape(batch * kv_heads, math.prod(rows), last)

    dimensions = (((contract[0] % 3,), (contract[1] % 3,)), ((0,), (0,)))
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(flat(a), flat(b), dimensions, precision=precision, preferred_element_type=jnp.float32)


class _Tile(NamedTuple):
    """One step of the outer loop."""

    query_tile: Any
    head: tuple[Any, Any] | None  # the row and kv head that it is about; None: all of them


class _Block(NamedTuple):
    """One block of keys as one query tile sees it."""

    start: Any
    k: Array
    v: Array
    mask: Array  # [B or 1, 1, 1, t, s]
    seen: Array  # [B or 1, 1, 1, t]: queries that see anything in the block
    k_scale: Array | None = None  # [B, K, 1, 1, s]: factors of the logits
    v_scale: Array | None = None  # [B, K, 1, 1, s]: factors of the weights


def _cut(plan: _Plan, x: Array, tile: _Tile, start: Any, size: int) -> Array:
    """`size` keys of all heads, or of the tile's own, from a storage index on, as [B, K, size, H]."""
    if tile.head is None:
        return x if size == x.shape[2] else lax.dynamic_slice_in_dim(x, start, size, axis=2)
    row, head = tile.head
    if plan.problem.is_ring:
        return lax.dynamic_slice(x, (row, head, start, jnp.int32(0)), (1, 1, size, x.shape[3]))
    x = lax.dynamic_slice(x, (row, start, head, jnp.int32(0)), (1, size, 1, x.shape[3]))
    return x.reshape(1, 1, size, x.shape[3])


def _add(plan: _Plan, total: Array, part: Array, tile: _Tile, start: Any) -> Array:
    """`total` with `part` added where `_cut` would take it from."""
    part = part + _cut(plan, total, tile, start, part.shape[2])
    if tile.head is None:
        return lax.dynamic_update_slice_in_dim(total, part, start, axis=2)
    row, head = tile.head
    if plan.problem.is_ring:
        return lax.dynamic_update_slice(total, part, (row, head, start, jnp.int32(0)))
    part = part.reshape(1, part.shape[2], 1, part.shape[3])
    return lax.dynamic_update_slice(total, part, (row, start, head, jnp.int32(0)))


def _block(
    plan: _Plan,
    tile: _Tile,
    k: Array,
    v: Array,
    nominal: Any,
    size: int,
    low: Any,
    *,
    pinned: bool = False,
    clean: bool = True,
) -> _Block:
    """The block of `size` keys at storage index `nominal`, moved left if it overhangs; indices under `low` are masked.

    `pinned`: the block has the sinks. `clean`: slots of a ring that hold nothing are set to zero, whatever is in them,
    since 0 * NaN is NaN.
    """
    problem, rows = plan.problem, plan.rows
    dtype = _compute_dtype(problem)
    start = jnp.minimum(nominal, problem.keys - size)
    slots = start + jnp.arange(size, dtype=jnp.int32)
    queries = tile.query_tile * plan.sizes.tile_size + jnp.arange(plan.sizes.tile_size, dtype=jnp.int32)
    real = (queries < problem.queries)[None]
    if rows.q_length is not None:
        real = real & (queries[None] < rows.q_length[:, None])
    at = query_positions(problem, rows, queries)
    if problem.is_ring or pinned:
        keys_at = key_positions(problem, rows, slots)
        mask = problem.window.visible(at[:, :, None], keys_at[:, None, :])
        mask = mask & real[:, :, None] & (slots >= low)[None, None]
    else:
        # Past the sinks a query sees a run of indices: one comparison a pair, where `visible` takes six.
        at = at if rows.kv_start is None else at - rows.kv_start[:, None]
        first, last = jnp.asarray(low)[None, None], jnp.int32(problem.keys - 1)[None, None]
        if problem.window.left is not None:
            first = jnp.maximum(first, behind(at, problem.window.left, -1))
        if problem.window.right is not None:
            last = jnp.minimum(last, ahead(at, problem.window.right, problem.keys - 1))
        last = jnp.where(real, last, -1)
        # Unsigned, an index before the run is far behind its end.
        count = jnp.maximum(last - first + 1, 0).astype(jnp.uint32)
        mask = (slots[None, None] - first[:, :, None]).astype(jnp.uint32) < count[:, :, None]
        seen = jnp.minimum(last, slots[-1:][None]) >= jnp.maximum(first, slots[:1][None])
    if rows.q_segments is not None and rows.kv_segments is not None:
        overhang = -problem.queries % plan.sizes.tile_size
        q_segments = jnp.pad(rows.q_segments, ((0, 0), (0, overhang)), constant_values=-1)
        first = tile.query_tile * plan.sizes.tile_size
        q_segments = lax.dynamic_slice_in_dim(q_segments, first, plan.sizes.tile_size, axis=1)
        kv_segments = lax.dynamic_slice_in_dim(rows.kv_segments, start, size, axis=1)
        mask = mask & (q_segments[:, :, None] == kv_segments[:, None, :]) & (kv_segments >= 0)[:, None, :]
    if problem.is_ring or pinned or problem.segments:
        seen = mask.any(-1)
    k, v = _cut(plan, k, tile, start, size).astype(dtype), _cut(plan, v, tile, start, size).astype(dtype)
    if problem.is_ring and clean:
        read = mask.any(1)[:, None, :, None]
        k, v = jnp.where(read, k, 0), jnp.where(read, v, 0)
    scales = [None if x is None else _cut_scale(x, tile, mask, start, size) for x in (rows.k_scale, rows.v_scale)]
    return _Block(start, k, v, mask[:, None, None], seen[:, None, None], *scales)


def _cut_scale(scale: Array, tile: _Tile, mask: Array, start: Any, size: int) -> Array:
    """Of a scale [B, K, C], the block's part as [B, K, 1, 1, size]; 0 where no query sees the key."""
    if tile.head is None:
        scale = lax.dynamic_slice_in_dim(scale, start, size, axis=2)
    else:  # of the row alone already
        scale = lax.dynamic_slice(scale, (jnp.int32(0), tile.head[1], start), (1, 1, size))
    return jnp.where(mask.any(1)[:, None], scale, 0.0)[:, :, None, None]


def _logits(problem: Problem, q: Array, block: _Block) -> tuple[Array, Array | None]:
    """Scaled, capped, masked logits, and the derivative of the cap."""
    logits = _product(q, block.k, (-1, -1)).reshape(*q.shape[:4], -1)
    if block.k_scale is not None:
        logits = logits * block.k_scale
    slope = None
    if problem.softcap is not None:
        capped = jnp.tanh(logits / problem.softcap)
        logits, slope = problem.softcap * capped, 1.0 - capped * capped
    return jnp.where(block.mask, logits, _MASKED), slope


def _visit(plan: _Plan, tile: _Tile, k: Array, v: Array, visit: Callable[[_Block, Any], Any], carry: Any) -> Any:
    """Calls `carry = visit(block, carry)` on each block that a tile needs: sinks first, then the window."""
    if plan.sinks:
        carry = visit(_block(plan, tile, k, v, 0, plan.sinks, 0, pinned=True), carry)
        if plan.sinks == plan.problem.keys:
            return carry
    first, end = _key_range(plan, tile.query_tile)
    size = plan.sizes.block_size

    def step(i: Any, carry: Any) -> Any:
        low = first + i * size
        return visit(_block(plan, tile, k, v, low, size, low), carry)

    if plan.blocks == 1:
        return step(0, carry)
    return lax.fori_loop(0, (end - first + size - 1) // size, step, carry)


def _skips(plan: _Plan) -> bool:
    """Whether blocks inside the range may have no visible pair, so that a look before the products pays."""
    return plan.problem.queries > 1 and (plan.problem.is_ring or (plan.problem.segments and plan.blocks > 1))


def _reads_whole(plan: _Plan) -> bool:
    """Whether a ring may be read in one pass: few queries, and no copy of it in another dtype."""
    problem = plan.problem
    as_it_is = jnp.dtype(problem.kv_dtype) == _compute_dtype(problem)
    return problem.is_ring and as_it_is and problem.queries * problem.group < MANY_ROWS


def _dense(problem: Problem, filled: Any) -> Any:
    """Whether a ring with `filled` slots in use is read in one pass: a small one always."""
    return filled > 0 if problem.keys <= 512 else 2 * filled >= problem.keys


def _whole_or_blocks(plan: _Plan, whole: Callable[[], Any], blocks: Callable[[], Any]) -> Any:
    """Reads a ring that is half full in one pass, without a copy of any part of it; else, block by block.

    The pass may meet NaN or infinity in slots that hold nothing, and then shows NaN; the blocks, which are cleaned,
    say whether a query really saw one. A cut or cleaned block is a copy, so they are small.
    """
    _, end = _key_range(plan, 0)
    shapes = jax.eval_shape(whole)

    def now() -> Any:
        found = whole()
        return jnp.isnan(found[0]).any(), found

    def later() -> Any:
        return jnp.bool_(True), jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    # Under a branch, so that XLA does not fuse the ring's update into the product, which would read a copy of it.
    again, found = lax.cond(_dense(plan.problem, end), now, later)
    return lax.cond(again, blocks, lambda: found)


def _head_by_head(problem: Problem) -> bool:
    # On a CPU one head's tile fills the cache and both cores; all heads at once only spill it. A few rows don't.
    return problem.platform == "cpu" and problem.queries * problem.group >= MANY_ROWS


def _over_tiles(
    plan: _Plan, f: Callable[[_Plan, _Tile, Any, Any], Any], carry: Any, per_query: Any, out: Any
) -> tuple[Any, Any]:
    """Runs `carry, part of out = f(plan, tile, carry, arrays)` on each tile of arrays [B, T, N, H] and [B, N, T].

    A tile holds some queries of all heads; or, head by head, of a few query heads of one kv head, with B = K = 1. `f`
    gets and returns [B, K, G, t, H] and [B, K, G, t], cut from the arrays in the loop: a transposed copy of a whole
    array costs as much as a tenth of the attention.
    """
    problem, size = plan.problem, plan.sizes.tile_size
    count = -(-problem.queries // size)
    apart = _head_by_head(problem)
    heads = plan.sizes.head_tile_size if apart else problem.group
    kv_heads, batch = (1, 1) if apart else (problem.kv_heads, problem.batch)
    wide = (batch, kv_heads, heads)  # of a tile

    def cut(x: Array, row: Any, head: Any, first: Any) -> Array:
        rest = x.shape[3:]
        at = (row, first, head, jnp.int32(0)) if rest else (row, head, first)
        shape = (batch, size, kv_heads * heads, *rest) if rest else (batch, kv_heads * heads, size)
        x = x if x.shape == shape else lax.dynamic_slice(x, at, shape)
        return (jnp.moveaxis(x, 1, 2) if rest else x).reshape(*wide, size, *rest)

    def put(x: Array, part: Array, row: Any, head: Any, first: Any) -> Array:
        rest = x.shape[3:]
        part = part.reshape(batch, kv_heads * heads, size, *rest)
        part = jnp.moveaxis(part, 2, 1) if rest else part
        if part.shape == x.shape:
            return part
        return lax.dynamic_update_slice(x, part, (row, first, head, jnp.int32(0)) if rest else (row, head, first))

    def step(i: Any, carry: Any) -> Any:
        carry, out = carry
        row, head, tile, narrow = jnp.int32(0), jnp.int32(0), _Tile(i, None), plan
        if apart:
            i, tiles = i % count, i // count
            row, head = tiles // (problem.heads // heads), tiles % (problem.heads // heads) * heads
            rows = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, row, 1), plan.rows)
            tile, narrow = _Tile(i, (row, head // problem.group)), plan._replace(rows=rows)
        carry, parts = f(narrow, tile, carry, jax.tree.map(lambda x: cut(x, row, head, i * size), per_query))
        return carry, jax.tree.map(lambda x, part: put(x, part, row, head, i * size), out, parts)

    def pad(x: Array) -> Array:
        over = count * size - problem.queries
        return jnp.pad(x, [(0, over if axis == (2 if x.ndim == 3 else 1) else 0) for axis in range(x.ndim)])

    def unpad(x: Array) -> Array:
        return x[:, :, : problem.queries] if x.ndim == 3 else x[:, : problem.queries]

    per_query, out = jax.tree.map(pad, (per_query, out))
    steps = problem.batch * (problem.heads // heads) * count if apart else count
    if steps == 1:
        carry, out = step(jnp.int32(0), (carry, out))
    else:
        carry, out = lax.fori_loop(0, steps, step, (carry, out))
    return carry, jax.tree.map(unpad, out)


def forward(
    problem: Problem, rows: Rows, q: Array, k: Array, v: Array, sink_logits: Array | None
) -> tuple[Array, Array]:
    """Output [B, T, N, value_dim] in `out_dtype` and lse [B, N, T] in float32."""
    plan = _plan(problem, rows)
    k, v = _stored(problem, k), _stored(problem, v)
    sinks = None
    if sink_logits is not None:
        sinks = sink_logits.astype(jnp.float32).reshape(1, problem.heads, 1)
        sinks = jnp.broadcast_to(sinks, (problem.batch, problem.heads, problem.queries))

    def tile(plan: _Plan, tile: _Tile, _: None, arrays: Any) -> tuple[None, tuple[Array, Array]]:
        q, sinks = arrays
        q = (q.astype(jnp.float32) * problem.scale).astype(_compute_dtype(problem))
        total, largest, normaliser, seen = _attend(plan, tile, q, k, v)
        # Whether a query saw a key is not read off `largest`: that would break up the fused pass that makes it.
        lse = jnp.where(seen, largest + jnp.log(normaliser), -jnp.inf)
        if sinks is not None:
            normaliser = normaliser + jnp.exp(sinks - largest)
        # No 0 / 0, even where it would not be taken: `jax_debug_nans` stops at it.
        out = jnp.where(seen[..., None], total / jnp.where(seen, normaliser, 1.0)[..., None], 0.0)
        return None, (out.astype(problem.out_dtype), lse)

    out = jnp.zeros((*q.shape[:3], problem.value_dim), problem.out_dtype)
    lse = jnp.zeros((problem.batch, problem.heads, problem.queries), jnp.float32)
    return _over_tiles(plan, tile, None, (q, sinks), (out, lse))[1]


def _attend(plan: _Plan, tile: _Tile, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array, Array]:
    """The weighted sum of values, the largest logit, the sum of weights, and whether anything was seen."""

    def attend(block: _Block, carry: Any) -> Any:
        # A softmax of the block alone, then a merge of few numbers: XLA's CPU backend fuses a plain maximum,
        # difference and exponential into one vectorised pass, but not with a running maximum in between.
        logits, _ = _logits(plan.problem, q, block)
        largest = logits.max(-1, keepdims=True)
        weights = jnp.exp(logits - largest)
        largest = largest[..., 0]
        normaliser = weights.sum(-1)
        if block.v_scale is not None:
            weights = weights * block.v_scale
        total = _product(weights.astype(block.v.dtype), block.v, (-1, -2)).reshape(*largest.shape, -1)
        seen = jnp.broadcast_to(block.seen, largest.shape)
        if carry is None:
            return total, largest, normaliser, seen
        old_total, old_largest, old_normaliser, old_seen = carry
        both = jnp.maximum(old_largest, largest)
        old_share, share = jnp.exp(old_largest - both), jnp.exp(largest - both)
        total = old_total * old_share[..., None] + total * share[..., None]
        return total, both, old_normaliser * old_share + normaliser * share, old_seen | seen

    def visit(block: _Block, carry: Any) -> Any:
        if not _skips(plan):
            return attend(block, carry)
        return lax.cond(block.mask.any(), attend, lambda _, carry: carry, block, carry)

    def whole() -> Any:
        return attend(_block(plan, tile, k, v, 0, plan.problem.keys, 0, pinned=True, clean=False), None)

    def blocks() -> Any:
        carry = None
        if _skips(plan) or (plan.blocks > 1 and not plan.sinks):
            shape = q.shape[:4]
            carry = (
                jnp.zeros((*shape, v.shape[-1]), jnp.float32),
                jnp.full(shape, _MASKED, jnp.float32),
                jnp.zeros(shape, jnp.float32),
                jnp.zeros(shape, bool),
            )
        return _visit(plan, tile, k, v, visit, carry)

    return _whole_or_blocks(plan, whole, blocks) if _reads_whole(plan) else blocks()


def backward(
    problem: Problem, rows: Rows, q: Array, k: Array, v: Array, g: Array, lse: Array, delta: Array
) -> tuple[Array, Array, Array]:
    """Cotangents of q, k and v, by five matrix products a tile (FlashAttention-2, Dao, 2023).

    Args:
      problem, rows, q, k, v: as given to `forward`.
      g: [B, T, N, value_dim], cotangent of the output.
      lse: [B, N, T], natural logarithm of the whole denominator, sink logits included.
      delta: [B, N, T], what to subtract from each weight's cotangent (see `_attention.py`).
    """
    plan, dtype = _plan(problem, rows), _compute_dtype(problem)
    keys, values = _stored(problem, k), _stored(problem, v)

    def tile(plan: _Plan, tile: _Tile, carry: Any, arrays: Any) -> Any:
        q, g, lse, delta = arrays
        scaled = (q.astype(jnp.float32) * problem.scale).astype(dtype)
        g = g.astype(dtype)
        lse = jnp.where(lse == -jnp.inf, 0.0, lse)

        def gradients(block: _Block) -> tuple[Array, Array, Array]:
            logits, slope = _logits(problem, scaled, block)
            weights = jnp.exp(logits - lse[..., None])
            d_logits = weights * (_product(g, block.v, (-1, -1)).reshape(logits.shape) - delta[..., None])
            if slope is not None:
                d_logits = d_logits * slope
            weights, d_logits = weights.astype(dtype), d_logits.astype(dtype)
            return (
                _product(d_logits, block.k, (-1, -2)).reshape(q.shape),
                _product(d_logits, scaled, (-2, -2)).reshape(block.k.shape),
                _product(weights, g, (-2, -2)).reshape(block.v.shape),
            )

        def visit(block: _Block, carry: Any) -> Any:
            dq, dk, dv = carry
            if _skips(plan):
                # Only the block's own gradients go through the branch: a whole dk or dv there would be copied.
                nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradients, block))
                dq_, dk_, dv_ = lax.cond(block.mask.any(), gradients, lambda _: nothing, block)
            else:
                dq_, dk_, dv_ = gradients(block)
            return dq + dq_, _add(plan, dk, dk_, tile, block.start), _add(plan, dv, dv_, tile, block.start)

        dq, *carry = _visit(plan, tile, keys, values, visit, (jnp.zeros(q.shape, jnp.float32), *carry))
        return tuple(carry), (dq * problem.scale).astype(problem.q_dtype)

    carry = (jnp.zeros(keys.shape, jnp.float32), jnp.zeros(values.shape, jnp.float32))
    (dk, dv), dq = _over_tiles(plan, tile, carry, (q, g, lse, delta), jnp.zeros_like(q))
    # `_stored` undoes itself.
    return dq, _stored(problem, dk).astype(k.dtype), _stored(problem, dv).astype(v.dtype)


def _stored(problem: Problem, x: Array) -> Array:
    """Keys or values as the loops cut them: [B, K, S, H], but linear ones [B, S, K, H] head by head."""
    return x if problem.is_ring or _head_by_head(problem) else jnp.moveaxis(x, 2, 1)
