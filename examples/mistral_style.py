"""A decoder in the style of Mistral 7B: every layer looks back through the same window, query heads share kv heads.

The weights are random: this is about the plumbing. Prompts of different lengths, each longer than the window, are read
in chunks and continued by one jitted loop; then every token is checked against a forward pass without any cache.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.tree_util import Partial

import ringjax as rj
from ringjax.nnx import SlidingWindowAttention


class FeedForward(nnx.Module):
    """SwiGLU (Shazeer, 2020)."""

    def __init__(self, width: int, hidden: int, rngs: nnx.Rngs):
        self.gate = nnx.Linear(width, hidden, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(width, hidden, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(hidden, width, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


class Layer(nnx.Module):
    def __init__(self, width: int, heads: int, kv_heads: int, window: int, rngs: nnx.Rngs):
        self.attention = SlidingWindowAttention(
            num_heads=heads,
            num_kv_heads=kv_heads,
            in_features=width,
            window=rj.Window.from_huggingface(window),  # transformers' `sliding_window`
            use_bias=False,
            rngs=rngs,
        )
        self.feed_forward = FeedForward(width, 7 * width // 2, rngs)
        self.attention_norm = nnx.RMSNorm(width, epsilon=1e-5, rngs=rngs)
        self.feed_forward_norm = nnx.RMSNorm(width, epsilon=1e-5, rngs=rngs)

    def __call__(self, x: jax.Array, ring: rj.RingBuffer | None, lengths: jax.Array | None):
        attended, ring = self.attention(self.attention_norm(x), ring, lengths=lengths)
        x = x + attended
        return x + self.feed_forward(self.feed_forward_norm(x)), ring


class Mistral(nnx.Module):
    def __init__(
        self, *, vocabulary: int, layers: int, width: int, heads: int, kv_heads: int, window: int, rngs: nnx.Rngs
    ):
        self.embed = nnx.Embed(vocabulary, width, rngs=rngs)
        self.layers = nnx.List([Layer(width, heads, kv_heads, window, rngs) for _ in range(layers)])
        self.norm = nnx.RMSNorm(width, epsilon=1e-5, rngs=rngs)
        self.head = nnx.Linear(width, vocabulary, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array, rings=None, *, lengths: jax.Array | None = None):
        """Tokens int32 [B, T] -> logits [B, T, V] and the rings after them; without rings, whole sequences."""
        x, after = self.embed(tokens), []
        for layer, ring in zip(self.layers, rings or [None] * len(self.layers), strict=True):
            x, ring = layer(x, ring, lengths)
            after.append(ring)
        return self.head(self.norm(x)), after

    def init_rings(self, batch: int) -> list[rj.RingBuffer]:
        return [layer.attention.init_buffer(batch) for layer in self.layers]


def step(model: Mistral, tokens: jax.Array, rings, *, lengths: jax.Array | None = None):
    """What `rj.generate` runs, in prompts and in decoding. `lengths` says how much of a chunk is padding."""
    return model(tokens, rings, lengths=lengths)


def main(
    layers: int = 4, width: int = 128, window: int = 64, prompts: tuple[int, ...] = (300, 173, 80), new: int = 100
) -> dict[str, float]:
    sizes = {"vocabulary": 512, "layers": layers, "width": width, "heads": 8, "kv_heads": 2, "window": window}
    model = Mistral(**sizes, rngs=nnx.Rngs(0))
    batch, lengths = len(prompts), jnp.array(prompts, jnp.int32)
    prompt = jax.random.randint(jax.random.key(1), (batch, max(prompts)), 0, sizes["vocabulary"], jnp.int32)

    # The model travels as an argument of the step, not as constants of the compiled program.
    run = rj.generate(
        Partial(step, model), model.init_rings(batch), prompt, lengths=lengths, max_new_tokens=new, prefill_size=window
    )

    # Without a cache: each row's prompt and its new tokens, in one forward. Greedy decoding took the likeliest token;
    # the margin allows for ties and rounding.
    rows = np.zeros((batch, max(prompts) + new), np.int32)
    for row, length in enumerate(prompts):
        rows[row, : length + new] = np.concatenate([prompt[row, :length], run.tokens[row]])
    logits = np.asarray(jax.jit(lambda model, tokens: model(tokens)[0])(model, rows))
    behind = 0.0
    for row, length in enumerate(prompts):
        here = logits[row, length - 1 : length - 1 + new]
        behind = max(behind, float((here.max(-1) - here[np.arange(new), run.tokens[row]]).max()))
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(run.state))
    spread = float(logits.std())
    print(f"{batch} prompts of {list(prompts)} tokens, {new} new ones each, window {window}")
    print(
        f"each is the likeliest token of a forward without cache, to within {behind:.1e} (logits spread {spread:.2f})"
    )
    print(f"{held:,} bytes of rings, before and after")
    return {"behind": behind, "spread": spread, "bytes": held}


if __name__ == "__main__":
    main()
