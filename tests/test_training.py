"""Chunked training: the gradient of the whole stream, or cut where it was asked for, and the memory either takes."""

from functools import cache

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import ringjax as rj

WIDTH, HEADS, DIM = 6, 2, 4
BATCH, STREAM, CHUNK = 3, 23, 5
WINDOWS = (rj.Window.causal(4, sinks=2), rj.Window.causal(7))


def parameters(rng):
    """Small ones: with large ones plain attention in float32, without any chunks, is off by more than 1e-5 too."""

    def layer():
        return {name: rng.standard_normal((WIDTH, HEADS * DIM)).astype(np.float32) / 4 for name in "qkv"} | {
            "o": rng.standard_normal((HEADS * DIM, WIDTH)).astype(np.float32) / 4,
            "sink_logits": rng.standard_normal(HEADS).astype(np.float32),
        }

    return [layer() for _ in WINDOWS]


def states(batch=BATCH):
    return tuple(rj.RingBuffer.empty(batch, HEADS, DIM, window, dtype=jnp.float32) for window in WINDOWS)


def error(params, inputs, attend):
    """A sum of squares over the real tokens of a model of two layers; `attend(layer, q, k, v, sink_logits)`."""
    x = inputs["x"]
    for i, layer in enumerate(params):
        q, k, v = ((x @ layer[name]).reshape(*x.shape[:2], HEADS, DIM) for name in "qkv")
        x = x + attend(i, q, k, v, layer["sink_logits"]).reshape(*x.shape[:2], -1) @ layer["o"]
    return jnp.where(inputs["real"][:, :, None], (x - inputs["y"]) ** 2, 0).sum()


def loss(params, chunk, state):
    lengths = chunk["real"].sum(1, dtype=jnp.int32)
    after = list(state)

    def attend(i, q, k, v, sink_logits):
        out, after[i] = rj.attend(q, k, v, state[i], lengths=lengths, sink_logits=sink_logits)
        return out

    value = error(params, chunk, attend)
    return value, tuple(after)


def whole_loss(params, inputs):
    """Without rings or chunks; padding comes last, so that no real token sees any."""
    position = np.arange(inputs["x"].shape[1])

    def attend(i, q, k, v, sink_logits):
        window = WINDOWS[i]
        sides = {"left": window.left, "right": window.right, "sinks": window.sinks}
        mask = oracle.visible(q_positions=position, k_positions=position, **sides)
        return cases.plain_attention(q, k, v, sink_logits, mask)[0]

    return error(params, inputs, attend)


def stream(seed, length=STREAM):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, length + 1, (BATCH, 1))
    x, y = (rng.standard_normal((BATCH, length, WIDTH)).astype(np.float32) for _ in "xy")
    return parameters(rng), {"x": x, "y": y, "real": np.arange(length) < lengths}


whole = jax.jit(jax.value_and_grad(whole_loss))


def exact(params, inputs):
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x if x.dtype == bool else x.astype(np.float64), (params, inputs))
        return jax.tree.map(np.asarray, whole(*wide))


def assert_near(got, wanted):
    """To 1e-5 of the largest element of each array."""
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert np.abs(x - y).max() <= 1e-5 * max(np.abs(y).max(), 1e-2)


@cache
def chunked(size, every=None):
    return jax.jit(rj.chunked_value_and_grad(loss, chunk_size=size, truncate_every=every))


@pytest.mark.parametrize("size", [1, 3, 14, STREAM + 9])
def test_gradient_of_the_whole_stream(size):
    """Law 10: any chunk length, shorter and longer than windows; ragged rows; sinks."""
    for seed in range(40):
        params, inputs = stream([size, seed])
        (value, state), gradients = chunked(size)(params, states(), inputs)
        wanted_value, wanted = exact(params, inputs)
        assert_near(gradients, wanted)
        assert_near(value, wanted_value)
        for ring in state:
            np.testing.assert_array_equal(ring.length, inputs["real"].sum(1))


def test_gradients_do_cross_chunks():
    """What the tests above compare is not zero: cut everywhere, the gradient is another one."""
    params, inputs = stream(0)
    inputs["real"][:] = True
    _, gradients = chunked(CHUNK, 1)(params, states(), inputs)
    _, wanted = exact(params, inputs)
    for got, wanted_layer in zip(gradients, wanted, strict=True):
        assert np.abs(got["k"] - wanted_layer["k"]).max() > 1e-2 * np.abs(wanted_layer["k"]).max()


@jax.jit
@jax.value_and_grad
def by_hand(params, inputs, cuts):
    """Chunk after chunk, the gradient stopped before those that `cuts` marks."""
    total, state = jnp.float32(0), states()
    for i, start in enumerate(range(0, STREAM, CHUNK)):
        state = jax.tree.map(lambda x, cut=cuts[i]: jnp.where(cut, jax.lax.stop_gradient(x), x), state)
        value, state = loss(params, jax.tree.map(lambda x, at=start: x[:, at : at + CHUNK], inputs), state)
        total = total + value
    return total


@pytest.mark.parametrize("every", [1, 3])
def test_gradient_cut_every_few_chunks(every):
    """Four chunks and a last, shorter one, which belongs to the chunks before it as any other would."""
    cuts = np.arange(5) % every == 0
    for seed in range(20):
        params, inputs = stream(seed)
        (value, state), gradients = chunked(CHUNK, every)(params, states(), inputs)
        wanted_value, wanted = by_hand(params, inputs, cuts)
        assert_near(gradients, wanted)
        assert_near(value, wanted_value)
        for ring in state:
            np.testing.assert_array_equal(ring.length, inputs["real"].sum(1))


def temporary_bytes(every, length):
    shapes = jax.eval_shape(lambda: stream_shapes(length))
    lowered = jax.jit(rj.chunked_value_and_grad(loss, chunk_size=CHUNK, truncate_every=every)).lower(*shapes)
    return lowered.compile().memory_analysis().temp_size_in_bytes


def stream_shapes(length):
    """Of one layer: a second one takes as long to compile, and has nothing else to show."""
    params = jax.tree.map(jnp.asarray, parameters(np.random.default_rng(0)))
    x = jnp.zeros((BATCH, length, WIDTH))
    return params[:1], states()[:1], {"x": x, "y": x, "real": jnp.zeros(x.shape[:2], bool)}


def test_memory_of_the_truncated_mode_is_constant():
    assert temporary_bytes(2, 20 * CHUNK) == temporary_bytes(2, 200 * CHUNK)


def test_memory_of_the_exact_mode_grows_by_rings_only():
    few, many = temporary_bytes(None, 20 * CHUNK), temporary_bytes(None, 200 * CHUNK)
    ring_bytes = sum(x.nbytes for x in jax.tree.leaves(states()[:1]))
    loss_bytes = 4
    # Every buffer of XLA's begins at a multiple of 64 bytes.
    rounding = 64 * len(jax.tree.leaves((states()[:1], 0)))
    assert 0 < many - few <= 180 * (ring_bytes + 2 * loss_bytes) + rounding


@pytest.mark.parametrize(
    ("options", "error", "first"),
    [
        ({"loss": 3, "chunk_size": 1}, TypeError, "loss must be a function (params, chunk, state), got int."),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1, got 0."),
        ({"chunk_size": 2.0}, TypeError, "chunk_size must be an int, got float."),
        ({"chunk_size": 2, "truncate_every": 0}, ValueError, "truncate_every must be at least 1, got 0."),
    ],
)
def test_messages(options, error, first):
    with pytest.raises(error) as raised:
        rj.chunked_value_and_grad(**{"loss": loss} | options)
    assert str(raised.value).splitlines()[0] == f"chunked_value_and_grad: {first}"


@pytest.mark.parametrize("every", [None, 2])
@pytest.mark.parametrize(
    ("inputs", "first"),
    [
        (
            [np.zeros((2, 3)), np.zeros((2, 4))],
            "inputs must be arrays [B, T, ...] of one B and T, got [(2, 3), (2, 4)].",
        ),
        ([np.zeros(3)], "inputs must be arrays [B, T, ...] of one B and T, got [(3,)]."),
        ([], "inputs must be arrays [B, T, ...] of one B and T, got []."),
        ([np.zeros((2, 0))], "inputs must not be empty, got T = 0."),
    ],
)
def test_messages_about_inputs(inputs, first, every):
    f = rj.chunked_value_and_grad(loss, chunk_size=2, truncate_every=every)
    with pytest.raises(ValueError) as raised:
        f({"weights": jnp.ones(2)}, (), inputs)
    assert str(raised.value).splitlines()[0] == f"chunked_value_and_grad: {first}"
