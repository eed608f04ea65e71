"""Named shapes of attention calls: the layers of real models, and the inputs that a timing runs on."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import ringjax as rj


class Arrays(NamedTuple):
    """Inputs of one call: q and g are [B, T, N, H], k and v [B, T, K, H], sink_logits [N] or None."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    g: jax.Array
    sink_logits: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Shape:
    """One layer's attention: B rows of T queries and T keys; a query sees `left` keys before it, `right` after it."""

    name: str
    queries: int
    heads: int
    kv_heads: int
    head_dim: int
    left: int
    right: int = 0
    batch: int = 1
    sink_logits: bool = False
    softcap: float | None = None

    def __str__(self):
        window = f"W={self.size}" if self.is_causal else f"left={self.left} right={self.right}"
        more = " sink logits" if self.sink_logits else ""
        more += f" softcap={self.softcap:g}" if self.softcap is not None else ""
        return (
            f"{self.name}: B={self.batch} T={self.queries} N={self.heads} K={self.kv_heads} "
            f"H={self.head_dim} {window}{more}"
        )

    @property
    def window(self):
        return rj.Window(self.left, self.right)

    @property
    def size(self):
        """W: keys that a query sees before it, itself included."""
        return self.left + 1

    @property
    def is_causal(self):
        return self.right == 0

    @property
    def pairs(self):
        """Visible (query, key) pairs of one head."""
        positions = np.arange(self.queries)
        return int((np.minimum(positions, self.left) + 1 + np.minimum(positions[::-1], self.right)).sum())

    @property
    def flops(self):
        """Useful FLOPs of a forward pass: two products over the visible pairs."""
        return 4 * self.batch * self.heads * self.head_dim * self.pairs

    @property
    def backward_flops(self):
        """Of a backward pass: five products, the logits' second computation included (FlashAttention's count)."""
        return 10 * self.batch * self.heads * self.head_dim * self.pairs

    def replace(self, **changes):
        return dataclasses.replace(self, **changes)

    def shard(self, count):
        """What one of `count` tensor-parallel devices computes."""
        assert self.kv_heads % count == 0
        return self.replace(
            name=f"{self.name} 1/{count}" if count > 1 else self.name,
            heads=self.heads // count,
            kv_heads=self.kv_heads // count,
        )

    def arrays(self, seed=0, dtype=jnp.float32):
        """Normal random inputs; never zeros, which some hardware multiplies faster."""
        rng = np.random.default_rng(seed)

        def normal(*shape):
            return jnp.asarray(rng.standard_normal(shape, np.float32)).astype(dtype)

        tokens = (self.batch, self.queries)
        q, k, v, g = (
            normal(*tokens, heads, self.head_dim) for heads in (self.heads, self.kv_heads, self.kv_heads, self.heads)
        )
        return Arrays(q, k, v, g, normal(self.heads) if self.sink_logits else None)


LONG = Shape("attention", queries=8192, heads=8, kv_heads=2, head_dim=64, left=511)
"""The shape that the project's goals are stated for."""

MODELS = {
    shape.name: shape
    for shape in (
        # From each model's published configuration. A window in these files is a number of keys seen, but
        # recurrentgemma's, which counts the keys before the query.
        Shape("mistral-7b", queries=8192, heads=32, kv_heads=8, head_dim=128, left=4095),
        Shape("gemma-3-1b", queries=8192, heads=4, kv_heads=1, head_dim=256, left=511),
        Shape("gpt-oss-20b", queries=8192, heads=64, kv_heads=8, head_dim=64, left=127, sink_logits=True),
        Shape("recurrentgemma-2b", queries=8192, heads=10, kv_heads=1, head_dim=256, left=2048),
        # LongT5's local encoder (radius 127), less its relative position bias.
        Shape("longt5-base", queries=8192, heads=12, kv_heads=12, head_dim=64, left=127, right=127),
    )
}
"""The local layers of real models, whole."""

# So that dense peers, whose memory grows with N T^2, stay near 2 GB of logits.
ON_CPU = {
    "mistral-7b": MODELS["mistral-7b"].shard(4),
    "gemma-3-1b": MODELS["gemma-3-1b"],
    "gpt-oss-20b": MODELS["gpt-oss-20b"].shard(4).replace(queries=4096),
    "recurrentgemma-2b": MODELS["recurrentgemma-2b"].replace(queries=4096),
    "longt5-base": MODELS["longt5-base"].replace(queries=4096),
}
"""The same, as one CPU can run them beside dense peers."""
