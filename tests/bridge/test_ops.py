"""`torch_bridge.attention`: ringjax's numbers to the bit, exact gradients, and all that torch does around it."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ringjax as rj

torch = pytest.importorskip("torch")

from bridge import dense  # noqa: E402 (torch may be missing)

import torch_bridge as tb  # noqa: E402
from torch_bridge import _ops  # noqa: E402

NAMES = ["sinks-both-sides", "all-logits", "padded", "offset-per-row", "bfloat16-all-logits"]


def as_torch(x):
    return None if x is None else tb.to_torch(jnp.asarray(x), copy=True)


def torch_call(case, made):
    """The tensors of a case, and the same call as `cases.run`."""
    options = cases.options(case, made)
    tensors = [as_torch(x) for x in made[:4]]
    rest = {
        name: as_torch(x) if isinstance(x, jax.Array | np.ndarray) else x
        for name, x in options.items()
        if name != "sink_logits"
    }

    def call(q, k, v, sink_logits):
        return tb.attention(q, k, v, case.window, sink_logits=sink_logits, return_lse=True, **rest)

    return tensors, call


@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_ringjaxs_and_gradients_exact(name):
    case = cases.BY_NAME[name]
    made = cases.arrays(case)
    tensors, call = torch_call(case, made)
    for x in tensors:
        if x is not None:
            x.requires_grad_()
    out, lse = call(*tensors)
    ours = jax.jit(lambda made: cases.run(case, made))(made)
    for got, expected in zip((out, lse), ours, strict=True):
        assert np.array_equal(np.asarray(tb.to_jax(got.detach())), np.asarray(expected))

    g, g_lse = as_torch(made.g), as_torch(made.g_lse)
    torch.autograd.backward((out, lse), (g, g_lse))
    wide = [None if x is None else x.detach().double().requires_grad_() for x in tensors]
    mask = torch.from_numpy(np.array(cases.seen(case, made)))
    exact_out, exact_lse = dense.attention(*wide[:3], mask, sink_logits=wide[3], softcap=case.softcap, scale=case.scale)
    finite = torch.isfinite(exact_lse)
    ((exact_out * g).sum() + (exact_lse[finite] * g_lse[finite]).sum()).backward()
    plain = cases.plain_gradients(case, made)
    for what, x, exact, measure in zip("qkvs", tensors, wide, plain, strict=True):
        if x is not None:
            cases.assert_close(jnp.asarray(tb.to_jax(x.grad)), exact.grad.numpy(), np.asarray(measure), f"d{what}")


W = rj.Window.causal(4, sinks=1)


def small(seed=0, requires_grad=False, batch=2, queries=5, keys=7):
    torch.manual_seed(seed)
    q, k, v = torch.randn(batch, queries, 4, 8), torch.randn(batch, keys, 2, 8), torch.randn(batch, keys, 2, 6)
    return [x.requires_grad_(requires_grad) for x in (q, k, v, torch.randn(4))]


def both(q, k, v, sinks=None):
    return tb.attention(q, k, v, W, sink_logits=sinks, return_lse=True)


def arguments(tensors, ids=None, kv_ids=None, offsets=None):
    return (*tensors, ids, kv_ids, offsets, 3, 0, 1, None, None, None, None, None, None, None)


def test_opcheck():
    q, k, v, sinks = small(requires_grad=True)
    ids, kv_ids = torch.zeros(2, 5, dtype=torch.int32), torch.zeros(2, 7, dtype=torch.int32)
    offsets = torch.tensor([1, 2], dtype=torch.int32)
    op = torch.ops.ringjax.attention.default
    torch.library.opcheck(op, arguments((q, k, v, sinks)))
    torch.library.opcheck(op, arguments((q, k, v, None), ids, kv_ids, offsets))
    with torch.no_grad():
        out, lse = op(*arguments((q, k, v, sinks)))
    tensors = [x.detach() for x in (q, k, v, out, lse, out, lse, sinks)]
    statics = arguments(())[3:]
    torch.library.opcheck(torch.ops.ringjax.attention_backward.default, (*tensors, None, None, None, *statics))


@pytest.mark.filterwarnings("ignore:Input #. requires gradient and is not a double:UserWarning")
def test_gradcheck():
    """In float32, which is all that the kernels have: differences over 1e-2 are good to about 1e-3."""
    torch.autograd.gradcheck(both, small(requires_grad=True), eps=1e-2, atol=5e-3, rtol=5e-3)


def gradients(f, tensors, **grads):
    out, lse = f(*tensors)
    return out, torch.autograd.grad(out.square().sum() + lse.sum(), tensors)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_a_graph_break(dynamic):
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for queries in (5, 6) if dynamic else (5,):
        tensors = small(queries=queries, requires_grad=True)
        out, found = gradients(compiled, tensors)
        expected_out, expected = gradients(both, tensors)
        assert torch.equal(out, expected_out)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_ring_breaks_the_graph_and_says_why():
    q, k, v, _ = small(keys=5)
    ring = tb.RingBuffer.empty(2, 2, 8, W, value_dim=6, dtype=torch.float32)
    step = torch.compile(lambda: tb.attend(q, k, v, ring)[0] * 2, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="updated in place"):
        step()
    step = torch.compile(lambda: tb.attend(q, k, v, ring)[0] * 2, backend="aot_eager")
    assert torch.equal(step(), tb.attention(q, k, v, W) * 2)
    torch._dynamo.reset()


def test_autocast_casts_as_for_torchs_own_attention():
    q, k, v, sinks = small(requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = tb.attention(q, k, v, W, sink_logits=sinks)
        theirs = torch.nn.functional.scaled_dot_product_attention(q[..., :4], q[..., 4:], q[..., 4:])
        mixed = tb.attention(q, k.bfloat16(), v, W)
    assert out.dtype == theirs.dtype == mixed.dtype == torch.bfloat16
    half = [x.detach().bfloat16() for x in (q, k, v)]
    assert torch.equal(out, tb.attention(*half, W, sink_logits=sinks))
    out.float().square().sum().backward()
    assert {x.grad.dtype for x in (q, k, v, sinks)} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert tb.attention(q, k, v, W).dtype == torch.float32


def test_func_grad_vmap_and_both():
    q, k, v, sinks = small(queries=7)

    def loss(q, k, v, sinks=None):
        return tb.attention(q[None], k[None], v[None], W, sink_logits=sinks).square().sum()

    for sink_logits in (None, sinks):
        rows = [
            torch.func.grad(loss, argnums=(0, 1, 2))(q[i], k[i], v[i], *([sinks] if sink_logits is not None else []))
            for i in range(2)
        ]
        each = torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2)), in_dims=(0, 0, 0, None))(q, k, v, sink_logits)
        for j, found in enumerate(each):
            torch.testing.assert_close(found, torch.stack([row[j] for row in rows]))
    # One gradient for the sink logits per element, and queries that all share one set of keys.
    per_sample = torch.vmap(torch.func.grad(loss, argnums=3), in_dims=(0, 0, 0, None))(q, k, v, sinks)
    singly = [torch.func.grad(loss, argnums=3)(q[i], k[i], v[i], sinks) for i in range(2)]
    torch.testing.assert_close(per_sample, torch.stack(singly))
    shared = torch.vmap(lambda q: tb.attention(q[None], k[:1], v[:1], W)[0])(q)
    expected = [tb.attention(q[i : i + 1], k[:1], v[:1], W)[0] for i in range(2)]
    torch.testing.assert_close(shared, torch.stack(expected))
    _, vjp = torch.func.vjp(lambda q: tb.attention(q, k, v, W), q)
    wanted = q.clone().requires_grad_()
    (tb.attention(wanted, k, v, W)).sum().backward()
    torch.testing.assert_close(vjp(torch.ones(2, 7, 4, 6))[0], wanted.grad)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # by torch.func.jvp itself
def test_derivatives_that_do_not_exist_say_so():
    q, k, v, _ = small(requires_grad=True)
    (dq,) = torch.autograd.grad(tb.attention(q, k, v, W).square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"^attention: the second derivative does not exist"):
        dq.sum().backward()
    with pytest.raises(NotImplementedError, match=r"^attention: forward-mode derivatives \(torch.func.jvp\) do not"):
        torch.func.jvp(lambda q: tb.attention(q, k, v, W), (q.detach(),), (q.detach(),))


def test_many_gradients_at_once():
    """`is_grads_batched`, as torch's vectorised Jacobians use it: the dispatcher takes them apart."""
    made = small(requires_grad=True)
    for f in (lambda *x: both(*x)[0], lambda *x: both(*x)[1]):
        out = f(*made)
        g = torch.randn(3, *out.shape)
        found = torch.autograd.grad(out, made, g, is_grads_batched=True, retain_graph=True, allow_unused=True)
        singly = [torch.autograd.grad(out, made, x, retain_graph=True) for x in g]
        for x, each in zip(found, zip(*singly, strict=True), strict=True):
            torch.testing.assert_close(x, torch.stack(each))


def test_dual_tensors_are_not_taken_for_plain_ones(recwarn):
    q, k, v, _ = small(keys=5)
    ring = tb.RingBuffer.empty(2, 2, 8, W, value_dim=6, dtype=torch.float32)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        for call, name in ((tb.attention, "attention"), (lambda *x: tb.attend(*x[:3], ring), "attend")):
            with pytest.raises(NotImplementedError, match=rf"^{name}: forward-mode derivatives .* do not exist"):
                call(dual, k, v, W)
        tb.attention(q, k, v, W)
    assert ring.length.tolist() == [0, 0]


def test_a_write_between_forward_and_backward_is_noticed():
    q, k, v, _ = small(requires_grad=True)
    out = tb.attention(q, k, v, W)
    with torch.no_grad():
        k.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_only_what_is_wanted_gets_a_gradient():
    q, k, v, _ = small()
    k.requires_grad_()
    out, lse = both(q, k, v)
    (only_lse,) = torch.autograd.grad(lse.sum(), k, retain_graph=True)
    (only_out,) = torch.autograd.grad(out.sum(), k, retain_graph=True)
    (together,) = torch.autograd.grad(out.sum() + lse.sum(), k)
    torch.testing.assert_close(only_lse + only_out, together)
    with torch.inference_mode():
        assert torch.equal(both(q, k, v)[0], out)


def test_integers_of_torchs_default_width():
    q, k, v, _ = small()
    ids, kv_ids = torch.tensor([[0, 0, 1, 1, -1]] * 2), torch.tensor([[0, 0, 0, 1, 1, 1, -1]] * 2)
    wide = tb.attention(q, k, v, W, segment_ids=ids, kv_segment_ids=kv_ids, q_offset=torch.tensor([1, 2]))
    narrow = tb.attention(q, k, v, W, segment_ids=ids.int(), kv_segment_ids=kv_ids.int(), q_offset=[1, 2])
    assert torch.equal(wide, narrow)
    assert not wide[:, -1].any()


def test_what_padding_holds_does_not_leak():
    q, k, v, _ = small(keys=5)
    ids = torch.tensor([[0, 0, 0, 1, -1]] * 2)
    dirty = [x.clone() for x in (q, k, v)]
    for x in dirty:
        x[:, -1] = torch.nan
        x.requires_grad_()
    out = tb.attention(*dirty, W, segment_ids=ids)
    assert torch.equal(out, tb.attention(q, k, v, W, segment_ids=ids))
    out.square().sum().backward()
    assert all(bool(torch.isfinite(x.grad).all()) for x in dirty)


@pytest.mark.parametrize("offset", [3, torch.tensor([2, 4])], ids=["one", "per row"])
def test_padding_of_a_bucket_is_not_seen_from_beyond_the_last_key(offset):
    """A causal query whose position is beyond the last key's sees places where a bucket's padding is."""
    q, k, v, _ = small(keys=5)
    plain = tb.attention(q, k, v, W, q_offset=offset, return_lse=True)
    for a, b in zip(tb.attention(q, k, v, W, q_offset=offset, return_lse=True, bucket=8), plain, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("pairs", [((3, 3), (5, 5), (8, 8)), ((2, 6), (3, 8), (7, 5))], ids=["T=S", "T!=S"])
@pytest.mark.parametrize("window", [W, rj.Window.symmetric(2)], ids=str)
def test_buckets_share_one_program(window, pairs):
    torch.manual_seed(0)
    square = pairs[0][0] == pairs[0][1]
    tiles = (None,) * 3
    static = _ops.Static(*(window.left, window.right, window.sinks), None, None, 0 if square else None, None, *tiles)
    programs = [_ops._forward(static), _ops._backward(static)]
    before = [program._cache_size() for program in programs]
    for queries, keys in pairs:
        q, k, v = (torch.randn(2, n, h, 8) for n, h in ((queries, 4), (keys, 2), (keys, 2)))
        offset = keys - queries  # any other way to say so, of which every value has a program of its own
        mask = torch.from_numpy(np.array(window.visible(offset + np.arange(queries)[:, None], np.arange(keys)[None])))
        for bucket in (8, [8, 64]):
            x = q.clone().requires_grad_()
            out, lse = tb.attention(x, k, v, window, return_lse=True, bucket=bucket)
            y = q.clone().requires_grad_()
            exact, exact_lse = dense.attention(y, k, v, mask[None])
            torch.testing.assert_close(out, exact.float())
            torch.testing.assert_close(lse, exact_lse.float())
            torch.testing.assert_close(*(torch.autograd.grad(o.sum(), z)[0] for o, z in ((out, x), (exact, y))))
    assert [program._cache_size() - n for program, n in zip(programs, before, strict=True)] == [1, 1]


def test_the_short_way_is_the_operation():
    """Without gradients, modes and transformations the dispatcher is left out; the numbers are the same."""
    q, k, v, sinks = small()
    expected = torch.ops.ringjax.attention(*arguments((q, k, v, sinks)))
    assert _ops._is_plain((q, k, v, sinks))
    assert all(torch.equal(a, b) for a, b in zip(both(q, k, v, sinks), expected, strict=True))
    made = small(requires_grad=True)
    short, long = (gradients(f, made)[1] for f in (both, lambda *x: torch.ops.ringjax.attention(*arguments(x))))
    assert all(torch.equal(a, b) for a, b in zip(short, long, strict=True))
    with torch._subclasses.FakeTensorMode() as mode:
        out, lse = both(*(mode.from_tensor(x) for x in (q, k, v, sinks)))
    assert (out.shape, out.dtype, lse.shape) == ((2, 5, 4, 6), torch.float32, (2, 4, 5))
