"""Attention in plain XLA: tiled, skipping, for every device. The reference that the kernels are held to.

Work is O(T (W + tile)) and temporaries are O(T): no array of T x S ever exists, forward or backward. For each tile of
queries, blocks of keys between the first and the last visible one go through an online softmax (Milakov and
Gimelshein, 2018; FlashAttention, Dao et al., 2022). The keys' storage is cut in two: where the pinned sinks are, and
the rest. Inside this file queries are [B, K, G, T, H], keys and values [B, K, S, H].
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from ringjax._kernels.problem import Problem, Rows, key_positions, query_positions
from ringjax._kernels.tiles import XlaTiles, xla_tiles
from ringjax._schedule import key_tiles

name = "xla"

_FAR = 2**30  # farther than any key, near enough for int32 arithmetic
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
    if span is not None and not problem.is_ring:
        reach = min(reach, sizes.tile_size + span - 1)
    return _Plan(problem, rows, sizes, sinks, max(1, -(-reach // sizes.block_size)))


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
    return jnp.float32 if problem.platform == "cpu" else jnp.result_type(problem.q_dtype, problem.kv_dtype)


def _product(subscripts: str, a: Array, b: Array) -> Array:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return jnp.einsum(subscripts, a, b, precision=precision, preferred_element_type=jnp.float32)


class _Block(NamedTuple):
    """One block of keys as one query tile sees it."""

    start: Any
    k: Array
    v: Array
    mask: Array  # [B or 1, 1, 1, t, s]
    seen: Array  # [B or 1, 1, 1, t]: queries that see anything in the block


def _block(
    plan: _Plan, k: Array, v: Array, query_tile: Any, nominal: Any, size: int, low: Any, *, pinned: bool = False
) -> _Block:
    """The block of `size` keys at storage index `nominal`, moved left if it overhangs; indices under `low` are masked.

    `pinned`: the block of the sinks. Slots that hold nothing are set to zero, whatever is in them: 0 * NaN is NaN.
    """
    problem, rows = plan.problem, plan.rows
    dtype = _compute_dtype(problem)
    start = jnp.minimum(nominal, problem.keys - size)
    slots = start + jnp.arange(size, dtype=jnp.int32)
    queries = query_tile * plan.sizes.tile_size + jnp.arange(plan.sizes.tile_size, dtype=jnp.int32)
    real = (queries < problem.queries)[None]
    if rows.q_length is not None:
        real = real & (queries[None] < rows.q_length[:, None])
    at = query_positions(problem, rows, queries)
    if problem.is_ring or pinned:
        keys_at = key_positions(problem, rows, slots)
        mask = problem.window.visible(at[:, :, None], keys_at[:, None, :])
        mask = mask & real[:, :, None] & (slots >= low)[None, None]
    else:
        # Past the sinks a query sees a run of indices: two comparisons a pair, where `visible` takes six.
        at = at if rows.kv_start is None else at - rows.kv_start[:, None]
        first, last = jnp.asarray(low)[None, None], jnp.int32(problem.keys - 1)[None, None]
        if problem.window.left is not None:
            first = jnp.maximum(first, at - min(problem.window.left, _FAR))
        if problem.window.right is not None:
            last = jnp.minimum(last, at + min(problem.window.right, _FAR))
        last = jnp.where(real, last, -1)
        mask = (slots[None, None] >= first[:, :, None]) & (slots[None, None] <= last[:, :, None])
        seen = jnp.minimum(last, slots[-1:][None]) >= jnp.maximum(first, slots[:1][None])
    if rows.q_segments is not None and rows.kv_segments is not None:
        overhang = -problem.queries % plan.sizes.tile_size
        q_segments = jnp.pad(rows.q_segments, ((0, 0), (0, overhang)), constant_values=-1)
        q_segments = lax.dynamic_slice_in_dim(
            q_segments, query_tile * plan.sizes.tile_size, plan.sizes.tile_size, axis=1
        )
        kv_segments = lax.dynamic_slice_in_dim(rows.kv_segments, start, size, axis=1)
        mask = mask & (q_segments[:, :, None] == kv_segments[:, None, :]) & (kv_segments >= 0)[:, None, :]
    if problem.is_ring or pinned or problem.segments:
        seen = mask.any(-1)
    k = lax.dynamic_slice_in_dim(k, start, size, axis=2).astype(dtype)
    v = lax.dynamic_slice_in_dim(v, start, size, axis=2).astype(dtype)
    if problem.is_ring:
        held = (keys_at >= 0)[:, None, :, None]
        k, v = jnp.where(held, k, 0), jnp.where(held, v, 0)
    return _Block(start, k, v, mask[:, None, None], seen[:, None, None])


def _logits(problem: Problem, q: Array, block: _Block) -> tuple[Array, Array | None]:
    """Scaled, capped, masked logits, and the derivative of the cap."""
    logits = _product("bkgth,bksh->bkgts", q, block.k)
    slope = None
    if problem.softcap is not None:
        capped = jnp.tanh(logits / problem.softcap)
        logits, slope = problem.softcap * capped, 1.0 - capped * capped
    return jnp.where(block.mask, logits, _MASKED), slope


def _visit(plan: _Plan, query_tile: Any, k: Array, v: Array, visit: Callable[[_Block, Any], Any], carry: Any) -> Any:
    """Calls `carry = visit(block, carry)` on each block that a query tile needs: sinks first, then the window."""
    if plan.sinks:
        carry = visit(_block(plan, k, v, query_tile, 0, plan.sinks, 0, pinned=True), carry)
        if plan.sinks == plan.problem.keys:
            return carry
    first, end = _key_range(plan, query_tile)
    size = plan.sizes.block_size

    def step(i: Any, carry: Any) -> Any:
        low = first + i * size
        return visit(_block(plan, k, v, query_tile, low, size, low), carry)

    if plan.blocks == 1:
        return step(0, carry)
    return lax.fori_loop(0, (end - first + size - 1) // size, step, carry)


def _skips(plan: _Plan) -> bool:
    """Whether blocks inside the range may have no visible pair, so that a look before the products pays."""
    return plan.problem.queries > 1 and (plan.problem.is_ring or (plan.problem.segments and plan.blocks > 1))


def _over_query_tiles(plan: _Plan, f: Callable[[Any, Any, Any], Any], carry: Any, per_tile: Any) -> Any:
    """Scans `carry, out = f(query_tile, carry, arrays)` over tiles of the T axis (the fourth) of each array."""
    queries, tile = plan.problem.queries, plan.sizes.tile_size
    count = -(-queries // tile)

    def cut(x: Array) -> Array:
        x = jnp.pad(x, [(0, count * tile - queries) if axis == 3 else (0, 0) for axis in range(x.ndim)])
        return jnp.moveaxis(x.reshape(*x.shape[:3], count, tile, *x.shape[4:]), 3, 0)

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 3)
        return x.reshape(*x.shape[:3], count * tile, *x.shape[5:])[:, :, :, :queries]

    tiles = jnp.arange(count, dtype=jnp.int32)
    carry, out = lax.scan(lambda c, x: f(x[0], c, x[1]), carry, (tiles, jax.tree.map(cut, per_tile)))
    return carry, jax.tree.map(join, out)


def _forward(problem: Problem, rows: Rows, q: Array, k: Array, v: Array, sinks: Array | None) -> tuple[Array, Array]:
    """Output in float32 and lse of queries [B, K, G, T, H]; sink logits are [B or 1, K, G]."""
    plan = _plan(problem, rows)
    batch, kv_heads, group = q.shape[:3]

    def tile(query_tile: Any, _: None, q: Array) -> tuple[None, tuple[Array, Array]]:
        q = (q.astype(jnp.float32) * problem.scale).astype(_compute_dtype(problem))

        def attend(block: _Block, carry: Any) -> Any:
            # A softmax of the block alone, then a merge of few numbers: XLA's CPU backend fuses a plain maximum,
            # difference and exponential into one vectorised pass, but not with a running maximum in between.
            logits, _ = _logits(problem, q, block)
            largest = logits.max(-1, keepdims=True)
            weights = jnp.exp(logits - largest)
            largest = largest[..., 0]
            normaliser = weights.sum(-1)
            total = _product("bkgts,bksh->bkgth", weights.astype(block.v.dtype), block.v)
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

        shape = (batch, kv_heads, group, plan.sizes.tile_size)
        carry = None
        if _skips(plan) or (plan.blocks > 1 and not plan.sinks):
            carry = (
                jnp.zeros((*shape, v.shape[-1]), jnp.float32),
                jnp.full(shape, _MASKED, jnp.float32),
                jnp.zeros(shape, jnp.float32),
                jnp.zeros(shape, bool),
            )
        total, largest, normaliser, seen = _visit(plan, query_tile, k, v, visit, carry)
        # Whether a query saw a key is not read off `largest`: that, too, would break up the fused pass.
        lse = jnp.where(seen, largest + jnp.log(normaliser), -jnp.inf)
        if sinks is not None:
            normaliser = normaliser + jnp.exp(sinks[..., None] - largest)
        out = jnp.where(seen[..., None], total / normaliser[..., None], 0.0)
        return None, (out, lse)

    if problem.queries == plan.sizes.tile_size:
        return tile(jnp.int32(0), None, q)[1]
    return _over_query_tiles(plan, tile, None, q)[1]


def _backward(
    problem: Problem, rows: Rows, q: Array, k: Array, v: Array, g: Array, lse: Array, delta: Array
) -> tuple[Array, Array, Array]:
    """Cotangents of q, k, v in float32, by five matrix products a tile (FlashAttention-2, Dao, 2023)."""
    plan = _plan(problem, rows)
    dtype = _compute_dtype(problem)

    def tile(query_tile: Any, carry: Any, arrays: Any) -> Any:
        q, g, lse, delta = arrays
        scaled = (q.astype(jnp.float32) * problem.scale).astype(dtype)
        g = g.astype(dtype)
        lse = jnp.where(lse == -jnp.inf, 0.0, lse)

        def gradients(block: _Block) -> tuple[Array, Array, Array]:
            logits, slope = _logits(problem, scaled, block)
            weights = jnp.exp(logits - lse[..., None])
            d_logits = weights * (_product("bkgth,bksh->bkgts", g, block.v) - delta[..., None])
            if slope is not None:
                d_logits = d_logits * slope
            weights, d_logits = weights.astype(dtype), d_logits.astype(dtype)
            return (
                _product("bkgts,bksh->bkgth", d_logits, block.k),
                _product("bkgts,bkgth->bksh", d_logits, scaled),
                _product("bkgts,bkgth->bksh", weights, g),
            )

        def visit(block: _Block, carry: Any) -> Any:
            dq, dk, dv = carry
            if _skips(plan):
                # Only the block's own gradients go through the branch: a whole dk or dv there would be copied.
                nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradients, block))
                dq_, dk_, dv_ = lax.cond(block.mask.any(), gradients, lambda _: nothing, block)
            else:
                dq_, dk_, dv_ = gradients(block)
            return dq + dq_, _add_at(dk, dk_, block.start), _add_at(dv, dv_, block.start)

        dq = jnp.zeros(q.shape, jnp.float32)
        dq, *carry = _visit(plan, query_tile, k, v, visit, (dq, *carry))
        return tuple(carry), dq * problem.scale

    carry = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    (dk, dv), dq = _over_query_tiles(plan, tile, carry, (q, g, lse, delta))
    return dq, dk, dv


def _add_at(total: Array, part: Array, start: Any) -> Array:
    old = lax.dynamic_slice_in_dim(total, start, part.shape[2], axis=2)
    return lax.dynamic_update_slice_in_dim(total, old + part, start, axis=2)


def _heads(problem: Problem, x: Array) -> Array:
    """[B, T, N, ...] to [B, K, G, T, ...]."""
    x = jnp.moveaxis(x, 1, 2)
    return x.reshape(x.shape[0], problem.kv_heads, problem.group, *x.shape[2:])


def _ungrouped(x: Array) -> Array:
    """[B, K, G, T, ...] to [B, T, N, ...]."""
    x = x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])
    return jnp.moveaxis(x, 2, 1)


def _head_by_head(problem: Problem) -> bool:
    # On a CPU one head's tile fills the cache and both cores; all heads at once only spill it. A few rows don't.
    return problem.platform == "cpu" and problem.queries * problem.group >= 64


def _map_heads(problem: Problem, f: Callable[..., Any], rows: Rows, grouped: Any, per_kv_head: Any) -> Any:
    """Calls `f(rows, grouped, per_kv_head)` for each row and each tile of the heads of a kv head, in turn.

    `grouped` are arrays [B, K, G, ...], `per_kv_head` [B, K, ...]; `f` gets them with B = K = 1 and G = the head tile.
    Each output comes back as [B, K, G / head tile, ...], its own leading axes of B = K = 1 taken away.
    """
    tile = _plan(problem, rows).sizes.head_tile_size
    cuts = problem.group // tile

    def one_tile(index: Array) -> Any:
        b, k, c = index // (problem.kv_heads * cuts), index // cuts % problem.kv_heads, index % cuts

        def pick(x: Array, *at: Any) -> Array:
            sizes = (1, 1, tile) if len(at) == 3 else (1, 1) if len(at) == 2 else (1,)
            starts = (*at, *[jnp.int32(0)] * (x.ndim - len(at)))
            return lax.dynamic_slice(x, starts, (*sizes, *x.shape[len(at) :]))

        return f(
            jax.tree.map(lambda x: pick(x, b), rows),
            jax.tree.map(lambda x: pick(x, b, k, c * tile), grouped),
            jax.tree.map(lambda x: pick(x, b, k), per_kv_head),
        )

    out = lax.map(one_tile, jnp.arange(problem.batch * problem.kv_heads * cuts, dtype=jnp.int32))
    return jax.tree.map(lambda x: x.reshape(problem.batch, problem.kv_heads, cuts, *x.shape[3:]), out)


def forward(
    problem: Problem, rows: Rows, q: Array, k: Array, v: Array, sink_logits: Array | None
) -> tuple[Array, Array]:
    """Output [B, T, N, value_dim] in `out_dtype` and lse [B, N, T] in float32."""
    heads = _heads(problem, q)
    k, v = (k, v) if problem.is_ring else (jnp.moveaxis(k, 2, 1), jnp.moveaxis(v, 2, 1))
    sinks = None
    if sink_logits is not None:
        sinks = sink_logits.astype(jnp.float32).reshape(1, problem.kv_heads, problem.group)
        sinks = jnp.broadcast_to(sinks, heads.shape[:3])
    if _head_by_head(problem):

        def one(rows: Rows, grouped: Any, per_kv_head: Any) -> Any:
            q, sinks = grouped
            k, v = per_kv_head
            out, lse = _forward(problem, rows, q, k, v, sinks)
            return out.astype(problem.out_dtype), lse

        out, lse = _map_heads(problem, one, rows, (heads, sinks), (k, v))
        out, lse = out.reshape(*heads.shape[:4], -1), lse.reshape(heads.shape[:4])
    else:
        out, lse = _forward(problem, rows, heads, k, v, sinks)
    return _ungrouped(out.astype(problem.out_dtype)), lse.reshape(problem.batch, problem.heads, problem.queries)


def backward(
    problem: Problem, rows: Rows, q: Array, k: Array, v: Array, g: Array, lse: Array, delta: Array
) -> tuple[Array, Array, Array]:
    """Cotangents of q, k and v.

    Args:
      problem, rows, q, k, v: as given to `forward`.
      g: [B, T, N, value_dim], cotangent of the output.
      lse: [B, N, T], natural logarithm of the whole denominator, sink logits included.
      delta: [B, N, T], what to subtract from each weight's cotangent (see `_attention.py`).
    """
    heads, g = _heads(problem, q), _heads(problem, g)
    lse, delta = lse.reshape(heads.shape[:4]), delta.reshape(heads.shape[:4])
    k_heads, v_heads = (k, v) if problem.is_ring else (jnp.moveaxis(k, 2, 1), jnp.moveaxis(v, 2, 1))
    if _head_by_head(problem):

        def one(rows: Rows, grouped: Any, per_kv_head: Any) -> Any:
            q, g, lse, delta = grouped
            k, v = per_kv_head
            dq, dk, dv = _backward(problem, rows, q, k, v, g, lse, delta)
            return dq.astype(problem.q_dtype), dk, dv

        dq, dk, dv = _map_heads(problem, one, rows, (heads, g, lse, delta), (k_heads, v_heads))
        dq = dq.reshape(heads.shape)
        # The query heads of a group may have been cut into several tiles, each with its share.
        dk, dv = dk.sum(2), dv.sum(2)
    else:
        dq, dk, dv = _backward(problem, rows, heads, k_heads, v_heads, g, lse, delta)
    if not problem.is_ring:
        dk, dv = jnp.moveaxis(dk, 1, 2), jnp.moveaxis(dv, 1, 2)
    return _ungrouped(dq.astype(q.dtype)), dk.astype(k.dtype), dv.astype(v.dtype)
