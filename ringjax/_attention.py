"""The one operation: sliding-window attention, without history (`attention`) or with a ring (`attend`)."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int

from ringjax import _explicit, _in_place, _inputs, _partition
from ringjax._buffer import RingBuffer, _as_seen, _check_tokens
from ringjax._kernels import backward_of, resolve
from ringjax._kernels.problem import Problem, Rows
from ringjax._kernels.tiles import Tiles, TileSizes
from ringjax._quantised import dequantise
from ringjax._window import Window


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _op(
    problem: Problem, implementation: str, rows: Rows, q: Array, k: Array, v: Array, sink_logits: Array | None
) -> tuple[Array, Array]:
    """Output and lse; the lse is that of the keys alone, whatever the sink logits."""
    return _partition.forward(problem, implementation, rows, q, k, v, sink_logits)


def _op_forward(
    problem: Problem, implementation: str, rows: Rows, q: Array, k: Array, v: Array, sink_logits: Array | None
) -> tuple[tuple[Array, Array], Any]:
    out, lse = _op(problem, implementation, rows, q, k, v, sink_logits)
    # Named, so that a rematerialisation policy can keep them and run no forward pass twice.
    out, lse = checkpoint_name(out, "ringjax_out"), checkpoint_name(lse, "ringjax_lse")
    return (out, lse), (rows, q, k, v, sink_logits, out, lse)


def _op_backward(problem: Problem, implementation: str, residuals: Any, cotangents: Any) -> Any:
    rows, q, k, v, sink_logits, out, lse = residuals
    g, g_lse = cotangents
    # With x the logits, Z = sum(exp(x)) + exp(sink), p = exp(x) / Z and lse = log(sum(exp(x))):
    #   dx = p * (g . v - delta) + g_lse * exp(x - lse),   delta = g . out,   dsink = -exp(sink) / Z * delta,
    # and the second term of dx is p * g_lse * Z / exp(lse), so that it can be taken off delta.
    delta = jnp.einsum("btnh,btnh->bnt", g, out, preferred_element_type=jnp.float32)
    total, ratio, d_sinks = lse, jnp.ones((), jnp.float32), None
    if sink_logits is not None:
        sinks = sink_logits.astype(jnp.float32)[None, :, None]
        total = jnp.logaddexp(lse, sinks)
        d_sinks = -(jnp.exp(sinks - total) * delta).sum((0, 2)).astype(sink_logits.dtype)
        # exp(88) is near the largest float32; weights so small beside a sink are 0 anyway.
        ratio = jnp.exp(jnp.minimum(total - jnp.where(lse == -jnp.inf, total, lse), 88.0))
    delta = delta - jnp.where(lse == -jnp.inf, 0.0, g_lse) * ratio
    constant = None
    if rows.k_scale is not None and rows.v_scale is not None:  # quantised: a constant, that the queries' gradient reads
        k, v = dequantise(k, rows.k_scale).astype(q.dtype), dequantise(v, rows.v_scale).astype(q.dtype)
        problem, rows = dataclasses.replace(problem, kv_dtype=str(q.dtype)), rows._replace(k_scale=None, v_scale=None)
        constant = None, None
    name = backward_of(problem, implementation)
    dq, *d_kv = _partition.backward(problem, name, rows, q, k, v, g, total, delta)
    return None, dq, *(d_kv if constant is None else constant), d_sinks


_op.defvjp(_op_forward, _op_backward)


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
    q, k, v, sink_logits = arrays
    if rows.q_segments is not None and rows.kv_segments is not None:
        q = _zero_where_padding(q, rows.q_segments >= 0)
        k, v = (_zero_where_padding(x, rows.kv_segments >= 0) for x in (k, v))
    out, lse = _op(problem, resolve(problem, "attention", implementation), rows, q, k, v, sink_logits)
    if rows.q_segments is not None:
        out = _zero_where_padding(out, rows.q_segments >= 0)
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


def _zero_where_padding(x: Array, real: Array) -> Array:
    """x [B, T, ...] with zeros where `real` [B, T] is False, and no gradient there."""
    return jnp.where(real[:, :, *[None] * (x.ndim - 2)], x, jnp.zeros((), x.dtype))


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    buffer: RingBuffer,
    *,
    lengths: Int[Array, " B"] | None = None,
    sink_logits: Float[Array, " N"] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    implementation: str | None = None,
    config: TileSizes | None = None,
) -> tuple[Array, RingBuffer]:
    """Attention of T new tokens to themselves and to what a ring still holds; appends them to the ring.

    The tokens stand at positions `buffer.length + t` of their rows. T = 1 is a decoding step, T > 1 a chunk, of any
    length; any partition of a stream into chunks gives what one call on the whole stream gives. Differentiable in q,
    k, v, the sink logits and the ring; with a quantised ring, in q and the sink logits.

    Args:
      q, k, v: of the new tokens, of one dtype. Keys and values are cast (or quantised) to the ring's dtype before they
        are seen.
      buffer: the ring; its window says which keys a query sees.
      lengths: int32 [B], how many of the T tokens are real. Padding is not written, its output is 0, and it may hold
        NaN. None: all.
      sink_logits, softcap, scale, implementation, config: as for `attention`.

    Returns:
      Output [B, T, N, Hv] in the queries' dtype, and the ring after the new tokens.

    Raises:
      ValueError: shapes, dtypes or options that do not fit each other or the ring; outside jit, lengths not in 0..T.
      TypeError: an argument of the wrong kind.
      NotImplementedError: the named implementation cannot run this call; with its reasons. Or the ring is quantised,
        and a gradient of k or v is asked for.
    """
    out, _, buffer = attend_with_lse(
        "attend", q, k, v, buffer, lengths, sink_logits, softcap, scale, implementation, config
    )
    return out, buffer


def attend_with_lse(
    call: str,
    q: Any,
    k: Any,
    v: Any,
    buffer: Any,
    lengths: Any,
    sink_logits: Any,
    softcap: Any,
    scale: Any,
    implementation: str | None,
    config: Any,
    out_dtype: Any = None,
) -> tuple[Array, Array, RingBuffer]:
    """`attend`, with the lse of the keys seen (without sink logits), and another dtype for the output if wanted."""
    _inputs.check_type(call, "buffer", buffer, RingBuffer)
    if (mesh := _explicit.mesh_of(q, k, v, buffer)) is not None:

        def again(q: Array, k: Array, v: Array, buffer: RingBuffer, lengths: Any, sink_logits: Any) -> Any:
            options = (lengths, sink_logits, softcap, scale, implementation, config, out_dtype)
            return attend_with_lse(call, q, k, v, buffer, *options)

        tokens = {"q": (q, "BTNH"), "k": (k, "BTKH"), "v": (v, "BTKH")}
        split_rows, heads = _explicit.rows_and_heads(call, {**tokens, "buffer.k": (buffer.k, "BKCH")})
        results = (P(split_rows, None, heads), P(split_rows, heads), _explicit.specs(buffer))
        return _explicit.run(mesh, results, again, q, k, v, buffer, lengths, sink_logits)
    _inputs.check_qkv(call, q, k, v)
    texts = {"q": _inputs.describe(q), "k": _inputs.describe(k)}
    _inputs.check_agree(call, "length", {"q": (q.shape[1], texts["q"]), "k": (k.shape[1], texts["k"])})
    _check_tokens(call, buffer, k, v)
    _inputs.check_sink_logits(call, sink_logits, q)
    batch, chunk = q.shape[:2]
    lengths = _inputs.as_row_integers(call, "lengths", lengths, batch)
    _inputs.check_lengths(call, lengths, chunk)
    options = _options(call, q, sink_logits, softcap, scale, config)
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    real = None
    if lengths is not None:
        real = jnp.arange(chunk, dtype=jnp.int32)[None] < lengths[:, None]
        q, k, v = (_zero_where_padding(x, real) for x in (q, k, v))

    out_dtype = jnp.dtype(out_dtype or q.dtype).name
    if chunk <= buffer.slack + 1:
        # What these tokens overwrite, not even the first of them still sees: the ring alone holds all.
        problem = _ring_problem(q, buffer, options, out_dtype, lengths)
        name, rows = resolve(problem, call, implementation), _ring_rows(buffer, buffer.length, lengths)
        read = partial(_op, problem, name)
        out, lse, after = _in_place.append_attend(problem, name, read, rows, q, k, v, buffer, sink_logits)
    else:
        after = buffer.append(k, v, lengths=lengths)
        k, v = _as_seen(buffer, k, v)
        run = partial(_run, call, implementation)
        out, lse = _attend_to_both(run, q, k, v, buffer, lengths, sink_logits, options, out_dtype)
        # A row rolled back too far reads as empty, its new tokens too.
        out = jnp.where(buffer.valid[:, None, None, None], out, jnp.zeros((), out.dtype))
        lse = jnp.where(buffer.valid[:, None, None], lse, -jnp.inf)
    return (out if real is None else _zero_where_padding(out, real)), lse, after


def attend_to_memory(
    call: str,
    q: Array,
    ring: RingBuffer,
    lengths: Any,
    softcap: Any,
    scale: Any,
    implementation: str | None,
    config: Any,
) -> tuple[Array, Array]:
    """Attention of queries [B, T, N, H] to all that a ring keeps in view, whatever their own positions.

    Output in float32 and lse. Each query stands where the ring's newest token does.
    """
    if (mesh := _explicit.mesh_of(q, ring)) is not None:

        def again(q: Array, ring: RingBuffer, lengths: Any) -> Any:
            return attend_to_memory(call, q, ring, lengths, softcap, scale, implementation, config)

        split_rows, heads = _explicit.rows_and_heads(call, {"q": (q, "BTNH"), "ring.k": (ring.k, "BKCH")})
        return _explicit.run(mesh, (P(split_rows, None, heads), P(split_rows, heads)), again, q, ring, lengths)
    q = jnp.asarray(q)
    lengths = _inputs.as_row_integers(call, "lengths", lengths, q.shape[0])
    options = _options(call, q, None, softcap, scale, config)
    if lengths is not None:
        q = _zero_where_padding(q, jnp.arange(q.shape[1], dtype=jnp.int32)[None] < lengths[:, None])
    problem = dataclasses.replace(_ring_problem(q, ring, options, "float32", lengths), q_stride=0)
    rows = _ring_rows(ring, ring.length - 1, lengths)
    return _run(call, implementation, problem, rows, q, ring.k, ring.v, None)


def _run(
    call: str, implementation: str | None, problem: Problem, rows: Rows, q: Array, k: Array, v: Array, sinks: Any
) -> tuple[Array, Array]:
    return _op(problem, resolve(problem, call, implementation), rows, q, k, v, sinks)


def _ring_problem(q: Array, ring: RingBuffer, options: dict[str, Any], out_dtype: str, lengths: Any) -> Problem:
    return Problem(
        batch=q.shape[0],
        queries=q.shape[1],
        keys=ring.capacity,
        heads=q.shape[2],
        kv_heads=ring.k.shape[1],
        head_dim=q.shape[3],
        value_dim=ring.v.shape[3],
        q_dtype=str(q.dtype),
        kv_dtype=str(ring.k.dtype),
        out_dtype=out_dtype,
        window=ring.window,
        layout="ring",
        slack=ring.slack,
        q_offset=None,
        ragged=lengths is not None,
        **options,
    )


def _ring_rows(ring: RingBuffer, q_start: Array, q_length: Array | None) -> Rows:
    return Rows(
        q_start=q_start,
        q_length=q_length,
        length=ring.length,
        written=ring.written,
        k_scale=ring.k_scale,
        v_scale=ring.v_scale,
    )


def _attend_to_both(
    run: Any,
    q: Array,
    k: Array,
    v: Array,
    buffer: RingBuffer,
    lengths: Array | None,
    sink_logits: Array | None,
    options: dict[str, Any],
    out_dtype: str,
) -> tuple[Array, Array]:
    """A chunk's attention to the ring as it was before, and to itself, merged: exact for a chunk of any length."""
    chunk, window = q.shape[1], buffer.window
    options = options | {"sink_logits": False}
    # Pinned sinks are seen from everywhere; the rest of the ring only from the chunk's first `left` queries.
    assert window.left is not None
    near = chunk if window.sinks else min(chunk, window.left)
    old_out = old_lse = None
    if near:
        problem = _ring_problem(q[:, :near], buffer, options, "float32", lengths)
        q_length = None if lengths is None else jnp.minimum(lengths, near)
        rows = _ring_rows(buffer, buffer.length, q_length)
        old_out, old_lse = run(problem, rows, q[:, :near], buffer.k, buffer.v, None)

    segments = None
    if lengths is not None:  # no key of the padding is seen, on either side
        real = jnp.arange(chunk, dtype=jnp.int32)[None] < lengths[:, None]
        segments = jnp.where(real, 0, -1).astype(jnp.int32)
    problem = dataclasses.replace(
        _ring_problem(q, buffer, options, "float32", lengths),
        keys=chunk,
        kv_dtype=str(k.dtype),
        layout="linear",
        slack=0,
        q_offset=0,
        segments=segments is not None,
    )
    rows = Rows(kv_start=buffer.length, q_length=lengths, q_segments=segments, kv_segments=segments)
    out, lse = run(problem, rows, q, k, v, None)
    if old_out is not None and old_lse is not None:
        first, first_lse = merge((old_out, out[:, :near]), (old_lse, lse[:, :, :near]), return_lse=True)
        out = jnp.concatenate([first, out[:, near:]], axis=1)
        lse = jnp.concatenate([first_lse, lse[:, :, near:]], axis=2)
    if sink_logits is not None:
        out = apply_sinks(out, lse, sink_logits)
    return out.astype(out_dtype), lse


def apply_sinks(out: Array, lse: Array, sink_logits: Array) -> Array:
    """What an output becomes with sink logits in the denominator; float32."""
    share = jax.nn.sigmoid(lse - sink_logits.astype(jnp.float32)[None, :, None])
    return out.astype(jnp.float32) * jnp.moveaxis(share, 1, 2)[..., None]


def merge(outs: Any, lses: Any, *, return_lse: bool = False) -> Any:
    """Attention to the union of disjoint sets of keys, from the attention to each: one softmax over all.

    Args:
      outs: outputs [B, T, N, Hv], one for each set of keys, without sink logits.
      lses: their logsumexps, float32 [B, N, T] (`return_lse=True`); -inf where a query saw no key.
      return_lse: whether to return the union's logsumexp too.

    Returns:
      Output [B, T, N, Hv] in the dtype of the first, and with `return_lse` the logsumexp [B, N, T]. Differentiable.

    Raises:
      ValueError: no or unequally many arrays, or shapes that differ.
      TypeError: an argument of the wrong kind.
    """
    outs, lses = _inputs.as_list("merge", "outs", outs), _inputs.as_list("merge", "lses", lses)
    if not outs or len(outs) != len(lses):
        raise ValueError(f"merge: outs and lses must be as many, at least one, got {len(outs)} and {len(lses)}.")
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        _inputs.check_array("merge", f"outs[{i}]", out, "B T N Hv")
        _inputs.check_array("merge", f"lses[{i}]", lse, "B N T")
        batch, queries, heads, _ = out.shape
        if out.shape != outs[0].shape or lse.shape != (batch, heads, queries):
            first = "merge: all outputs must be [B, T, N, Hv] and all lses [B, N, T], of the same B, T, N and Hv."
            facts = {
                f"outs[{j}]": f"{_inputs.describe(o)}, lse {_inputs.describe(m)}"
                for j, (o, m) in enumerate(zip(outs, lses, strict=True))
            }
            raise ValueError(_inputs.message(first, facts))
    stacked = jnp.stack([jnp.asarray(lse, jnp.float32) for lse in lses])
    largest = jax.lax.stop_gradient(stacked.max(0))
    largest = jnp.where(largest == -jnp.inf, 0.0, largest)
    shares = jnp.exp(stacked - largest[None])
    total = shares.sum(0)
    empty = total == 0.0
    safe = jnp.where(empty, 1.0, total)
    out = jnp.zeros(outs[0].shape, jnp.float32)
    for share, lse, part in zip(shares, stacked, outs, strict=True):
        # A part that saw nothing adds nothing, whatever it holds, and 0 * NaN is NaN: in the gradients too.
        part = jnp.where(jnp.moveaxis(lse == -jnp.inf, 1, 2)[..., None], 0.0, jnp.asarray(part, jnp.float32))
        out = out + jnp.moveaxis(share / safe, 1, 2)[..., None] * part
    out = out.astype(outs[0].dtype)
    if not return_lse:
        return out
    return out, jnp.where(empty, -jnp.inf, largest + jnp.log(safe))
