"""A decoder in the style of Gemma 3: local layers with small windows, and now and then a global one.

A global layer sees everything, so its ring has to be as long as the longest stream; the local layers' rings are tiny.
The weights are random: what is shown is that one list of rings, of both kinds, streams what a whole forward computes.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import ringjax as rj
from ringjax.nnx import SlidingWindowAttention


class Layer(nnx.Module):
    """Norms before and after both halves, normalised queries and keys, GeGLU."""

    def __init__(self, width: int, window: rj.Window, rotary_base: float, rngs: nnx.Rngs):
        self.attention = SlidingWindowAttention(
            num_heads=4,
            num_kv_heads=1,
            head_dim=2 * width // 4,  # Gemma's heads are wider than its features divided among them
            in_features=width,
            window=window,
            rotary_base=rotary_base,
            normalize_qk=True,
            use_bias=False,
            rngs=rngs,
        )
        self.gate, self.up = (nnx.Linear(width, 4 * width, use_bias=False, rngs=rngs) for _ in range(2))
        self.down = nnx.Linear(4 * width, width, use_bias=False, rngs=rngs)
        self.before_attention, self.after_attention, self.before_dense, self.after_dense = (
            nnx.RMSNorm(width, rngs=rngs) for _ in range(4)
        )

    def __call__(self, x: jax.Array, ring: rj.RingBuffer | None):
        attended, ring = self.attention(self.before_attention(x), ring)
        x = x + self.after_attention(attended)
        dense = self.before_dense(x)
        dense = self.down(nnx.gelu(self.gate(dense), approximate=True) * self.up(dense))
        return x + self.after_dense(dense), ring


class Gemma(nnx.Module):
    def __init__(
        self, *, vocabulary: int, width: int, layers: int, every: int, window: int, max_length: int, rngs: nnx.Rngs
    ):
        """Every `every`-th layer is global; its window, and its ring, are `max_length` tokens."""
        local, far = rj.Window.causal(window), rj.Window.causal(max_length)
        self.embed = nnx.Embed(vocabulary, width, rngs=rngs)
        self.layers = nnx.List(
            [
                Layer(width, far, 1_000_000.0, rngs) if i % every == 0 else Layer(width, local, 10_000.0, rngs)
                for i in range(1, layers + 1)
            ]
        )
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.width = width

    def __call__(self, tokens: jax.Array, rings: list[rj.RingBuffer] | None = None):
        x, after = self.embed(tokens) * jnp.float32(self.width**0.5), []
        for layer, ring in zip(self.layers, rings or [None] * len(self.layers), strict=True):
            x, ring = layer(x, ring)
            after.append(ring)
        return self.embed.attend(self.norm(x)), after  # the embedding is the head, too

    def init_rings(self, batch: int) -> list[rj.RingBuffer]:
        return [layer.attention.init_buffer(batch) for layer in self.layers]


def main(layers: int = 6, every: int = 6, width: int = 64, window: int = 32, length: int = 1000) -> dict[str, float]:
    model = Gemma(
        vocabulary=256, width=width, layers=layers, every=every, window=window, max_length=length, rngs=nnx.Rngs(0)
    )
    tokens = jax.random.randint(jax.random.key(1), (2, length), 0, 256, jnp.int32)
    whole = np.asarray(jax.jit(lambda model, tokens: model(tokens)[0])(model, tokens))

    # The stream: half of it as a prompt in one chunk, half token by token, all in one list of rings.
    @jax.jit
    def stream(model: Gemma, tokens: jax.Array):
        prompt, rest = jnp.split(tokens, [length // 2], axis=1)
        first, rings = model(prompt, model.init_rings(batch=2))

        def one(rings, token):
            logits, rings = model(token[:, None], rings)
            return rings, logits[:, 0]

        rings, others = jax.lax.scan(one, rings, rest.T)
        return jnp.concatenate([first, jnp.moveaxis(others, 0, 1)], axis=1), rings

    streamed, rings = stream(model, tokens)
    difference, largest = float(np.abs(np.asarray(streamed) - whole).max()), float(np.abs(whole).max())
    size = {True: 0, False: 0}
    for number, ring in enumerate(rings, start=1):
        size[number % every == 0] += ring.k.nbytes + ring.v.nbytes
    print(
        f"{layers} layers, every {every}th global: stream and batch differ by at most {difference:.1e} of {largest:.1f}"
    )
    print(f"rings: {size[False]:,} bytes in the local layers, {size[True]:,} in the global ones")
    return {"difference": difference, "largest": largest, "local": size[False], "global": size[True]}


if __name__ == "__main__":
    main()
