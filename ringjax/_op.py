"""The one differentiable op behind `attention` and `attend`: any implementation, one `custom_vjp`."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from ringjax import _partition
from ringjax._kernels import backward_of, ignores_padding
from ringjax._kernels.problem import Problem, Rows, without_padding
from ringjax._quantised import dequantise


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def op(
    problem: Problem, implementation: str, rows: Rows, q: Array, k: Array, v: Array, sink_logits: Array | None
) -> tuple[Array, Array]:
    """Output and lse; the lse is that of the keys alone, whatever the sink logits."""
    if not ignores_padding(implementation):
        q, k, v = without_padding(rows, [q], [k, v])
    return _partition.forward(problem, implementation, rows, q, k, v, sink_logits)


def _op_forward(
    problem: Problem, implementation: str, rows: Rows, q: Array, k: Array, v: Array, sink_logits: Array | None
) -> tuple[tuple[Array, Array], Any]:
    out, lse = op(problem, implementation, rows, q, k, v, sink_logits)
    # Named, so that a rematerialisation policy can keep them and run no forward pass twice.
    out, lse = checkpoint_name(out, "ringjax_out"), checkpoint_name(lse, "ringjax_lse")
    return (out, lse), (rows, q, k, v, sink_logits, out, lse)


def op_backward(problem: Problem, implementation: str, residuals: Any, cotangents: Any) -> Any:
    rows, q, k, v, sink_logits, out, lse = residuals
    g, g_lse = cotangents
    # With x the logits, Z = sum(exp(x)) + exp(sink), p = exp(x) / Z and lse = log(sum(exp(x))):
    #   dx = p * (g . v - delta) + g_lse * exp(x - lse),   delta = g . out,   dsink = -exp(sink) / Z * delta,
    # and the second term of dx is p * g_lse * Z / exp(lse), so that it can be taken off delta.
    delta = jnp.einsum("btnh,btnh->bnt", g, out, preferred_element_type=jnp.float32)
    if problem.segments:  # what padding gets as a cotangent may be NaN
        delta = jnp.where(lse == -jnp.inf, 0.0, delta)
    total, ratio, d_sinks = lse, jnp.ones((), jnp.float32), None
    if sink_logits is not None:
        sinks = sink_logits.astype(jnp.float32)[None, :, None]
        total = jnp.logaddexp(lse, sinks)
        # Where no key is seen both may be -inf: a sink logit of -inf is none.
        share = jnp.where(lse == -jnp.inf, 0.0, jnp.exp(sinks - total))
        d_sinks = -(share * delta).sum((0, 2)).astype(sink_logits.dtype)
        # exp(88) is near the largest float32; weights so small beside a sink are 0 anyway.
        ratio = jnp.exp(jnp.minimum(jnp.where(lse == -jnp.inf, 0.0, total - lse), 88.0))
    delta = delta - jnp.where(lse == -jnp.inf, 0.0, g_lse) * ratio
    constant = None
    if rows.k_scale is not None and rows.v_scale is not None:  # quantised: a constant, that the queries' gradient reads
        k, v = dequantise(k, rows.k_scale).astype(q.dtype), dequantise(v, rows.v_scale).astype(q.dtype)
        problem, rows = dataclasses.replace(problem, kv_dtype=str(q.dtype)), rows._replace(k_scale=None, v_scale=None)
        constant = None, None
    name = backward_of(problem, implementation)
    if not ignores_padding(name):
        q, g, k, v = without_padding(rows, [q, g], [k, v])
    dq, *d_kv = _partition.backward(problem, name, rows, q, k, v, g, total, delta)
    return None, dq, *(d_kv if constant is None else constant), d_sinks


op.defvjp(_op_forward, op_backward)
