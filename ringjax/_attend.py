"""Attention with a ring: to new tokens and to what the ring still holds (`attend`)."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int

from ringjax import _explicit, _in_place, _inputs, _partition
from ringjax._attention import _options
from ringjax._buffer import RingBuffer, _as_seen, _check_tokens
from ringjax._kernels import IMPLEMENTATIONS, resolve
from ringjax._kernels.problem import Memory, Problem, Rows, zero_where_padding
from ringjax._kernels.tiles import TileSizes
from ringjax._merge import apply_sinks, merge
from ringjax._op import op
from ringjax._slots import slot_of_position


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
    memories: tuple[RingBuffer, ...] = (),
) -> tuple[Array, Array, RingBuffer]:
    """`attend`, with the lse of the keys seen (without sink logits), and another dtype for the output if wanted.

    With `memories`, for at most `slack + 1` tokens: one softmax over the ring and all that they keep in view.
    """
    _inputs.check_type(call, "buffer", buffer, RingBuffer)
    if (mesh := _explicit.mesh_of(q, k, v, buffer, memories)) is not None:

        def again(q: Array, k: Array, v: Array, buffer: RingBuffer, lengths: Any, sinks: Any, memories: Any) -> Any:
            options = (lengths, sinks, softcap, scale, implementation, config, out_dtype, memories)
            return attend_with_lse(call, q, k, v, buffer, *options)

        tokens = {"q": (q, "BTNH"), "k": (k, "BTKH"), "v": (v, "BTKH"), "buffer.k": (buffer.k, "BKCH")}
        stored = {f"memories[{i}].k": (memory.k, "BKCH") for i, memory in enumerate(memories)}
        split_rows, heads = _explicit.rows_and_heads(call, tokens | stored)
        results = (P(split_rows, None, heads), P(split_rows, heads), _explicit.specs(buffer))
        return _explicit.run(mesh, results, again, q, k, v, buffer, lengths, sink_logits, memories)
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
        q, k, v = (zero_where_padding(x, real) for x in (q, k, v))

    out_dtype = jnp.dtype(out_dtype or q.dtype).name
    if chunk <= buffer.slack + 1:
        # What these tokens overwrite, not even the first of them still sees: the ring alone holds all.
        problem = _ring_problem(q, buffer, options, out_dtype, lengths)
        name, rows = resolve(problem, call, implementation), _ring_rows(buffer, buffer.length, lengths)
        plain = options | {"sink_logits": False}
        beside = tuple(_memory(q, memory, plain, lengths) for memory in memories)
        read = partial(_read_all, call, implementation, problem, name, tuple(memory.problem for memory in beside))
        out, lse, after = _in_place.append_attend(problem, name, read, rows, q, k, v, buffer, sink_logits, beside)
    else:
        assert not memories
        after = buffer.append(k, v, lengths=lengths)
        k, v = _as_seen(buffer, k, v)
        run = partial(_run, call, implementation)
        problem = _ring_problem(q, buffer, options, out_dtype, lengths)

        apart = partial(_attend_to_both, run, options, out_dtype)
        in_order = partial(_attend_in_order, run, options, out_dtype)
        arrays = (q, k, v, buffer, lengths, sink_logits)
        # Sinks stand at positions of their own, which no window tells from one array to the next.
        derived = in_order if buffer.window.left and not buffer.window.sinks else apart
        out, lse = _in_one_launch(problem, implementation, derived, *arrays) or apart(*arrays)
        # A row rolled back too far reads as empty, its new tokens too.
        out = jnp.where(buffer.valid[:, None, None, None], out, jnp.zeros((), out.dtype))
        lse = jnp.where(buffer.valid[:, None, None], lse, -jnp.inf)
    return (out if real is None else zero_where_padding(out, real)), lse, after


def _in_one_launch(
    problem: Problem,
    implementation: str | None,
    derived: Callable[..., tuple[Array, Array]],
    q: Array,
    k: Array,
    v: Array,
    buffer: RingBuffer,
    lengths: Any,
    sink_logits: Any,
) -> tuple[Array, Array] | None:
    """Attention of a chunk to the ring before it and to itself, where an implementation offers that; else None.

    It does with `extends(problem) -> bool` and `extend(problem, rows, q, k, v, ring_k, ring_v, sink_logits) -> (out,
    lse)`. The derivative, and a batch of calls under `vmap`, are those of `derived`, the same function of the arrays.
    """
    arrays = (q, k, v, buffer, lengths, sink_logits)
    asked = [name for name in IMPLEMENTATIONS if implementation in (None, name)]
    name = next((x for x in asked if not IMPLEMENTATIONS[x].unsupported(problem)), None)
    offers = getattr(IMPLEMENTATIONS.get(name or ""), "extends", None)
    if name is None or offers is None or not offers(problem):
        return None
    if _partition.may_be_partitioned(jax.tree.leaves(arrays)):
        return None
    extend = partial(_extend, problem, name)

    def launch(*arrays: Any) -> tuple[Array, Array]:
        q, k, v, buffer, lengths, sink_logits = arrays
        rows = _ring_rows(buffer, buffer.length, lengths)
        return extend(rows, q, k, v, buffer.k, buffer.v, sink_logits)

    together = jax.custom_vjp(_partition.batched_as(derived, launch))
    together.defvjp(lambda *arrays: jax.vjp(derived, *arrays), lambda vjp, cotangents: vjp(cotangents))
    return together(*arrays)


@partial(jax.jit, static_argnums=(0, 1))  # layers of one shape are traced and compiled once
def _extend(problem: Problem, implementation: str, *arrays: Any) -> tuple[Array, Array]:
    out, lse = IMPLEMENTATIONS[implementation].extend(problem, *arrays)
    return out, lse


def attend_to_all(
    call: str,
    q: Any,
    k: Any,
    v: Any,
    buffer: RingBuffer,
    memories: tuple[RingBuffer, ...],
    lengths: Any,
    sink_logits: Any,
    softcap: Any,
    scale: Any,
    implementation: str | None,
    config: Any,
) -> tuple[Array, RingBuffer]:
    """`attend` with one softmax over the ring and all that memories keep in view, whatever a query's own position.

    Memories of the ring's dtype are read in the launch that writes into the ring, where an implementation offers that.
    A row whose ring is lost sees nothing of the memories either.
    """
    options = (softcap, scale, implementation, config)
    few = jnp.shape(q)[1] <= buffer.slack + 1
    near = tuple(memory for memory in memories if few and memory.k.dtype == buffer.k.dtype)
    far = tuple(memory for memory in memories if not (few and memory.k.dtype == buffer.k.dtype))
    if not far:
        out, _, after = attend_with_lse(call, q, k, v, buffer, lengths, sink_logits, *options, memories=near)
        return out, after
    out, lse, after = attend_with_lse(call, q, k, v, buffer, lengths, None, *options, "float32", near)
    parts = [(out, lse), *(attend_to_memory(call, q, memory, lengths, *options) for memory in far)]
    out, lse = _merged(parts, after.valid)
    if sink_logits is not None:
        _inputs.check_sink_logits(call, sink_logits, q)
        out = apply_sinks(out, lse, jnp.asarray(sink_logits))
    return out.astype(q.dtype), after


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
        q = zero_where_padding(q, jnp.arange(q.shape[1], dtype=jnp.int32)[None] < lengths[:, None])
    memory = _memory(q, ring, options, lengths)
    return _run(call, implementation, memory.problem, memory.rows, q, memory.k, memory.v, None)


def _memory(q: Array, ring: RingBuffer, options: dict[str, Any], lengths: Any) -> Memory:
    problem = dataclasses.replace(_ring_problem(q, ring, options, "float32", lengths), q_stride=0)
    return Memory(problem, _ring_rows(ring, ring.length - 1, lengths), ring.k, ring.v)


def _read_all(
    call: str,
    implementation: str | None,
    problem: Problem,
    name: str,
    problems: tuple[Problem, ...],
    rows: Rows,
    q: Array,
    k: Array,
    v: Array,
    sink_logits: Array | None,
    memories: Any,
) -> tuple[Array, Array]:
    """Attention to a ring, by the implementation `name`, and to memories, each by itself, merged."""
    if not memories:
        return op(problem, name, rows, q, k, v, sink_logits)
    own = dataclasses.replace(problem, out_dtype="float32", sink_logits=False)
    parts = [op(own, name, rows, q, k, v, None)]
    for memory, (its_rows, its_k, its_v) in zip(problems, memories, strict=True):
        parts.append(_run(call, implementation, memory, its_rows, q, its_k, its_v, None))
    assert rows.length is not None and rows.written is not None
    out, lse = _merged(parts, rows.written - rows.length <= problem.slack)
    if sink_logits is not None:
        out = apply_sinks(out, lse, sink_logits)
    return out.astype(problem.out_dtype), lse


def _merged(parts: list[tuple[Array, Array]], valid: Array) -> tuple[Array, Array]:
    """Outputs and lses of parts, merged. A row whose past is lost must not look like one that has none."""
    lses = [jnp.where(valid[:, None, None], lse, -jnp.inf) for _, lse in parts]
    return merge([out for out, _ in parts], lses, return_lse=True)


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


def _attend_in_order(
    run: Any,
    options: dict[str, Any],
    out_dtype: str,
    q: Array,
    k: Array,
    v: Array,
    ring: RingBuffer,
    lengths: Array | None,
    sink_logits: Array | None,
) -> tuple[Array, Array]:
    """A chunk's attention to one array: the ring's last tokens, oldest first, and its own; of a ring without sinks.

    The copy costs little beside the derivative, which is then that of attention without history, at its speed.
    """
    left, chunk = ring.window.left, q.shape[1]
    assert left and not ring.window.sinks
    at = ring.length[:, None] - left + jnp.arange(left, dtype=jnp.int32)[None]
    slots = slot_of_position(jnp.maximum(at, 0), sinks=0, capacity=ring.capacity)
    held = (at >= 0) & (jnp.take_along_axis(ring.positions(), slots, axis=1) == at)

    def joined(store: Array, new: Array) -> Array:
        old = jnp.moveaxis(jnp.take_along_axis(store, slots[:, None, :, None], axis=2), 1, 2)
        return jnp.concatenate([zero_where_padding(old, held), new], axis=1)

    real = jnp.ones((q.shape[0], chunk), bool)
    if lengths is not None:
        real = jnp.arange(chunk, dtype=jnp.int32)[None] < lengths[:, None]
    ids = [jnp.where(x, 0, -1).astype(jnp.int32) for x in (real, jnp.concatenate([held, real], axis=1))]
    linear: dict[str, Any] = {
        "layout": "linear",
        "keys": left + chunk,
        "slack": 0,
        "q_offset": left,
        "segments": True,
        "ragged": False,
    }
    problem = dataclasses.replace(_ring_problem(q, ring, options, out_dtype, None), kv_dtype=str(k.dtype), **linear)
    rows = Rows(q_segments=ids[0], kv_segments=ids[1])
    return run(problem, rows, q, joined(ring.k, k), joined(ring.v, v), sink_logits)


def _attend_to_both(
    run: Any,
    options: dict[str, Any],
    out_dtype: str,
    q: Array,
    k: Array,
    v: Array,
    buffer: RingBuffer,
    lengths: Array | None,
    sink_logits: Array | None,
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
