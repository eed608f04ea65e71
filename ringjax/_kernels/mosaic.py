"""Attention on Hopper GPUs in Pallas Mosaic GPU: the row of the table; the kernels are built when first called.

Without a ring, head sizes are padded with zeros to 64, 128 or 256, which changes no logit and no output. A ring is read
as it is, by a kernel of its own, which can write new tokens into it too (`append_attend`); its derivative is another
row's (`differentiates`).
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ringjax._kernels.problem import Problem, Rows

name = "mosaic"

_HOPPER = re.compile(r"\b(?:H100|H200|GH200|H800|H20)\b")
_JAX = tuple(int(part) for part in jax.__version__.split(".")[:2])
_DEPTHS = (64, 128, 256)


def unsupported(problem: Problem) -> list[str]:
    """Reasons why this implementation cannot run the problem; none: it can."""
    reasons = []
    if problem.platform != "gpu":
        reasons.append(f"needs a GPU, the platform is {problem.platform}")
    elif not _HOPPER.search(problem.device_kind):
        reasons.append(f"needs a Hopper GPU (compute capability 9.0), the device is {problem.device_kind}")
    if _JAX < (0, 11):
        reasons.append(f"needs jax >= 0.11, got {jax.__version__}")
    if problem.ragged and not problem.is_ring:
        reasons.append("takes numbers of valid queries with rings only")
    if problem.is_ring and problem.window.left is None:
        reasons.append("reads rings of windows with a bound on the left only")
    if problem.q_dtype not in ("bfloat16", "float16"):
        reasons.append(f"needs bfloat16 or float16, got {problem.q_dtype}")
    # Of a ring, the output may be float32: it is merged with another one then.
    out_dtype = problem.q_dtype if problem.is_ring and problem.out_dtype == "float32" else problem.out_dtype
    if not problem.q_dtype == problem.kv_dtype == out_dtype:
        found = f"{problem.q_dtype}, {problem.kv_dtype} and {problem.out_dtype}"
        reasons.append(f"needs one dtype for queries, keys and values, and output, got {found}")
    if max(problem.head_dim, problem.value_dim) > _DEPTHS[-1]:
        reasons.append(f"needs head_dim and value_dim <= {_DEPTHS[-1]}, got {problem.head_dim} and {problem.value_dim}")
    if problem.is_ring and (problem.head_dim % 8 or problem.value_dim % 8):
        found = f"{problem.head_dim} and {problem.value_dim}"
        reasons.append(f"reads rings whose head_dim and value_dim are multiples of 8 only, got {found}")
    return reasons


def differentiates(problem: Problem) -> bool:
    """Whether `backward` takes the problem."""
    return not problem.is_ring


def _padded(problem: Problem, *arrays: Array) -> tuple[Array, ...]:
    """Arrays [..., H] with H padded to the kernels' next head size."""
    depth = next(d for d in _DEPTHS if d >= max(problem.head_dim, problem.value_dim))
    return tuple(jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, depth - x.shape[-1])]) for x in arrays)


def forward(
    problem: Problem, rows: Rows, q: Array, k: Array, v: Array, sink_logits: Array | None, **options: Any
) -> tuple[Array, Array]:
    """Output [B, T, N, value_dim] and lse [B, N, T]; `options` are the kernel's (tests set them)."""
    if problem.is_ring:
        from ringjax._kernels import mosaic_decode  # not before it is needed: Mosaic GPU is heavy to import

        return mosaic_decode.forward(problem, rows, q, k, v, sink_logits, **options)
    from ringjax._kernels import mosaic_forward

    q, k, v = _padded(problem, q, k, v)
    out, lse = mosaic_forward.forward(problem, rows, q, k, v, sink_logits, **options)
    return out[..., : problem.value_dim], lse


def backward(
    problem: Problem, rows: Rows, q: Array, k: Array, v: Array, g: Array, lse: Array, delta: Array, **options: Any
) -> tuple[Array, Array, Array]:
    """Cotangents of q, k and v, arguments as for `xla.backward`."""
    from ringjax._kernels import mosaic_backward

    q, k, v, g = _padded(problem, q, k, v, g)
    dq, dk, dv = mosaic_backward.backward(problem, rows, q, k, v, g, lse, delta, **options)
    return dq[..., : problem.head_dim], dk[..., : problem.head_dim], dv[..., : problem.value_dim]


def writes(problem: Problem) -> bool:
    """Whether `append_attend` takes the problem."""
    from ringjax._kernels import mosaic_decode

    return problem.is_ring and mosaic_decode.writes(problem)


def append_attend(
    problem: Problem,
    rows: Rows,
    q: Array,
    k: Array,
    v: Array,
    ring_k: Array,
    ring_v: Array,
    sink_logits: Array | None,
    **options: Any,
) -> tuple[Array, Array, Array, Array]:
    """Output, lse and the ring with the tokens `k` and `v`, in one launch; `rows` are those before the tokens."""
    from ringjax._kernels import mosaic_decode

    return mosaic_decode.append_attend(problem, rows, q, k, v, ring_k, ring_v, sink_logits, **options)
