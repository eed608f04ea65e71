"""Training on streams longer than memory: chunk by chunk, with gradients through the ring."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from ringjax import _inputs

ChunkLoss = Callable[[Any, Any, Any], tuple[Array, Any]]
"""`loss(params, chunk, state) -> (loss, state)`: the chunk's arrays are [B, chunk_size, ...], the loss is a sum."""


def chunked_value_and_grad(
    loss: ChunkLoss, *, chunk_size: int, truncate_every: int | None = None
) -> Callable[[Any, Any, Any], tuple[tuple[Array, Any], Any]]:
    """The gradient of a loss over a stream that is read in chunks, its rings carried from chunk to chunk.

    Without `truncate_every` the gradient is that of the whole stream at once: cotangents flow back through the rings
    (their keys and values are differentiable) from every chunk to those before it. Chunks are rematerialised, so the
    activations of one chunk are held, and a copy of the state for each.

    With `truncate_every=n` the gradient is cut after every n chunks, the state going on (truncated backpropagation
    through time; Transformer-XL, Dai et al., 2019, is n = 1). Gradients are summed on the way, and peak memory does
    not depend on the stream's length.

    Args:
      loss: `loss(params, chunk, state) -> (loss, state)`, a sum over the chunk's tokens, scalar; all rings of `state`
        hold what came before. `chunk` is a piece of `inputs`.
      chunk_size: tokens in a chunk; a last, shorter chunk takes the rest.
      truncate_every: cut the gradient every so many chunks; None: never.

    Returns:
      `f(params, state, inputs) -> ((loss, state), gradients)`: `inputs` is a pytree of arrays [B, T, ...]; the loss is
      the stream's sum, the gradients are with respect to `params`. Run it under `jit`.

    Raises:
      ValueError, TypeError: sizes below 1; inputs that do not agree on [B, T].
    """
    call = "chunked_value_and_grad"
    if not callable(loss):
        raise TypeError(f"{call}: loss must be a function (params, chunk, state), got {type(loss).__name__}.")
    size = _inputs.as_int(call, "chunk_size", chunk_size, least=1)
    cut = None if truncate_every is None else _inputs.as_int(call, "truncate_every", truncate_every, least=1)

    def stream(params: Any, state: Any, inputs: Any, start: Any, chunks: int) -> tuple[Array, Any]:
        """The loss of `chunks` chunks from token `start` on, each one rematerialised in the backward pass."""

        def one(state: Any, i: Array) -> tuple[Any, Array]:
            value, state = loss(params, _chunk(inputs, start + i * size, size), state)
            return state, value

        if chunks == 1:
            state, value = jax.checkpoint(one)(state, jnp.int32(0))
            return value, state
        state, values = lax.scan(jax.checkpoint(one), state, jnp.arange(chunks, dtype=jnp.int32))
        return values.sum(), state

    def whole(params: Any, state: Any, inputs: Any, start: int) -> tuple[Array, Any]:
        """The loss of all that is left from token `start` on, the last, shorter chunk included."""
        length = _length(call, inputs)
        total, chunks = jnp.zeros((), jnp.float32), (length - start) // size
        if chunks:
            total, state = stream(params, state, inputs, start, chunks)
        if short := length % size:
            value, state = loss(params, _chunk(inputs, length - short, short), state)
            total = total + value
        return total, state

    def exact(params: Any, state: Any, inputs: Any) -> Any:
        return jax.value_and_grad(whole, has_aux=True)(params, state, inputs, 0)

    def truncated(params: Any, state: Any, inputs: Any) -> Any:
        assert cut is not None
        length = _length(call, inputs)
        span = cut * size

        def add(carry: Any, part: Any, *arguments: Any) -> Any:
            total, state, gradients = carry
            (value, state), more = jax.value_and_grad(part, has_aux=True)(params, state, inputs, *arguments)
            return total + value, state, jax.tree.map(jnp.add, gradients, more)

        carry = (jnp.zeros((), jnp.float32), state, jax.tree.map(jnp.zeros_like, params))

        def segment(carry: Any, _: None) -> Any:
            start, carry = carry
            return (start + span, add(carry, stream, start, cut)), None

        # The start is counted, not listed: a list would grow with the stream.
        (_, carry), _ = lax.scan(segment, (jnp.int32(0), carry), None, length=length // span)
        if length % span:
            carry = add(carry, whole, length - length % span)
        total, state, gradients = carry
        return (total, state), gradients

    return exact if cut is None else truncated


def _length(call: str, inputs: Any) -> int:
    shapes = {x.shape[:2] for x in jax.tree.leaves(inputs)}
    if len(shapes) != 1 or any(len(shape) != 2 for shape in shapes):
        first = f"{call}: inputs must be arrays [B, T, ...] of one B and T, got {sorted(shapes)}."
        raise ValueError(first)
    (_, length), *_ = shapes
    if length == 0:
        raise ValueError(f"{call}: inputs must not be empty, got T = 0.")
    return length


def _chunk(inputs: Any, start: Any, size: int) -> Any:
    # Cut out inside the loop: a scan over reshaped inputs would hold a second copy of the stream.
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, size, axis=1), inputs)
