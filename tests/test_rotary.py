"""Rotary embedding: exact to float32 at any position, the convention of transformers, and what it promises."""

import math
import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ringjax as rj

B, T, N, H = 2, 4, 3, 16
FAR = 2**31 - 1
EPS = float(jnp.finfo(jnp.float32).eps)


@cache
def rotate(**options):
    return jax.jit(partial(rj.apply_rotary, **options))


def queries(seed=0, dtype="float32", shape=(B, T, N, H)):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def as_int32(*positions):
    return jnp.asarray(np.resize(positions, (B, T)), jnp.int32)


def exact(x, positions, turning):
    """In float64, from the definition: a pair is a complex number, and turning it a product."""
    x, half = np.asarray(x).astype(np.float64), len(turning)
    angles = np.asarray(positions).astype(np.float64)[:, :, None, None] * np.asarray(turning)
    turned = (x[..., :half] + 1j * x[..., half : 2 * half]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag, x[..., 2 * half :]], axis=-1)


def series(base=10_000.0, rotated=H):
    return base ** (-2 * np.arange(rotated // 2) / rotated)


def assert_exact(got, x, positions, turning):
    """A few roundings of float32 (angle, at most pi; cosine, sine; two products, their sum), one to the dtype."""
    want = exact(x, positions, turning)
    bound = 8 * EPS * math.sqrt(2) * np.abs(np.asarray(x).astype(np.float64)).max()
    last = 0 if got.dtype == jnp.float32 else float(jnp.finfo(got.dtype).eps) / 2
    np.testing.assert_allclose(np.asarray(got).astype(np.float64), want, rtol=last, atol=bound)


@given(
    st.lists(st.integers(-(2**31), FAR) | st.integers(0, 2**20), min_size=B * T, max_size=B * T),
    st.sampled_from([10_000.0, 1_000_000.0]),
)
def test_exact_at_any_position(positions, base):
    positions, x = as_int32(*positions), queries()
    assert_exact(rotate(base=base)(x, positions), x, positions, series(base))


def test_float32_angles_would_not_do():
    """Why angles are reduced in integers: the usual product, at a position near 10**6, misses by 10,000 times."""
    x, positions = queries(), as_int32(999_983)
    angles = positions.astype(jnp.float32)[:, :, None] * jnp.asarray(series(), jnp.float32)[None, None]
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second = x[..., : H // 2], x[..., H // 2 :]
    usual = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    want = exact(x, positions, series())
    error = np.abs(np.asarray(usual) - want).max()
    assert error > 1e-3
    assert np.abs(np.asarray(rotate()(x, positions)) - want).max() < error / 1000


def test_logits_depend_on_the_distance_only():
    """Also far from the origin, where a stream has been going on for two thousand million tokens."""
    q, k = queries(1), queries(2)
    turn = rotate()

    def logits(start):
        positions = as_int32(*range(start, start + T))
        return np.einsum("btnh,bsnh->bnts", np.asarray(turn(q, positions)), np.asarray(turn(k, positions)))

    near = logits(0)
    for start in (1, 5, 4096, 10**6, FAR - T, -T, -(10**9)):
        np.testing.assert_allclose(logits(start), near, rtol=0, atol=H * 16 * EPS * np.abs(near).max())


def test_position_0_changes_nothing_and_minus_turns_back():
    x, positions = queries(), as_int32(1, 77, 10**6, FAR)
    np.testing.assert_array_equal(rotate()(x, as_int32(0)), x)
    np.testing.assert_allclose(rotate()(rotate()(x, positions), -positions), x, atol=32 * EPS, rtol=0)


def test_one_row_of_positions_serves_all():
    positions = jnp.arange(7, 7 + T, dtype=jnp.int32)
    both = jnp.broadcast_to(positions[None], (B, T))
    assert_exact(rotate()(queries(), positions), queries(), both, series())


@pytest.mark.parametrize("fraction", [0.25, 0.4, 1.0])
def test_fraction_turns_the_first_features(fraction):
    """0.4 of 16 is 6.4: 6, as in Phi and GPT-NeoX."""
    x, positions = queries(), as_int32(3, 1000, 10**6)
    got = rotate(fraction=fraction)(x, positions)
    rotated = int(H * fraction)
    assert_exact(got, x, positions, series(rotated=rotated))
    np.testing.assert_array_equal(got[..., rotated:], x[..., rotated:])


def test_frequencies_replace_the_series():
    x, positions = queries(), as_int32(3, 1000, 10**6, -5)
    turning = (1.0, 0.25, -0.1, 0.0, 7.0, 1e-9)
    got = rotate(frequencies=turning)(x, positions)
    assert_exact(got, x, positions, turning)
    np.testing.assert_array_equal(got[..., 3], x[..., 3])
    np.testing.assert_array_equal(rotate(frequencies=tuple(series()))(x, positions), rotate()(x, positions))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_computed_in_float32_returned_in_its_dtype(dtype):
    x, positions = queries(dtype=dtype), as_int32(3, 1000, 10**6)
    got = rotate(fraction=0.5)(x, positions)
    assert got.dtype == dtype
    assert_exact(got, x, positions, series(rotated=H // 2))


def test_gradient_turns_back():
    """A rotation's transpose is its inverse."""
    x, g, positions = queries(1), queries(2), as_int32(3, 1000, 10**6, FAR)
    _, vjp = jax.vjp(lambda x: rotate()(x, positions), x)
    np.testing.assert_allclose(vjp(g)[0], rotate()(g, -positions), atol=8 * EPS, rtol=0)


def test_vmap_and_integer_dtypes():
    x, positions = queries(), as_int32(3, 1000)
    rows = jax.vmap(lambda x, p: rj.apply_rotary(x[None], p)[0])(x, positions)
    assert_exact(rows, x, positions, series())
    assert_exact(rotate()(x, np.asarray(positions, np.uint16)), x, positions, series())


@pytest.mark.parametrize("model", ["llama", "llama3", "gemma", "phi", "gpt_neox"])
def test_transformers_does_the_same(model):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    file = model.rstrip("3")
    name = {"llama": "Llama", "gemma": "Gemma", "phi": "Phi", "gpt_neox": "GPTNeoX"}[file]
    modeling = pytest.importorskip(f"transformers.models.{file}.modeling_{file}")
    rope = {"rope_theta": 500_000.0, "rope_type": "default"}
    if model in ("phi", "gpt_neox"):
        rope["partial_rotary_factor"] = 0.25
    if model == "llama3":
        rope |= {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope["original_max_position_embeddings"] = 64
    sizes = {"hidden_size": N * H, "num_attention_heads": N, "max_position_embeddings": 512}
    config = getattr(transformers, f"{name}Config")(
        **sizes, rope_parameters=rope, **{"head_dim": H} if file == "gemma" else {}
    )
    embedding = getattr(modeling, f"{name}RotaryEmbedding")(config)

    q, k, positions = queries(1), queries(2), as_int32(0, 1, 5, 63, 64, 200, 511)
    theirs_q, theirs_k = (torch.from_numpy(np.array(x)).transpose(1, 2) for x in (q, k))
    cos, sin = embedding(theirs_q, torch.from_numpy(np.array(positions)).long())
    rotated = cos.shape[-1]
    turned = modeling.apply_rotary_pos_emb(theirs_q[..., :rotated], theirs_k[..., :rotated], cos, sin)
    assert rotated == (4 if "partial_rotary_factor" in rope else H)

    options = {"base": 500_000.0, "fraction": rotated / H}
    if model == "llama3":
        options = {"frequencies": tuple(embedding.inv_freq.tolist())}
        assert not np.allclose(options["frequencies"], series(500_000.0), rtol=0.01)
    for x, want in zip((q, k), turned, strict=True):
        got = rotate(**options)(x, positions)
        # Their angles are products in float32, of float32 frequencies.
        bound = 511 * 4 * EPS * np.abs(np.asarray(x)).max()
        np.testing.assert_allclose(got[..., :rotated], want.transpose(1, 2).numpy(), rtol=0, atol=bound)


X, P = queries(), as_int32(0)
INTEGERS, PAIRS = "positions must be an array of integers", "frequencies must be 1 to 8 finite numbers, one per pair"
EVEN = "head_dim * fraction must be even, at least 2 and at most head_dim"
WRONG = [
    (ValueError, (X[0], P), {}, "x must have 4 axes [B, T, N, H], got float32[4, 3, 16]."),
    (TypeError, (X.astype(jnp.int32), P), {}, "x must be one of float32, bfloat16, float16, got int32[2, 4, 3, 16]."),
    (TypeError, (X, 3), {}, f"{INTEGERS}, got int."),
    (TypeError, (X, X[..., 0, 0]), {}, f"{INTEGERS}, got float32[2, 4]."),
    (ValueError, (X, P[:, :1]), {}, "positions must be int32[4] or int32[2, 4], got int32[2, 1]."),
    (ValueError, (X, P[0, 0]), {}, "positions must be int32[4] or int32[2, 4], got int32[]."),
    (ValueError, (X, np.full((T,), 2**31)), {}, "positions must fit int32, got 2147483648."),
    (ValueError, (X, P), {"base": 0.0}, "base must be finite and above 0, got 0.0."),
    (ValueError, (X, P), {"fraction": 0}, "fraction must be finite and above 0, got 0."),
    (ValueError, (X, P), {"fraction": 1.5}, f"{EVEN}, got 16 * 1.5."),
    (ValueError, (X, P), {"fraction": 0.2}, f"{EVEN}, got 16 * 0.2."),
    (ValueError, (X[..., :5], P), {}, f"{EVEN}, got 5 * 1."),
    (ValueError, (X, P), {"frequencies": [1.0] * 9}, f"{PAIRS} of features, got float64[9]."),
    (ValueError, (X, P), {"frequencies": [np.inf]}, f"{PAIRS} of features, got float64[1]."),
]


@pytest.mark.parametrize(("kind", "arguments", "options", "text"), WRONG)
def test_messages(kind, arguments, options, text):
    with pytest.raises(kind, match="^" + re.escape(f"apply_rotary: {text}") + "(\n|$)"):
        rj.apply_rotary(*arguments, **options)


def test_traced_frequencies_are_refused():
    with pytest.raises(TypeError, match=r"^apply_rotary: frequencies must be static numbers, got float32\[8\]\."):
        jax.jit(lambda f: rj.apply_rotary(X, P, frequencies=f))(jnp.ones(8))
