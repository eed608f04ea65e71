"""Sliding-window attention without history (`attention`)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int

from ringjax import _explicit, _inputs
from ringjax._kernels import resolve
from ringjax._kernels.problem import Problem, Rows
from ringjax._kernels.tiles import Tiles, TileSizes
from ringjax._op import op
from ringjax._window import Window


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    window: Window,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    kv_segment_ids: Int[Array, "B S"] | None = None,
    sink_logits: Float[Array, " N"] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    q_offset: int | Int[Array, " B"] | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    config: TileSizes | None = None,
) -> Any:
    """Sliding-window attention without history, differentiable in q, k, v and the sink logits.

    The order is: scale, softcap `c * tanh(x / c)`, mask, sink logits, softmax; logits, softmax and sums in float32.
    A query that sees no key gets output 0, lse -inf and zero gradients. Time is O(T W), memory O(T).

    Args:
      q: queries, float32, bfloat16 or float16. N is a multiple of K: query heads n * N / K ... share kv head n.
      k, v: keys and values of the queries' dtype.
      window: which keys a query sees.
      segment_ids: packed sequences: a query sees keys of its own segment only. A negative segment is padding: it is
        seen by nothing, sees nothing and may hold NaN.
      kv_segment_ids: of the keys; None: `segment_ids`, if T = S.
      sink_logits: a learned logit per query head, in the softmax's denominator only (gpt-oss).
      softcap: bound of the logits (Gemma 2); None: none.
      scale: factor on the logits; None: `H ** -0.5`.
      q_offset: position of query 0, key 0 being at 0: one number or int32 [B]; None: S - T, so that the last query
        is at the last key.
      return_lse: whether to return the logsumexp too.
      implementation: the name of one implementation, which runs or raises; None: the first that can (see `explain`).
      config: tile sizes, such as a `RingBufferConfig`; None: tuned ones.

    Returns:
      Output [B, T, N, Hv] in the queries' dtype; with `return_lse`, also the natural logarithm of the sum of
      exponentials of the scaled, capped, masked logits (without sink logits), float32 [B, N, T], differentiable too.

    Raises:
      ValueError: shapes, dtypes or options that do not fit each other; an unknown implementation.
      TypeError: an argument of the wrong kind.
      NotImplementedError: the named implementation cannot run this call; with its reasons.
    """
    if (mesh := _explicit.mesh_of(q, k, v)) is not None:

        def again(
            q: Array, k: Array, v: Array, segment_ids: Any, kv_segment_ids: Any, sink_logits: Any, q_offset: Any
        ) -> Any:
            ids = {"segment_ids": segment_ids, "kv_segment_ids": kv_segment_ids, "q_offset": q_offset}
            options = {"sink_logits": sink_logits, "softcap": softcap, "scale": scale, "return_lse": return_lse}
            return attention(q, k, v, window, implementation=implementation, config=config, **ids, **options)

        arrays = {"q": (q, "BTNH"), "k": (k, "BSKH"), "v": (v, "BSKH")}
        split_rows, heads = _explicit.rows_and_heads("attention", arrays)
        results = (P(split_rows, None, heads), P(split_rows, heads)) if return_lse else P(split_rows, None, heads)
        return _explicit.run(mesh, results, again, q, k, v, segment_ids, kv_segment_ids, sink_logits, q_offset)
    problem, rows, arrays = _canonical(
        "attention", q, k, v, window, segment_ids, kv_segment_ids, sink_logits, softcap, scale, q_offset, config
    )
    problem = dataclasses.replace(problem, lse=return_lse)
    q, k, v, sink_logits = arrays
    out, lse = op(problem, resolve(problem, "attention", implementation), rows, q, k, v, sink_logits)
    return (out, lse) if return_lse else out


def _canonical(
    call: str,
    q: Any,
    k: Any,
    v: Any,
    window: Any,
    segment_ids: Any,
    kv_segment_ids: Any,
    sink_logits: Any,
    softcap: Any,
    scale: Any,
    q_offset: Any,
    config: Any,
) -> tuple[Problem, Rows, Any]:
    """The static facts, the rows and the arrays of a call without history; raises whatever is wrong with it."""
    _inputs.check_type(call, "window", window, Window, "Window.causal(size) sees the last `size` keys.")
    _inputs.check_qkv(call, q, k, v)
    _inputs.check_sink_logits(call, sink_logits, q)
    q_segments, kv_segments = _inputs.check_segments(call, segment_ids, kv_segment_ids, q, k)
    batch, queries, heads, head_dim = q.shape
    keys = k.shape[1]
    q_start = None
    if q_offset is None:
        q_offset = keys - queries
    elif isinstance(q_offset, int | np.integer) and not isinstance(q_offset, bool):
        q_offset = int(q_offset)
        _inputs.check_int32(call, "q_offset", q_offset)
    else:
        q_start, q_offset = _inputs.as_row_integers(call, "q_offset", q_offset, batch, scalar=True), None
    problem = Problem(
        batch=batch,
        queries=queries,
        keys=keys,
        heads=heads,
        kv_heads=k.shape[2],
        head_dim=head_dim,
        value_dim=v.shape[3],
        q_dtype=str(q.dtype),
        kv_dtype=str(k.dtype),
        out_dtype=str(q.dtype),
        window=window,
        q_offset=q_offset,
        segments=q_segments is not None,
        **_options(call, q, sink_logits, softcap, scale, config),
    )
    arrays = (jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), None if sink_logits is None else jnp.asarray(sink_logits))
    return problem, Rows(q_start=q_start, q_segments=q_segments, kv_segments=kv_segments), arrays


def _options(call: str, q: Any, sink_logits: Any, softcap: Any, scale: Any, config: Any) -> dict[str, Any]:
    platform, device_kind = _device(q)
    return {
        "scale": float(q.shape[3] ** -0.5) if scale is None else _inputs.as_positive(call, "scale", scale),
        "softcap": None if softcap is None else _inputs.as_positive(call, "softcap", softcap),
        "sink_logits": sink_logits is not None,
        "platform": platform,
        "device_kind": device_kind,
        "tiles": _tiles(call, config),
    }


def _device(x: Any) -> tuple[str, str]:
    """Platform and kind of the device a call will run on: an array's own, or the default while tracing."""
    device = jax.devices()[0]
    chosen = getattr(jax.config, "jax_default_device", None)
    if _inputs.is_concrete(x) and isinstance(x, jax.Array):
        device = next(iter(x.devices()))
    elif isinstance(chosen, jax.Device):
        device = chosen
    return device.platform, device.device_kind


def _tiles(call: str, config: Any) -> Tiles:
    if config is None:
        return Tiles()
    sizes = {}
    for field in Tiles._fields:
        if not hasattr(config, field):
            raise TypeError(f"{call}: config must be a RingBufferConfig, got {_inputs.describe(config)}.")
        size = getattr(config, field)
        sizes[field] = None if size is None else _inputs.as_int(call, f"config.{field}", size, least=1)
    return Tiles(**sizes)
