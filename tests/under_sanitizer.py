"""Every Hopper kernel once, on small arrays: a program for NVIDIA's `compute-sanitizer`.

`compute-sanitizer --tool memcheck python tests/under_sanitizer.py`, and the same with `--tool racecheck`: 0 errors, 0
hazards, in about 12 seconds each.
"""

import os

os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # so that memory past an array's end is nobody's

import jax
import jax.numpy as jnp
import numpy as np

import ringjax as rj
from ringjax import Window

SIZE = 200  # no multiple of a tile


def main():
    rng = np.random.default_rng(0)
    q, k, v, g = (jnp.asarray(rng.standard_normal((1, SIZE, n, 64)), jnp.bfloat16) for n in (2, 1, 1, 2))

    def derivative(q, k, v, g, window):
        out, vjp = jax.vjp(lambda *x: rj.attention(*x, window, implementation="mosaic"), q, k, v)
        return out, vjp(g)

    run = jax.jit(derivative, static_argnums=4)
    results = {f"attention, {window}": run(q, k, v, g, window) for window in (Window.causal(90), Window.causal())}
    step = jax.jit(rj.attend, static_argnames="implementation")
    ring = rj.RingBuffer.empty(1, 1, 64, Window.causal(150, sinks=3))
    for i in range(2):
        results[f"chunk {i}"], ring = step(q, k, v, ring, implementation="mosaic")
    for i in range(3):
        token = (x[:, i : i + 1] for x in (q, k, v))
        results[f"token {i}"], ring = step(*token, ring, implementation="mosaic")
    for dtype in ("int8", "float8_e4m3fn"):
        ring = rj.RingBuffer.empty(1, 1, 64, Window.causal(150, sinks=3), slack=2, dtype=dtype)
        ring = jax.jit(rj.RingBuffer.append)(ring, k, v)
        for i in range(2):
            some = (x[:, 3 * i : 3 * i + 3] for x in (q, k, v))
            results[f"tokens {i}, {dtype}"], ring = step(*some, ring, implementation="mosaic")
    state = rj.init_state(rj.RingBufferConfig(buffer_size=150, implementation="mosaic"), 1, kv_heads=1, head_dim=64)
    for grad in (False, True):
        _, state = jax.jit(rj.encode, static_argnames="requires_grad")(q, k, v, state, requires_grad=grad)
    decode = jax.jit(rj.decode)
    for i in range(2):
        token = (x[:, i : i + 1] for x in (q, k, v))
        results[f"decode {i}"], state = decode(*token, state, position=state.last_calculated + 1)
    for name, found in results.items():
        means = [float(jnp.abs(x.astype(jnp.float32)).mean()) for x in jax.tree.leaves(found)]
        assert np.isfinite(means).all() and min(means) > 0, name
        print(name, *(f"{mean:.4f}" for mean in means))


if __name__ == "__main__":
    main()
