"""Decoding: one token at a time against the last W, by ringjax and by others, from the same history.

A decoder is built from a history (chunks of keys and values [B, t, K, H], oldest first) and advances by blocks of
tokens; each block goes on where the last one ended.
"""

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import ringjax as rj
from benchmarks.compiled import compile_for


class Tokens(NamedTuple):
    """New tokens in turn: q [n, B, 1, N, H], k and v [n, B, 1, K, H], sink_logits [N] or None."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    sink_logits: jax.Array | None


class Decoder(NamedTuple):
    """One stream.

    Attributes:
      name: as it stands in tables.
      advance: decodes the tokens that it was built for once more; outputs [n, B, 1, N, H].
      executable: what XLA compiled for it, if it did.
      before: what puts the stream where it is to be timed, if something must.
    """

    name: str
    advance: Callable[[], Any]
    executable: Any = None
    before: Callable[[], Any] | None = None


def tokens(shape, count, seed):
    """`count` normal random tokens."""
    drawn = shape.replace(queries=count).arrays(seed)
    q, k, v = (jnp.moveaxis(x, 1, 0)[:, :, None] for x in drawn[:3])
    return Tokens(q, k, v, drawn.sink_logits)


def history(shape, position, seed):
    """Keys and values of the tokens before `position`: chunks of W, an odd one first. All chunks are different."""
    first = position % shape.size or shape.size
    for i, count in enumerate([first] + [shape.size] * ((position - first) // shape.size)):
        rng = np.random.default_rng((seed, i))
        chunk = (shape.batch, count, shape.kv_heads, shape.head_dim)
        yield rng.standard_normal(chunk, np.float32), rng.standard_normal(chunk, np.float32)


def _run(attend):
    def run(state, q, k, v):
        def step(state, token):
            out, state = attend(*token, state)
            return state, out

        return lax.scan(step, state, (q, k, v))

    return run


def scanned(attend, tokens, state, donated=True):
    """Executable and `advance()` of a loop `attend(q, k, v, state) -> (out, state)` over the tokens, state in place."""
    arguments = tokens[:3]
    executable = compile_for(_run(attend), state, *arguments, donate=(0,) if donated else ())
    held = [state]
    del state

    def advance():
        held[0], out = executable(held[0], *arguments)
        return out

    return executable, advance


def ours(shape, tokens, positions, implementation=None):
    """ringjax: `attend` in a scan over its own ring.

    Returns:
      `build(position, chunks)`, which gives the decoder at one of the positions from the history before it. All of
      them share one ring, in the same memory, and one executable: what differs in their times is the position.
    """
    empty = rj.RingBuffer.empty(shape.batch, shape.kv_heads, shape.head_dim, shape.window, dtype=jnp.float32)
    append = jax.jit(lambda ring, k, v: ring.append(k, v), donate_argnums=0)

    def attend(q, k, v, ring):
        return rj.attend(
            q,
            k,
            v,
            ring,
            sink_logits=tokens.sink_logits,
            softcap=shape.softcap,
            implementation=implementation,
        )

    # The ring that is given up lends its memory to the one that is restored.
    restore = jax.jit(
        lambda ring, exported: rj.RingBuffer.restore(exported, shape.window), donate_argnums=0, keep_unused=True
    )
    executable = compile_for(_run(attend), empty, *tokens[:3], donate=(0,))
    held = [empty]
    del empty

    def advance():
        held[0], out = executable(held[0], *tokens[:3])
        return out

    def build(position, chunks):
        held[0] = held[0].reset()
        for k, v in chunks:
            held[0] = append(held[0], k, v)
        exported = held[0].export()

        def seek():
            held[0] = jax.block_until_ready(restore(held[0], exported))

        name = "ringjax" if position == positions[0] else f"ringjax at {position}"
        return Decoder(name, advance, executable, seek)

    return build


PLAIN = ("BWKH", "BKWH", "XWH")
"""Layouts of the ring by hand; X is B and K in one axis."""


def plain(shape, chunks, tokens, layout):
    """The plainest ring by hand: one `dynamic_update_slice` each for k and v, one pair of einsums, one mask.

    XLA's CPU compiler fuses the update into what reads it, and so copies the ring at every token: but for the layout
    XWH, where X is more than 1. None is the fastest for every shape; the fastest is the one to beat.
    """
    size, scale, rows = shape.size, shape.head_dim**-0.5, shape.batch * shape.kv_heads
    k_ring, v_ring = (np.zeros((shape.batch, size, shape.kv_heads, shape.head_dim), np.float32) for _ in range(2))
    position = 0
    for k, v in chunks:
        slots = np.arange(position, position + k.shape[1]) % size
        k_ring[:, slots], v_ring[:, slots] = k, v
        position += k.shape[1]
    heads, axis = ("x", 1) if layout == "XWH" else ("bk", layout.index("W"))
    stored = layout.lower()

    def laid_out(x):
        x = x if layout == "BWKH" else jnp.moveaxis(x, 1, 2)
        return x.reshape(rows, -1, shape.head_dim) if layout == "XWH" else x

    def attend(q, k, v, state):
        k_ring, v_ring, position = state
        k_ring = lax.dynamic_update_slice_in_dim(k_ring, laid_out(k), position % size, axis)
        v_ring = lax.dynamic_update_slice_in_dim(v_ring, laid_out(v), position % size, axis)
        lead = (rows,) if layout == "XWH" else (shape.batch, shape.kv_heads)
        grouped = q.reshape(*lead, -1, shape.head_dim)
        logits = jnp.einsum(f"{heads}gh,{stored}->{heads}gw", grouped, k_ring) * scale
        logits = jnp.where(jnp.arange(size) <= position, logits, -jnp.inf)
        if tokens.sink_logits is not None:
            sinks = jnp.broadcast_to(tokens.sink_logits, (shape.batch, shape.heads)).reshape(*logits.shape[:-1], 1)
            logits = jnp.concatenate([logits, sinks], axis=-1)
        weights = jax.nn.softmax(logits, axis=-1)[..., :size]
        out = jnp.einsum(f"{heads}gw,{stored}->{heads}gh", weights, v_ring)
        return out.reshape(q.shape), (k_ring, v_ring, position + 1)

    state = (jnp.array(laid_out(jnp.asarray(k_ring))), jnp.array(laid_out(jnp.asarray(v_ring))), jnp.int32(position))
    executable, advance = scanned(attend, tokens, state)
    return Decoder(f"plain ring {layout}", advance, executable)


def huggingface_unsupported(shape):
    """Why transformers' static sliding cache cannot run here; no reasons: it can."""
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        return [f"{name} not installed" for name in missing]
    return [what for what, wanted in (("sink logits", shape.sink_logits), ("softcap", shape.softcap)) if wanted]


def huggingface(shape, chunks, tokens):
    """transformers' static sliding-window cache layer with torch's own attention, eager, on the CPU."""
    import torch
    from transformers.cache_utils import StaticSlidingWindowLayer

    def to_torch(x):
        return torch.from_numpy(np.array(x)).transpose(-3, -2).contiguous()

    layer = StaticSlidingWindowLayer(max_cache_len=2**30, sliding_window=shape.size)
    position = 0
    for k, v in chunks:
        layer.update(to_torch(k), to_torch(v))
        position += k.shape[1]
    # Before it is full, its unwritten slots would need a mask.
    assert position >= shape.size
    q, k, v = (to_torch(x) for x in tokens[:3])

    @torch.inference_mode()
    def advance():
        outs = []
        for query, key, value in zip(q, k, v, strict=True):
            keys, values = layer.update(key, value)
            outs.append(
                torch.nn.functional.scaled_dot_product_attention(
                    query, keys, values, enable_gqa=shape.heads != shape.kv_heads
                )
            )
        return torch.stack(outs).transpose(-3, -2).numpy()

    return Decoder("transformers static", advance)
