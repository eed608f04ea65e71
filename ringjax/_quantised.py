"""Keys and values in 8 bits: one scale per token and kv head.

A stored number times its token's scale is the key's or value's number. The scale is the token's largest magnitude over
the largest number of the dtype, as of SmoothQuant's per-token quantisation (Xiao et al., 2023), kept to 16 significant
bits: then every product of a stored number and its scale is exact in float32, and quantising it again gives the same
numbers. What a quantised ring exports can be restored bit for bit.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ringjax import _inputs

LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}
"""The dtypes, and the largest number that is used of each."""


def is_quantised(dtype: Any) -> bool:
    """Whether numbers of this dtype need scales."""
    return jnp.dtype(dtype).name in LARGEST


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def quantise(x: Array, dtype: Any) -> tuple[Array, Array]:
    """Numbers [..., H] in a quantised dtype, and their scales, float32 [...].

    The largest error is half a step: 1/254 of the token's largest magnitude in int8, 1/16 of each number in float8. A
    token with a NaN or an infinity becomes NaN as a whole, since its scale does.

    Raises:
      NotImplementedError: a gradient is asked for. It is 0 wherever it exists, which nobody wants to train with.
    """
    x = x.astype(jnp.float32)
    largest = LARGEST[jnp.dtype(dtype).name]
    # A product, as which XLA does a division by a constant where it is jitted: the bits are the same then everywhere.
    scale = lax.reduce_precision(jnp.abs(x).max(-1) * np.float32(1 / largest), exponent_bits=8, mantissa_bits=15)
    # Below the smallest normal number, which processors may take for 0 or not, nothing is left to tell apart.
    scale = jnp.where(scale < np.finfo(np.float32).tiny, 0.0, scale)
    real = ((scale > 0.0) & (scale < jnp.inf))[..., None]
    steps = jnp.clip(jnp.where(real, x, 0.0) / jnp.where(real, scale[..., None], 1.0), -largest, largest)
    return (jnp.round(steps) if jnp.dtype(dtype) == jnp.int8 else steps).astype(dtype), scale


def _refuse(x: Array, dtype: Any) -> Any:
    first = f"RingBuffer: dtype must be float32, bfloat16 or float16 for gradients of keys and values, got {dtype}."
    hint = "a quantised ring is for inference: train with another dtype, or give it stop_gradient of k and v."
    raise NotImplementedError(_inputs.message(first, hint=hint))


quantise.defvjp(_refuse, _refuse)


def dequantise(x: Array, scale: Array) -> Array:
    """The numbers that are meant, float32 [..., H]; exact."""
    return x.astype(jnp.float32) * scale[..., None]
