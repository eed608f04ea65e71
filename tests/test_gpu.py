"""The Hopper kernels on the GPU they are for: `pytest -m gpu tests/test_gpu.py`, faster with `-n 8`."""

import dataclasses
from functools import partial
from unittest import mock

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from test_mosaic import poisoned, problem_of

import ringjax as rj
from ringjax import Window
from ringjax import _attention as attention
from ringjax._kernels import resolve
from ringjax._kernels.problem import Rows
from ringjax._op import op

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def hopper(request):
    """Skips where the kernels do not run."""
    problem, *_ = problem_of(cases.BY_NAME["bfloat16"], cases.arrays(cases.BY_NAME["bfloat16"]))
    device = jax.devices()[0]
    problem = dataclasses.replace(problem, platform=device.platform, device_kind=device.device_kind)
    if resolve(problem, "attention", None) != "mosaic":
        pytest.skip(f"the kernels are for Hopper GPUs and jax >= 0.11, not for {device.device_kind}")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def run(case, made, deterministic):
    """Output, lse and the gradients for q, k, v and the sink logits, by the kernels.

    Not deterministic means the fused backward kernel, also for windows so narrow that the tuned choice is another.
    """
    problem, rows, (*qkv, _) = problem_of(case, made, deterministic=deterministic)
    assert resolve(problem, "attention", "mosaic") == "mosaic"

    @jax.jit
    def both(q, k, v, sink_logits, g, g_lse):
        found, vjp = jax.vjp(partial(op, problem, "mosaic", rows), q, k, v, sink_logits)
        return found, vjp((g, g_lse))

    from ringjax._kernels import mosaic_backward

    tuned = mosaic_backward.mosaic_backward_tiles

    def fused(*arguments, head_dim, **options):
        return tuned(*arguments, head_dim=head_dim, **options)._replace(fused=head_dim <= 128)

    with mock.patch.object(mosaic_backward, "mosaic_backward_tiles", fused):
        return both(*qkv, made.sink_logits, poisoned(made.g, rows.q_segments), made.g_lse)


def check(case, deterministic=False, seed=0):
    made = cases.arrays(case, seed)
    found, gradients = run(case, made, deterministic)
    for name, got, exact, plain in zip(
        ("out", "lse"), found, cases.exact(case, made), cases.plain(case, made), strict=True
    ):
        cases.assert_close(got, exact, plain, name)
    exact, plain = cases.exact_gradients(case, made), cases.plain_gradients(case, made)
    for name, got, x, y in zip(("dq", "dk", "dv", "dsinks"), gradients, exact, plain, strict=True):
        if x is not None:
            cases.assert_close(got, x, y, name)
    return found, gradients


def sixteen_bits(case):
    return case if case.dtype != "float32" else case.replace(dtype="bfloat16")


@pytest.mark.parametrize("case", [sixteen_bits(case) for case in cases.CASES], ids=str)
def test_every_case(case):
    check(case)


LARGE = cases.Case(
    "large", Window.causal(300), queries=1500, keys=1500, heads=4, kv_heads=2, head_dim=128, value_dim=128, tiles=None
).replace(dtype="bfloat16")
LARGER = [
    LARGE,
    LARGE.replace(name="large-64", head_dim=64, value_dim=64, window=Window.causal(1000)),
    LARGE.replace(name="large-80-96", head_dim=80, value_dim=96, dtype="float16"),
    LARGE.replace(name="large-256", head_dim=256, value_dim=256, queries=700, keys=900),
    LARGE.replace(name="large-all-logits", softcap=5.0, sink_logits=True, window=Window.causal(200, sinks=5)),
    LARGE.replace(name="large-packed", segments="packed", window=Window(500, 40)),
    LARGE.replace(name="large-padded-sinks", segments="padded", window=Window(200, 10, 70)),
    LARGE.replace(name="large-causal", window=Window.causal(), head_dim=64, value_dim=64, kv_heads=4),
    LARGE.replace(name="large-full", window=Window.full(), queries=1000, keys=1100),
    LARGE.replace(name="large-more-queries", window=Window(300, 100), keys=700),
    LARGE.replace(name="large-offsets", queries=700, q_offset=(100, 790)),
]


@pytest.mark.parametrize("deterministic", [False, True], ids=["fused", "split"])
@pytest.mark.parametrize("case", LARGER, ids=str)
def test_large(case, deterministic):
    check(case, deterministic, seed=1)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_integers_are_exact(head_dim):
    """Values that are whole numbers, all weights equal: a register overwritten too early would show in any digit."""
    size, window = 2048, Window.causal(512)
    rng = np.random.default_rng(0)
    q = jnp.zeros((1, size, 4, head_dim), jnp.bfloat16)
    k = jnp.asarray(rng.integers(-3, 4, (1, size, 2, head_dim)), jnp.bfloat16)
    v = jnp.asarray(rng.integers(-8, 9, (1, size, 2, head_dim)), jnp.bfloat16)
    g = jnp.asarray(rng.integers(-4, 5, (1, size, 4, head_dim)) * 512, jnp.bfloat16)
    out, vjp = jax.vjp(lambda v: rj.attention(q, k, v, window, implementation="mosaic"), v)
    sums = np.cumsum(np.asarray(v, np.float64), axis=1)
    late = np.arange(511, size)  # rows with 512 keys: the mean is exact
    exact = (sums[:, late] - np.where(late[None, :, None, None] >= 512, sums[:, late - 512], 0.0)) / 512
    np.testing.assert_array_equal(
        np.asarray(out[:, 511:]), np.repeat(exact, 2, axis=2).astype(jnp.bfloat16), "the mean of 512 whole numbers"
    )
    (dv,) = vjp(g)
    g64 = np.asarray(g, np.float64).reshape(1, size, 2, 2, head_dim).sum(3) / 512
    inner = np.arange(511, size - 511)  # keys that 512 full rows see
    sums = np.concatenate([np.zeros_like(g64[:, :1]), np.cumsum(g64, axis=1)], axis=1)
    exact = (sums[:, inner + 512] - sums[:, inner]).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(dv[:, inner]), exact, "the sum of whole numbers")


def test_memory_that_nobody_sees_may_hold_nan():
    """Padding tokens hold NaN, of the arrays and of the output's cotangent; nothing of it comes out."""
    case = LARGE.replace(name="poison", segments="padded", window=Window.causal(200, sinks=3), queries=700, keys=700)
    made = cases.arrays(case)
    padding = (np.asarray(made.segment_ids) < 0)[:, :, None, None]
    poisoned = [jnp.where(padding, jnp.nan, x).astype(x.dtype) for x in made[:3]]

    def f(q, k, v):
        return rj.attention(q, k, v, case.window, segment_ids=made.segment_ids, implementation="mosaic")

    out, vjp = jax.vjp(f, *made[:3])
    dirty, dirty_vjp = jax.vjp(f, *poisoned)
    np.testing.assert_array_equal(np.asarray(dirty), np.asarray(out))
    dirty_g = jnp.where(padding, jnp.nan, made.g).astype(made.g.dtype)
    for got, clean in zip(dirty_vjp(dirty_g)[1:], vjp(made.g)[1:], strict=True):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(clean))  # dk and dv; dq is summed in any order


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_deterministic_means_bit_for_bit(head_dim):
    case = LARGE.replace(name="repeat", head_dim=head_dim, value_dim=head_dim)
    made = cases.arrays(case)
    problem, rows, (q, k, v, _) = problem_of(case, made, deterministic=True)

    @jax.jit
    def both(q, k, v, g):
        found, vjp = jax.vjp(partial(op, problem, "mosaic", rows), q, k, v, None)
        return found, vjp((g, made.g_lse))[:3]

    first = jax.tree.map(np.asarray, both(q, k, v, made.g))
    for _ in range(50):
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, both(q, k, v, made.g)), first)


def test_memory_is_linear():
    """No array of T x S: temporaries are the padded copies and, backward, float32 dq."""
    shape = (1, 32768, 4, 128)
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    def gradients(q, k, v, g):
        return jax.vjp(lambda *a: rj.attention(*a, Window.causal(1024), implementation="mosaic"), q, k, v)[1](g)

    stats = jax.jit(gradients).lower(x, x, x, x).compile().memory_analysis()
    assert stats.temp_size_in_bytes <= 4 * 2 * np.prod(shape)


def test_none_takes_the_kernels():
    """And what they refuse still runs."""
    q, k, v = (jnp.ones((1, 64, 2, 64), jnp.bfloat16) for _ in range(3))
    kind = jax.devices()[0].device_kind
    problem, rows, _ = attention._canonical("attention", q, k, v, Window.causal(5), *[None] * 7)
    assert (problem.platform, problem.device_kind, rows) == ("gpu", kind, Rows())
    assert resolve(problem, "attention", None) == "mosaic"
    wide = rj.attention(*(x.astype(jnp.float32) for x in (q, k, v)), Window.causal(5))
    np.testing.assert_array_equal(np.asarray(wide), np.ones_like(wide))


def test_arrays_beyond_two_to_the_31_elements():
    """Forward and backward of 17 GB of arrays, compared at the first tokens, around element 2**31 and at the end."""
    size, heads, head_dim, near = 2**21 + 1000, 8, 128, 96
    window = Window.causal(64)
    shapes = ((1, size, n, head_dim) for n in (heads, 1, 1, heads))

    @jax.jit
    def made():
        keys = jax.random.split(jax.random.key(0), 4)
        return [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)]

    @jax.jit
    def run(q, k, v, g):
        out, vjp = jax.vjp(lambda *x: rj.attention(*x, window, implementation="mosaic"), q, k, v)
        return out, *vjp(g)

    arrays = made()
    assert arrays[0].size > 2**31
    found = run(*arrays)
    for end in (near, 2**21 + 20, size):  # queries [end - near, end), of which the last keys are seen by no other
        start, low = end - near, max(0, end - near - 63)
        q, g = (x[:, start:end] for x in (arrays[0], arrays[3]))
        k, v = (x[:, low:end] for x in arrays[1:3])
        at, keys = np.arange(start, end), np.arange(low, end)
        mask = np.broadcast_to(window.visible(at[:, None], keys[None]), (1, near, len(keys)))
        out, dq = (np.asarray(x[:, start:end]) for x in found[:2])
        args = (None, jnp.asarray(mask))
        exact, _ = oracle.attention(q, k, v, left=63, right=0, sinks=0, q_positions=at, k_positions=keys)
        cases.assert_close(out, exact, cases._plain(None, None)(q, k, v, *args)[0], f"out {end}")
        lse = jnp.zeros((1, heads, near))
        plain = cases._plain_gradients(None, None)(q, k, v, *args, g, lse)
        with jax.enable_x64(True):
            wide = [np.asarray(x).astype(np.float64) for x in (q, k, v, g, lse)]
            exact = cases._plain_gradients(None, None)(*wide[:3], None, mask, *wide[3:])
        cases.assert_close(dq, np.asarray(exact[0]), plain[0], f"dq {end}")
        if end == size:
            for name, got, x, y in zip("kv", found[2:], exact[1:3], plain[1:3], strict=True):
                last = slice(len(keys) - near, None)
                cases.assert_close(got[:, start:], np.asarray(x)[:, last], y[:, last], f"d{name}")


def test_vmap_of_attention_and_of_its_gradients():
    made = cases.arrays(LARGE.replace(queries=400, keys=400))
    stacked = [jnp.stack([x, x[:, ::-1]]) for x in (*made[:3], made.g)]

    def both(q, k, v, g):
        out, vjp = jax.vjp(lambda *x: rj.attention(*x, LARGE.window, implementation="mosaic"), q, k, v)
        return out, *vjp(g)[1:]  # dq is summed in any order

    found = jax.jit(jax.vmap(both))(*stacked)
    for i in range(2):
        alone = jax.jit(both)(*(x[i] for x in stacked))
        for got, exact in zip(found, alone, strict=True):
            np.testing.assert_array_equal(np.asarray(got[i]), np.asarray(exact))


def test_attention_in_a_shard_map():
    made = cases.arrays(LARGE.replace(queries=400, keys=400))
    mesh = jax.make_mesh((1, 1), ("rows", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = jax.P("rows", None, "heads")

    def both(q, k, v, g):
        out, vjp = jax.vjp(lambda *x: rj.attention(*x, LARGE.window, implementation="mosaic"), q, k, v)
        return out, *vjp(g)[1:]

    arrays = (*made[:3], made.g)
    split = jax.jit(jax.shard_map(both, mesh=mesh, in_specs=(spec,) * 4, out_specs=(spec,) * 3, check_vma=False))
    for got, exact in zip(split(*arrays), jax.jit(both)(*arrays), strict=True):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(exact))
