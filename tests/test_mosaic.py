"""The Hopper kernels without a GPU: run by Mosaic's interpreter with race detection, and lowered for CUDA.

The fused backward kernel sums dq by TMA reduction, which the interpreter does not know: there, every share of dq is
written to a place of its own, and the sum is taken outside. All else of the kernel is what runs on a GPU.
"""

import dataclasses

import cases
import chunk_cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from ring_cases import RingCase

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
    """The problem, rows and arrays of a case, as if on an H200; what is padding is NaN, the cotangents' apart."""
    given = cases.options(case, made)
    names = ("segment_ids", "kv_segment_ids", "sink_logits", "softcap", "scale", "q_offset")
    options = [given[name] for name in names]
    problem, rows, found = attention._canonical("attention", *made[:3], case.window, *options, None)
    problem = dataclasses.replace(problem, platform="gpu", device_kind="NVIDIA H200", **changes)
    *qkv, sink_logits = found
    ids = rows.q_segments, rows.kv_segments, rows.kv_segments
    return problem, rows, (*map(poisoned, qkv, ids), sink_logits)


def poisoned(x, ids):
    """x [B, T, ...] with NaN where the segment ids [B, T] say padding."""
    return x if ids is None else jnp.where(ids[:, :, None, None] < 0, jnp.asarray(jnp.nan, x.dtype), x)


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
    for got, exact, plain in zip((out, lse), cases.exact(case, made), cases.plain(case, made), strict=True):
        cases.assert_close(got, exact, plain, case.name)


CHUNK = RingCase("chunk", Window.causal(150), queries=140, batch=2, heads=2, kv_heads=1, lengths=(400, 90))
CHUNKS = [
    CHUNK,
    CHUNK.replace(name="chunk-slots-by-8", window=Window.causal(148, sinks=4), heads=4, kv_heads=2),
    CHUNK.replace(
        name="chunk-logits",
        window=Window.causal(200, sinks=70),
        ragged=True,
        sink_logits=True,
        softcap=3.0,
        lengths=(30, 1000),
    ),
    CHUNK.replace(name="chunk-slack", window=Window(180, 7), slack=76, rolled_back=True, out_dtype="float32"),
]


@needs_new_jax
@pytest.mark.parametrize("case", CHUNKS, ids=str)
def test_a_chunk_after_a_ring_in_the_interpreter(case, interpret):
    """The slots that nobody sees hold NaN, and share tiles with others."""
    made = chunk_cases.make(case)
    assert not mosaic.unsupported(case.problem) and mosaic.extends(case.problem)
    chunk_cases.check(made, *mosaic.extend(case.problem, *made.arguments, interpret=interpret, tiles=SMALL_FORWARD))


@needs_new_jax
@pytest.mark.parametrize("sinks", [0, 90])
def test_a_chunk_alone_in_the_interpreter(sinks, interpret):
    """What stands beside a ring: positions from anywhere on, a number of real queries a row, the output in float32."""
    start, real = np.array([500, 20], np.int32), np.array([140, 60], np.int32)
    case = CHUNK.replace(name=f"alone-{sinks}", window=Window.causal(70, sinks=sinks), lengths=tuple(start.tolist()))
    made = chunk_cases.make(case)
    _, q, k, v, *_ = made.arguments
    at = start[:, None] + np.arange(140)[None]
    what = {"left": 69, "right": 0, "sinks": sinks, "q_positions": at, "k_positions": at}
    what |= {"q_segments": np.where(np.arange(140)[None] < real[:, None], 0, 7), "k_segments": np.zeros((2, 140), int)}
    mask = np.broadcast_to(oracle.visible(**what), (2, 140, 140))
    changes = {"layout": "linear", "keys": 140, "q_offset": 0, "ragged": True, "out_dtype": "float32"}
    problem = dataclasses.replace(case.problem, **changes)
    assert not mosaic.unsupported(problem)
    rows = Rows(kv_start=jnp.asarray(start), q_length=jnp.asarray(real))
    out, lse = mosaic.forward(problem, rows, q, k, v, None, interpret=interpret, tiles=SMALL_FORWARD)
    assert out.dtype == jnp.float32
    plain = cases._plain(None, None)(q, k, v, None, jnp.asarray(mask))
    for got, exact, near in zip((out, lse), oracle.attention(q, k, v, **what), plain, strict=True):
        cases.assert_close(got, exact, near)
    assert not np.asarray(out)[~mask.any(-1)].any()


@needs_new_jax
def test_exponentials_without_the_special_function_unit(interpret):
    """Where a softcap bounds the logits, and where nothing does."""
    for case in (LONGER, LONGER.replace(name="longer-uncapped", softcap=None, window=Window.causal(140))):
        made = cases.arrays(case)
        problem, rows, found = problem_of(case, made)
        out, lse = mosaic.forward(
            problem, rows, *found, interpret=interpret, tiles=SMALL_FORWARD._replace(polynomial=32)
        )
        for got, exact, plain in zip((out, lse), cases.exact(case, made), cases.plain(case, made), strict=True):
            cases.assert_close(got, exact, plain, case.name)


def check_backward(case, interpret, tiles, made=None, **changes):
    made = cases.arrays(case) if made is None else made
    problem, rows, found = problem_of(case, made, **changes)
    q, k, v, _ = found
    out, lse = (jnp.asarray(x, jnp.float32) for x in cases.exact(case, made))
    total = lse
    if made.sink_logits is not None:
        total = jnp.logaddexp(lse, made.sink_logits.astype(jnp.float32)[None, :, None])
    delta = jnp.einsum("btnh,btnh->bnt", made.g.astype(jnp.float32), out)
    delta = delta - jnp.where(lse == -jnp.inf, 0.0, made.g_lse * jnp.exp(total - lse))
    g = poisoned(made.g, rows.q_segments)
    got = mosaic.backward(problem, rows, q, k, v, g, total, delta, interpret=interpret, tiles=tiles)
    exact, plain = cases.exact_gradients(case, made)[:3], cases.plain_gradients(case, made)[:3]
    for name, x, y, z in zip(("dq", "dk", "dv"), got, exact, plain, strict=True):
        cases.assert_close(x, y, z, f"{case.name} {name}")


@needs_new_jax
@pytest.mark.parametrize("skip, case", [(True, LONGER.replace(name="gradients")), (False, INTERPRETED[1])], ids=str)
def test_backward_in_the_interpreter(skip, case, interpret):
    check_backward(case, interpret, SMALL_BACKWARD._replace(skip=skip), deterministic=True)


ONE_HEAD = LONGER.replace(head_dim=128, value_dim=128, sink_logits=False, softcap=None)
FUSED = {
    "causal": (ONE_HEAD.replace(window=Window.causal()), MosaicBackwardTiles(heads_outer=True)),
    "window-128": (ONE_HEAD, MosaicBackwardTiles(descending=True)),
    "window-64": (LONGER, MosaicBackwardTiles(tile_size=128)),
    "segments": (INTERPRETED[-1], MosaicBackwardTiles(tile_size=128, descending=True)),
    "narrow": (LONGER.replace(window=Window(40, 10, 3), queries=60, keys=200), MosaicBackwardTiles(tile_size=128)),
}


@needs_new_jax
@pytest.mark.parametrize("name", FUSED)
def test_fused_backward_in_the_interpreter(name, interpret):
    """The steps that one of the two computing warpgroups skips are among them, and heads one after the other."""
    case, tiles = FUSED[name]
    check_backward(case.replace(name=f"fused-{name}"), interpret, tiles)


@needs_new_jax
def test_padding_beside_full_tiles_in_the_interpreter(interpret):
    """Tiles that hold padding come before, between and after tiles that need no mask; nothing of the NaN comes out."""
    case = cases.Case("beside", Window.causal(400), queries=400, keys=400, batch=1, heads=1, kv_heads=1, tiles=None)
    case = case.replace(head_dim=64, value_dim=64, dtype="bfloat16")
    ids = np.full((1, 400), 5, np.int32)
    ids[:, [0, 1, 290, 340]] = -3
    ids[:, 341:] = 7
    made = cases.arrays(case)._replace(segment_ids=jnp.asarray(ids), kv_segment_ids=jnp.asarray(ids))
    made = made._replace(g_lse=jnp.where(jnp.asarray(ids)[:, None] < 0, 0.0, made.g_lse))
    problem, rows, found = problem_of(case, made)
    assert all(bool(jnp.isnan(x[:, 290]).all()) for x in found[:3])
    out, lse = mosaic.forward(problem, rows, *found, interpret=interpret, tiles=SMALL_FORWARD)
    for got, exact, plain in zip((out, lse), cases.exact(case, made), cases.plain(case, made), strict=True):
        cases.assert_close(got, exact, plain, case.name)
    check_backward(case, interpret, MosaicBackwardTiles(tile_size=128), made)


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
    # Forward; then zeros for dq and the fused kernel, or dq and dk with dv, or at head size 256 one for each.
    kernels = 3 if max(problem.head_dim, problem.value_dim) <= 128 else 4
    assert text.count("mosaic_gpu") >= kernels


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"platform": "cpu"}, "needs a GPU"),
        ({"device_kind": "NVIDIA A100-SXM4-80GB"}, "Hopper"),
        ({"device_kind": "NVIDIA B200"}, "Hopper"),
        ({"device_kind": "NVIDIA GeForce GTX 1080"}, "Hopper"),
        ({"layout": "ring", "head_dim": 20}, "rings whose head_dim"),
        ({"q_dtype": "float32", "kv_dtype": "float32", "out_dtype": "float32"}, "needs bfloat16"),
        ({"out_dtype": "float16"}, "one dtype"),
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
