"""The kernel for arithmetic on rows: by Mosaic's interpreter with race detection, and lowered for CUDA. No torch."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

NEW = tuple(int(part) for part in jax.__version__.split(".")[:2]) >= (0, 11)
needs_new_jax = pytest.mark.skipif(not NEW, reason="Mosaic GPU as used here needs jax >= 0.11")

PATH = Path(__file__).parents[2] / "torch_bridge" / "_by_row.py"  # the package itself needs torch


@pytest.fixture(scope="module")
def by_row():
    found = importlib.util.spec_from_file_location("_by_row", PATH)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.fixture
def interpret(numpy_promotion):
    """Parameters of the interpreter; a test that failed leaves nothing behind for the next."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
    from jax.experimental.pallas import mosaic_gpu as plgpu

    yield plgpu.InterpretGPUParams(detect_races=True)
    interpret_pallas_call.reset_gpu_interpret_mode_state()


def expressions(m):
    """What stands before a backward pass: the lse in base 2, and the output times its gradient, less the lse's."""
    empty = m.Apply("EQ", (m.Narrow(0), -np.inf))
    lse = m.Apply("select", (empty, np.inf, m.Apply("multiply", (m.Narrow(0), 1.5))))
    return [lse, m.Apply("subtract", (m.Wide(0, 1), m.Apply("select", (empty, 0.0, m.Narrow(1)))))]


def arrays(depth):
    keys = jax.random.split(jax.random.key(depth), 4)
    wide = [jax.random.normal(key, (2, 128, 3, depth), jnp.bfloat16) for key in keys[:2]]
    lse, g_lse = (jax.random.normal(key, (2, 3, 128)) for key in keys[2:])
    return wide, [lse.at[1, 2, 5].set(-jnp.inf), g_lse.at[1, 2, 5].set(jnp.nan)]


@needs_new_jax
@pytest.mark.parametrize("depth", [64, 256])
def test_expressions_of_rows(by_row, depth, interpret):
    wide, narrow = arrays(depth)
    found = np.asarray(by_row.by_row([*expressions(by_row), 7.0], wide, narrow, interpret=interpret))
    lse, g_lse = map(np.asarray, narrow)
    g, out = (np.asarray(x).astype(np.float64) for x in wide)
    assert np.array_equal(found[:, :, 0], np.where(lse == -np.inf, np.inf, lse * np.float32(1.5)))
    exact = np.einsum("btnh,btnh->bnt", g, out) - np.where(lse == -np.inf, 0.0, g_lse)
    assert np.abs(found[:, :, 1] - exact).max() < 1e-5 * depth
    assert (found[:, :, 2] == 7.0).all()


@needs_new_jax
def test_it_is_one_kernel_for_cuda(by_row, numpy_promotion):
    wide, narrow = arrays(64)
    program = jax.jit(lambda *x: by_row.by_row(expressions(by_row), x[:2], x[2:]))
    text = program.trace(*wide, *narrow).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == 1


def test_what_it_takes(by_row):
    def spec(*shape, dtype="bfloat16"):
        return jax.ShapeDtypeStruct(shape, dtype)

    rows = spec(2, 3, 128, dtype="float32")
    assert by_row.takes([spec(2, 128, 3, 64)] * 2, [rows])
    for wide, narrow in (
        ([], [rows]),
        ([spec(2, 128, 3, 64)], []),
        ([spec(2, 128, 3, 80)], [rows]),
        ([spec(2, 128, 3, 320)], [rows]),
        ([spec(2, 100, 3, 64)], [spec(2, 3, 100, dtype="float32")]),
        ([spec(2, 128, 3, 64, dtype="float32")], [rows]),
        ([spec(2, 128, 3, 64), spec(2, 128, 3, 128)], [rows]),
        ([spec(2, 128, 3, 64)], [spec(2, 3, 64, dtype="float32")]),
        ([spec(2, 128, 3, 64)], [spec(2, 3, 128)]),
    ):
        assert not by_row.takes(wide, narrow)
