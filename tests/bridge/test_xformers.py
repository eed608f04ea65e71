"""xFormers' memory_efficient_attention with our operator gives what a dense mask gives, forward and backward."""

import cases
import numpy as np
import pytest

torch = pytest.importorskip("torch", exc_type=ImportError)
fmha = pytest.importorskip("xformers.ops.fmha", exc_type=ImportError)
if not hasattr(fmha, "memory_efficient_attention"):
    pytest.skip("this xFormers has handed its attention over to mslk", allow_module_level=True)

import torch_bridge  # noqa: E402
from torch_bridge.xformers import OP, BwOp, FwOp  # noqa: E402

masks = fmha.attn_bias
DEVICE = torch.device("cpu")  # test_gpu_xformers.py runs these tests on another
Q, K, ROOM = (3, 1, 2), (6, 2, 4), 6  # lengths of three blocks, few shapes: each is compiled, forward and backward
HEADS, DIM, VALUE_DIM = 4, 8, 8


def blocks(queries=Q, keys=K):
    return masks.BlockDiagonalMask.from_seqlens(list(queries), list(keys), device=DEVICE)


def padded(kind, *window, queries=Q, keys=K, room=ROOM):
    mask = masks.BlockDiagonalPaddedKeysMask.from_seqlens(list(queries), room, list(keys), device=DEVICE)
    return getattr(masks, kind)(mask.q_seqinfo, mask.k_seqinfo, *window)


def gappy(kind):
    return getattr(masks, kind).from_seqlens(
        list(Q), [1, 6, 9, 14], list(K), device=DEVICE
    )  # the first two share a key


def paged(kind):
    tables = torch.tensor([[4, 1], [5, 0], [2, 3]], dtype=torch.int32, device=DEVICE)
    return getattr(masks, kind).from_seqlens(list(Q), list(K), tables, 3, device=DEVICE)


MASKS = {
    "none": lambda: None,
    "causal-top-left": masks.LowerTriangularMask,
    "causal-bottom-right": masks.LowerTriangularFromBottomRightMask,
    "local-causal": lambda: masks.LowerTriangularFromBottomRightLocalAttentionMask(3),
    "local": lambda: masks.LocalAttentionFromBottomRightMask(2, 1),
    "blocks": blocks,
    "blocks-causal": lambda: blocks().make_causal(),
    "blocks-causal-bottom-right": lambda: blocks().make_causal_from_bottomright(),
    "blocks-local": lambda: blocks().make_local_attention(3),
    "blocks-local-bottom-right": lambda: blocks().make_local_attention_from_bottomright(3),
    "blocks-of-one-length": lambda: blocks((2, 2, 2), (3, 3, 3)).make_causal_from_bottomright(),
    "padded": lambda: padded("BlockDiagonalPaddedKeysMask"),
    "padded-idle": lambda: padded("BlockDiagonalPaddedKeysMask", queries=(3, 0, 3)),  # of whose keys none is seen
    "padded-causal": lambda: padded("BlockDiagonalCausalWithOffsetPaddedKeysMask"),
    "padded-local": lambda: padded("BlockDiagonalLocalAttentionPaddedKeysMask", 2, 1),
    "padded-local-causal": lambda: padded("BlockDiagonalCausalLocalAttentionPaddedKeysMask", 3),
    "gappy": lambda: gappy("BlockDiagonalGappyKeysMask"),
    "gappy-causal": lambda: gappy("BlockDiagonalCausalWithOffsetGappyKeysMask"),
    "paged": lambda: paged("PagedBlockDiagonalPaddedKeysMask"),
    "paged-causal": lambda: paged("PagedBlockDiagonalCausalWithOffsetPaddedKeysMask"),
}


def sizes(mask):
    """Batch, queries and keys that a mask is for."""
    if mask is None or not hasattr(mask, "q_seqinfo"):
        return 2, 6, 12
    keys = mask.block_tables.numel() * mask.page_size if hasattr(mask, "block_tables") else None
    return 1, mask.q_seqinfo.seqstart_py[-1], keys or mask.k_seqinfo.seqstart_py[-1]


def tensors(mask, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    batch, queries, keys = sizes(mask)
    shapes = [(queries, DIM), (keys, DIM), (keys, VALUE_DIM), (queries, VALUE_DIM)]
    return [torch.randn(batch, n, HEADS, h, generator=generator).to(DEVICE, dtype) for n, h in shapes]


def seen(mask, queries, keys):
    if mask is None:
        return torch.ones(queries, keys, dtype=torch.bool, device=DEVICE)
    return mask.materialize((queries, keys), device=DEVICE).exp().bool()


def dense(q, k, v, mask, dtype):
    """Output and lse of plain attention, selected from, in a dtype; a row that sees nothing is 0."""
    q, k, v = (x.to(dtype) for x in (q, k, v))
    pairs = seen(mask, q.shape[1], k.shape[1])
    logits = torch.einsum("bqnh,bknh->bnqk", q, k) * q.shape[-1] ** -0.5
    logits = torch.where(pairs, logits, torch.tensor(-torch.inf, dtype=dtype, device=DEVICE))
    weights = torch.where(pairs.any(-1, keepdim=True), logits, 0.0).softmax(-1)
    weights = torch.where(pairs, weights, torch.zeros((), dtype=dtype, device=DEVICE))
    return torch.einsum("bnqk,bknh->bqnh", weights, v), logits.logsumexp(-1)


def gradients(function, leaves, g):
    leaves = [x.clone().requires_grad_() for x in leaves]
    out = function(*leaves)
    return out, *torch.autograd.grad(out, leaves, g.to(out.dtype))


def compare(got, exact, plain, what):
    got, exact, plain = (x.detach().double().cpu().numpy() for x in (got, exact, plain))
    cases.assert_close(got.astype(np.float32), exact, plain, what)


@pytest.mark.parametrize("name", MASKS)
def test_forward_and_backward(name):
    if name == "padded-local" and not hasattr(masks, "BlockDiagonalLocalAttentionPaddedKeysMask"):
        pytest.skip("this xFormers has no such mask")
    mask = MASKS[name]()
    *leaves, g = tensors(mask)
    ours = gradients(lambda *x: fmha.memory_efficient_attention(*x, attn_bias=mask, op=OP), leaves, g)
    exact = gradients(lambda *x: dense(*x, mask, torch.float64)[0], leaves, g)
    plain = gradients(lambda *x: dense(*x, mask, torch.float32)[0], leaves, g)
    for what, *values in zip(("out", "dq", "dk", "dv"), ours, exact, plain, strict=True):
        compare(*values, f"{name}: {what}")


def test_the_same_numbers_as_ringjax_to_the_bit():
    mask = MASKS["local-causal"]()
    q, k, v, _ = tensors(mask)
    ours = fmha.memory_efficient_attention(q, k, v, attn_bias=mask, op=OP)
    assert torch.equal(ours, torch_bridge.attention(q, k, v, torch_bridge.Window.causal(3)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_everywhere(dtype):
    mask = MASKS["padded-causal"]()
    q, k, v, _ = tensors(mask, dtype)
    out = fmha.memory_efficient_attention(q, k, v, attn_bias=mask, op=OP)
    assert out.dtype == dtype
    plain, exact = (dense(q, k, v, mask, kind)[0].double() for kind in (dtype, torch.float64))
    assert (out.double() - exact).abs().max() <= 2 * (plain - exact).abs().max() + torch.finfo(dtype).eps


def test_scale():
    q, k, v, _ = tensors(None)
    ours = fmha.memory_efficient_attention(q, k, v, scale=0.7, op=OP)
    torch.testing.assert_close(ours, dense(q * 0.7 * DIM**0.5, k, v, None, torch.float32)[0])


@pytest.mark.parametrize("name", ["causal-bottom-right", "padded-local-causal"])
def test_partial_attentions_merge_into_the_whole(name):
    mask = MASKS[name]()
    q, k, v, _ = tensors(mask)
    out, lse = fmha.memory_efficient_attention_partial(q, k, v, attn_bias=mask, op=FwOp)
    exact, exact_lse = dense(q, k, v, mask, torch.float64)
    compare(out, exact, dense(q, k, v, mask, torch.float32)[0], "out")
    compare(lse, exact_lse, dense(q, k, v, mask, torch.float32)[1], "lse")


def test_partial_attentions_of_two_sets_of_keys():
    q, k, v, _ = tensors(None)
    parts = [
        fmha.memory_efficient_attention_partial(q.bfloat16(), *(x[:, some].bfloat16() for x in (k, v)), op=OP)
        for some in (slice(0, 4), slice(4, None))
    ]
    assert all(out.dtype == lse.dtype == torch.float32 for out, lse in parts)
    weights = torch.stack([lse for _, lse in parts]).softmax(0).transpose(2, 3)[..., None]
    merged = sum(weight * out for weight, (out, _) in zip(weights, parts, strict=True))
    torch.testing.assert_close(merged, dense(q, k, v, None, torch.float32)[0], atol=0.03, rtol=0.03)


def test_rows_that_see_nothing():
    """More queries than keys, aligned at the last: the first ones see none, and get 0 and minus infinity."""
    mask = masks.LowerTriangularFromBottomRightLocalAttentionMask(3)
    q, k, v, _ = tensors(None)
    q, k, v = k.clone().requires_grad_(), q, q[..., :VALUE_DIM].contiguous()
    out = fmha.memory_efficient_attention(q, k, v, attn_bias=mask, op=OP)
    (dq,) = torch.autograd.grad(out.sum(), q)
    assert not out[:, :6].any() and not dq[:, :6].any() and out[:, 6:].all()
    _, lse = fmha.memory_efficient_attention_partial(q.detach(), k, v, attn_bias=mask, op=OP)
    assert torch.isneginf(lse[:, :, :6]).all() and torch.isfinite(lse[:, :, 6:]).all()


def test_no_keys_and_no_queries():
    empty = masks.BlockDiagonalMask.from_seqlens([2, 1], [0, 0], device=DEVICE)
    q = torch.ones(1, 3, 2, 8, device=DEVICE, requires_grad=True)
    k, v = (torch.ones(1, 0, 2, 8, device=DEVICE) for _ in range(2))
    out = fmha.memory_efficient_attention(q, k, v, attn_bias=empty, op=OP)
    (dq,) = torch.autograd.grad(out.sum(), q)
    assert out.shape == (1, 3, 2, 8) and not out.any() and not dq.any()
    assert fmha.memory_efficient_attention(k, q.detach(), q.detach(), op=OP).shape == (1, 0, 2, 8)


@pytest.mark.parametrize(
    "name",
    [
        "causal-top-left",
        "local-causal",
        "blocks-causal",
        "padded",
        "padded-idle",
        "padded-local-causal",
        "gappy",
        "paged-causal",
    ],
)
def test_what_is_not_seen_may_be_nan(name):
    """Padding, and keys too far away for every query: nothing is ever added to them or multiplied by 0."""
    mask = MASKS[name]()
    *leaves, g = tensors(mask)
    unseen = ~seen(mask, *sizes(mask)[1:]).any(0)
    assert unseen.any()
    clean = gradients(lambda *x: fmha.memory_efficient_attention(*x, attn_bias=mask, op=OP), leaves, g)
    for x in leaves[1:]:
        x[:, unseen] = torch.nan
    poisoned = gradients(lambda *x: fmha.memory_efficient_attention(*x, attn_bias=mask, op=OP), leaves, g)
    for a, b in zip(clean, poisoned, strict=True):
        assert torch.equal(a, b)
    assert not any(gradient[:, unseen].any() for gradient in poisoned[2:])


def grouped(shared):
    """Queries [B, M, 2, 2, K] and keys, values of as many heads, the two of a group the same memory or not."""
    q, k, v, _ = tensors(None)
    if not shared:
        return [x.unflatten(2, (2, 2)) for x in (q, k, v)]
    return q.unflatten(2, (2, 2)), *(x[:, :, :2, None].expand(-1, -1, -1, 2, -1) for x in (k, v))


@pytest.mark.parametrize("shared", [True, False])
def test_groups_of_heads(shared):
    q, k, v = grouped(shared)
    mask = masks.LowerTriangularFromBottomRightMask()
    ours = fmha.memory_efficient_attention(q, k, v, attn_bias=mask, op=OP)
    flat = [x.flatten(2, 3) for x in (q, k, v)]
    torch.testing.assert_close(ours.flatten(2, 3), dense(*flat, mask, torch.float32)[0])
    _, lse = fmha.memory_efficient_attention_partial(q, k, v, attn_bias=mask, op=OP)
    torch.testing.assert_close(lse.flatten(1, 2), dense(*flat, mask, torch.float32)[1])


def test_shared_heads_are_not_copied(monkeypatch):
    q, k, v = grouped(True)
    given = []
    plain = torch_bridge.attention

    def spy(q, k, v, *rest, **options):
        given.append(k.shape[2])
        return plain(q, k, v, *rest, **options)

    monkeypatch.setattr("torch_bridge.xformers.attention", spy)
    fmha.memory_efficient_attention(q, k, v, op=OP)
    one = [x[:, :, :1].expand(-1, -1, HEADS, -1) for x in tensors(None)[1:3]]
    fmha.memory_efficient_attention(tensors(None)[0], *one, op=OP)
    assert given == [2, 1]


def test_multi_query_gradients():
    """One key head for all queries, by expansion: its gradient is the sum."""
    q, k, v, g = tensors(None)
    leaves = [q, k[:, :, :1].clone(), v[:, :, :1].clone()]

    def expand(q, k, v):
        return q, k.expand(-1, -1, HEADS, -1), v.expand(-1, -1, HEADS, -1)

    ours = gradients(lambda *x: fmha.memory_efficient_attention(*expand(*x), op=OP), leaves, g)
    exact = gradients(lambda *x: dense(*expand(*x), None, torch.float64)[0], leaves, g)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b.double(), atol=1e-5, rtol=1e-5)


def test_packed_qkv():
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(2, 6, 3, HEADS, DIM, generator=generator).to(DEVICE)
    mask = masks.LowerTriangularMask()  # sees the first 6 keys only, as above
    g = torch.randn(2, 6, HEADS, DIM, generator=generator).to(DEVICE)
    ours = gradients(lambda x: fmha.memory_efficient_attention(*x.unbind(2), attn_bias=mask, op=OP), [packed], g)
    exact = gradients(lambda x: dense(*x.unbind(2), mask, torch.float64)[0], [packed], g)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b.double(), atol=1e-5, rtol=1e-5)


def test_three_axes():
    q, k, v, _ = tensors(None)
    ours = fmha.memory_efficient_attention(q[:, :, 0], k[:, :, 0], v[:, :, 0], masks.LowerTriangularMask(), op=OP)
    torch.testing.assert_close(ours, dense(q, k, v, masks.LowerTriangularMask(), torch.float32)[0][:, :, 0])


@pytest.mark.parametrize("op", [(FwOp, None), (FwOp, BwOp)])
def test_our_backward_goes_with_our_forward(op):
    q, k, v, g = tensors(None)
    ours = gradients(lambda *x: fmha.memory_efficient_attention(*x, op=op), [q, k, v], g)
    exact = gradients(lambda *x: dense(*x, None, torch.float64)[0], [q, k, v], g)
    torch.testing.assert_close(ours[1].double(), exact[1].double(), atol=1e-5, rtol=1e-5)


def test_forward_and_backward_called_apart():
    mask = MASKS["blocks-local"]()
    q, k, v, g = tensors(mask)
    out, lse = fmha.memory_efficient_attention_forward_requires_grad(q, k, v, mask, op=FwOp)
    assert lse.shape == (1, HEADS, sum(Q))
    got = fmha.memory_efficient_attention_backward(g, out, lse, q, k, v, mask, op=BwOp)
    together = gradients(lambda *x: fmha.memory_efficient_attention(*x, attn_bias=mask, op=OP), [q, k, v], g)
    assert all(torch.equal(a, b) for a, b in zip(got, together[1:], strict=True))


@pytest.mark.filterwarnings("ignore")  # dynamo's own, where it follows xFormers: what they are changes with torch
@pytest.mark.parametrize(("name", "fullgraph"), [("local-causal", True), ("blocks-causal", False)])
def test_torch_compile(name, fullgraph):
    """In one graph, forward and backward; the lengths of blocks break it."""
    mask = MASKS[name]()
    *leaves, g = tensors(mask)

    def attend(q, k, v):
        return 2 * fmha.memory_efficient_attention(q + 1, k, v, attn_bias=mask, op=OP)

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=fullgraph, backend="aot_eager")
    for a, b in zip(gradients(compiled, leaves, g), gradients(attend, leaves, g), strict=True):
        torch.testing.assert_close(a, b)
