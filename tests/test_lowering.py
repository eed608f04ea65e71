"""The xla implementation lowers for devices that are not there: forward, backward, decoding and chunks."""

import jax
import jax.numpy as jnp
import pytest

import ringjax as rj
from ringjax import _attention

B, T, N, K, H = 2, 300, 4, 2, 16
PLATFORMS = {"cuda": ("gpu", "NVIDIA H200"), "tpu": ("tpu", "TPU v5e"), "cpu": ("cpu", "cpu")}


@pytest.fixture(params=PLATFORMS)
def platform(request, monkeypatch):
    """A platform; calls take themselves to be there, so that what is lowered is what would run there."""
    monkeypatch.setattr(_attention, "_device", lambda x: PLATFORMS[request.param])
    jax.clear_caches()  # tracings made for another device
    return request.param


def arrays(dtype, queries=T):
    q = jax.ShapeDtypeStruct((B, queries, N, H), dtype)
    k = jax.ShapeDtypeStruct((B, queries, K, H), dtype)
    return q, k, k


def lowered(f, *args, platform):
    text = jax.jit(f).trace(*args).lower(lowering_platforms=(platform,)).as_text()
    assert "stablehlo.dot_general" in text
    return text


OPTIONS = {
    "plain": {},
    "all-logits": {"softcap": 20.0, "sink_logits": jnp.zeros(N)},
    "packed": {"segment_ids": jnp.zeros((B, T), jnp.int32)},
    "offsets": {"q_offset": jnp.zeros(B, jnp.int32)},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_and_its_gradient_lower(platform, options, dtype):
    def f(q, k, v):
        out, lse = rj.attention(
            q, k, v, rj.Window.causal(64, 3), return_lse=True, implementation="xla", **OPTIONS[options]
        )
        return out.astype(jnp.float32).sum() + lse.sum()

    text = lowered(jax.value_and_grad(f, (0, 1, 2)), *arrays(dtype), platform=platform)
    # Products take 16-bit numbers as they are where the hardware does, and are done in float32 on a CPU.
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    narrow = [line for line in products if line.count("xbf16>") >= 2]
    # One sum over the features, of the backward pass, takes them everywhere.
    assert (len(narrow) > 1) == (dtype == "bfloat16" and platform != "cpu")
    assert all("xf32>" in line.rsplit("->", 1)[1] for line in products), "accumulation in float32"


@pytest.mark.parametrize("tokens", [1, 200])
def test_attend_and_its_gradient_lower(platform, tokens):
    ring = rj.RingBuffer.empty(B, K, H, rj.Window.causal(100, 3), slack=4)

    def f(ring, q, k, v, lengths):
        out, ring = rj.attend(q, k, v, ring, lengths=lengths, implementation="xla")
        return out.astype(jnp.float32).sum(), ring

    def backward(ring, q, k, v, lengths):
        def loss(keys, values, q, k, v):
            old = rj.RingBuffer(keys, values, ring.length, ring.written, ring.window, ring.slack)
            return f(old, q, k, v, lengths)[0]

        return jax.grad(loss, (0, 1, 2, 3, 4))(ring.k, ring.v, q, k, v)

    shapes = jax.eval_shape(lambda: ring)
    args = shapes, *arrays("bfloat16", tokens), jax.ShapeDtypeStruct((B,), "int32")
    lowered(f, *args, platform=platform)
    lowered(backward, *args, platform=platform)


def test_one_program_for_several_platforms():
    """Exported once, run on what is there."""

    def f(q, k, v):
        return rj.attention(q, k, v, rj.Window.causal(8), implementation="xla")

    args = [jnp.ones(x.shape, x.dtype) for x in arrays("float32", 16)]
    exported = jax.export.export(jax.jit(f), platforms=("cpu", "cuda", "tpu"))(*args)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    if jax.default_backend() == "cpu":
        assert jnp.array_equal(exported.call(*args), jax.jit(f)(*args))
