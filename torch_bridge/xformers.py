"""An operator for xFormers: `memory_efficient_attention(q, k, v, attn_bias=mask, op=torch_bridge.xformers.OP)`.

On CPU and CUDA, with every mask whose meaning is a window: none, causal (both alignments), local, blocks of these, with
keys padded, gappy or in pages. A mask decides which pairs count; it is never added, so that what padding holds, NaN
included, goes nowhere. Queries that see nothing get 0, and minus infinity for their lse.

From xFormers 0.0.28 on; where xFormers hands its attention over to mslk, with mslk. Heads shared by expansion (stride
0, four or five axes) are not copied out. xFormers cannot differentiate five axes: train with four, or with
`torch_bridge.attention`.
"""

import importlib
import math
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ringjax import Window
from torch_bridge import _xformers_masks as masks
from torch_bridge import attention

__all__ = ["OP", "BwOp", "FwOp", "dispatch"]


def _host() -> Any:
    """The module that has `memory_efficient_attention`: xFormers', or that of mslk."""
    for name in ("xformers.ops.fmha", "mslk.attention.fmha"):
        try:
            module = importlib.import_module(name)
        except (ImportError, OSError):  # OSError: mslk's CUDA libraries on a machine without CUDA
            continue
        if hasattr(module, "memory_efficient_attention"):
            return module
    raise ImportError(
        "torch_bridge.xformers: needs the attention of xformers >= 0.0.28 or of mslk, and neither can be imported."
        "\n  Hint: pip install 'ringjax[xformers]'; torch_bridge.attention needs neither."
    )


_fmha = _host()
# What xFormers re-exports, mslk may own: each class is taken from the module that defines it.
_base = sys.modules[_fmha.AttentionFwOpBase.__module__]
_attn_bias = sys.modules[_fmha.AttentionBias.__module__]
_dispatcher: Any = sys.modules[_fmha._dispatch_fw.__module__]

_NOT_OURS = ("bf16 is only supported on A100", "xFormers wasn't build with CUDA")  # of kernels in C++; ours are in JAX


class _Rules:
    """What forward and backward have in common: which calls they take."""

    OPERATOR = staticmethod(attention)
    SUPPORTED_DEVICES = frozenset({"cpu", "cuda"})
    SUPPORTED_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
    SUPPORTED_MAX_K = math.inf
    SUPPORTED_ATTN_BIAS_TYPES = (
        type(None),
        *(getattr(_attn_bias, kind) for kind in masks.KINDS if hasattr(_attn_bias, kind)),
    )
    SUPPORTS_DROPOUT = False
    SUPPORTS_CUSTOM_SCALE = True
    SUPPORTS_DIFFERENT_VALUE_EMBED = True
    SUPPORTS_OUTPUT_DTYPE = True
    SUPPORTS_PARTIAL = True
    IS_DETERMINISTIC = True
    VARLEN_LSE_PACKED = True

    @classmethod
    def not_supported_reasons(cls, d: Any) -> list[str]:
        """Why these inputs cannot be run; nothing if they can."""
        reasons = [text for text in super().not_supported_reasons(d) if not text.startswith(_NOT_OURS)]  # type: ignore[misc]
        if type(d.attn_bias) not in cls.SUPPORTED_ATTN_BIAS_TYPES:
            reasons.append("a bias that is not a window is not supported: ours are selected from, never added")
        elif d.attn_bias is not None:
            reasons += masks.wrong_sizes(d.attn_bias, d.query.shape[0], d.query.shape[1], d.key.shape[1])
        if d.key.dtype != d.query.dtype:
            reasons.append(f"keys and values must have the queries' dtype, {d.query.dtype}, got {d.key.dtype}")
        if d.scale is not None and not (math.isfinite(d.scale) and d.scale > 0):
            reasons.append(f"scale must be finite and above 0, got {d.scale}")
        return reasons


class FwOp(_Rules, _fmha.AttentionFwOpBase):  # type: ignore[name-defined]
    """ringjax's forward pass as xFormers' operator."""

    NAME = "ringjaxF"
    SUPPORTS_BMGHK = True

    @classmethod
    def apply(cls, inp: Any, needs_gradient: bool) -> tuple[Tensor, Any]:
        """Output and, if a gradient is needed, what `BwOp` wants to know."""
        if inp.query.ndim == 5 and any(x.requires_grad for x in (inp.query, inp.key, inp.value)):
            raise NotImplementedError(
                "torch_bridge.xformers: xFormers differentiates 4 axes [B, M, H, K] only, got "
                f"{inp.query.ndim} [B, M, G, H, K]."
                "\n  Hint: expand the kv heads and flatten G and H, or call torch_bridge.attention."
            )
        groups = inp.query.shape[2:-1]
        q, k, v = inp.query.flatten(2, -2), _shared_heads(inp.key), _shared_heads(inp.value)
        if k.shape[2] != v.shape[2]:
            k, v = inp.key.flatten(2, -2), inp.value.flatten(2, -2)
        out, lse = _forward(q, k, v, inp)
        out = out.unflatten(2, groups).to(inp.get_output_dtype())
        if not needs_gradient:
            return out, None
        return out, _base.Context(lse=lse.unflatten(1, groups), out=out, op_bw=BwOp)


class BwOp(_Rules, _fmha.AttentionBwOpBase):  # type: ignore[name-defined]
    """ringjax's backward pass as xFormers' operator."""

    NAME = "ringjaxB"
    SUPPORTS_BMGHK = False

    @classmethod
    def apply(cls, ctx: Any, inp: Any, grad: Tensor) -> Any:
        """Gradients for the queries, keys and values."""
        if grad.numel() == 0 or inp.key.numel() == 0:
            return _base.Gradients(dq=inp.query * 0, dk=torch.zeros_like(inp.key), dv=torch.zeros_like(inp.value))
        plan, pages = _plan_of(inp)
        if ctx.lse.shape != (inp.query.shape[0], inp.query.shape[2], inp.query.shape[1]):
            raise ValueError(
                "torch_bridge.xformers: lse must be [B, H, M], of all blocks together, got "
                f"{list(ctx.lse.shape)} for queries {list(inp.query.shape)}."
                "\n  Hint: an operator that pads each block's lse needs its own backward operator."
            )
        q, k, v = _spread(plan, pages, inp.query, inp.key, inp.value)
        out, grad, lse = ctx.out.to(q.dtype), grad.to(q.dtype), ctx.lse.float()
        if plan.q_rows is not None:
            out, grad = plan.q_rows.spread(out), plan.q_rows.spread(grad)
            lse = plan.q_rows.spread(lse.transpose(1, 2)).transpose(1, 2)
        one = isinstance(plan.q_offset, int)
        dq, dk, dv, _ = torch.ops.ringjax.attention_backward(
            q,
            k,
            v,
            out,
            lse,
            grad,
            g_lse=None,
            sink_logits=None,
            segment_ids=plan.segment_ids,
            kv_segment_ids=plan.kv_segment_ids,
            q_offsets=None if one else plan.q_offset,
            left=plan.window.left,
            right=plan.window.right,
            sinks=0,
            softcap=None,
            scale=inp.scale,
            q_offset=plan.q_offset if one else None,
            implementation=None,
            block_size=None,
            tile_size=None,
            head_tile_size=None,
        )
        if plan.q_rows is not None:
            dq = plan.q_rows.collect(dq)
        dk, dv = (_sum_keys(plan, pages, x, like) for x, like in ((dk, inp.key), (dv, inp.value)))
        return _base.Gradients(dq=dq, dk=dk, dv=dv)


OP = (FwOp, BwOp)
"""The pair for `memory_efficient_attention(..., op=OP)`."""

# By these names torch.compile finds the classes again.
getattr(_fmha, "_OPS_LOOKUP", {}).update({FwOp.NAME: FwOp, BwOp.NAME: BwOp})


def _shared_heads(x: Tensor) -> Tensor:
    """Keys or values as [B, M, H, K], with one head for all that are the same memory."""
    if x.ndim == 5:
        x = x[:, :, :, 0] if x.stride(3) == 0 else x.flatten(2, 3)
    return x[:, :, :1] if x.stride(2) == 0 else x


class _Rows(NamedTuple):
    """How the one row of a packed tensor is laid out in R rows of T.

    Attributes:
      shape: (R, T).
      source: int64 [R * T], which place of the one row to put there; None: cut it into pieces as it lies.
      back: int64 [M], where each place of the one row went.
    """

    shape: tuple[int, int]
    source: Tensor | None
    back: Tensor | None

    def spread(self, x: Tensor) -> Tensor:
        """[1, M, ...] as [R, T, ...]."""
        x = x[0]
        return (x if self.source is None else x.index_select(0, self.source)).unflatten(0, self.shape)

    def collect(self, x: Tensor) -> Tensor:
        """[R, T, ...] as [1, M, ...]."""
        x = x.flatten(0, 1)
        return (x if self.back is None else x.index_select(0, self.back))[None]


class _Plan(NamedTuple):
    """An arrangement on a device."""

    window: Window
    q_offset: int | Tensor
    segment_ids: Tensor | None
    kv_segment_ids: Tensor | None
    q_rows: _Rows | None
    k_rows: _Rows | None
    k_range: tuple[int, int] | None


@lru_cache(maxsize=64)
def _plan(layout: masks.Layout, queries: int, keys: int, device: torch.device) -> _Plan:
    found = masks.arrange(layout, queries, keys)

    def there(x: Any) -> Any:
        return x if x is None or isinstance(x, int) else torch.from_numpy(x).to(device)

    def rows(index: Any, size: int, segments: Any) -> _Rows | None:
        if index is None:
            return None
        flat = torch.from_numpy(index).flatten()
        if torch.equal(flat, torch.arange(size)):
            return _Rows(index.shape, None, None)
        back = torch.zeros(size, dtype=torch.int64)
        real = torch.arange(len(flat))
        if segments is not None:
            real = real[torch.from_numpy(segments >= 0).flatten()]
        back[flat[real]] = real
        return _Rows(index.shape, flat.to(device), back.to(device))

    return _Plan(
        found.window,
        there(found.q_offset),
        there(found.segment_ids),
        there(found.kv_segment_ids),
        rows(found.q_index, queries, found.segment_ids),
        rows(found.k_index, keys, found.kv_segment_ids),
        found.k_range,
    )


def _plan_of(inp: Any) -> tuple[_Plan, Tensor | None]:
    """The plan of a call, and which keys its pages list, row after row."""
    mask, pages = inp.attn_bias, None
    if hasattr(mask, "block_tables"):
        pages = mask.block_tables.long()[:, :, None] * mask.page_size
        pages = (pages + torch.arange(mask.page_size, device=pages.device)).flatten()
    keys = inp.key.shape[1] if pages is None else len(pages)
    return _plan(masks.layout_of(mask), inp.query.shape[1], keys, inp.query.device), pages


def _spread(plan: _Plan, pages: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values in the plan's rows."""
    if pages is not None:
        k, v = k.index_select(1, pages), v.index_select(1, pages)
    if plan.k_range is not None:
        k, v = k[:, slice(*plan.k_range)], v[:, slice(*plan.k_range)]
    if plan.q_rows is None or plan.k_rows is None:
        return q, k, v
    return plan.q_rows.spread(q), plan.k_rows.spread(k), plan.k_rows.spread(v)


def _sum_keys(plan: _Plan, pages: Tensor | None, x: Tensor, like: Tensor) -> Tensor:
    """Gradients of keys in the plan's rows as gradients of the keys that they came from, which may be in two rows."""
    if plan.k_range is not None:
        first, end = plan.k_range
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, first, like.shape[1] - end))
    if plan.k_rows is not None:
        x = x.flatten(0, 1)[None]
        if plan.k_rows.source is not None:
            keys = like.shape[1] if pages is None else len(pages)
            x = x.new_zeros(1, keys, *x.shape[2:]).index_add(1, plan.k_rows.source, x)
    return x if pages is None else torch.zeros_like(like).index_add(1, pages, x)


def _forward(q: Tensor, k: Tensor, v: Tensor, inp: Any) -> tuple[Tensor, Tensor]:
    """Output [B, M, N, Hv] and lse float32 [B, N, M] of queries, keys and values [B, M, N or K, H]."""
    batch, queries, heads = q.shape[:3]
    if q.numel() == 0 or k.numel() == 0:
        lse = torch.full((batch, heads, queries), -math.inf, device=q.device)
        return torch.zeros(batch, queries, heads, v.shape[3], dtype=q.dtype, device=q.device), lse
    plan, pages = _plan_of(inp)
    q, k, v = _spread(plan, pages, q, k, v)
    out, lse = attention(
        q,
        k,
        v,
        plan.window,
        segment_ids=plan.segment_ids,
        kv_segment_ids=plan.kv_segment_ids,
        q_offset=plan.q_offset,
        scale=inp.scale,
        return_lse=True,
    )
    if plan.q_rows is not None:
        out = plan.q_rows.collect(out)
        lse = plan.q_rows.collect(lse.transpose(1, 2)).transpose(1, 2)
    return out, lse


class _Entry(NamedTuple):
    first: bool
    when: Callable[[Any], bool] | None


_entries: list[_Entry] = []
_original: Any = None
_lock = threading.Lock()


@contextmanager
def dispatch(priority: Literal["first", "last"] = "first", when: Callable[[Any], bool] | None = None) -> Iterator[None]:
    """Within it, calls without `op=` may choose this operator: code that names no operator runs as it is.

    For the whole process, the threads that compute gradients included. Contexts nest, and the innermost one decides;
    the end of the outermost one leaves xFormers as it was.

    Args:
      priority: "first": this operator wherever it can run. "last": only where no operator of xFormers can.
      when: given the `Inputs` of a call, whether to consider this operator at all; None: always.

    Raises:
      ValueError: another priority.
    """
    global _original
    if priority not in ("first", "last"):
        raise ValueError(f"torch_bridge.xformers.dispatch: priority must be 'first' or 'last', got {priority!r}.")
    entry = _Entry(priority == "first", when)
    with _lock:
        if not _entries:
            # The one place where xFormers chooses operators, forward and backward.
            _original, _dispatcher._run_priority_list = _dispatcher._run_priority_list, _run_priority_list
        _entries.append(entry)
    try:
        yield
    finally:
        with _lock:
            # Contexts of several threads may end in another order than they began.
            del _entries[len(_entries) - 1 - _entries[::-1].index(entry)]
            if not _entries:
                _dispatcher._run_priority_list = _original


def _run_priority_list(name: str, priority_list: Any, inp: Any, *args: Any, **kwargs: Any) -> Any:
    for entry in _entries[-1:]:
        if entry.when is None or entry.when(inp):
            ours = BwOp if name.endswith("backward") else FwOp
            priority_list = [ours, *priority_list] if entry.first else [*priority_list, ours]
    return _original(name, priority_list, inp, *args, **kwargs)
