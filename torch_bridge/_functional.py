"""`torch_bridge.attention`: ringjax's attention on torch tensors."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

import ringjax as rj
from torch_bridge._arguments import autocast, bucketed, check_floats, check_window, row_integers, tiles_of
from torch_bridge._ops import attention_call


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: rj.Window,
    *,
    segment_ids: Tensor | None = None,
    kv_segment_ids: Tensor | None = None,
    sink_logits: Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    q_offset: int | Tensor | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    config: Any = None,
    bucket: int | Sequence[int] | None = None,
) -> Any:
    """`ringjax.attention` on torch tensors: the same function to the bit, differentiable in torch.

    The operation is `torch.ops.ringjax.attention`: it works under `torch.compile`, `torch.vmap` and `torch.func.grad`.
    Under autocast, q, k and v are cast as for `scaled_dot_product_attention`; sink logits are not.

    Args:
      q: queries [B, T, N, H], float32, bfloat16 or float16. N is a multiple of K.
      k, v: keys and values [B, S, K, H] and [B, S, K, Hv].
      window: which keys a query sees.
      segment_ids, kv_segment_ids: integers [B, T] and [B, S]; a query sees its own segment only, negative is padding.
        int32 is read as it is; of int64, the values are checked, which on a GPU waits for them.
      sink_logits: a learned logit [N] per query head, in the softmax's denominator only.
      softcap, scale: of the logits.
      q_offset: position of query 0: an int, or integers [B]; None: S - T.
      return_lse: whether to return the logsumexp, float32 [B, N, T], too.
      implementation, config: as for `ringjax.attention`.
      bucket: T and S are padded to a multiple of this number, or to the smallest of these lengths that holds them, so
        that calls of varying lengths share a compiled program. None: every shape is compiled.

    Returns:
      Output [B, T, N, Hv] and, with `return_lse`, the logsumexp; both differentiable.

    Raises:
      ValueError, TypeError, NotImplementedError: as `ringjax.attention`, in its words.
    """
    call = "attention"
    check_window(call, window)
    q, k, v = autocast(q, k, v)
    check_floats(call, {"q": q, "k": k, "v": v}, {"sink_logits": sink_logits})
    segment_ids = row_integers(call, "segment_ids", segment_ids, q)
    kv_segment_ids = row_integers(call, "kv_segment_ids", kv_segment_ids, q)
    q_offsets = None
    if q_offset is not None and not isinstance(q_offset, int):
        q_offsets, q_offset = row_integers(call, "q_offset", q_offset, q), None
    queries, keys = q.shape[1], k.shape[1]
    if bucket is not None:
        more, kv_more = (bucketed(call, bucket, length) - length for length in (queries, keys))
        # The last query stands at the last key, unless an offset says otherwise.
        beyond = q_offsets is not None or (q_offset is not None and q_offset + queries > keys)
        if q_offset is None and q_offsets is None and queries != keys:
            # As an array, so that every difference of lengths runs the same program.
            q_offsets = torch.full((q.shape[0],), keys - queries, dtype=torch.int32, device=q.device)
        elif q_offset is None and q_offsets is None:
            q_offset = 0
        if segment_ids is not None and kv_segment_ids is None and queries == keys:
            kv_segment_ids = segment_ids
        if segment_ids is None and kv_segment_ids is None and (window.right != 0 or beyond):
            # A key behind the last one must not be seen; a causal query that is not beyond sees none of those anyway.
            segment_ids = torch.zeros(q.shape[:2], dtype=torch.int32, device=q.device)
            kv_segment_ids = torch.zeros(k.shape[:2], dtype=torch.int32, device=q.device)
        if segment_ids is not None and kv_segment_ids is not None:
            segment_ids = pad(segment_ids, (0, more), value=-1)
            kv_segment_ids = pad(kv_segment_ids, (0, kv_more), value=-1)
        q = pad(q, (0, 0, 0, 0, 0, more)) if more else q
        k, v = (pad(x, (0, 0, 0, 0, 0, kv_more)) if kv_more else x for x in (k, v))
    out, lse = attention_call(
        q,
        k,
        v,
        sink_logits,
        segment_ids,
        kv_segment_ids,
        q_offsets,
        window.left,
        window.right,
        window.sinks,
        softcap,
        scale,
        q_offset,
        implementation,
        *tiles_of(call, config),
        lse=return_lse,
    )
    out = out if bucket is None else out[:, :queries]
    if not return_lse:
        return out
    assert lse is not None
    return out, lse if bucket is None else lse[:, :, :queries]
