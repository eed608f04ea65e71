"""The Hopper kernels without a GPU: run by Mosaic's interpreter with race detection, and lowered for CUDA.

The fused backward kernel sums by TMA reduction, which the interpreter does not know: tests/test_gpu.py runs it.
"""

import dataclasses

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ringjax import Window
from ringjax import _attention as attention
from ringjax._kernels import mosaic, reasons_against, resolve
from ringjax._kernels.problem import Problem, Rows
from ringjax._kernels.tiles import MosaicBackwardTiles, MosaicForwardTiles

NEW = tuple(int(part) for part in jax.__version__.split(".")[:2]) >= (0, 11)
needs_new_jax = pytest.mark.skipif(not NEW, reason="Mosaic GPU as used here needs jax >= 0.11")

SMALL_FORWARD = MosaicForwardTiles(block_size=64)
SMALL_BACKWARD = MosaicBackwardTiles(fused=False, dq_block=64, q_stages=2)


def problem_of(case, made, **changes):
    """The problem, rows and arrays of a case, as if on an H200; what is padding is zero, as `attention` makes it."""
    given = cases.options(case, made)
    names = ("segment_ids", "kv_segment_ids", "sink_logits", "softcap", "scale", "q_offset")
    options = [given[name] for name in names]
    problem, rows, found = attention._canonical("attention", *made[:3], case.window, *options, None)
    problem = dataclasses.replace(problem, platform="gpu", device_kind="NVIDIA H200", **changes)
    q, k, v, sink_logits = found
    if rows.q_segments is not None:
        q = attention._zero_where_padding(q, rows.q_segments >= 0)
        k, v = (attention._zero_where_padding(x, rows.kv_segments >= 0) for x in (k, v))
    return problem, rows, (q, k, v, sink_logits)


@pytest.fixture
def interpret():
    """Parameters of the interpreter; a test that failed leaves nothing behind for the next."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
    from jax.experimental.pallas import mosaic_gpu as plgpu

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield plgpu.InterpretGPUParams(detect_races=True)
    interpret_pallas_call.reset_gpu_interpret_mode_state()


LONGER = cases.Case(
    "longer",
    Window.causal(70),
    queries=150,
    keys=170,
    batch=1,
    heads=2,
    kv_heads=1,
    head_dim=64,
    value_dim=64,
    sink_logits=True,
    softcap=3.0,
    dtype="bfloat16",
)
INTERPRETED = [
    cases.BY_NAME["bfloat16"],
    cases.BY_NAME["bfloat16-packed"].replace(batch=1),
    cases.BY_NAME["float16-more-keys"].replace(batch=1),
    cases.BY_NAME["offset-per-row"].replace(dtype="bfloat16"),
    cases.BY_NAME["more-queries"].replace(dtype="bfloat16", batch=1),
    LONGER,
    LONGER.replace(name="longer-segments", window=Window(70, 10, 3), segments="padded", sink_logits=False),
]


@needs_new_jax
@pytest.mark.parametrize("case", INTERPRETED, ids=str)
def test_forward_in_the_interpreter(case, interpret):
    made = cases.arrays(case)
    problem, rows, found = problem_of(case, made)
    assert not mosaic.unsupported(problem)
    out, lse = mosaic.forward(problem, rows, *found, interpret=interpret, tiles=SMALL_FORWARD)
    if rows.q_segments is not None:
        out = attention._zero_where_padding(out, rows.q_segments >= 0)
    for got, exact, plain in zip((out, lse), cases.exact(case, made), cases.plain(case, made), strict=True):
        cases.assert_close(got, exact, plain, case.name)


@needs_new_jax
@pytest.mark.parametrize("case", [LONGER.replace(name="gradients"), INTERPRETED[1]], ids=str)
def test_backward_in_the_interpreter(case, interpret):
    made = cases.arrays(case)
    problem, rows, found = problem_of(case, made, deterministic=True)
    q, k, v, _ = found
    out, lse = (jnp.asarray(x, jnp.float32) for x in cases.exact(case, made))
    total = lse
    if made.sink_logits is not None:
        total = jnp.logaddexp(lse, made.sink_logits.astype(jnp.float32)[None, :, None])
    delta = jnp.einsum("btnh,btnh->bnt", made.g.astype(jnp.float32), out)
    delta = delta - jnp.where(lse == -jnp.inf, 0.0, made.g_lse) * jnp.exp(total - lse)
    got = mosaic.backward(problem, rows, q, k, v, made.g, total, delta, interpret=interpret, tiles=SMALL_BACKWARD)
    exact, plain = cases.exact_gradients(case, made)[:3], cases.plain_gradients(case, made)[:3]
    for name, x, y, z in zip(("dq", "dk", "dv"), got, exact, plain, strict=True):
        cases.assert_close(x, y, z, f"{case.name} {name}")


def a_problem(**changes):
    facts = {
        "batch": 1,
        "queries": 300,
        "keys": 300,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 64,
        "value_dim": 64,
        "q_dtype": "bfloat16",
        "kv_dtype": "bfloat16",
        "out_dtype": "bfloat16",
        "window": Window.causal(100),
        "scale": 0.125,
        "platform": "gpu",
        "device_kind": "NVIDIA H200",
    }
    return Problem(**(facts | changes))


@needs_new_jax
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"head_dim": 128, "value_dim": 128, "window": Window(100, 30), "softcap": 20.0, "sink_logits": True},
        {"head_dim": 192, "value_dim": 128, "window": Window.causal(100, sinks=4)},
        {"head_dim": 80, "value_dim": 80, "window": Window.full(), "q_dtype": "float16"},
        {"segments": True, "window": Window.causal()},
        {"deterministic": True},
    ],
    ids=["plain", "logits", "padded-256", "padded-128", "segments", "deterministic"],
)
def test_forward_and_backward_lower_for_cuda(changes):
    """Shapes, layouts and shared memory are checked on a machine without CUDA."""
    if "q_dtype" in changes:
        changes = changes | {"kv_dtype": changes["q_dtype"], "out_dtype": changes["q_dtype"]}
    problem = a_problem(**changes)
    q = jax.ShapeDtypeStruct((1, 300, 4, problem.head_dim), problem.q_dtype)
    k = jax.ShapeDtypeStruct((1, 300, 2, problem.head_dim), problem.q_dtype)
    v = jax.ShapeDtypeStruct((1, 300, 2, problem.value_dim), problem.q_dtype)
    g = jax.ShapeDtypeStruct((1, 300, 4, problem.value_dim), problem.q_dtype)
    ids = jax.ShapeDtypeStruct((1, 300), np.int32)
    statistics = jax.ShapeDtypeStruct((1, 4, 300), np.float32)
    sinks = jax.ShapeDtypeStruct((4,), np.float32) if problem.sink_logits else None

    def both(q, k, v, g, sinks, ids, lse, delta):
        rows = Rows(q_segments=ids, kv_segments=ids) if problem.segments else Rows()
        return (
            mosaic.forward(problem, rows, q, k, v, sinks),
            mosaic.backward(problem, rows, q, k, v, g, lse, delta),
        )

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        traced = jax.jit(both).trace(q, k, v, g, sinks, ids, statistics, statistics)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    narrow = problem.window.left is not None and problem.window.right is not None
    split = problem.deterministic or narrow or max(problem.head_dim, problem.value_dim) > 128
    kernels = (3 if problem.head_dim <= 128 else 4) if split else 2
    assert text.count("mosaic_gpu") >= kernels


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"platform": "cpu"}, "needs a GPU"),
        ({"device_kind": "NVIDIA A100-SXM4-80GB"}, "Hopper"),
        ({"device_kind": "NVIDIA B200"}, "Hopper"),
        ({"device_kind": "NVIDIA GeForce GTX 1080"}, "Hopper"),
        ({"layout": "ring", "head_dim": 20}, "rings whose head_dim"),
        ({"ragged": True}, "valid queries"),
        ({"q_dtype": "float32", "kv_dtype": "float32", "out_dtype": "float32"}, "needs bfloat16"),
        ({"out_dtype": "float32"}, "one dtype"),
        ({"head_dim": 320}, "head_dim"),
    ],
    ids=lambda x: None if isinstance(x, dict) else x,
)
def test_what_it_cannot_do_falls_to_xla(changes, reason):
    problem = a_problem(**changes)
    assert any(reason in found for found in reasons_against(problem)["mosaic"])
    assert resolve(problem, "attention", None) != "mosaic"
    with pytest.raises(NotImplementedError, match=reason):
        resolve(problem, "attention", "mosaic")


@pytest.mark.parametrize("kind", ["NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA GH200 480GB", "NVIDIA H20"])
def test_it_is_first_on_a_hopper(kind):
    problem = a_problem(device_kind=kind)
    if NEW:
        assert resolve(problem, "attention", None) == "mosaic"
    else:
        assert any("jax >= 0.11" in reason for reason in mosaic.unsupported(problem))
