"""The attention "ring_buffer" in the registries of old xFormers, for models that are built from configs.

`register()` adds it, or `from torch_bridge.legacy import RingBufferAttention, RingBufferConfig` does; then
`build_attention({"name": "ring_buffer", "dropout": 0.0, "buffer_size": 512})` makes one, and so do
`build_multi_head_attention` and `xFormer.from_config`. xFormers 0.0.29 removed the last two, 0.0.34 all the rest: with
newer ones use `torch_bridge.xformers.OP` or `torch_bridge.RingBufferAttention`.
"""

import dataclasses
import importlib
import warnings
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ringjax as rj
from torch_bridge import attention

_HINT = (
    "\n  Hint: pip install --no-deps xformers==0.0.28.post3 brings all of it back, beside any torch, up to Python 3.12;"
    "\n  with a newer xformers use torch_bridge.xformers.OP, without one torch_bridge.RingBufferAttention."
)
_REMOVED = "register_attention and build_attention went in 0.0.34, build_multi_head_attention and xFormer in 0.0.29."


class Registered(NamedTuple):
    """What `register` added: the attention, and the dataclass of its config."""

    attention: type
    config: type


@cache
def register() -> Registered:
    """Registers "ring_buffer" with xFormers, once.

    The fields of its config are those of `RingBufferConfig`, with the same defaults, and xFormers' `name` and
    `dropout`, which must be 0. Nothing but xFormers' registry changes.

    Raises:
      ImportError: there is no xFormers, or one without the registry.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # that it will be removed, which is known here
        try:
            registry: Any = importlib.import_module("xformers.components.attention")
        except ImportError:
            registry = None
    if not hasattr(registry, "register_attention"):
        try:
            version = f"xformers {importlib.import_module('xformers').__version__} has none"
        except ImportError:
            version = "xformers is not installed"
        raise ImportError(
            "torch_bridge.legacy: needs the component registry of xformers 0.0.33 or older, "
            f"and {version}.\n  {_REMOVED}{_HINT}"
        )

    options = [(field.name, field.type, None) for field in dataclasses.fields(rj.RingBufferConfig)]
    config = dataclasses.make_dataclass("RingBufferConfig", options, bases=(registry.AttentionConfig,))
    config.__doc__ = "The fields of `ringjax.RingBufferConfig`; None, or a field that is missing, means its default."

    class RingBufferAttention(registry.Attention):
        """Sliding-window attention of ringjax: causal, or to both sides, aligned at the last query and key."""

        def __init__(self, dropout: float = 0.0, name: str = "ring_buffer", **options: Any) -> None:
            super().__init__()
            if dropout:
                first = f"{name}: dropout of attention weights is not supported, got {dropout}."
                raise NotImplementedError(f"{first}\n  Hint: write 'dropout': 0.0 in the attention's config.")
            self.config = rj.RingBufferConfig(**options)
            self.requires_head_dimension = True
            self.supports_attention_mask = False
            self.supports_key_padding_mask = True

        def forward(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
            """Output [B, N, T, Hv] of q [B, N, T, H], k [B, N, S, H] and v [B, N, S, Hv]; or all without N.

            `key_padding_mask` is bool [B, S], False where a key is padding.
            """
            if q.ndim == 3:
                return self.forward(q[:, None], k[:, None], v[:, None], key_padding_mask)[:, 0]
            segments = kv_segments = None
            if key_padding_mask is not None:
                segments = torch.zeros(q.shape[0], q.shape[2], dtype=torch.int32, device=q.device)
                kv_segments = torch.where(key_padding_mask, 0, -1).to(torch.int32)
            out = attention(
                q.transpose(1, 2),
                k.transpose(1, 2),
                v.transpose(1, 2),
                self.config.window,
                segment_ids=segments,
                kv_segment_ids=kv_segments,
                softcap=self.config.softcap,
                scale=self.config.scale,
                implementation=self.config.implementation,
                config=self.config,
            )
            return out.transpose(1, 2).contiguous()

    registry.register_attention("ring_buffer", config)(RingBufferAttention)
    return Registered(RingBufferAttention, config)


def __getattr__(name: str) -> Any:
    if name == "RingBufferAttention":
        return register().attention
    if name == "RingBufferConfig":
        return register().config
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
