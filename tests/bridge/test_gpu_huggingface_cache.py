"""RingCache on a GPU: the CPU's tests there. `pytest -m gpu`."""

import pytest

torch = pytest.importorskip("torch", exc_type=ImportError)
pytest.importorskip("transformers", exc_type=ImportError)

import tiny_transformers as tiny  # noqa: E402
from bridge import test_huggingface_cache  # noqa: E402
from bridge.test_huggingface_cache import (  # noqa: E402, F401
    test_a_full_layer_grows_and_a_sliding_one_does_not,
    test_a_step_copies_no_ring_and_compiles_nothing,
    test_assisted_decoding,
    test_chunks_of_any_length,
    test_chunks_with_padding,
    test_crop,
    test_crop_of_padding,
    test_gradients_flow_through_the_rings,
    test_other_dtypes_are_kept,
    test_reset_and_copies,
    test_rows_reordered_selected_and_repeated,
    without_gradients,
)

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def tensors_there(monkeypatch, on_the_gpu):
    monkeypatch.setattr(tiny, "DEVICE", on_the_gpu)
    monkeypatch.setattr(test_huggingface_cache, "IDS", test_huggingface_cache.IDS.cuda())
