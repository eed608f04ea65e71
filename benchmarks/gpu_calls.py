"""What the benchmarks of decoding share: shapes and full rings, chains of calls in one executable, errors, times."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

import ringjax as rj
from benchmarks.timing import in_batches
from ringjax._quantised import quantise

BATCHES, BATCH_S = 9, 0.05
COLD = 400e6  # bytes of rings taken in turn; the cache of an H200 holds 50 MB


@dataclasses.dataclass(frozen=True)
class Shape:
    """Rows, query heads, kv heads, head size, window."""

    b: int
    n: int
    k: int
    h: int
    w: int

    def __str__(self):
        return str(dataclasses.astuple(self))

    @property
    def bytes(self):
        """Of keys and values."""
        return 4 * self.b * self.k * self.h * self.w

    @property
    def sets(self):
        return max(1, round(COLD / self.bytes))

    @property
    def rounds(self):
        """Of a chain over all sets: 6 ms of calls, so that its start costs nothing."""
        calls = min(240, max(1, round(6e-3 / (self.bytes / 4.3e12))))
        return max(1, calls // self.sets)


SHAPES = [
    Shape(1, 32, 8, 128, 4096),
    Shape(16, 32, 8, 128, 4096),
    Shape(64, 32, 8, 128, 4096),
    Shape(128, 16, 8, 256, 1024),
    Shape(8, 32, 8, 128, 32768),
]


@functools.partial(jax.jit, static_argnums=0)
def _normal(shape, key):
    # Drawn in bfloat16, they would have 256 values, and errors of quantising them would not average out.
    return jax.random.normal(key, shape).astype(jnp.bfloat16)


def normal(seed, *shape):
    return _normal(shape, jax.random.key(seed))


def ring(shape, seed, length=None, dtype=jnp.bfloat16, slack=0):
    """A ring that has wrapped, a little further in each row; or `length` tokens in every row."""
    at = shape.w + 77 + 13 * jnp.arange(shape.b, dtype=jnp.int32)
    at = at if length is None else jnp.full_like(at, length)
    empty = jax.eval_shape(
        lambda: rj.RingBuffer.empty(shape.b, shape.k, shape.h, rj.Window.causal(shape.w), slack=slack, dtype=dtype)
    )
    k, v = normal(seed, *empty.k.shape), normal(seed + 1, *empty.v.shape)
    scales = {}
    if empty.k_scale is not None:
        (k, k_scale), (v, v_scale) = (jax.jit(quantise, static_argnums=1)(x, dtype) for x in (k, v))
        scales = {"k_scale": k_scale, "v_scale": v_scale}
    return dataclasses.replace(empty, k=k, v=v, length=at, written=at + 0, **scales)


def chained(step, count):
    """`count` rounds over all states; donates these."""

    @functools.partial(jax.jit, donate_argnums=2)
    def run(q, new, states):
        states = list(states)
        for i in range(count * len(states)):
            at = i % len(states)
            q, states[at] = step(q, new, states[at])
        return q, states

    return run


@jax.jit
def exact(q, k, v):
    """float32 attention of one row's query [N, H] to all its keys [K, S, H]; [N, H]."""
    with jax.default_matmul_precision("highest"):
        heads = q.reshape(len(k), -1, q.shape[-1]).astype(jnp.float32)
        logits = jnp.einsum("kgh,ksh->kgs", heads, k.astype(jnp.float32)) * q.shape[-1] ** -0.5
        return jnp.einsum("kgs,ksh->kgh", jax.nn.softmax(logits, -1), v.astype(jnp.float32)).reshape(q.shape)


def off(found, wanted):
    """The relative error."""
    return float(jnp.linalg.norm(found.astype(jnp.float32) - wanted) / jnp.linalg.norm(wanted))


def error(shape, q, out, k, v):
    """Largest relative error of the first and the last row; k and v [B, K, S, H] with all keys visible."""
    return max(off(out[b, 0], exact(q[b, 0], k[b], v[b])) for b in (0, shape.b - 1))


WORST = {"bfloat16": 1e-2, "int8": 2e-2, "float8_e4m3fn": 6e-2}
"""Relative errors from which on a result is wrong, by the ring's dtype: no time is told of it. A NaN is wrong too."""


def timed(calls, batches=BATCHES, batch_s=BATCH_S):
    """Median seconds of each call."""
    waiting = {name: (call, jax.block_until_ready) for name, call in calls.items()}
    return {name: found.median for name, found in in_batches(waiting, batches=batches, batch_s=batch_s).items()}


def compiling(pool, step, rounds, q, new, states):
    """Two futures: of one call on the first state, of the chain. Arrays, or their shapes."""
    one, chain = jax.jit(step).lower(q, new, states[0]), chained(step, rounds).lower(q, new, states)
    return pool.submit(one.compile), pool.submit(chain.compile)


class Caller:
    """A chain that is called again and again; its states are donated and kept."""

    def __init__(self, run, q, new, states):
        self.run, self.q, self.new, self.states = run, q, new, states

    def __call__(self):
        out, self.states = self.run(self.q, self.new, self.states)
        return out
