"""A server's loop: requests of different lengths come and go in a batch of fixed shape, each in a row of its own.

The weights are random: this is about the plumbing. A request waits for a free row; its prompt is read, chunk by chunk,
into rings of one row, which are then put into the batch; all rows decode together, each at its own position; a row
whose request is finished is emptied. Every shape is fixed, so three executables, compiled once, serve all of it, and
the batch's rings are never copied. Then each request is run alone: it must say the same.
"""

from collections import deque
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

import ringjax as rj

HEAD_DIM, HEADS, KV_HEADS = 16, 4, 2


class Request(NamedTuple):
    arrives: int  # at which turn of the loop
    prompt: np.ndarray
    new: int  # tokens wanted


def init_parameters(key: jax.Array, layers: int, width: int, vocabulary: int) -> dict:
    def matrix(key: jax.Array, rows: int, columns: int) -> jax.Array:
        return jax.random.normal(key, (rows, columns)) * rows**-0.5

    keys = iter(jax.random.split(key, 1 + 4 * layers))
    kv = KV_HEADS * HEAD_DIM
    shapes = {"q": (width, HEADS * HEAD_DIM), "k": (width, kv), "v": (width, kv), "out": (HEADS * HEAD_DIM, width)}
    return {
        "embed": matrix(next(keys), vocabulary, width) * vocabulary**0.5,
        "layers": [{name: matrix(next(keys), *shape) for name, shape in shapes.items()} for _ in range(layers)],
    }


def step(params: dict, tokens: jax.Array, rings: list[rj.RingBuffer], *, lengths: jax.Array | None = None):
    """Tokens int32 [B, T] -> logits [B, T, V] and the rings after them. `lengths` says how much is no padding."""
    batch, chunk = tokens.shape
    x, after = params["embed"][tokens], []
    positions = rings[0].length[:, None] + jnp.arange(chunk, dtype=jnp.int32)[None]
    for layer, ring in zip(params["layers"], rings, strict=True):
        q, k, v = ((x @ layer[name]).reshape(batch, chunk, -1, HEAD_DIM) for name in "qkv")
        q, k = rj.apply_rotary(q, positions), rj.apply_rotary(k, positions)
        out, ring = rj.attend(q, k, v, ring, lengths=lengths)
        x = x + out.reshape(batch, chunk, -1) @ layer["out"]
        after.append(ring)
    return x @ params["embed"].T, after


def init_rings(batch: int, windows: tuple[int, ...]) -> list[rj.RingBuffer]:
    """One ring per layer, of the layer's own window."""
    sizes = {"kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "dtype": jnp.float32}
    return [rj.RingBuffer.empty(batch, window=rj.Window.causal(window), **sizes) for window in windows]


# The batch's rings are the last argument of each, and are given away: the new ones lie where the old ones were.


@partial(jax.jit, static_argnames="chunk", donate_argnames="rings")
def admit(params: dict, prompt: jax.Array, length: jax.Array, row: jax.Array, rings: list, *, chunk: int):
    """Reads a prompt [1, longest] into a row; its first new token."""
    alone = [ring.select(jnp.zeros(1, jnp.int32)).reset() for ring in rings]
    logits, alone = rj.prefill(Partial(step, params), alone, prompt, lengths=length, prefill_size=chunk)
    token = jnp.argmax(logits[0]).astype(jnp.int32)
    return token, [ring.insert(row, one) for ring, one in zip(rings, alone, strict=True)]


@partial(jax.jit, donate_argnames="rings")
def decode(params: dict, tokens: jax.Array, active: jax.Array, rings: list):
    """One token for each active row, int32 [B]; a row that is not active is padding, and stays as it is."""
    logits, rings = step(params, tokens[:, None], rings, lengths=active.astype(jnp.int32))
    return jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32), rings


@partial(jax.jit, donate_argnames="rings")
def release(finished: jax.Array, rings: list):
    """Empties rows."""
    return None, [ring.reset(finished) for ring in rings]


def serve(params: dict, requests: list[Request], rings: list, *, chunk: int, longest: int) -> tuple[list, int]:
    """The new tokens of each request, and how often all rows were decoded."""
    slots = rings[0].length.shape[0]
    waiting, running = deque(enumerate(requests)), [-1] * slots
    outs: list[list[int]] = [[] for _ in requests]
    tokens, turn, decoded = np.zeros(slots, np.int32), 0, 0
    while waiting or max(running) >= 0:
        for row in range(slots):
            if running[row] < 0 and waiting and waiting[0][1].arrives <= turn:
                running[row], request = waiting.popleft()
                prompt = np.zeros((1, longest), np.int32)
                prompt[0, : len(request.prompt)] = request.prompt
                length = np.array([len(request.prompt)], np.int32)
                token, rings = admit(params, prompt, length, np.int32(row), rings, chunk=chunk)
                tokens[row] = token
                outs[running[row]].append(int(token))
        done = np.array([i >= 0 and len(outs[i]) >= requests[i].new for i in running])
        if done.any():
            _, rings = release(done, rings)
            running = [-1 if over else i for i, over in zip(running, done, strict=True)]
        active = np.array(running) >= 0
        if active.any():
            new, rings = decode(params, tokens, active, rings)
            tokens, decoded = np.array(new), decoded + 1
            for row in np.flatnonzero(active):
                outs[running[row]].append(int(tokens[row]))
        turn += 1
    return outs, decoded


def main(
    slots: int = 4, count: int = 16, windows: tuple[int, ...] = (64, 32), longest: int = 200, most: int = 100
) -> dict[str, int]:
    rng = np.random.default_rng(0)
    vocabulary, chunk = 256, 32
    params = init_parameters(jax.random.key(0), len(windows), 64, vocabulary)
    requests = [
        Request(
            arrives=int(rng.integers(0, most)) if i >= slots else 0,
            prompt=rng.integers(0, vocabulary, rng.integers(1, longest + 1)).astype(np.int32),
            new=int(rng.integers(1, most + 1)),
        )
        for i in range(count)
    ]
    requests.sort(key=lambda request: request.arrives)
    rings = init_rings(slots, windows)
    tokens, active = jnp.zeros(slots, jnp.int32), jnp.ones(slots, bool)
    certificate = rj.certify(decode, rings, params, tokens, active)
    outs, decoded = serve(params, requests, rings, chunk=chunk, longest=longest)

    same = 0
    for request, out in zip(requests, outs, strict=True):
        prompt = np.zeros((1, longest), np.int32)
        prompt[0, : len(request.prompt)] = request.prompt
        alone = rj.generate(
            Partial(step, params),
            init_rings(1, windows),
            prompt,
            lengths=np.array([len(request.prompt)], np.int32),
            max_new_tokens=most,
            prefill_size=chunk,
        )
        same += np.asarray(alone.tokens)[0, : request.new].tolist() == out
    # The same requests in whole batches, each as slow as its longest.
    in_batches = sum(max(r.new for r in requests[i : i + slots]) - 1 for i in range(0, count, slots))
    executables = sum(f._cache_size() for f in (admit, decode, release))
    print(certificate)
    print(f"{count} requests of 1 to {longest} tokens, 1 to {most} new ones, in {slots} rows")
    print(f"{same} of {count} say what they say alone; {executables} executables served all of them")
    print(f"{decoded} decoding steps; in batches that wait for their longest: {in_batches}")
    return {"same": same, "executables": executables, "decoded": decoded, "in batches": in_batches}


if __name__ == "__main__":
    main()
