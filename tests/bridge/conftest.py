"""What the bridge's tests on a GPU share."""

import jax
import pytest


@pytest.fixture
def precise_products():
    """JAX's float32 products in float32, on torch's backward thread too: a GPU's default is tf32, torch's is not."""
    wanted = {
        "jax_default_matmul_precision": "highest",
        "jax_numpy_dtype_promotion": "standard",  # Mosaic's own code relies on it
        "jax_numpy_rank_promotion": "allow",
    }
    before = {name: getattr(jax.config, name) for name in wanted}
    for name, value in wanted.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def on_the_gpu(precise_products):
    """The GPU that torch sees, for tests written for a CPU: their modules say where their tensors are."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    return torch.device("cuda", 0)
