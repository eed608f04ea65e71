"""The xFormers operator on a GPU: the CPU's tests with their tensors there, and 16-bit kernels. `pytest -m gpu`."""

import pytest

torch = pytest.importorskip("torch", exc_type=ImportError)
fmha = pytest.importorskip("xformers.ops.fmha", exc_type=ImportError)
if not hasattr(fmha, "memory_efficient_attention"):
    pytest.skip("this xFormers has handed its attention over to mslk", allow_module_level=True)

from bridge import test_xformers, test_xformers_dispatch  # noqa: E402
from bridge.test_xformers import (  # noqa: E402, F401
    test_forward_and_backward,
    test_forward_and_backward_called_apart,
    test_groups_of_heads,
    test_half_precision_runs_everywhere,
    test_multi_query_gradients,
    test_no_keys_and_no_queries,
    test_our_backward_goes_with_our_forward,
    test_packed_qkv,
    test_partial_attentions_merge_into_the_whole,
    test_partial_attentions_of_two_sets_of_keys,
    test_rows_that_see_nothing,
    test_shared_heads_are_not_copied,
    test_three_axes,
    test_torch_compile,
    test_what_is_not_seen_may_be_nan,
)
from bridge.test_xformers_dispatch import (  # noqa: E402, F401
    test_forward_and_backward_without_an_operator,
    test_mistral_inference_decodes_over_its_ring,
)

from torch_bridge import Window, attention  # noqa: E402
from torch_bridge.xformers import OP  # noqa: E402

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def tensors_there(monkeypatch, on_the_gpu):
    for module in (test_xformers, test_xformers_dispatch):
        monkeypatch.setattr(module, "DEVICE", on_the_gpu)


def test_the_same_numbers_as_ringjax_to_the_bit():
    """Keys out of every query's sight are left out first: one program for both; two of XLA's round differently."""
    mask = test_xformers.MASKS["local-causal"]()
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v, _ = test_xformers.tensors(mask, dtype)
        ours = fmha.memory_efficient_attention(q, k, v, attn_bias=mask, op=OP)
        first = k.shape[1] - q.shape[1] - 2
        assert torch.equal(ours, attention(q, k[:, first:], v[:, first:], Window.causal(3), q_offset=2))


@pytest.mark.parametrize("name", ["local-causal", "local", "blocks-causal", "padded-local-causal"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_16_bit_tensors(name, dtype):
    """Within twice what plain attention in that dtype loses, in norm: forward and backward kernels."""
    mask = test_xformers.MASKS[name]()
    *leaves, g = test_xformers.tensors(mask, dtype)
    ours = test_xformers.gradients(lambda *x: fmha.memory_efficient_attention(*x, attn_bias=mask, op=OP), leaves, g)
    exact, plain = (
        test_xformers.gradients(
            lambda *x, kind=kind: test_xformers.dense(*x, mask, kind)[0], [x.to(kind) for x in leaves], g.to(kind)
        )
        for kind in (torch.float64, dtype)
    )
    for what, a, b, c in zip(("out", "dq", "dk", "dv"), ours, exact, plain, strict=True):
        assert a.dtype == dtype
        error, bound = (((x.double() - b).norm() / b.norm()).item() for x in (a, c))
        assert error <= 2 * bound + torch.finfo(dtype).eps, f"{name}: {what}: {error:.2g}, plain {bound:.2g}"
