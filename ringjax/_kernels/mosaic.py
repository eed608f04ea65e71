"""Attention on Hopper GPUs in Pallas Mosaic GPU: the row of the table; the kernels are built when first called.

Without a ring, head sizes are padded with zeros to 64, 128 or 256, which changes no logit and no output. A ring is read
as it is, by a kernel of its own, which can write new tokens into it too and read other rings beside it
(`append_attend`); its derivative is another row's (`differentiates`).
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ringjax._kernels.problem import Memory, Problem, Rows, Walk
from ringjax._kernels.tiles import Tiles, mosaic_forward_tiles

name = "mosaic"
ignores_padding = True

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
    if problem.is_ring and problem.window.left is None:
        reasons.append("reads rings of windows with a bound on the left only")
    if problem.q_dtype not in ("bfloat16", "float16"):
        reasons.append(f"needs bfloat16 or float16, got {problem.q_dtype}")
    # The output may be float32: it is merged with another one then.
    out_dtype = problem.q_dtype if problem.out_dtype == "float32" else problem.out_dtype
    kv_dtype = problem.q_dtype if problem.is_ring and problem.quantised else problem.kv_dtype
    if not problem.q_dtype == kv_dtype == out_dtype:
        found = f"{problem.q_dtype}, {problem.kv_dtype} and {problem.out_dtype}"
        reasons.append(f"needs one dtype for queries, keys and values, and output, got {found}")
    if max(problem.head_dim, problem.value_dim) > _DEPTHS[-1]:
        reasons.append(f"needs head_dim and value_dim <= {_DEPTHS[-1]}, got {problem.head_dim} and {problem.value_dim}")
    if problem.is_ring and problem.kv_dtype == "float8_e4m3fn" and problem.q_dtype != "bfloat16":
        # Queries and weights become two numbers of float8, which have 8 bits together.
        reasons.append(f"reads float8_e4m3fn rings for bfloat16 queries only, got {problem.q_dtype}")
    multiple = 16 if problem.quantised else 8  # numbers in 16 bytes
    if problem.is_ring and (problem.head_dim % multiple or problem.value_dim % multiple):
        found = f"{problem.head_dim} and {problem.value_dim}"
        reasons.append(f"reads rings whose head_dim and value_dim are multiples of {multiple} only, got {found}")
    return reasons


def differentiates(problem: Problem) -> bool:
    """Whether `backward` takes the problem: it knows padding by its segments, and sinks by their indices."""
    padding = problem.ragged and not problem.segments
    # Only a chunk beside a ring has its output in float32, and its key 0 at another position than 0.
    elsewhere = problem.out_dtype != problem.q_dtype and problem.window.sinks > 0
    return not (problem.is_ring or padding or elsewhere)


def walk(problem: Problem) -> Walk | None:
    """Which pairs the forward kernel computes; None of a ring: there it depends on more than its tiles."""
    if problem.is_ring:
        return None
    sizes = mosaic_forward_tiles(problem.tiles, head_dim=_depth(problem), group=problem.group)
    return Walk(Tiles(sizes.block_size, 64 * sizes.warpgroups, 1), on_grid=True)


def _depth(problem: Problem) -> int:
    """The kernels' next head size."""
    return next(d for d in _DEPTHS if d >= max(problem.head_dim, problem.value_dim))


def _padded(problem: Problem, *arrays: Array) -> tuple[Array, ...]:
    """Arrays [..., H] with H padded to the kernels' next head size."""
    depth = _depth(problem)
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

    q, k, v, g = _padded(problem, q, k, v, g.astype(q.dtype))
    dq, dk, dv = mosaic_backward.backward(problem, rows, q, k, v, g, lse, delta, **options)
    return dq[..., : problem.head_dim], dk[..., : problem.head_dim], dv[..., : problem.value_dim]


def extends(problem: Problem) -> bool:
    """Whether `extend` takes the call on a ring, of a chunk that the ring alone does not hold.

    Its tiles have 128 queries of one head: a few tokens leave them nearly empty, where the decode kernel packs those of
    a group. That reads the ring once for 64 queries (32 at head size 256). For one row they are about even at three
    readings (64 tokens, groups of 4, W = 4096: 69 us, and 85 by four readings and a merge), for many rows at fewer (128
    tokens, 8 rows: 143 and 454 us). (One H200, jax 0.11.2, 2026-11-22.)
    """
    from ringjax._kernels import mosaic_decode

    many = problem.queries * problem.group > 2 * mosaic_decode.most_rows(problem)
    return problem.is_ring and problem.q_stride == 1 and not problem.quantised and many


def extend(
    problem: Problem,
    rows: Rows,
    q: Array,
    k: Array,
    v: Array,
    ring_k: Array,
    ring_v: Array,
    sink_logits: Array | None,
    **options: Any,
) -> tuple[Array, Array]:
    """Output and lse of a chunk's attention to a ring as it was before it and to itself, in one launch."""
    from ringjax._kernels import mosaic_forward

    q, k, v, ring_k, ring_v = _padded(problem, q, k, v, ring_k, ring_v)
    out, lse = mosaic_forward.extend(problem, rows, q, k, v, ring_k, ring_v, sink_logits, **options)
    return out[..., : problem.value_dim], lse


def writes(problem: Problem, *memories: Problem) -> bool:
    """Whether `append_attend` takes the problem, with memories beside its ring."""
    from ringjax._kernels import mosaic_decode

    able = problem.is_ring and not any(unsupported(memory) for memory in memories)
    return able and mosaic_decode.writes(problem, *memories)


def append_attend(
    problem: Problem,
    rows: Rows,
    q: Array,
    k: Array,
    v: Array,
    ring_k: Array,
    ring_v: Array,
    sink_logits: Array | None,
    memories: Sequence[Memory] = (),
    **options: Any,
) -> tuple[Array, Array, Array, Array, Rows]:
    """Output, lse, the ring with the tokens `k` and `v`, and the rows after them, in one launch."""
    from ringjax._kernels import mosaic_decode

    return mosaic_decode.append_attend(problem, rows, q, k, v, ring_k, ring_v, sink_logits, memories, **options)
