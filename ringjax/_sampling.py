"""How the next token is drawn from logits."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from ringjax import _inputs


@partial(jax.tree_util.register_dataclass, data_fields=["temperature", "top_p"], meta_fields=["top_k"])
@dataclasses.dataclass(frozen=True)
class Sampling:
    """Draws tokens from `softmax(logits / temperature)`, cut to the likeliest.

    A pytree: another temperature or another `top_p` compiles nothing anew.

    Attributes:
      temperature: above 0; the smaller, the greedier.
      top_k: keep the k likeliest tokens, and those that tie with the last of them (Fan et al., 2018); None: all.
      top_p: keep the fewest likeliest tokens whose probabilities reach p, 0 < p <= 1 (nucleus sampling, Holtzman et
        al., 2020), and those that tie with the last of them, after `top_k`; None: all.

    Raises:
      ValueError, TypeError: a field out of its range or of the wrong kind.
    """

    temperature: Any = 1.0
    top_k: int | None = None
    top_p: Any = None

    def __post_init__(self) -> None:
        # Inside jit and in tree maps the numbers are arrays or placeholders, which are not looked at.
        if isinstance(self.temperature, int | float):
            _inputs.as_positive("Sampling", "temperature", self.temperature)
        if isinstance(self.top_p, int | float) and _inputs.as_positive("Sampling", "top_p", self.top_p) > 1:
            raise ValueError(f"Sampling: top_p must be at most 1, got {self.top_p}.")
        if self.top_k is not None:
            object.__setattr__(self, "top_k", _inputs.as_int("Sampling", "top_k", self.top_k, least=1))

    def __call__(self, logits: Float[Array, "B V"], key: Array) -> Int[Array, " B"]:
        """Tokens int32 [B]."""
        return jax.random.categorical(key, self.adjust(logits), axis=-1).astype(jnp.int32)

    def adjust(self, logits: Float[Array, "... V"]) -> Float[Array, "... V"]:
        """The logits that are drawn from, float32; -inf where a token is cut off."""
        logits = jnp.asarray(logits, jnp.float32)
        # From the largest down, or else tiny temperatures divide several of them to infinity.
        temperature = jnp.maximum(jnp.asarray(self.temperature, jnp.float32), jnp.finfo(jnp.float32).tiny)
        logits = (logits - logits.max(axis=-1, keepdims=True)) / temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = jax.lax.top_k(logits, self.top_k)[0][..., -1:]
            logits = jnp.where(logits < least, -jnp.inf, logits)
        if self.top_p is not None:
            ordered = jnp.sort(logits, axis=-1, descending=True)
            shares = jax.nn.softmax(ordered, axis=-1)
            # A token stays if those before it do not reach p yet; the first always does.
            top_p = jnp.asarray(self.top_p, jnp.float32)
            # In float32 the sum reaches 1 before the last token does.
            stays = (jnp.cumsum(shares, axis=-1) - shares < top_p) | (top_p >= 1)
            least = jnp.min(jnp.where(stays, ordered, jnp.inf), axis=-1, keepdims=True)
            logits = jnp.where(logits < least, -jnp.inf, logits)
        return logits


def greedy(logits: Float[Array, "B V"], key: Array) -> Int[Array, " B"]:
    """The likeliest token, int32 [B]; the key is not used."""
    del key
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
