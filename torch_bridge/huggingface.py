"""ringjax as an attention of Hugging Face transformers, and its rings as a cache.

    torch_bridge.huggingface.register()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="ringjax")
    model.generate(**inputs, past_key_values=torch_bridge.huggingface.RingCache(model.config))

Training and generation of causal and bidirectional models, with sliding windows or without, softcap, sinks, padding on
either side, packed sequences, and every cache of transformers'. A model's eager attention is what it equals.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

try:
    from transformers import AttentionInterface, AttentionMaskInterface
except ImportError as error:
    raise ImportError(
        "torch_bridge.huggingface: needs transformers 5.14 or newer.\n  Hint: pip install 'ringjax[huggingface]'."
    ) from error
from torch import Tensor

from torch_bridge import Window, attention
from torch_bridge._huggingface_cache import LENGTHS, NAMES, RingCache
from torch_bridge._huggingface_masks import make_mask, seen_of

__all__ = ["LENGTHS", "RingCache", "register"]


def register(
    name: str = "ringjax", *, implementation: str | None = None, bucket: int | Sequence[int] | None = LENGTHS
) -> str:
    """Adds an `attn_implementation` to transformers, for every model that asks for its attention by name.

    Args:
      name: what models ask for.
      implementation: as for `attention`; None: the first that can run.
      bucket: as for `attention`: which lengths are compiled for. A cache that grows by a token with every step has
        another shape in every step, so the default rounds lengths up, by less than a quarter. None: every length.

    Returns:
      The name. Registering it again replaces it.

    Raises:
      ValueError: a name that transformers gives a meaning of its own.
    """
    if not name or name.startswith(("eager", "sdpa", "fl")) or "|" in name or "/" in name:
        raise ValueError(f"torch_bridge.huggingface.register: name must not be one of transformers' own, got {name!r}.")
    AttentionInterface.register(name, partial(_forward, implementation=implementation, bucket=bucket))
    AttentionMaskInterface.register(name, make_mask)
    NAMES.add(name)
    return name


def _forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    *,
    implementation: str | None = None,
    bucket: int | Sequence[int] | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: q [B, N, T, H], k and v [B, K, S, H]; output [B, T, N, Hv], and no weights."""
    call = "torch_bridge.huggingface"
    if dropout:
        raise NotImplementedError(
            f"{call}: dropout of attention weights is not supported, got {dropout}."
            "\n  Hint: train with attention_dropout=0.0 in the model's config."
        )
    if others.get("output_attentions"):
        raise NotImplementedError(
            f"{call}: output_attentions must be off: the weights never exist as a whole."
            "\n  Hint: attn_implementation='eager' has them."
        )
    if others.get("position_bias") is not None:
        raise NotImplementedError(f"{call}: a bias that is added to the logits (position_bias) is not supported.")
    seen = seen_of(attention_mask)
    if attention_mask is not None and seen is None:
        raise NotImplementedError(
            f"{call}: a mask must be 2-D padding, or not given, got one of shape {list(attention_mask.shape)}."
            "\n  Hint: a mask of pairs says more than a window can: use attn_implementation='sdpa' or 'eager'."
        )
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    options: dict[str, Any] = {
        "sink_logits": s_aux,
        "softcap": softcap,
        "scale": scaling,
        "implementation": implementation,
    }
    layer = getattr(key, "ringjax_layer", None)
    if layer is not None:
        return layer.attend(q, k, v, seen, **options), None
    if seen is None:
        # As for transformers' flash attention: the module says what it is.
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        window = Window.from_huggingface(sliding_window, causal=causal)
        return attention(q, k, v, window, bucket=bucket, **options), None
    if seen.keys != k.shape[1]:
        raise ValueError(
            f"{call}: the mask and the keys must agree on length, got {seen.keys} and {k.shape[1]}."
            "\n  Hint: attention after RingCache.update needs the very keys that it returned."
        )
    out = attention(
        q,
        k,
        v,
        seen.window,
        segment_ids=seen.segment_ids,
        kv_segment_ids=seen.kv_segment_ids,
        q_offset=seen.q_offset,
        bucket=bucket,
        **options,
    )
    return out, None
