"""Models of transformers on a GPU: the CPU's tests there, and bfloat16 on Hopper's kernels. `pytest -m gpu`."""

import copy

import pytest

torch = pytest.importorskip("torch", exc_type=ImportError)
pytest.importorskip("transformers", exc_type=ImportError)

import tiny_transformers as tiny  # noqa: E402
from bridge.test_huggingface import (  # noqa: E402, F401
    test_bidirectional_windows,
    test_generate,
    test_gradients,
    test_lengths_around_the_window,
    test_logits,
    test_packed_sequences,
    test_the_end_of_a_sequence,
)

from torch_bridge.huggingface import RingCache  # noqa: E402

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def tensors_there(monkeypatch, on_the_gpu):
    monkeypatch.setattr(tiny, "DEVICE", on_the_gpu)


@pytest.mark.parametrize("kind", ["mistral", "gemma3"])
def test_models_in_bfloat16(kind):
    """Logits in one call, and through rings in chunks and single tokens: as near to the truth as eager attention's."""
    eager, ours = (copy.deepcopy(model).bfloat16() for model in tiny.pair(kind))
    ids = tiny.tokens(2, 16)
    with torch.no_grad():
        exact = copy.deepcopy(tiny.pair(kind)[0]).double()(ids).logits
        plain, whole = eager(ids).logits, ours(ids).logits
        cache = RingCache(ours.config, slack=4)
        parts = [ours(part, past_key_values=cache).logits for part in ids.split([9, 1, 1, 1, 4], dim=1)]
    bound = (plain - exact).norm()
    for got in (whole, torch.cat(parts, dim=1)):
        assert got.dtype == torch.bfloat16
        assert (got - exact).norm() <= 2 * bound
