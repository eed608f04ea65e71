"""Attention by cuDNN on Ampere and newer GPUs, through `jax.nn.dot_product_attention`, where it means what ours means.

jax.nn aligns queries and keys at their first (we: at their last), leaks the future if a window without a right side is
asked for without `is_causal` (jax#39576), and knows no soft cap, no sink logits and no pinned sinks. What differs is
refused. Its logsumexp is rounded to the queries' dtype: enough for a call that reads none, and only for that.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_batching import custom_vmap

from ringjax._kernels.problem import Problem, Rows

name = "cudnn"

# Names of devices, as `device_kind` gives them: nothing else tells a chip's generation before it runs.
_HOPPER = r"\b(?:H100|H200|GH200|H800|H20)\b"
_NEW = re.compile(
    r"\b(?:A100X?|A800|A30|A40|A10G?|A16|A2|RTX A\d{3,4}|RTX 30\d\d)\b"  # Ampere
    r"|\b(?:L4|L20|L40S?|RTX 40\d\d|RTX \d{3,4} Ada)\b"
    rf"|{_HOPPER}"
    r"|\b(?:B100|B200|B300|GB10|GB200|GB300|RTX 50\d\d|RTX PRO \d{3,4})\b"  # Blackwell
)


def _sides(problem: Problem) -> tuple[int | None, int | None]:
    """The window's left and right; None also for a side so far away that every key is nearer."""
    left, right, offset = problem.window.left, problem.window.right, problem.q_offset
    if offset is not None:
        left = None if left is not None and left >= offset + problem.queries - 1 else left
        right = None if right is not None and right >= problem.keys - 1 - offset else right
    return left, right


def unsupported(problem: Problem) -> list[str]:
    """Reasons why this implementation cannot run the problem; none: it can."""
    reasons = []
    if problem.platform != "gpu":
        reasons.append(f"needs a GPU, the platform is {problem.platform}")
    elif not _NEW.search(problem.device_kind):
        reasons.append(f"needs an NVIDIA GPU of the Ampere generation or newer, the device is {problem.device_kind}")
    if problem.is_ring:
        reasons.append("reads no rings")
    if problem.ragged:
        reasons.append("takes no numbers of valid queries")
    if problem.segments:
        reasons.append("takes no segment ids")
    if problem.q_dtype not in ("bfloat16", "float16"):
        reasons.append(f"needs bfloat16 or float16, got {problem.q_dtype}")
    if not problem.q_dtype == problem.kv_dtype == problem.out_dtype:
        found = f"{problem.q_dtype}, {problem.kv_dtype} and {problem.out_dtype}"
        reasons.append(f"needs one dtype for queries, keys and values, and output, got {found}")
    most = 256 if re.search(_HOPPER, problem.device_kind) else 128
    if problem.head_dim > most or problem.head_dim % 8 or problem.head_dim != problem.value_dim:
        found = f"{problem.head_dim} and {problem.value_dim}"
        reasons.append(f"needs head_dim = value_dim, a multiple of 8, at most {most}, got {found}")
    if problem.queries % 2 or problem.keys % 2:
        found = f"{problem.queries} and {problem.keys}"
        reasons.append(f"needs even numbers of queries and keys, as jax.nn does for its derivative, got {found}")
    if problem.softcap is not None:
        reasons.append("has no softcap")
    if problem.sink_logits:
        reasons.append("has no sink logits")
    left, right = _sides(problem)
    if left is not None and problem.window.sinks:
        reasons.append("pins no sinks")
    if right not in (None, 0):
        reasons.append(f"has no right side of a window but 0 or all, got {right}")
    elif right is None and left is not None:
        reasons.append("bounds a window on the left only where it is causal")
    elif right == 0 and (problem.q_offset != 0 or problem.queries != problem.keys):
        where = "rows' own positions" if problem.q_offset is None else problem.q_offset
        found = f"{problem.queries} and {problem.keys}, the first query at {where}"
        reasons.append(f"needs as many queries as keys, the first query at the first key, if causal, got {found}")
    if problem.lse:
        reasons.append("gives the lse in 16 bits only: call it without return_lse")
    if problem.deterministic:
        reasons.append("is not deterministic")
    return reasons


def _options(problem: Problem) -> dict[str, Any]:
    """How jax.nn is asked for the problem."""
    left, right = _sides(problem)
    # A window goes with `is_causal` always: without it, (left, 0) sees the future.
    size = None if left is None else (left, 0)
    causal = {"is_causal": right == 0, "local_window_size": size}
    return {"scale": problem.scale, "implementation": "cudnn", **causal}


def _over_batches(f: Callable[..., Any]) -> Callable[..., Any]:
    """f, a function of arrays [B, ...], whose `vmap` is a larger B: jax.nn's own misses some axes and versions."""
    run = custom_vmap(f)

    @run.def_vmap
    def over(size: int, batched: list[bool], *arrays: Array) -> Any:
        def fold(x: Array, is_batched: bool) -> Array:
            x = x if is_batched else jnp.broadcast_to(x[None], (size, *x.shape))
            return x.reshape(size * x.shape[1], *x.shape[2:])

        results = run(*map(fold, arrays, batched))
        return tuple(x.reshape(size, -1, *x.shape[1:]) for x in results), (True,) * len(results)

    return run


def forward(
    problem: Problem, rows: Rows, q: Array, k: Array, v: Array, sink_logits: Array | None
) -> tuple[Array, Array]:
    """Output [B, T, N, H] and lse [B, N, T], the latter of 16 bits' precision."""

    @_over_batches
    def run(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        # With the lse, it is the very call that `backward` differentiates, and XLA makes one of the two.
        out, lse = jax.nn.dot_product_attention(q, k, v, return_residual=True, **_options(problem))
        return out, jnp.moveaxis(lse, 1, 2).astype(jnp.float32)

    return run(q, k, v)


def backward(
    problem: Problem, rows: Rows, q: Array, k: Array, v: Array, g: Array, lse: Array, delta: Array
) -> tuple[Array, Array, Array]:
    """Cotangents of q, k and v, arguments as for `xla.backward`.

    jax.nn's derivative keeps residuals of its own, which are no array of ours: so its call stands here again. Compiled
    together with `forward` it costs nothing; in a loop apart from it (a scan over layers), another forward pass.
    """

    @_over_batches
    def run(q: Array, k: Array, v: Array, g: Array) -> tuple[Array, Array, Array]:
        return jax.vjp(partial(jax.nn.dot_product_attention, **_options(problem)), q, k, v)[1](g)

    return run(q, k, v, g)
