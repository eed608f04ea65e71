"""Automatic dispatch to our xFormers operator: asked for, reversible, and enough for code that names no operator."""

import threading

import pytest

torch = pytest.importorskip("torch", exc_type=ImportError)
fmha = pytest.importorskip("xformers.ops.fmha", exc_type=ImportError)
if not hasattr(fmha, "memory_efficient_attention"):
    pytest.skip("this xFormers has handed its attention over to mslk", allow_module_level=True)

from torch_bridge.xformers import OP, FwOp, dispatch  # noqa: E402

masks = fmha.attn_bias
DEVICE = torch.device("cpu")  # test_gpu_xformers.py runs some of these tests on another
chooser = fmha.dispatch._run_priority_list
WINDOW, ROWS, HEADS, DIM = 4, 3, 2, 8


def qkv(queries=5, keys=5):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, n, HEADS, DIM, generator=generator).to(DEVICE) for n in (queries, keys, keys)]


def test_nothing_changes_unless_asked_for():
    assert fmha.dispatch._run_priority_list is chooser
    with pytest.raises(NotImplementedError, match="No operator found for `memory_efficient_attention_forward`"):
        fmha.memory_efficient_attention(*qkv())


def test_forward_and_backward_without_an_operator():
    q, k, v = qkv()
    named, chosen = [q.clone().requires_grad_() for _ in range(2)]
    mask = masks.LowerTriangularMask()
    fmha.memory_efficient_attention(named, k, v, attn_bias=mask, op=OP).sum().backward()
    with dispatch():
        fmha.memory_efficient_attention(chosen, k, v, attn_bias=mask).sum().backward()
    assert torch.equal(named.grad, chosen.grad)
    with dispatch():
        out, lse = fmha.memory_efficient_attention_forward_requires_grad(q, k, v, mask)
        dq, _, _ = fmha.memory_efficient_attention_backward(torch.ones_like(out), out, lse, q, k, v, mask)
    assert torch.equal(dq, named.grad)
    assert fmha.dispatch._run_priority_list is chooser


def test_an_error_inside_leaves_no_trace():
    with pytest.raises(ZeroDivisionError), dispatch():
        raise ZeroDivisionError
    assert fmha.dispatch._run_priority_list is chooser


class Other(FwOp):
    """Another operator that could run the same call."""

    NAME = "other"


def choose(inputs):
    return fmha.dispatch._run_priority_list("memory_efficient_attention_forward", [Other], inputs)


def test_priority_and_predicate():
    inputs = fmha.Inputs(*qkv())
    assert choose(inputs) is Other
    with dispatch():
        assert choose(inputs) is FwOp
        with dispatch("last"):
            assert choose(inputs) is Other
        assert choose(inputs) is FwOp
    with dispatch(when=lambda given: given.query.shape[1] > 5):
        assert choose(inputs) is Other
        assert choose(fmha.Inputs(*qkv(6, 6))) is FwOp
    with dispatch("last"), pytest.raises(NotImplementedError, match="`ringjaxF` is not supported because"):
        fmha.memory_efficient_attention(*qkv(), p=0.5)


def test_contexts_of_threads_may_end_in_any_order():
    entered, leave = threading.Event(), threading.Event()

    def other():
        with dispatch("last"):
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    with dispatch():
        thread.start()
        assert entered.wait(60)
    assert fmha.dispatch._run_priority_list is not chooser  # the other one's is still open
    leave.set()
    thread.join()
    assert fmha.dispatch._run_priority_list is chooser


class Ring:
    """A cache as mistral-inference keeps it: token p of a row in slot p % WINDOW, its slots never in order again."""

    def __init__(self):
        self.k = torch.full((ROWS, WINDOW, HEADS, DIM), torch.nan, device=DEVICE)
        self.v = torch.full((ROWS, WINDOW, HEADS, DIM), torch.nan, device=DEVICE)
        self.lengths = [0] * ROWS

    def unrotated(self, x, row):
        length = self.lengths[row]
        slots = [p % WINDOW for p in range(max(0, length - WINDOW), length)]
        return x[row, slots]

    def write(self, k, v, chunk):
        start = 0
        for row, n in enumerate(chunk):
            for t in range(n):
                slot = (self.lengths[row] + t) % WINDOW
                self.k[row, slot], self.v[row, slot] = k[0, start + t], v[0, start + t]
            self.lengths[row] += n
            start += n

    def attend(self, q, k, v, chunk):
        """One layer's attention; no operator is named, as in mistral-inference."""
        if max(chunk) == 1:
            self.write(k, v, chunk)
            mask = masks.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
                q_seqlen=chunk, kv_padding=WINDOW, kv_seqlen=[min(n, WINDOW) for n in self.lengths], device=DEVICE
            )
            return fmha.memory_efficient_attention(q, self.k.flatten(0, 1)[None], self.v.flatten(0, 1)[None], mask)
        if not any(self.lengths):
            mask = masks.BlockDiagonalCausalMask.from_seqlens(chunk, device=DEVICE).make_local_attention(WINDOW)
            out = fmha.memory_efficient_attention(q, k, v, mask)
        else:
            held = [min(n, WINDOW) for n in self.lengths]
            both = [
                torch.cat([part for row in range(ROWS) for part in (self.unrotated(store, row), new[row])])[None]
                for store, new in ((self.k, k[0].split(chunk)), (self.v, v[0].split(chunk)))
            ]
            mask = masks.BlockDiagonalMask.from_seqlens(
                chunk, [a + b for a, b in zip(chunk, held, strict=True)], device=DEVICE
            ).make_local_attention_from_bottomright(WINDOW)
            out = fmha.memory_efficient_attention(q, *both, mask)
        self.write(k, v, chunk)
        return out


def test_mistral_inference_decodes_over_its_ring():
    """Its three masks, ragged prompts, chunks and single tokens, against every row's whole history."""
    generator = torch.Generator().manual_seed(1)
    ring, history = Ring(), [[], [], []]
    with dispatch():
        for chunk in ([5, 7, 2], [3, 1, 6], [1] * 3, [1] * 3, [9, 2, 1], [1] * 3):
            q, k, v = (torch.randn(1, sum(chunk), HEADS, DIM, generator=generator).to(DEVICE) for _ in range(3))
            out = ring.attend(q, k, v, chunk)
            for row, new in enumerate(zip(*(x[0].split(chunk) for x in (q, k, v, out)), strict=True)):
                mine, k_new, v_new, got = new
                history[row].append((k_new, v_new))
                k_all, v_all = (torch.cat(parts).double() for parts in zip(*history[row], strict=True))
                first = len(k_all) - len(mine)
                for t, query in enumerate(mine.double()):
                    some = slice(max(0, first + t + 1 - WINDOW), first + t + 1)
                    weights = (torch.einsum("nh,knh->nk", query, k_all[some]) * DIM**-0.5).softmax(-1)
                    exact = torch.einsum("nk,knh->nh", weights, v_all[some])
                    torch.testing.assert_close(got[t].double(), exact, atol=1e-5, rtol=1e-5)
