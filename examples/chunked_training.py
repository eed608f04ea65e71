"""Training on one stream, longer than a batch could hold: chunk by chunk, with gradients through the rings.

Exact: the gradient of the whole stream at once, in the memory of a chunk and the rings between the chunks. Truncated:
the gradient is cut every few chunks, and memory does not depend on how long the stream is.
"""

import pydoc_data.topics

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import ringjax as rj
from ringjax.nnx import SlidingWindowAttention


class Model(nnx.Module):
    """Two layers of local attention over bytes."""

    def __init__(self, width: int, window: int, rngs: nnx.Rngs):
        self.embed = nnx.Embed(256, width, rngs=rngs)
        seen = rj.Window.causal(window, sinks=2)
        self.attentions = nnx.List(
            [SlidingWindowAttention(2, width, seen, normalize_qk=True, rngs=rngs) for _ in range(2)]
        )
        self.denses = nnx.List([nnx.Linear(width, width, rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(width, 256, rngs=rngs)

    def __call__(self, tokens: jax.Array, rings: list[rj.RingBuffer]) -> tuple[jax.Array, list[rj.RingBuffer]]:
        x, after = self.embed(tokens), []
        for attention, dense, ring in zip(self.attentions, self.denses, rings, strict=True):
            attended, ring = attention(x, ring)
            x = x + attended
            x = x + nnx.relu(dense(x))
            after.append(ring)
        return self.head(x), after

    def init_rings(self) -> list[rj.RingBuffer]:
        return [attention.init_buffer(batch=1) for attention in self.attentions]


def loss(model: Model, chunk: dict[str, jax.Array], rings: list[rj.RingBuffer]):
    """What `rj.chunked_value_and_grad` asks for: the loss of a chunk, summed, and the rings after it."""
    logits, rings = model(chunk["read"], rings)
    return optax.softmax_cross_entropy_with_integer_labels(logits, chunk["next"]).sum(), rings


def text(length: int) -> dict[str, jax.Array]:
    """One row of bytes from the manual that Python ships, and the byte after each."""
    data = np.frombuffer("\n".join(pydoc_data.topics.topics.values()).encode(), np.uint8)
    data = jnp.asarray(data[: length + 1].astype(np.int32))[None]
    return {"read": data[:, :-1], "next": data[:, 1:]}


def compiled(function, *arguments):
    """A program that was compiled for such arguments; it knows how much memory it needs beside them."""
    return jax.jit(function).lower(*arguments).compile()


def main(
    length: int = 16_384, chunk: int = 256, width: int = 64, window: int = 64, steps: int = 16
) -> dict[str, float]:
    model = Model(width, window, nnx.Rngs(0))
    exact = rj.chunked_value_and_grad(loss, chunk_size=chunk)
    truncated = rj.chunked_value_and_grad(loss, chunk_size=chunk, truncate_every=2)
    at_once = rj.chunked_value_and_grad(loss, chunk_size=length)

    # Chunks change the memory, not the gradient.
    part, longer, rings = text(length), text(10 * length), model.init_rings()
    programs = {
        "at once": compiled(at_once, model, rings, part),
        "by chunks": compiled(exact, model, rings, part),
        "truncated": compiled(truncated, model, rings, part),
        "truncated, 10 x longer": compiled(truncated, model, rings, longer),
    }
    _, whole = programs["at once"](model, rings, part)
    _, by_chunks = programs["by chunks"](model, rings, part)
    difference = jax.tree.map(jnp.subtract, by_chunks, whole)
    difference = float(optax.tree.norm(difference) / optax.tree.norm(whole))
    print(
        f"gradient of {length:,} bytes, by chunks of {chunk} and at once: they differ by {difference:.1e} of the norm"
    )
    memory = {name: program.memory_analysis().temp_size_in_bytes for name, program in programs.items()}
    for name, size in memory.items():
        print(f"  {name:<24}{size / 1e6:8.2f} MB beside arguments and results")

    # A training that reads on: the rings go from step to step, so no byte loses sight of what came before it.
    optimizer = optax.adam(3e-3)

    @jax.jit
    def train_step(model: Model, state: optax.OptState, rings: list[rj.RingBuffer], part: dict[str, jax.Array]):
        (total, rings), gradients = truncated(model, rings, part)
        gradients = jax.tree.map(lambda g: g / part["read"].size, gradients)
        updates, state = optimizer.update(gradients, state, model)
        return optax.apply_updates(model, updates), state, rings, total / part["read"].size

    state, losses, size = optimizer.init(model), [], 4 * chunk
    stream = text(steps * size)
    for i in range(steps):
        part = jax.tree.map(lambda x, i=i: x[:, i * size : (i + 1) * size], stream)
        model, state, rings, value = train_step(model, state, rings, part)
        losses.append(float(value))
    print(f"{steps} steps over one stream of {steps * size:,} bytes: {losses[0]:.2f} to {losses[-1]:.2f} nats per byte")
    return {"difference": difference, "first": losses[0], "last": losses[-1], **memory}


if __name__ == "__main__":
    main()
