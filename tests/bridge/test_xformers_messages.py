"""Wrong calls of our xFormers operator: what they say, and that nothing is harmed."""

import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", exc_type=ImportError)
fmha = pytest.importorskip("xformers.ops.fmha", exc_type=ImportError)
if not hasattr(fmha, "memory_efficient_attention"):
    pytest.skip("this xFormers has handed its attention over to mslk", allow_module_level=True)

from torch_bridge.xformers import OP, FwOp, dispatch  # noqa: E402

masks = fmha.attn_bias
CPU = torch.device("cpu")


def attend(q=None, k=None, v=None, **options):
    q = torch.ones(1, 4, 2, 8) if q is None else q
    k = q if k is None else k
    return fmha.memory_efficient_attention(q, k, k if v is None else v, op=OP, **options)


def five_axes():
    q = torch.ones(1, 4, 2, 2, 8, requires_grad=True)
    return attend(q, q.detach(), q.detach())


def padded_lse():
    q = torch.ones(1, 4, 2, 8)
    mask = masks.BlockDiagonalMask.from_seqlens([1, 3], device=CPU)
    with dispatch():
        return fmha.memory_efficient_attention_backward(q, q, torch.ones(2, 2, 3), q, q, q, mask)


def ours_then_another():
    q = torch.ones(1, 4, 2, 8, requires_grad=True)
    return fmha.memory_efficient_attention(q, q, q, op=(FwOp, fmha.flash.BwOp))


BLOCKS = masks.BlockDiagonalMask.from_seqlens([1, 3], device=CPU)
TABLES = torch.tensor([[0, 1]], dtype=torch.int32)
WRONG = {
    "dropout": (lambda: attend(p=0.5), ValueError, "dropout > 0.0"),
    "a bias": (
        lambda: attend(attn_bias=torch.zeros(1, 2, 4, 4)),
        ValueError,
        "a bias that is not a window is not supported: ours are selected from, never added",
    ),
    "a mask with a bias": (
        lambda: attend(attn_bias=masks.LowerTriangularMask().add_bias(torch.zeros(1, 2, 4, 4))),
        ValueError,
        "a bias that is not a window is not supported",
    ),
    "float64": (lambda: attend(torch.ones(1, 4, 2, 8).double()), ValueError, "dtype=torch.float64 (supported:"),
    "negative scale": (lambda: attend(scale=-1.0), ValueError, "scale must be finite and above 0, got -1.0"),
    "no scale": (
        lambda: attend(scale=float("nan")),
        ValueError,
        "scale must be finite and above 0, got nan",
    ),
    "too many queries": (
        lambda: attend(torch.ones(1, 5, 2, 8), torch.ones(1, 4, 2, 8), attn_bias=BLOCKS),
        ValueError,
        "the mask is for 4 queries, got 5",
    ),
    "too few keys": (
        lambda: attend(k=torch.ones(1, 3, 2, 8), attn_bias=BLOCKS),
        ValueError,
        "the mask is for 4 keys, got 3",
    ),
    "a batch of blocks": (
        lambda: attend(
            torch.ones(2, 1, 2, 8),
            torch.ones(2, 4, 2, 8),
            attn_bias=masks.BlockDiagonalPaddedKeysMask.from_seqlens([1], 4, [2], device=CPU),
        ),
        ValueError,
        "a mask of blocks takes a batch of 1, got 2",
    ),
    "half a page": (
        lambda: attend(
            torch.ones(1, 1, 2, 8),
            torch.ones(1, 7, 2, 8),
            attn_bias=masks.PagedBlockDiagonalPaddedKeysMask.from_seqlens([1], [3], TABLES, 4, device=CPU),
        ),
        ValueError,
        "the keys must be whole pages of 4, got 7",
    ),
    "quantised keys": (
        lambda: attend(k=torch.ones(1, 4, 2, 8, dtype=torch.int32)),
        ValueError,
        "keys and values must have the queries' dtype, torch.float32, got torch.int32",
    ),
    "another device": (
        lambda: attend(torch.ones(1, 4, 2, 8, device="meta")),
        ValueError,
        "device=meta (supported:",
    ),
    "gradients of five axes": (
        five_axes,
        NotImplementedError,
        "torch_bridge.xformers: xFormers differentiates 4 axes [B, M, H, K] only, got 5 [B, M, G, H, K].",
    ),
    "a padded lse": (
        padded_lse,
        ValueError,
        "torch_bridge.xformers: lse must be [B, H, M], of all blocks together, got [2, 2, 3] for queries [1, 4, 2, 8].",
    ),
    "another backward": (ours_then_another, ValueError, "but forward op can only run with op_bw=ringjaxB"),
    "priority": (
        lambda: dispatch("highest").__enter__(),
        ValueError,
        "torch_bridge.xformers.dispatch: priority must be 'first' or 'last', got 'highest'.",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_call_says_what_is_wrong(name):
    call, error, message = WRONG[name]
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error and message in str(caught.value)
    if message.startswith("torch_bridge"):
        assert str(caught.value).splitlines()[0] == message
    torch.testing.assert_close(attend(), torch.ones(1, 4, 2, 8))  # as before


ALONE = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("xformers", "mslk", "transformers"):
            raise ImportError(name)
sys.meta_path.insert(0, Hide())
import torch, torch_bridge
torch_bridge.attention(*[torch.ones(1, 2, 1, 4)] * 3, torch_bridge.Window.causal())
try:
    import torch_bridge.xformers
except ImportError as error:
    print(str(error).splitlines()[0])
"""


def test_without_xformers():
    """`import torch_bridge` works, and the operator says what it lacks."""
    result = subprocess.run(
        [sys.executable, "-c", ALONE], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120
    )
    assert result.stdout.strip() == (
        "torch_bridge.xformers: needs the attention of xformers >= 0.0.28 or of mslk, and neither can be imported."
    ), result.stderr
