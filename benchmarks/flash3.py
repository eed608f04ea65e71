"""FlashAttention-3, which is for torch, beside JAX in one process: on the same arrays, which it gets without a copy.

It has no package on PyPI. `FLASH_ATTENTION_3` names its library, such as `flash_attn_3/_C.so` of the xformers 0.0.34
wheel; that one was built for CUDA 12 and needs a `libcudart.so.12`, which may lie beside it.
"""

import ctypes
import os
from functools import cache
from pathlib import Path

import jax


@cache
def unsupported():
    """Reasons why it cannot run here."""
    path = os.environ.get("FLASH_ATTENTION_3")
    if not path:
        return ["not installed: FLASH_ATTENTION_3 names no library"]
    try:
        import torch

        runtime = Path(path).with_name("libcudart.so.12")
        if runtime.exists():
            ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)
        torch.ops.load_library(path)
        _ = torch.ops.flash_attn_3.fwd, torch.ops.flash_attn_3.bwd
    except Exception as problem:
        return [f"does not load: {type(problem).__name__}: {str(problem).splitlines()[0]}"]
    return []


def call(row, what, arrays):
    """A function without arguments that runs it on a row's arrays, and one that waits until it is done."""
    import torch

    q, k, v, g = (torch.from_dlpack(x) for x in arrays[:4])
    left = -1 if row.size is None else row.size - 1
    options = {"softmax_scale": row.shape[4] ** -0.5, "is_causal": True}
    options |= {"window_size_left": left, "window_size_right": 0}

    def forward():
        return torch.ops.flash_attn_3.fwd(q, k, v, **options, num_splits=1)[:1]

    def with_backward():
        out, lse, *_ = torch.ops.flash_attn_3.fwd(q, k, v, **options, num_splits=1)
        return out, *torch.ops.flash_attn_3.bwd(g, q, k, v, out, lse, **options)[:3]

    def wait(_):
        torch.cuda.synchronize()

    return {"forward": forward, "with backward": with_backward}[what], wait


def as_jax(found):
    """Its results as jax arrays."""
    return tuple(jax.dlpack.from_dlpack(x.contiguous()) for x in found)
