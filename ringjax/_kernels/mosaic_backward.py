"""Attention backward on Hopper in Pallas Mosaic GPU: two deterministic kernels, or a faster one that is not.

With x the logits, p = exp(x - lse) and dx = p * (g . v - delta), the cotangents are dv = p^T g, dk = scale dx^T q and
dq = scale dx k (FlashAttention-2, Dao, 2023). Two kernels make seven products a tile, and two runs agree bit for bit.
One kernel needs five, and adds its share of dq to float32 in global memory by TMA reduction, in an order that varies
from run to run.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from ringjax._kernels import mosaic_backward_fused, mosaic_backward_split
from ringjax._kernels.mosaic_backward_tile import Call
from ringjax._kernels.mosaic_tile import LOG2E, pad_axis, rounded_up
from ringjax._kernels.problem import Problem, Rows, without_padding
from ringjax._kernels.tiles import MosaicBackwardTiles, mosaic_backward_tiles


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
        problem.tiles,
        head_dim=q.shape[-1],
        window=problem.window,
        group=problem.group,
        deterministic=problem.deterministic,
    )
    if problem.deterministic:
        sizes = sizes._replace(fused=False)
    if not sizes.fused:  # which knows how to do without these copies
        q, g, k, v = without_padding(rows, [q, g], [k, v])
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
    call = Call(problem, rows, operands, sizes, interpret)
    dq, dk, dv = (mosaic_backward_fused if sizes.fused else mosaic_backward_split).dq_dk_dv(call)
    return dq[:, :queries], dk[:, :keys], dv[:, :keys]
