"""A mask of xFormers, read as integers, lets through exactly the pairs that its own `materialize` lets through."""

import types

import numpy as np
import pytest

from ringjax import Window

torch = pytest.importorskip("torch", exc_type=ImportError)
attn_bias = pytest.importorskip("xformers.ops.fmha.attn_bias", exc_type=ImportError)

from torch_bridge import _xformers_masks as masks  # noqa: E402

CPU = torch.device("cpu")
DENSE = masks.KINDS[:4]
CASES = 25


def lengths(rng, rows, low=0, high=7):
    return [int(n) for n in rng.integers(low, high, rows)]


def dense(kind, rng):
    made = getattr(attn_bias, kind)
    if kind == "LocalAttentionFromBottomRightMask":
        return made(*lengths(rng, 2))
    return made(int(rng.integers(1, 6))) if "Local" in kind else made()


def packed(kind, rng, q, k):
    """A mask of blocks without gaps between their keys."""
    if "BottomRight" in kind:
        k = [max(a, b) for a, b in zip(q, k, strict=True)]
    mask = attn_bias.BlockDiagonalMask.from_seqlens(q, k, device=CPU)
    window = 1 + max(max(0, a - b) for a, b in zip(q, k, strict=True)) + int(rng.integers(0, 3))
    if kind == "BlockDiagonalCausalMask":
        return mask.make_causal()
    if kind == "BlockDiagonalCausalFromBottomRightMask":
        return mask.make_causal_from_bottomright()
    if kind == "BlockDiagonalCausalLocalAttentionMask":
        return mask.make_local_attention(window)
    if kind == "BlockDiagonalCausalLocalAttentionFromBottomRightMask":
        return mask.make_local_attention_from_bottomright(window)
    return mask


def gaps(kind, rng, q, k):
    """A mask of blocks whose keys fill a part of their room, each beginning anywhere in it."""
    room = max(k) + int(rng.integers(0, 3))
    if "Gappy" in kind:
        starts = [row * room + int(rng.integers(0, room - n + 1)) for row, n in enumerate(k)]
        return room, getattr(attn_bias, kind).from_seqlens(q, [*starts, len(k) * room], k, device=CPU)
    made = getattr(attn_bias, kind)
    mask = attn_bias.BlockDiagonalPaddedKeysMask.from_seqlens(q, room, k, device=CPU)
    local = lengths(rng, 2) if kind == "BlockDiagonalLocalAttentionPaddedKeysMask" else lengths(rng, 1, 1)
    return room, made(mask.q_seqinfo, mask.k_seqinfo, *(local if "Local" in kind else ()))


def example(kind, rng):
    """A random mask, and numbers of queries and keys for it."""
    if kind in DENSE:
        return dense(kind, rng), *lengths(rng, 2, 1, 12)
    rows = int(rng.integers(1, 5))
    q, k = lengths(rng, rows), lengths(rng, rows)
    q[0], k[0] = q[0] + 1, k[0] + 1
    if kind.startswith("Paged"):
        unpaged = getattr(attn_bias, kind)._UNPAGED_TYPE.__name__
        page, pages = int(rng.integers(1, 4)), int(rng.integers(2, 4))
        k = [min(n, page * pages) for n in k]
        tables = torch.tensor(rng.permutation(rows * pages).reshape(rows, pages), dtype=torch.int32)
        made = getattr(attn_bias, kind)
        if "Gappy" not in kind:
            return made.from_seqlens(q, k, tables, page, device=CPU), sum(q), rows * pages * page
        starts = [int(rng.integers(0, max(1, page * pages - n + 1 - (n == 0)))) for n in k]
        logical = [row * page * pages + start for row, start in enumerate(starts)]
        mask = getattr(attn_bias, unpaged).from_seqlens(q, [*logical, rows * page * pages], k, device=CPU)
        return mask.make_paged(tables, page, page * pages, made), sum(q), rows * pages * page
    if "Padded" in kind or "Gappy" in kind:
        room, mask = gaps(kind, rng, q, k)
        return mask, sum(q), len(k) * room
    mask = packed(kind, rng, q, k)
    return mask, sum(q), mask.k_seqinfo.seqstart_py[-1]


def theirs(mask, queries, keys):
    return mask.materialize((queries, keys)).exp().bool().numpy()


def ours(mask, queries, keys):
    """bool [queries, keys], from the arguments that `attention` would get."""
    found = masks.arrange(masks.layout_of(mask), queries, keys)
    pages = np.arange(keys)
    if hasattr(mask, "block_tables"):
        page = np.arange(mask.page_size)
        pages = (mask.block_tables.numpy()[:, :, None] * mask.page_size + page).reshape(-1)
    q_index = np.arange(queries)[None] if found.q_index is None else found.q_index
    k_index = np.arange(keys)[None] if found.k_index is None else found.k_index
    k_index = k_index if found.k_range is None else k_index[:, slice(*found.k_range)]
    seen = np.zeros((queries, keys), int)
    for row in range(len(q_index)):
        offset = found.q_offset if np.ndim(found.q_offset) == 0 else found.q_offset[row]
        pairs = found.window.visible(offset + np.arange(q_index.shape[1])[:, None], np.arange(k_index.shape[1])[None])
        if found.segment_ids is not None:
            mine, its = found.segment_ids[row][:, None], found.kv_segment_ids[row][None]
            pairs = pairs & (mine == its) & (mine >= 0)
        np.add.at(seen, (q_index[row][:, None], pages[k_index[row]][None]), pairs)
    assert seen.max(initial=0) <= 1, "a pair twice"
    return seen.astype(bool)


@pytest.mark.parametrize("kind", masks.KINDS)
def test_every_mask_means_the_same(kind):
    if not hasattr(attn_bias, kind):
        pytest.skip(f"this xFormers has no {kind}")
    for seed in range(CASES):
        rng = np.random.default_rng([seed, len(kind)])
        mask, queries, keys = example(kind, rng)
        assert masks.wrong_sizes(mask, 1, queries, keys) == []
        np.testing.assert_array_equal(ours(mask, queries, keys), theirs(mask, queries, keys), f"{kind}, seed {seed}")


def test_no_mask_of_xformers_is_forgotten():
    known = {name for name in vars(attn_bias) if name.endswith("Mask") and not name.startswith("_")}
    assert known <= set(masks.KINDS)


def test_overlapping_gappy_blocks():
    """Two blocks may share keys."""
    mask = attn_bias.BlockDiagonalGappyKeysMask.from_seqlens([2, 3], [1, 2, 7], [4, 5], device=CPU)
    np.testing.assert_array_equal(ours(mask, 5, 7), theirs(mask, 5, 7))


def test_in_place_updates_are_seen():
    """Masks are updated in place for CUDA graphs: nothing may be remembered by the mask's identity."""
    mask = attn_bias.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens([1, 1], 6, [3, 5], device=CPU)
    ours(mask, 2, 12)
    if not hasattr(mask.k_seqinfo, "from_seqlens_padded_inplace"):
        pytest.skip("this xFormers cannot")
    mask.k_seqinfo.from_seqlens_padded_inplace([4, 2])
    np.testing.assert_array_equal(ours(mask, 2, 12), theirs(mask, 2, 12))


def test_keys_that_nobody_sees_are_not_given():
    local = attn_bias.LowerTriangularFromBottomRightLocalAttentionMask(4)
    assert arranged(local, 3, 20) == masks.Arrangement(Window.causal(4), 3, k_range=(14, 20))
    # A decoder over keys that grow: one shape, once there are as many as the window is wide.
    steps = {arranged(local, 1, keys)[:-1] for keys in range(4, 9)}
    assert steps == {masks.Arrangement(Window.causal(4), 3)[:-1]}
    assert arranged(attn_bias.LowerTriangularMask(), 3, 20).k_range == (0, 3)


def arranged(mask, queries, keys):
    return masks.arrange(masks.layout_of(mask), queries, keys)


def test_equal_blocks_take_rows_and_ragged_local_ones_share_one():
    even = attn_bias.BlockDiagonalCausalMask.from_seqlens([64] * 4, device=CPU)
    assert arranged(even, 256, 256).q_index.shape == (4, 64)
    ragged = attn_bias.BlockDiagonalMask.from_seqlens([100, 3, 2], device=CPU).make_local_attention(8)
    found = arranged(ragged, 105, 105)
    assert found.q_index is None and found.q_offset == 0 and found.window == Window.causal(8)


def test_shapes_do_not_follow_the_fill_of_a_cache():
    """A decoder's steps share one executable: nothing static depends on how far its ring is filled."""
    steps = [
        arranged(
            attn_bias.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens([1, 1], 8, filled, device=CPU), 2, 16
        )
        for filled in ([1, 4], [2, 5], [8, 8])
    ]
    for found in steps:
        assert found.k_index.shape == found.kv_segment_ids.shape == (2, 8) and found.q_index.shape == (2, 1)
        assert found.q_offset.dtype == np.int32 and found.window == Window.causal()


def test_rows_of_many_lengths_come_in_few_shapes():
    made = {masks._room([(0, n), (n, 1)], n + 1) for n in range(1, 1025)}
    assert len(made) < 40


def test_a_mask_of_one_block_needs_no_segments():
    found = arranged(attn_bias.BlockDiagonalCausalMask.from_seqlens([9], device=CPU), 9, 9)
    assert found == masks.Arrangement(Window.causal(), 0)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ((2, 5, 8), "a mask of blocks takes a batch of 1, got 2"),
        ((1, 4, 8), "the mask is for 5 queries, got 4"),
        ((1, 5, 9), "the mask is for 8 keys, got 9"),
    ],
)
def test_sizes_that_do_not_fit_are_said(sizes, reason):
    mask = attn_bias.BlockDiagonalPaddedKeysMask.from_seqlens([2, 3], 4, [4, 3], device=CPU)
    assert masks.wrong_sizes(mask, *sizes) == [reason]


def test_pages_that_do_not_fit_are_said():
    tables = torch.tensor([[0, 1]], dtype=torch.int32)
    mask = attn_bias.PagedBlockDiagonalPaddedKeysMask.from_seqlens([1], [3], tables, 4, device=CPU)
    assert masks.wrong_sizes(mask, 1, 1, 9) == ["the keys must be whole pages of 4, got 9"]


def test_masks_are_read_by_name_and_fields():
    """The successor of xFormers' masks, mslk's, has the same names and other classes."""
    spans = types.SimpleNamespace(seqstart_py=[0, 2, 5])
    mask = type("BlockDiagonalCausalMask", (), {"q_seqinfo": spans, "k_seqinfo": spans})()
    assert masks.layout_of(mask).blocks == ((0, 2, 0, 2), (2, 3, 2, 3))
