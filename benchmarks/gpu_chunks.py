"""Times chunks of a stream against a ring on a GPU: `python -m benchmarks.gpu_chunks`, as Markdown.

What a long prompt or a stream in training does again and again: T tokens attend to a ring that is full and has wrapped,
and to themselves, and are appended. Beside it, `attention` to the same pairs with the keys in order in one array, which
is what a chunk cannot be faster than, and `attend` by `xla`. Each result is checked against float32 first; candidates
are timed in turn, in batches of calls.
"""

import argparse
import dataclasses
import datetime
import sys
from functools import partial

import jax
import jax.numpy as jnp

import ringjax as rj
from benchmarks.gpu_calls import exact, off
from benchmarks.timing import in_batches


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Tokens of a chunk, rows, query heads, kv heads, head size, window, spare slots of the ring."""

    t: int
    b: int
    n: int = 32
    k: int = 8
    h: int = 128
    w: int = 4096
    slack: int = 0

    @property
    def flops(self):
        """Of visible pairs: every query sees W keys."""
        return 4 * self.h * self.n * self.b * self.t * self.w


CHUNKS = [Chunk(128, 8), Chunk(512, 1), Chunk(2048, 1), Chunk(512, 8), Chunk(2048, 8), Chunk(512, 1, slack=1)]


@partial(jax.jit, static_argnums=0)
def tokens(chunk):
    """q of the chunk, and k and v of the W - 1 tokens before it and of itself, after others that are out of sight."""
    heads = (chunk.t, chunk.n), *[(2 * chunk.w + 77 + chunk.t, chunk.k)] * 2
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(
        jax.random.normal(key, (chunk.b, *shape, chunk.h)).astype(jnp.bfloat16)
        for key, shape in zip(keys, heads, strict=True)
    )


@partial(jax.jit, static_argnums=0)
def ring(chunk, k, v):
    """A ring of all tokens before the chunk."""
    empty = rj.RingBuffer.empty(chunk.b, chunk.k, chunk.h, rj.Window.causal(chunk.w), slack=chunk.slack)
    return empty.append(k[:, : -chunk.t], v[:, : -chunk.t])


def error(chunk, q, k, v, out):
    """Largest relative error of a few queries of the first and the last row."""
    worst = []
    for b in (0, chunk.b - 1):
        for t in (0, chunk.t // 2, chunk.t - 1):
            seen = slice(k.shape[1] - chunk.t + t + 1 - chunk.w, k.shape[1] - chunk.t + t + 1)
            near_k, near_v = (jnp.swapaxes(x[b, seen], 0, 1) for x in (k, v))
            worst.append(off(out[b, t], exact(q[b, t], near_k, near_v)))
    return max(worst)


class Stream:
    """`attend`, call after call, on one ring that is donated and kept."""

    def __init__(self, implementation, q, k, v, state):
        step = partial(rj.attend, implementation=implementation)
        self.run = jax.jit(step, donate_argnums=3).lower(q, k, v, state).compile()
        self.arguments, self.state = (q, k, v), state

    def __call__(self):
        out, self.state = self.run(*self.arguments, self.state)
        return out


def candidates(chunk, q, k, v):
    """By name, a call without arguments; the first call's result is what is checked."""
    new, last = (q, k[:, -chunk.t :], v[:, -chunk.t :]), -(chunk.w - 1 + chunk.t)
    in_order = jax.jit(partial(rj.attention, window=rj.Window.causal(chunk.w))).lower(q, k[:, last:], v[:, last:])
    return {
        "attend": Stream(None, *new, ring(chunk, k, v)),
        "attention to the same pairs": partial(in_order.compile(), q, k[:, last:], v[:, last:]),
        "attend by xla": Stream("xla", *new, ring(chunk, k, v)),
    }


def measure(chunk, *, batches, batch_s, candidates=candidates):
    """Prints a line for each candidate; whether all were right."""
    arrays, right = tokens(chunk), {}
    made = candidates(chunk, *arrays)
    row = f"| {chunk.t} | {chunk.b} | {chunk.w + chunk.slack}"
    for name, call in made.items():
        found = error(chunk, *arrays, call())
        if found < 1e-2:  # a NaN is not
            right[name] = found
        else:
            print(f"{row} | {name} | REFUSED: wrong | | {found:.1e} |", flush=True)
    calls = {name: (made[name], jax.block_until_ready) for name in right}
    for name, timing in in_batches(calls, batches=batches, batch_s=batch_s).items():
        rate = chunk.flops / timing.median / 1e12
        figures = f"{timing.median * 1e6:.1f} | {rate:.0f} | {right[name]:.1e}"
        print(f"{row} | {name} | {figures} |", flush=True)
    return len(right) == len(made)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_chunks", description=__doc__)
    parser.add_argument("--batches", type=int, default=7, help="of each candidate; their median is the figure")
    parser.add_argument("--batch-ms", type=float, default=40.0)
    options = parser.parse_args(argv)
    today = datetime.datetime.now(datetime.UTC).date()
    first = CHUNKS[0]
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {today}; medians. bfloat16, {first.n} and {first.k}")
    print(f"heads of {first.h}, W = {first.w}.\n")
    print("| T | rows | slots | | us | TFLOP/s | error |\n|---|---|---|---|---|---|---|")
    sizes = {"batches": options.batches, "batch_s": options.batch_ms / 1e3}
    wrong = sum(not measure(chunk, **sizes) for chunk in CHUNKS)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
