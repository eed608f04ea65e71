"""RingCache: a transformers cache whose layers are rings of ringjax's."""

from functools import partial
from typing import Any, ClassVar

import jax
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

import ringjax as rj
from torch_bridge import RingBuffer, Window, attend
from torch_bridge._huggingface_masks import Seen

NAMES: set[str] = set()
"""The names under which our attention is registered with transformers."""

LENGTHS = (1, *(size << power for power in range(3, 29) for size in (2, 3)))
"""1, 16, 24, 32, 48, 64, 96, ...: the lengths that are compiled for. Beyond 16, no call pays for half as much again."""


class RingLayer(CacheLayerMixin):
    """One layer's ring. `update` announces tokens; our attention then attends and appends in one step.

    Padding is never written, so it takes no room and no place in the window.
    """

    is_compileable = False

    def __init__(self, config: Any, window: int | None, slack: int, room: int, dtype: torch.dtype | None):
        super().__init__()
        self.config, self.slack, self.room, self.kept_dtype = config, slack, room, dtype
        self.sliding_window = window
        self.is_sliding = window is not None
        self.is_croppable = slack > 0
        self.cumulative_length = 0
        self.buffer: Any = None
        self._announced: Tensor | None = None
        self._real: Tensor | None = None  # bool [B, <= slack]: which of the last tokens are not padding

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """An empty ring for keys [B, K, T, H] and values [B, K, T, Hv]."""
        batch, heads, _, head_dim = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        self.buffer = RingBuffer.empty(
            batch,
            heads,
            head_dim,
            Window.causal(self.sliding_window or self.room),
            slack=self.slack,
            value_dim=value_states.shape[3],
            dtype=self.kept_dtype or self.dtype,
            device=self.device,
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Takes the tokens' keys and values to the attention, which asks this layer for the rest.

        Raises:
          ValueError: the model's attention is not ours, and would see nothing but these tokens.
          RuntimeError: it has not asked since the last call.
        """
        if self.config._attn_implementation not in NAMES:
            raise ValueError(
                "RingCache: the model's attn_implementation must be one that torch_bridge.huggingface.register() gave, "
                f"got {self.config._attn_implementation!r}.\n  Hint: model.set_attn_implementation('ringjax')."
            )
        if self._announced is not None:
            raise RuntimeError(
                "RingCache: every update must be followed by the attention of its layer, got two updates."
                "\n  Hint: reset() after an error; a model whose layers share keys needs another cache."
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys = key_states.view_as(key_states)
        keys.ringjax_layer = self  # type: ignore[attr-defined]
        self._announced = keys
        self.cumulative_length += key_states.shape[2]
        return keys, value_states

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Seen | None, **options: Any) -> Tensor:
        """Output [B, T, N, Hv] of queries [B, T, N, H]; the announced keys and values [B, T, K, H] go into the ring.

        Raises:
          ValueError: the mask wants another window than the layer has.
        """
        window = Window.causal(self.sliding_window)
        if seen is not None and seen.window != window:
            raise ValueError(f"RingCache: the mask must want the layer's window, {window}, got {seen.window}.")
        real = None if seen is None else seen.real
        self._make_room()
        self._remember(real, q)
        tokens = q.shape[1]
        lengths = order = None
        if real is not None:  # the ring takes the real ones first
            order = (~real).to(torch.int8).argsort(dim=1, stable=True)
            lengths = real.sum(1).to(torch.int32)
            q, k, v = (_rows(x, order) for x in (q, k, v))
        out, _ = attend(q, k, v, self.buffer, lengths=lengths, bucket=None if tokens == 1 else LENGTHS, **options)
        self._announced = None
        return out if order is None else _rows(out, order.argsort(dim=1))

    def _make_room(self) -> None:
        """A layer without a window forgets nothing: its ring grows, by doubling."""
        if self.is_sliding or self.cumulative_length <= self.room:
            return
        while self.room < self.cumulative_length:
            self.room *= 2
        self.buffer.adopt(_larger(self.buffer.release(), Window.causal(self.room)))

    def _remember(self, real: Tensor | None, q: Tensor) -> None:
        """Padding counts as tokens for transformers and not for the ring: what `crop` takes back must be told apart."""
        if self.slack == 0 or (self._real is None and real is None):
            return
        real = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device) if real is None else real
        if self._real is None:
            self._real = torch.ones(q.shape[0], 0, dtype=torch.bool, device=q.device)
            earlier = min(self.cumulative_length - q.shape[1], self.slack)
            self._real = torch.nn.functional.pad(self._real, (earlier, 0), value=True)
        self._real = torch.cat([self._real, real], dim=1)[:, -self.slack :]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys the mask is for, and the position of the first."""
        offset = 0 if self.sliding_window is None else max(self.cumulative_length - self.sliding_window + 1, 0)
        return self.cumulative_length - offset + query_length, offset

    def get_seq_length(self) -> int:
        """How many tokens have come, padding included."""
        return self.cumulative_length

    def get_max_length(self) -> int:
        """The window; -1 without one."""
        return -1 if self.sliding_window is None else self.sliding_window

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last `-tokens_to_remove` tokens, at most the slack, before and after the ring has wrapped.

        Raises:
          ValueError: more than the slack, more than there are, or a positive number (a length, in older transformers).
        """
        count = -tokens_to_remove
        if count < 0:
            raise ValueError(
                f"RingCache.crop: tokens_to_remove must be 0 or negative, got {tokens_to_remove}."
                "\n  Hint: crop(-n) removes the last n tokens."
            )
        if count == 0 or not self.is_initialized:
            return
        if count > min(self.slack, self.cumulative_length):
            raise ValueError(
                f"RingCache.crop: at most {min(self.slack, self.cumulative_length)} tokens can be removed, got {count}."
                f"\n  Hint: RingCache(config, slack={count}) keeps as many, counted since the farthest token."
            )
        removed = count if self._real is None else self._real[:, -count:].sum(1).to(torch.int32)
        self.buffer.rollback(removed)
        if self._real is not None:
            self._real = self._real[:, :-count]
        self.cumulative_length -= count

    def reset(self) -> None:
        """Empties the ring."""
        self.cumulative_length, self._announced, self._real = 0, None, None
        if self.is_initialized:
            self.buffer.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes row `beam_idx[i]`: beam search, forks, another batch size."""
        if self.is_initialized:
            self.buffer.select(beam_idx.to(self.device))
            self._real = None if self._real is None else self._real[beam_idx.to(self.device)]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps rows."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row, `repeats` times."""
        if self.is_initialized:
            self.reorder_cache(torch.arange(self.buffer.batch, device=self.device).repeat_interleave(repeats))


@partial(jax.jit, static_argnums=1)
def _larger(ring: Any, window: Window) -> Any:
    """The ring, with all it holds, in a larger one."""
    return rj.RingBuffer.restore(ring.export(), window, slack=ring.slack, dtype=ring.k.dtype)


def _rows(x: Tensor, order: Tensor) -> Tensor:
    """x [B, T, ...], each row's tokens in its own order."""
    return x.gather(1, order[:, :, *[None] * (x.ndim - 2)].expand(-1, -1, *x.shape[2:]))


class RingCache(Cache):
    """A cache for `generate(..., past_key_values=RingCache(model.config))` that holds rings.

    A layer with a sliding window keeps exactly its window (and slack), written in place, one slot per token: its memory
    does not grow, and neither does a step's time. A layer without one keeps all tokens, in a ring that grows by
    doubling. Works with `attn_implementation="ringjax"` only: other attentions do not know how to read a ring.

    Padding, on any side, is never stored and takes no place in a window; transformers' own caches store it.

    Args:
      config: of the model.
      slack: how many tokens `crop` can take back: assisted decoding wants its number of candidate tokens.
      length: how many tokens layers without a window have room for at first.
      dtype: of the keys and values kept; None: the model's.

    Raises:
      NotImplementedError: a layer that neither slides nor sees everything.
      ValueError, TypeError: numbers out of range.
    """

    types: ClassVar[tuple[str, ...]] = ("full_attention", "sliding_attention")

    def __init__(self, config: Any, *, slack: int = 0, length: int = 256, dtype: torch.dtype | None = None):
        for name, number, least in (("slack", slack, 0), ("length", length, 1)):
            if not isinstance(number, int) or isinstance(number, bool):
                raise TypeError(f"RingCache: {name} must be an int, got {number!r}.")
            if number < least:
                raise ValueError(f"RingCache: {name} must be at least {least}, got {number}.")
        config = config.get_text_config(decoder=True)
        window = getattr(config, "sliding_window", None)
        types = getattr(config, "layer_types", None)
        if types is None:
            types = ["full_attention" if window is None else "sliding_attention"] * config.num_hidden_layers
        strange = sorted(set(types) - set(self.types))
        if getattr(config, "attention_chunk_size", None) is not None and getattr(config, "layer_types", None) is None:
            strange = ["chunked_attention"]
        if getattr(config, "num_kv_shared_layers", 0):
            strange = ["layers that share keys"]
        if strange:
            raise NotImplementedError(
                f"RingCache: layers must be of {' or '.join(self.types)}, got {', '.join(strange)}."
                "\n  Hint: transformers' DynamicCache works with attn_implementation='ringjax' too."
            )
        windows = [window if kind == "sliding_attention" else None for kind in types]
        super().__init__(layers=[RingLayer(config, size, slack, length, dtype) for size in windows])
