"""One set of rules for every test: strict jax, no network, no window, no GPU memory taken in advance."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# Threads of XLA on the CPU: an interpreted kernel's warpgroups wait for each other; with two, all would wait for ever.
os.environ.setdefault("NPROC", "8")

import hypothesis
import jax
import pytest
from absl import flags

# No persistent compilation cache: XLA's CPU executables are compiled for the machine that made them, so a cache that
# travels (a shared home, a CI image) warns or dies elsewhere; and a test that reads what was compiled (copies, bytes,
# number of executables) must see the compiler run, not last week's answer.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# tokamax and chex keep settings in absl flags, which tokamax would otherwise look for among pytest's arguments.
flags.FLAGS.mark_as_parsed()

# 200 cases is what a law owes. No deadline: the first case of a shape pays for a compilation.
hypothesis.settings.register_profile(
    "ringjax",
    max_examples=200,
    deadline=None,
    derandomize="CI" in os.environ,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("ringjax")


def pytest_collection_modifyitems(items):
    """Skip what needs a GPU where jax finds none, and say how to run it."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and jax.default_backend() != "gpu":
        reason = "needs a GPU: pip install -e '.[dev,cuda]' where there is one, then pytest -m gpu"
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


# Files that look at what was compiled, or at how fast it is; and the examples, as a user runs them.
OPTIMISED = {
    "test_benchmarks",
    "test_certify",
    "test_examples",
    "test_layers_in_a_loop",
    "test_memory",
    "test_transforms",
}


@pytest.fixture(autouse=True, scope="module")
def compile_quickly(request):
    """Leave out LLVM's optimisations, half of the compile time of programs this small; XLA's own passes all run."""
    quickly = jax.default_backend() == "cpu" and request.module.__name__.split(".")[-1] not in OPTIMISED
    jax.config.update("jax_disable_most_optimizations", quickly)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True, scope="module")
def forget_executables():
    """Free a file's executables after it: a few thousand of them exhaust a process's memory maps."""
    yield
    jax.clear_caches()


@pytest.fixture
def numpy_promotion():
    """For tests that run other people's code, which may rely on NumPy's promotion of dtypes and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
