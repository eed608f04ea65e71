"""Law 5 for a whole model: layers of different windows, heads and head sizes in one carry, and no ring is copied.

The usual way, a scan over layers with the cache as its `xs` and `ys`, copies all of it at every token: shown here too,
so that the first claim says something.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from jax import lax

import ringjax as rj
from ringjax import _hlo

WIDTH, STEPS = 32, 5


class Layer(NamedTuple):
    window: rj.Window
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str


# Like Gemma's, local and global by turns; one ring in 8 bits; one whose sinks never go.
LAYERS = (
    Layer(rj.Window.causal(509), 4, 2, 16, "float32"),
    Layer(rj.Window.causal(2039, sinks=3), 2, 1, 32, "int8"),
    Layer(rj.Window.causal(1021, sinks=2), 4, 4, 8, "float32"),
)


def parameters(layers=LAYERS):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape) / 6, jnp.float32)

    return [
        {
            "q": normal(WIDTH, x.heads * x.head_dim),
            "kv": normal(WIDTH, 2 * x.kv_heads * x.head_dim),
            "out": normal(x.heads * x.head_dim, WIDTH),
        }
        for x in layers
    ]


def rings(batch, layers=LAYERS):
    return [rj.RingBuffer.empty(batch, x.kv_heads, x.head_dim, x.window, dtype=x.dtype) for x in layers]


def one_layer(weights, x, ring, shape):
    batch, chunk, _ = x.shape
    q = (x @ weights["q"]).reshape(batch, chunk, shape.heads, shape.head_dim)
    k, v = jnp.split((x @ weights["kv"]).reshape(batch, chunk, 2 * shape.kv_heads, shape.head_dim), 2, axis=2)
    out, ring = rj.attend(q, k, v, ring)
    return jnp.tanh(x + out.reshape(batch, chunk, -1) @ weights["out"]), ring


def token(weights, x, state, layers=LAYERS):
    """The documented way: a Python loop over the layers, a list of rings."""
    after = []
    for one, ring, shape in zip(weights, state, layers, strict=True):
        x, ring = one_layer(one, x, ring, shape)
        after.append(ring)
    return x, after


def tokens(weights, x, state, layers=LAYERS):
    def body(carry, _):
        x, state = token(weights, *carry, layers)
        return (x, state), x

    (_, state), out = lax.scan(body, (x, state), length=STEPS)
    return out, state


def test_layers_of_every_kind_in_one_carry():
    x, state = jax.ShapeDtypeStruct((2, 1, WIDTH), jnp.float32), jax.eval_shape(partial(rings, 2))
    found = rj.certify(tokens, state, jax.eval_shape(parameters), x)
    assert [name for name, _, _ in found.rings] == [
        *("state[0].k", "state[0].v"),
        *("state[1].k", "state[1].v", "state[1].k_scale", "state[1].v_scale"),
        *("state[2].k", "state[2].v"),
    ]
    # Blocks of float32, of all heads, and never as much as the rings.
    assert found.temp_bytes < sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def test_each_layer_has_a_window_of_its_own():
    """vLLM PR 51756: the window of a group of layers was taken for each of them. One layer at a time, by the oracle."""
    windows = (rj.Window.causal(3), rj.Window.causal(7, sinks=2), rj.Window.causal(5))
    layers = [x._replace(window=window, dtype="float32") for x, window in zip(LAYERS, windows, strict=True)]
    weights, length = parameters(layers), 40
    x = np.random.default_rng(1).standard_normal((2, length, WIDTH)).astype(np.float32)
    step = jax.jit(partial(token, layers=layers))
    outs, state = [], rings(2, layers)
    for t in range(length):
        out, state = step(weights, x[:, t : t + 1], state)
        outs.append(out)
    assert [ring.capacity for ring in state] == [3, 9, 5]
    for one, shape in zip(weights, layers, strict=True):
        one = {name: np.asarray(w) for name, w in one.items()}
        q = (x @ one["q"]).reshape(2, length, shape.heads, shape.head_dim)
        k, v = np.split((x @ one["kv"]).reshape(2, length, 2 * shape.kv_heads, shape.head_dim), 2, axis=2)
        index, window = np.arange(length), shape.window
        sides = {"left": window.left, "right": 0, "sinks": window.sinks, "q_positions": index, "k_positions": index}
        out, _ = oracle.attention(q, k, v, **sides)
        x = np.tanh(x + out.reshape(2, length, -1) @ one["out"])
    np.testing.assert_allclose(np.concatenate(outs, axis=1), x, rtol=0, atol=1e-4)


def test_rings_as_xs_and_ys_are_copied_at_every_token():
    """What a scan over equal layers costs, and that a Python loop over the same layers costs nothing of the kind."""
    layers = (LAYERS[0],) * 3
    weights, state = parameters(layers), rings(2, layers)

    def stacked_token(weights, x, stack):
        def layer(x, one):
            return one_layer(*one[:1], x, one[1], layers[0])

        return lax.scan(layer, x, (weights, stack))

    def stacked(weights, x, stack):
        def body(carry, _):
            return stacked_token(weights, *carry), None

        return lax.scan(body, (x, stack), length=STEPS)[0]

    def copied(f, weights, state):
        """Bytes of the arrays made of rings in the loop over tokens, at each token."""
        x = jnp.ones((2, 1, WIDTH))
        compiled = jax.jit(f, donate_argnums=2).lower(weights, x, state).compile()
        module = _hlo.read(compiled.as_text())
        numbers = [i for i, line in enumerate(module.parameters()) if line.arrays[0].shape[-2:] == (509, 16)]
        assert len(numbers) == (2 if state is stack else 6)
        made = _hlo.made_of(module, dict.fromkeys(numbers, 2 * 2 * 509 * 16))
        per_layer = 3 if state is stack else 1  # an instruction in the loop over layers runs for each of them
        return sum(m.array.bytes * (1 if m.array.size > 2 * 2 * 509 * 16 else per_layer) for m in made)

    stack, stack_weights = (jax.tree.map(lambda *x: jnp.stack(x), *one) for one in (state, weights))
    held = sum(ring.k.nbytes + ring.v.nbytes for ring in state)
    assert copied(partial(tokens, layers=layers), weights, state) == 0
    assert copied(stacked, stack_weights, stack) >= held
