"""The derivative of `attention` as a function of its own, for frameworks that keep the residuals themselves."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from ringjax import _inputs
from ringjax._attention import _canonical
from ringjax._kernels import resolve
from ringjax._kernels.tiles import TileSizes
from ringjax._op import op_backward
from ringjax._window import Window


def attention_gradients(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    window: Window,
    out: Float[Array, "B T N Hv"],
    lse: Float[Array, "B N T"],
    g: Float[Array, "B T N Hv"],
    g_lse: Float[Array, "B N T"] | None = None,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    kv_segment_ids: Int[Array, "B S"] | None = None,
    sink_logits: Float[Array, " N"] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    q_offset: int | Int[Array, " B"] | None = None,
    implementation: str | None = None,
    config: TileSizes | None = None,
) -> tuple[Array, Array, Array, Array | None]:
    """Gradients of `attention` from its output, without running it again.

    JAX code needs it nowhere: `attention` is differentiable. It is for a framework with its own tape (torch_bridge),
    which keeps `out` and `lse` and comes back later with their cotangents.

    Args:
      q, k, v, window: of the call of `attention`.
      out, lse: what that call returned with `return_lse=True`.
      g: the output's cotangent, of the queries' dtype.
      g_lse: the lse's cotangent, float32; None: zeros.
      segment_ids, kv_segment_ids, sink_logits, softcap, scale, q_offset, implementation, config: of the call.

    Returns:
      Gradients for q, k, v and the sink logits (None without them), in the dtypes of these.

    Raises:
      ValueError, TypeError, NotImplementedError: as for `attention`, and for residuals of another shape.
    """
    call = "attention_gradients"
    problem, rows, (q, k, v, sink_logits) = _canonical(
        call, q, k, v, window, segment_ids, kv_segment_ids, sink_logits, softcap, scale, q_offset, config
    )
    shape = (problem.batch, problem.queries, problem.heads, problem.value_dim)
    for name, x, axes, wanted in (
        ("out", out, "B T N Hv", shape),
        ("lse", lse, "B N T", (shape[0], shape[2], shape[1])),
        ("g", g, "B T N Hv", shape),
        ("g_lse", lse if g_lse is None else g_lse, "B N T", (shape[0], shape[2], shape[1])),
    ):
        _inputs.check_array(call, name, x, axes)
        if x.shape != wanted:
            raise ValueError(f"{call}: {name} must have shape {list(wanted)}, got {_inputs.describe(x)}.")
    g_lse = jnp.zeros_like(lse) if g_lse is None else g_lse
    name = resolve(problem, call, implementation)
    _, dq, dk, dv, d_sinks = op_backward(
        problem, name, (rows, q, k, v, sink_logits, jnp.asarray(out), jnp.asarray(lse)), (jnp.asarray(g), g_lse)
    )
    return dq, dk, dv, d_sinks
