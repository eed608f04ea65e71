"""An encoder-decoder with three rings: it reads a source of any length, and writes with one softmax over two memories.

`forward` keeps what the encoder saw, `feedback` what the decoder itself wrote; `backward` takes the place of `forward`
where gradients must flow back from the decoder into the encoder, chunk by chunk. All three have a fixed size.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import ringjax as rj

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
WIDTH = HEADS * HEAD_DIM


def random_weights(vocabulary: int, seed: int) -> dict[str, jax.Array]:
    shapes = {"embed": (vocabulary, WIDTH)}
    for part in ("encoder", "decoder"):
        shapes |= {f"{part}_q": (WIDTH, HEADS, HEAD_DIM), f"{part}_out": (HEADS, HEAD_DIM, WIDTH)}
        shapes |= {f"{part}_k": (WIDTH, KV_HEADS, HEAD_DIM), f"{part}_v": (WIDTH, KV_HEADS, HEAD_DIM)}
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {
        name: jax.random.normal(key, shape) * (1.0 if name == "embed" else WIDTH**-0.5)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def project(w: dict[str, jax.Array], part: str, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    q, k, v = (jnp.einsum("btd,dnh->btnh", x, w[f"{part}_{name}"]) for name in "qkv")
    return q, k, v


@partial(jax.jit, static_argnames="requires_grad", donate_argnames="state")
def read(w: dict[str, jax.Array], tokens: jax.Array, state: rj.BufferState, requires_grad: bool = False):
    """The encoder: one more chunk of the source goes into its ring."""
    _, state = rj.encode(*project(w, "encoder", w["embed"][tokens]), state, requires_grad=requires_grad)
    return state


@partial(jax.jit, donate_argnames="state")
def write(w: dict[str, jax.Array], token: jax.Array, position: jax.Array, state: rj.BufferState):
    """The decoder: logits [B, V] of its next token, after `token` [B] at `position`."""
    x = w["embed"][token][:, None]
    out, state = rj.decode(*project(w, "decoder", x), state, position=position)
    x = x + jnp.einsum("btnh,nhd->btd", out, w["decoder_out"])
    return (x @ w["embed"].T)[:, 0], state


def dense_logits(w: dict[str, jax.Array], source: jax.Array, written: jax.Array, config: rj.RingBufferConfig):
    """The same without rings: all keys of both streams in one row, and a mask."""
    _, k_source, v_source = project(w, "encoder", w["embed"][source])
    x = w["embed"][written]
    q, k_own, v_own = project(w, "decoder", x)
    length, own = source.shape[1], jnp.arange(written.shape[1])
    far = jnp.arange(length)
    kept = (far < config.sinks) | (far >= length - config.buffer_size)  # what the encoder's ring still holds
    behind = own[:, None] - own[None]
    near = (behind >= 0) & ((behind < config.buffer_size) | (own[None] < config.sinks))
    mask = jnp.concatenate([jnp.broadcast_to(kept[None], (own.size, length)), near], axis=1)
    k, v = (
        jnp.repeat(jnp.concatenate(pair, axis=1), HEADS // KV_HEADS, axis=2)
        for pair in ((k_source, k_own), (v_source, v_own))
    )
    scores = jnp.where(mask[None, None], jnp.einsum("btnh,bsnh->bnts", q, k) * HEAD_DIM**-0.5, -jnp.inf)
    out = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores, axis=-1), v)
    return (x + jnp.einsum("btnh,nhd->btd", out, w["decoder_out"])) @ w["embed"].T


def main(
    source_length: int = 1000, chunk: int = 100, new: int = 60, window: int = 64, slack: int = 8
) -> dict[str, float]:
    config = rj.RingBufferConfig(buffer_size=window, sinks=4, slack=slack)
    start = partial(rj.init_state, config, batch=2, kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype=jnp.float32)
    w = random_weights(vocabulary=100, seed=0)
    source = jax.random.randint(jax.random.key(1), (2, source_length), 0, 100, jnp.int32)

    state = start()
    for i in range(0, source_length, chunk):
        state = read(w, source[:, i : i + chunk], state)
    token, written, streamed = jnp.zeros(2, jnp.int32), [], []
    for position in range(new):
        written.append(token)
        logits, state = write(w, token, jnp.int32(position), state)
        streamed.append(np.asarray(logits))
        token = logits.argmax(-1).astype(jnp.int32)  # its own output, shifted right, is its next input

    expected = np.asarray(dense_logits(w, source, jnp.stack(written, axis=1), config))
    difference = float(np.abs(np.stack(streamed, axis=1) - expected).max())
    # An earlier position rolls the decoder back: the last tokens are taken back, and written again.
    again = []
    for position in range(new - slack, new):
        logits, state = write(w, written[position], jnp.int32(position), state)
        again.append(np.abs(np.asarray(logits) - streamed[position]).max())

    # Training: the decoder's loss reaches the encoder through the backward ring, whatever the chunks.
    def loss(w: dict[str, jax.Array], size: int) -> jax.Array:
        state = start()
        for i in range(0, 2 * chunk, size):
            state = read(w, source[:, i : i + size], state, requires_grad=True)
        logits, _ = write(w, source[:, 0], jnp.int32(0), state)
        return jax.nn.logsumexp(logits, axis=-1).sum()

    gradients = [jax.jit(jax.grad(loss), static_argnums=1)(w, size)["encoder_v"] for size in (chunk // 2, 2 * chunk)]
    gradient_difference = float(jnp.abs(gradients[0] - gradients[1]).max() / jnp.abs(gradients[1]).max())
    print(f"read {source_length} tokens, wrote {new}: rings and dense attention differ by at most {difference:.1e}")
    print(f"rolled back {slack} tokens and wrote them again: the same to within {max(again):.1e}")
    print(f"gradients of the encoder's values, in 4 chunks and in 1: the same to within {gradient_difference:.1e}")
    return {"difference": difference, "again": float(max(again)), "gradient_difference": gradient_difference}


if __name__ == "__main__":
    main()
