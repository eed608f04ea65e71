"""Attention with a ring: to new tokens and to what the ring still holds (`attend`)."""

import dataclasses
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int

from ringjax import _explicit, _in_place, _inputs
from ringjax._attention import _options, _zero_where_padding
from ringjax._buffer import RingBuffer, _as_seen, _check_tokens
from ringjax._kernels import resolve
from ringjax._kernels.problem import Problem, Rows
from ringjax._kernels.tiles import TileSizes
from ringjax._merge import apply_sinks, merge
from ringjax._op import op


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
        read = partial(op, problem, name)
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
    return op(problem, resolve(problem, call, implementation), rows, q, k, v, sinks)


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
