"""A model of a few numbers with one ring per layer, for tests of generation and serving."""

import jax.numpy as jnp
import numpy as np

import ringjax as rj

VOCABULARY, WIDTH, HEADS, KV_HEADS, DIM = 11, 16, 2, 1, 8
LAYERS = (rj.Window.causal(4, sinks=1), rj.Window.causal(6))


def parameters(seed=0, layers=2):
    """Random weights."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape) / shape[0] ** 0.5, jnp.float32)

    heads, kv = HEADS * DIM, KV_HEADS * DIM
    shapes = {"q": (WIDTH, heads), "k": (WIDTH, kv), "v": (WIDTH, kv), "o": (heads, WIDTH)}
    return {
        "embed": 3 * normal(VOCABULARY, WIDTH),
        "place": 3 * normal(64, WIDTH),
        "layers": [{name: 2 * normal(*shape) for name, shape in shapes.items()} for _ in range(layers)],
        "out": normal(WIDTH, VOCABULARY),
    }


def rings(batch, windows=LAYERS, slack=0, dtype=jnp.float32):
    return [rj.RingBuffer.empty(batch, KV_HEADS, DIM, window, slack=slack, dtype=dtype) for window in windows]


def step(params, tokens, state, *, lengths=None):
    """Tokens int32 [B, T] -> logits [B, T, V] and the rings after them."""
    batch, chunk = tokens.shape
    positions = state[0].length[:, None] + jnp.arange(chunk, dtype=jnp.int32)[None]
    x = params["embed"][tokens] + params["place"][positions % 64]
    after = []
    for layer, ring in zip(params["layers"], state, strict=True):
        q, k, v = ((x @ layer[name]).reshape(batch, chunk, -1, DIM) for name in "qkv")
        out, ring = rj.attend(q, k, v, ring, lengths=lengths)
        x = x + out.reshape(batch, chunk, -1) @ layer["o"]
        after.append(ring)
    return x @ params["out"], after


def prompts(seed, batch, length):
    return np.random.default_rng(seed).integers(0, VOCABULARY, (batch, length)).astype(np.int32)
