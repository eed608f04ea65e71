"""Rotary position embedding, exact to float32 at any int32 position."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from ringjax import _inputs


def apply_rotary(
    x: Float[Array, "B T N H"],
    positions: Int[Array, "B T"] | Int[Array, " T"],
    *,
    base: float = 10_000.0,
    fraction: float = 1.0,
    frequencies: Sequence[float] | None = None,
) -> Float[Array, "B T N H"]:
    """Queries or keys, each turned by its position (rotary position embedding, arXiv:2104.09864).

    Of the first R = int(H * fraction) features, number i is paired with number i + R / 2, and the pair is turned by
    `position * base ** (-2 i / R)` radians: the split-half convention of Llama, Mistral, Gemma, GPT-NeoX and
    transformers, not the interleaved one of the original paper and GPT-J. The other features stay as they are.

    Angles are reduced modulo one turn in integers, so that they are as good at position 2**31 - 1 as at 0. The product
    of a position and a frequency in float32, as elsewhere, is wrong by 0.03 radians near position 10**6.

    Args:
      x: float32, bfloat16 or float16. Computed in float32, returned in its own dtype.
      positions: integers, [B, T] or one [T] for all rows, within int32. They may be negative.
      base: of the geometric series of frequencies; Gemma 3 takes 10,000 in local layers and 1,000,000 in global ones.
      fraction: the part of the features that is turned, above 0 and at most 1 (transformers: `partial_rotary_factor`).
      frequencies: radians per position of each pair, R / 2 static numbers, instead of `base` and `fraction`: for
        scaled embeddings such as Llama 3's (transformers: `inv_freq`). 0 leaves a pair as it is.

    Raises:
      ValueError: positions of another shape, or numbers out of their range.
      TypeError: an argument of the wrong kind or dtype.
    """
    call = "apply_rotary"
    _inputs.check_array(call, "x", x, "B T N H")
    positions = check_positions(call, positions, x)
    turning = rotary_frequencies(call, x.shape[3], base, fraction, frequencies)
    angles = _angles(positions if positions.ndim == 2 else positions[None], turning)[:, :, None]
    x = jnp.asarray(x)
    half = len(turning)
    first, second = (part.astype(jnp.float32) for part in (x[..., :half], x[..., half : 2 * half]))
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return turned if 2 * half == x.shape[3] else jnp.concatenate([turned, x[..., 2 * half :]], axis=-1)


def check_positions(call: str, positions: Any, x: Any) -> Array:
    """Positions of the tokens of x [B, T, ...] as int32 [T] or [B, T]."""
    if not hasattr(positions, "dtype") or not np.issubdtype(positions.dtype, np.integer):
        raise TypeError(f"{call}: positions must be an array of integers, got {_inputs.describe(positions)}.")
    batch, length = x.shape[:2]
    if positions.shape not in ((length,), (batch, length)):
        first = f"{call}: positions must be int32[{length}] or int32[{batch}, {length}], got "
        raise ValueError(_inputs.message(f"{first}{_inputs.describe(positions)}.", {"x": _inputs.describe(x)}))
    _inputs.check_int32(call, "positions", positions)
    return jnp.asarray(positions, jnp.int32)


def rotary_frequencies(
    call: str, head_dim: int, base: Any, fraction: Any, frequencies: Sequence[float] | None
) -> np.ndarray:
    """Radians per position of each pair, float64 [R / 2]."""
    if frequencies is not None:
        if not _inputs.is_concrete(frequencies):
            raise TypeError(f"{call}: frequencies must be static numbers, got {_inputs.describe(frequencies)}.")
        turning = np.asarray(frequencies, np.float64)
        if turning.ndim != 1 or not 0 < 2 * len(turning) <= head_dim or not np.isfinite(turning).all():
            first = f"{call}: frequencies must be 1 to {head_dim // 2} finite numbers, one per pair of features, got "
            raise ValueError(f"{first}{_inputs.describe(turning)}.")
        return turning
    base, fraction = (_inputs.as_positive(call, *pair) for pair in (("base", base), ("fraction", fraction)))
    rotated = int(head_dim * fraction)
    if fraction > 1.0 or rotated < 2 or rotated % 2:
        first = f"{call}: head_dim * fraction must be even, at least 2 and at most head_dim, got "
        raise ValueError(f"{first}{head_dim} * {fraction:g}.")
    return base ** (-np.arange(0, rotated, 2, dtype=np.float64) / rotated)


def _angles(positions: Array, frequencies: np.ndarray) -> Array:
    """Angles in -pi..pi, float32 [B, T, R / 2], of int32 positions [B, T]."""
    # Turns per position, as 64-bit fractions of a turn. A product modulo 2**64 loses whole turns and nothing else.
    turns = [round(math.ldexp(float(f) / (2 * math.pi), 64)) % 2**64 for f in frequencies]
    high, low = (np.array([part(t) for t in turns], np.uint32) for part in (lambda t: t >> 32, lambda t: t % 2**32))
    p = positions.astype(jnp.uint32)[..., None]
    high, low = high[None, None], low[None, None]
    # The upper 32 bits of p * low: JAX has no 64-bit integers by default. The carries left out are 3 units at most.
    half, rest = np.uint32(16), np.uint32(2**16 - 1)
    p1, p0, l1, l0 = p >> half, p & rest, low >> half, low & rest
    upper = p1 * l1 + ((p1 * l0) >> half) + ((p0 * l1) >> half)
    upper = upper - jnp.where(positions[..., None] < 0, low, np.uint32(0))
    phase = jax.lax.bitcast_convert_type(p * high + upper, jnp.int32)
    return phase.astype(jnp.float32) * np.float32(2 * math.pi / 2**32)
