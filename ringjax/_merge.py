"""One softmax over parts: outputs and logsumexps of disjoint sets of keys, merged."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ringjax import _inputs


def apply_sinks(out: Array, lse: Array, sink_logits: Array) -> Array:
    """What an output becomes with sink logits in the denominator; float32."""
    # Where no key is seen both may be -inf, and the output is 0 whatever its share.
    share = jax.nn.sigmoid(jnp.where(lse == -jnp.inf, 0.0, lse - sink_logits.astype(jnp.float32)[None, :, None]))
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
