"""New tokens into a ring and attention to it: in one launch where an implementation offers that, else in two steps.

An implementation offers it with `writes(problem) -> bool` and `append_attend(problem, rows, q, k, v, ring_k, ring_v,
sink_logits) -> (out, lse, ring_k, ring_v, rows)`, from the rows before the tokens to those after them: of these,
`length`, `written` and the scales count. It has no derivative of its own: where one is asked for, the tokens are
written first and the ring is read as ever. It may read other rings in the same softmax, if `writes` takes their
problems too (`writes(problem, *problems)`): `append_attend` then has a further argument, a tuple of `Memory`.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.tree_util import Partial

from ringjax import _kernels, _partition
from ringjax._buffer import RingBuffer
from ringjax._kernels.problem import Memory, Problem, Rows


def append_attend(
    problem: Problem,
    implementation: str,
    read: Callable[..., tuple[Array, Array]],
    rows: Rows,
    q: Array,
    k: Array,
    v: Array,
    buffer: RingBuffer,
    sink_logits: Array | None,
    memories: tuple[Memory, ...] = (),
) -> tuple[Array, Array, RingBuffer]:
    """Output, lse and the ring after the tokens.

    Args:
      problem, implementation: of the call on the ring.
      read: attention to a ring, given its rows, q, its keys and values, the sink logits and the rows, keys and values
        of each memory; differentiable.
      rows: of the ring before the tokens.
      q, k, v: of the tokens, whose padding is zero.
      buffer: the ring before the tokens.
      sink_logits: [N] or None.
      memories: that are read in the same softmax.
    """

    def apart(rows: Rows, q: Array, k: Array, v: Array, sink_logits: Any, buffer: RingBuffer, others: Any) -> Any:
        after = buffer.append(k, v, lengths=rows.q_length)
        now = {"length": after.length, "written": after.written, "k_scale": after.k_scale, "v_scale": after.v_scale}
        out, lse = read(rows._replace(**now), q, after.k, after.v, sink_logits, others)
        return out, lse, after

    problems = tuple(memory.problem for memory in memories)
    arrays = (rows, q, k, v, sink_logits, buffer, tuple((memory.rows, memory.k, memory.v) for memory in memories))
    writes = getattr(_kernels.IMPLEMENTATIONS[implementation], "writes", None)
    if writes is None or not writes(problem, *problems) or _partition.may_be_partitioned(jax.tree.leaves(arrays)):
        return apart(*arrays)

    together = jax.custom_vjp(_partition.batched_as(apart, partial(_launch, problem, problems, implementation)))

    def forward(*marked: Any) -> Any:
        # What no derivative is asked of stays a constant: a quantised ring has none in k and v.
        found: Any = jax.tree.flatten(marked, is_leaf=lambda x: isinstance(x, CustomVJPPrimal))
        leaves, tree = found

        def apart_of(*active: Array) -> Any:
            rest = iter(active)
            return apart(*tree.unflatten([next(rest) if x.perturbed else x.value for x in leaves]))

        def back(vjp: Any, cotangents: Any) -> Any:
            rest = iter(vjp(cotangents))
            return tree.unflatten([next(rest) if x else None for x in perturbed])

        perturbed = [x.perturbed for x in leaves]
        results, vjp = jax.vjp(apart_of, *(x.value for x in leaves if x.perturbed))
        return results, Partial(back, vjp)

    def backward(back: Any, cotangents: Any) -> Any:
        def filled(x: Any) -> Any:
            return jnp.zeros(x.shape, x.dtype) if isinstance(x, SymbolicZero) else x

        return back(jax.tree.map(filled, cotangents, is_leaf=lambda x: isinstance(x, SymbolicZero)))

    together.defvjp(forward, backward, symbolic_zeros=True)
    return together(*arrays)


@partial(jax.jit, static_argnums=(0, 1, 2))  # layers of one shape are traced and compiled once
def _launch(
    problem: Problem,
    problems: tuple[Problem, ...],
    implementation: str,
    rows: Rows,
    q: Array,
    k: Array,
    v: Array,
    sinks: Any,
    buffer: RingBuffer,
    others: Any,
) -> Any:
    run = _kernels.IMPLEMENTATIONS[implementation].append_attend
    if not problem.quantised:
        k, v = k.astype(buffer.k.dtype), v.astype(buffer.v.dtype)
    memories = tuple(Memory(its, *arrays) for its, arrays in zip(problems, others, strict=True))
    beside = (memories,) if memories else ()
    out, lse, ring_k, ring_v, after = run(problem, rows, q, k, v, buffer.k, buffer.v, sinks, *beside)
    now = {name: getattr(after, name) for name in ("length", "written", "k_scale", "v_scale")}
    return out, lse, dataclasses.replace(buffer, k=ring_k, v=ring_v, **now)
