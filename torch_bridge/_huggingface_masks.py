"""transformers' masks as windows and segments: what its mask functions close over, read and never evaluated."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function

from ringjax import Window


class Seen(NamedTuple):
    """What a layer's queries see.

    Attributes:
      window: as for `attention`.
      q_offset: as for `attention`: query 0 stands at this key. A tensor [B] if it differs from call to call.
      segment_ids, kv_segment_ids: int32 [B, T] and [B, S], or None.
      real: bool [B, T], which of the new tokens are not padding; None: all.
      keys: S.
    """

    window: Window
    q_offset: int | Tensor
    segment_ids: Tensor | None
    kv_segment_ids: Tensor | None
    real: Tensor | None
    keys: int


class Mask(Tensor):
    """A mask [B, 1, T, S] as transformers hands it around: no memory, and what it says beside it.

    It must be a tensor of four axes to be left alone; a model that changes it gets another one, which says nothing.
    """

    seen: Seen

    @classmethod
    def of(cls, seen: Seen, batch: int, queries: int, device: Any) -> "Mask":
        made = torch.ones((), dtype=torch.bool, device=device).expand(batch, 1, queries, seen.keys).as_subclass(cls)
        made.seen = seen
        return made

    def contiguous(self, *_: Any, **__: Any) -> "Mask":
        """Itself: there is nothing to lay out."""
        return self


def seen_of(mask: Any) -> Seen | None:
    """What a mask says, or None if it is not ours, or not any more."""
    return getattr(mask, "seen", None) if isinstance(mask, Mask) else None


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: Any = None,
    **_: Any,
) -> Mask:
    """What transformers calls for a mask; it gives queries `q_offset` + t and keys `kv_offset` + s.

    Raises:
      NotImplementedError: a mask function that is no window.
    """
    sides, packed = _read(mask_function)
    window = Window(*sides)
    start = int(q_offset)
    segments = kv_segments = real = None
    if packed is not None:
        segments = kv_segments = packed.to(torch.int32)
    if attention_mask is not None:
        missing = max(kv_offset + kv_length, start + q_length) - attention_mask.shape[1]
        known = torch.nn.functional.pad(attention_mask.bool(), (0, max(0, missing)))
        seen = known[:, kv_offset : kv_offset + kv_length]
        if not seen.all():
            kv_segments = torch.where(seen, 0, -1).to(torch.int32)
            segments = torch.zeros(batch_size, q_length, dtype=torch.int32, device=kv_segments.device)
        if start + q_length == kv_offset + kv_length:
            real = known[:, start : start + q_length]
            real = None if real.all() else real
    first = start - kv_offset
    offset: int | Tensor = first
    if q_length != kv_length:  # a decoder: the next step's is another, and what is compiled is not
        offset = torch.full((batch_size,), first, dtype=torch.int32, device=device)
    return Mask.of(Seen(window, offset, segments, kv_segments, real, kv_length), batch_size, q_length, device)


def _read(function: Any) -> tuple[tuple[int | None, int | None], Tensor | None]:
    """Both sides of the window, and which of several packed sequences each token is in."""
    left, right, packed = None, None, None
    for name, inside in _parts(function):
        if name == "causal_mask_function":
            right = 0
        elif name == "sliding_window_overlay.<locals>.inner_mask":
            left = inside["sliding_window"] - 1
        elif name == "sliding_window_bidirectional_overlay.<locals>.inner_mask":
            left = right = inside["sliding_window"]
        elif name == "packed_sequence_mask_function.<locals>.inner_mask":
            packed = inside["packed_sequence_mask"]
        elif name != "bidirectional_mask_function":
            kind = name.partition(".<locals>")[0]
            raise NotImplementedError(
                f"torch_bridge.huggingface: a mask must be a window, over packed sequences or padding, got {kind}."
                "\n  Hint: chunked, image and custom masks need attn_implementation='sdpa' or 'eager'."
            )
    return (left, right), packed


def _parts(function: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The functions that a mask function is the conjunction of: their names, and what they close over."""
    name = getattr(function, "__qualname__", type(function).__name__)
    if (module := getattr(function, "__module__", None)) != "transformers.masking_utils":
        yield f"{module}.{name}", {}
        return
    inside = dict(inspect.getclosurevars(function).nonlocals)
    if name == "and_masks.<locals>.and_mask":
        for part in inside["mask_functions"]:
            yield from _parts(part)
    elif name == "remap_positions_for_packed_sequence.<locals>.inner_mask":
        # Within one sequence, positions and places differ by a constant, which no window sees.
        yield from _parts(inside["mask_function"])
    else:
        yield name, inside
