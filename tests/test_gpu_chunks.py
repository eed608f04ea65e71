"""A chunk after a ring in one launch, on the GPU it is for: `pytest -m gpu tests/test_gpu_chunks.py`."""

import dataclasses

import cases
import chunk_cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from ring_cases import RingCase

import ringjax as rj
from ringjax import Window
from ringjax._kernels import mosaic, resolve
from ringjax._kernels.tiles import MosaicForwardTiles

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def hopper():
    """Skips where the kernel does not run."""
    device = jax.devices()[0]
    problem = dataclasses.replace(BASE.problem, platform=device.platform, device_kind=device.device_kind)
    if resolve(problem, "attend", None) != "mosaic":
        pytest.skip(f"the kernel is for Hopper GPUs and jax >= 0.11, not for {device.device_kind}")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


BASE = RingCase("base", Window.causal(700), queries=300, heads=8, head_dim=128, value_dim=128, lengths=(5000, 333, 0))
CASES = [
    BASE,
    BASE.replace(name="64", head_dim=64, value_dim=64, lengths=(701, 699, 2000)),
    BASE.replace(name="256", head_dim=256, value_dim=256, window=Window.causal(333), lengths=(332, 334, 900)),
    BASE.replace(name="80-96", head_dim=80, value_dim=96, dtype="float16"),
    BASE.replace(
        name="all",
        window=Window.causal(500, sinks=150),
        ragged=True,
        sink_logits=True,
        softcap=4.0,
        lengths=(100, 149, 3000),
    ),
    BASE.replace(
        name="all-64", window=Window.causal(384, sinks=5), ragged=True, softcap=50.0, head_dim=64, value_dim=64
    ),
    BASE.replace(name="slack", slack=200, rolled_back=True, out_dtype="float32"),
    BASE.replace(name="longer-than-window", window=Window.causal(100), queries=500),
    BASE.replace(name="longer-with-sinks", window=Window.causal(100, sinks=200), queries=500, lengths=(50, 0, 1000)),
    BASE.replace(name="sees-what-comes", window=Window(200, 7, 3), queries=200),
    BASE.replace(name="float32-256", head_dim=256, value_dim=256, out_dtype="float32", window=Window.causal(512)),
    BASE.replace(name="own-key-only", window=Window.causal(1), queries=20),
    BASE.replace(name="two-tokens", window=Window.causal(1024), queries=2, lengths=(1024, 5000, 130)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_kind_of_chunk(case):
    run = jax.jit(lambda *arguments: mosaic.extend(case.problem, *arguments))
    for seed in range(2):
        made = chunk_cases.make(case, seed)
        chunk_cases.check(made, *run(*made.arguments))


@pytest.mark.parametrize("polynomial", [0, 32, 64])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_exponentials_without_the_special_function_unit(polynomial, softcap):
    case = BASE.replace(name="polynomial", softcap=softcap)
    made = chunk_cases.make(case)
    tiles = MosaicForwardTiles(block_size=128, polynomial=polynomial)
    chunk_cases.check(made, *jax.jit(lambda *x: mosaic.extend(case.problem, *x, tiles=tiles))(*made.arguments))


@pytest.mark.parametrize("polynomial", [0, 64])
def test_logits_far_apart(polynomial, monkeypatch):
    """Weights that vanish beside others; and sums of exponentials up to e**60, which no maximum keeps small."""
    tiles = MosaicForwardTiles(block_size=128, polynomial=polynomial)

    def run(case, made):
        rows, q, *others = made.arguments
        return jax.jit(lambda *x: mosaic.extend(case.problem, *x, tiles=tiles))(rows, q * 40, *others)

    case = BASE.replace(name="far", lengths=(900, 800, 700))
    made = chunk_cases.make(case)
    rows, q, k, v, ring_k, ring_v, _ = made.arguments
    held = rj.RingBuffer(ring_k, ring_v, rows.length, rows.written, case.window, 0).positions()
    at = np.asarray(rows.length)[:, None] + np.arange(300)[None]
    what = {"left": 699, "right": 0, "sinks": 0, "q_positions": at}
    what["k_positions"] = np.concatenate([np.asarray(held), at], axis=1)
    keys, values = (
        jnp.concatenate([jnp.nan_to_num(jnp.moveaxis(old, 1, 2)), new], axis=1)
        for old, new in ((ring_k, k), (ring_v, v))
    )
    exact = oracle.attention(q * 40, keys, values, **what)
    plain = cases._plain(None, None)(q * 40, keys, values, None, jnp.asarray(oracle.visible(**what)))
    for got, x, y in zip(run(case, made), exact, plain, strict=True):
        cases.assert_close(got, x, y)

    capped = case.replace(name="far-capped", softcap=60.0)
    out, lse = run(capped, made)
    assert float(lse.max()) > 55.0
    monkeypatch.setattr("ringjax._kernels.mosaic_forward.MOST_CAPPED", 0.0)
    with_maximum, other_lse = run(capped, made)
    roundings = 4 * float(jnp.finfo(jnp.bfloat16).eps) / 2  # of the weights and of the output, in both
    np.testing.assert_allclose(np.float32(out), np.float32(with_maximum), rtol=0, atol=roundings * float(abs(v).max()))
    exponentials = 2 * 1e-4 if polynomial else 0.0  # of the polynomial's, in both
    np.testing.assert_allclose(lse, other_lse, rtol=0, atol=60 * 2**-20 + exponentials)


def a_stream(tokens, batch=2, heads=8, kv_heads=2, head_dim=128):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((batch, tokens, n, head_dim) for n in (heads, kv_heads, kv_heads))
    return tuple(jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True))


@pytest.mark.parametrize("chunks", [(1000,), (400, 600), (130, 1, 512, 57, 300)], ids=str)
def test_a_stream_in_chunks_is_the_whole(chunks):
    """Law 2, against float64; each chunk is one kernel."""
    q, k, v = a_stream(1000)
    window = Window.causal(300)

    def step(ring, q, k, v):
        return rj.attend(q, k, v, ring)

    ring, outs, start = rj.RingBuffer.empty(2, 2, 128, window), [], 0
    for chunk in chunks:
        part = [x[:, start : start + chunk] for x in (q, k, v)]
        compiled = jax.jit(step, donate_argnums=0).lower(ring, *part).compile()
        assert compiled.as_text().count('custom_call_target="mosaic_gpu') == 1
        out, ring = compiled(ring, *part)
        outs.append(out)
        start += chunk
    at = np.arange(1000)
    what = {"left": 299, "right": 0, "sinks": 0, "q_positions": at, "k_positions": at}
    exact, _ = oracle.attention(q, k, v, **what)
    plain, _ = cases._plain(None, None)(q, k, v, None, jnp.asarray(oracle.visible(**what)))
    cases.assert_close(np.concatenate(outs, axis=1), exact, plain)


@pytest.mark.parametrize("sinks", [0, 3, 4])
def test_a_chunk_copies_no_ring(sinks):
    """The tokens are padded to whole tiles; what is not there is anything as large as the ring."""
    ring = rj.RingBuffer.empty(4, 2, 128, Window.causal(4096, sinks=sinks))
    step = jax.jit(lambda ring, q, k, v: rj.attend(q, k, v, ring), donate_argnums=0)
    compiled = step.lower(ring, *a_stream(130, batch=4)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < ring.k.nbytes


@pytest.mark.parametrize("sinks", [0, 3])
def test_gradients_through_a_ring_in_chunks(sinks):
    """Law 10: of a stream in three chunks, ragged, against float64; with sinks XLA derives the ring's part."""
    window, chunk, real = Window.causal(200, sinks=sinks), 250, np.array([[250, 250, 250], [250, 100, 250]])
    q, k, v = a_stream(750, heads=4)
    g = jax.random.normal(jax.random.key(9), q.shape, jnp.bfloat16)

    @jax.jit
    def gradients(q, k, v):
        def loss(q, k, v):
            ring, total = rj.RingBuffer.empty(2, 2, 128, window), 0.0
            for i in range(3):
                part = slice(chunk * i, chunk * (i + 1))
                out, ring = rj.attend(*(x[:, part] for x in (q, k, v)), ring, lengths=jnp.asarray(real[:, i]))
                total = total + (out.astype(jnp.float32) * g[:, part].astype(jnp.float32)).sum()
            return total

        return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

    tokens = np.concatenate([np.arange(chunk)[None] < real[:, i : i + 1] for i in range(3)], axis=1)
    at = np.where(tokens, np.cumsum(tokens, axis=1) - 1, -1)
    what = {"left": 199, "right": 0, "sinks": sinks, "q_positions": at, "k_positions": at}
    what |= {"q_segments": np.where(tokens, 0, 7), "k_segments": np.zeros_like(at)}
    mask = jnp.asarray(oracle.visible(**what))
    lse = jnp.zeros((2, 4, 750))
    plain = cases._plain_gradients(None, None)(q, k, v, None, mask, g, lse)
    with jax.enable_x64(True):
        wide = [np.asarray(x).astype(np.float64) for x in (q, k, v, g, lse)]
        exact = cases._plain_gradients(None, None)(*wide[:3], None, np.asarray(mask), *wide[3:])
    for name, got, x, y in zip("qkv", gradients(q, k, v), exact[:3], plain[:3], strict=True):
        cases.assert_close(got, np.asarray(x), y, name)


def test_a_chunk_is_the_same_bit_for_bit():
    case = CASES[4]
    made = chunk_cases.make(case)
    run = jax.jit(lambda *arguments: mosaic.extend(case.problem, *arguments))
    first = jax.tree.map(np.asarray, run(*made.arguments))
    for _ in range(50):
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, run(*made.arguments)), first)
