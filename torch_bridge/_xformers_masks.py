"""xFormers' masks as integers: a window, where its blocks lie, and how to hand both to `attention`.

A mask is read by the names of its class and fields, and xFormers is not imported. Nothing here looks at a tensor, save
at its shape: the lengths of a mask's blocks are kept on the host too.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from ringjax import Window

# Every mask whose meaning is a window; all but the first are aligned at the bottom right unless `TOP_LEFT` says not.
KINDS = (
    "LowerTriangularMask",
    "LowerTriangularFromBottomRightMask",
    "LowerTriangularFromBottomRightLocalAttentionMask",
    "LocalAttentionFromBottomRightMask",
    "BlockDiagonalMask",
    "BlockDiagonalCausalMask",
    "BlockDiagonalCausalFromBottomRightMask",
    "BlockDiagonalCausalLocalAttentionMask",
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask",
    "BlockDiagonalPaddedKeysMask",
    "BlockDiagonalCausalWithOffsetPaddedKeysMask",
    "BlockDiagonalLocalAttentionPaddedKeysMask",
    "BlockDiagonalCausalLocalAttentionPaddedKeysMask",
    "BlockDiagonalGappyKeysMask",
    "BlockDiagonalCausalWithOffsetGappyKeysMask",
    "PagedBlockDiagonalPaddedKeysMask",
    "PagedBlockDiagonalCausalWithOffsetPaddedKeysMask",
    "PagedBlockDiagonalGappyKeysMask",
    "PagedBlockDiagonalCausalWithOffsetGappyKeysMask",
)
TOP_LEFT = ("LowerTriangularMask", "BlockDiagonalCausalMask", "BlockDiagonalCausalLocalAttentionMask")


class Block(NamedTuple):
    """Some queries that see some keys, and no others do: where they begin and how many they are."""

    q_start: int
    q_length: int
    k_start: int
    k_length: int


class Layout(NamedTuple):
    """What a mask says.

    Attributes:
      window: what a query sees in its own block.
      bottom_right: whether a block's last query stands at its last key; else its first query at its first key.
      blocks: of the one row of the batch; None: every row of the batch is a block.
      filled: whether the keys' lengths say how far a store is filled: they change from call to call, shapes do not.
    """

    window: Window
    bottom_right: bool
    blocks: tuple[Block, ...] | None
    filled: bool = False


def layout_of(mask: Any) -> Layout:
    """What a mask, one of `KINDS` or None, says. The keys of a paged mask are those that its pages list, in order."""
    kind = type(mask).__name__
    window = Window.from_xformers(mask)
    bottom_right = kind not in TOP_LEFT
    if not hasattr(mask, "q_seqinfo"):
        return Layout(window, bottom_right, None)
    queries = mask.q_seqinfo.seqstart_py
    starts = list(mask.k_seqinfo.seqstart_py)
    lengths = getattr(mask.k_seqinfo, "seqlen_py", None)
    filled = lengths is not None
    if lengths is None:
        lengths = [end - start for start, end in pairwise(starts)]
    if kind.startswith("Paged"):
        if "Gappy" not in kind:
            starts = [0] * len(lengths)  # every row begins with its first page
        elif len(starts) > len(lengths):  # newer xFormers: ends, not lengths
            lengths = [end - start for start, end in zip(starts, lengths, strict=False)]
        room = mask.block_tables.shape[1] * mask.page_size
        starts = [row * room + start for row, start in enumerate(starts)]
    blocks = [
        Block(q_start, q_end - q_start, k_start, k_length)
        for q_start, q_end, k_start, k_length in zip(queries, queries[1:], starts, lengths, strict=False)
    ]
    return Layout(window, bottom_right, tuple(blocks), filled)


def wrong_sizes(mask: Any, batch: int, queries: int, keys: int) -> list[str]:
    """What does not fit about the batch and the lengths of the arrays that come with a mask."""
    if not hasattr(mask, "q_seqinfo"):
        return []
    reasons = [] if batch == 1 else [f"a mask of blocks takes a batch of 1, got {batch}"]
    wanted = mask.q_seqinfo.seqstart_py[-1]
    if queries != wanted:
        reasons.append(f"the mask is for {wanted} queries, got {queries}")
    if hasattr(mask, "block_tables"):
        if keys % mask.page_size:
            reasons.append(f"the keys must be whole pages of {mask.page_size}, got {keys}")
    elif keys != (wanted := mask.k_seqinfo.seqstart_py[-1]):
        reasons.append(f"the mask is for {wanted} keys, got {keys}")
    return reasons


class Arrangement(NamedTuple):
    """Arguments for `attention`, whose positions count along a row and whose rows cannot see each other.

    Attributes:
      window: as for `attention`.
      q_offset: as for `attention`; int32 [R] if the rows differ.
      segment_ids, kv_segment_ids: int32 [R, T] and [R, S], or None.
      q_index, k_index: int [R, T] and [R, S], which of the mask's queries and keys to put there; None: they stay in
        the rows they are in.
      k_range: first and end of the keys to give; None: all. What no query sees is not read.
    """

    window: Window
    q_offset: int | np.ndarray
    segment_ids: np.ndarray | None = None
    kv_segment_ids: np.ndarray | None = None
    q_index: np.ndarray | None = None
    k_index: np.ndarray | None = None
    k_range: tuple[int, int] | None = None


@lru_cache(maxsize=64)  # the layers of a model share a mask
def arrange(layout: Layout, queries: int, keys: int) -> Arrangement:
    """How to compute a layout: in the row that all blocks share, or with a row for each block.

    One row takes a single offset between queries and keys, which is compiled in, and costs as if every block could see
    all others; a row for each costs as if all blocks were as long as the longest. What costs less is taken, if both are
    possible.
    """
    window, bottom_right, blocks, filled = layout
    everything = window.left is None and window.right is None
    if blocks is None:
        offset = keys - queries if bottom_right else 0
        first, end = _seen(window, offset, queries, keys)
        if (first, end) == (0, keys):
            return Arrangement(window, 0 if everything else offset)
        return Arrangement(window, offset - first, k_range=(first, end))
    shifts = [b.k_length - b.q_length if bottom_right else 0 for b in blocks]
    both = [(b, shift) for b, shift in zip(blocks, shifts, strict=True) if b.q_length and b.k_length]
    offsets = {b.k_start - b.q_start + shift for b, shift in both}
    q_spans, k_spans = [b[:2] for b in blocks], [b[2:] for b in blocks]
    q_seen = [(0, b.q_length) for b in blocks]
    k_seen = [
        _seen(window, shift, b.q_length, b.k_length) if b.q_length else (0, 0)
        for b, shift in zip(blocks, shifts, strict=True)
    ]
    row_queries, row_keys = _room(q_spans, queries), _room(k_spans, keys)
    width = keys if window.left is None or window.right is None else window.left + 1 + window.right
    fewer = len(blocks) * row_queries * min(row_keys, width) < queries * min(keys, width)
    if not filled and not fewer and (everything or len(offsets) <= 1):
        segments, kv_segments = _segments(q_spans, q_seen, queries), _segments(k_spans, k_seen, keys)
        shared = 0 if everything else next(iter(offsets), 0)
        if len(blocks) == 1 and not (segments.any() or kv_segments.any()):
            return Arrangement(window, shared)
        return Arrangement(window, shared, segments, kv_segments)
    q_index, q_real = _rows(q_spans, q_seen, row_queries, queries)
    k_index, k_real = _rows(k_spans, k_seen, row_keys, keys)
    starts = np.asarray(shifts, np.int32)
    if not filled and q_real.all() and k_real.all():
        return Arrangement(window, starts, None, None, q_index, k_index)
    segments, kv_segments = (np.where(real, 0, -1).astype(np.int32) for real in (q_real, k_real))
    return Arrangement(window, starts, segments, kv_segments, q_index, k_index)


def _seen(window: Window, offset: int, queries: int, keys: int) -> tuple[int, int]:
    """First and end of the keys that any query sees, query 0 standing at key `offset`; one key at least, if any."""
    first = 0 if window.left is None else min(max(0, offset - window.left), max(0, keys - 1))
    end = keys if window.right is None else min(keys, offset + queries + window.right)
    return first, max(min(first + 1, keys), end)


def _room(spans: Sequence[tuple[int, int]], size: int) -> int:
    """How long a row must be for every span to fit in one.

    If the spans begin at equal distances, that distance, so that the array is cut into rows as it lies; otherwise the
    longest span, rounded up by at most a quarter: each length of a row is compiled for.
    """
    stride, rest = divmod(size, len(spans))
    if rest == 0 and all(start == row * stride and length <= stride for row, (start, length) in enumerate(spans)):
        return stride
    longest = max(length for _, length in spans)
    step = max(1, 1 << max(0, longest.bit_length() - 3))
    return -(-longest // step) * step


def _segments(spans: Sequence[tuple[int, int]], seen: Sequence[tuple[int, int]], size: int) -> np.ndarray:
    """int32 [1, size]: the number of the span that each place is in, or -1 where it is in none or is not seen."""
    segments = np.full(size, -1, np.int32)
    for number, ((start, _), (first, end)) in enumerate(zip(spans, seen, strict=True)):
        segments[start + first : start + end] = number
    return segments[None]


def _rows(
    spans: Sequence[tuple[int, int]], seen: Sequence[tuple[int, int]], longest: int, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Index [R, longest] of the places of each span, all within the array, and which of them are seen."""
    starts = np.asarray(spans, np.int64)[:, :1]
    firsts, ends = np.asarray(seen, np.int64).T[:, :, None]
    along = np.arange(longest)[None]
    return np.minimum(starts + along, size - 1), (along >= firsts) & (along < ends)
