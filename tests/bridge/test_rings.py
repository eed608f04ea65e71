"""`torch_bridge.RingBuffer` and `attend`: ringjax's laws hold on torch tensors, in place, and rings change hands."""

import copy
import gc
import os
import pickle
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ringjax as rj

torch = pytest.importorskip("torch")

from bridge import dense  # noqa: E402 (torch may be missing)

import torch_bridge as tb  # noqa: E402
from torch_bridge import _buffer  # noqa: E402

B, N, K, H, SIZE, SINKS, SLACK = 2, 4, 2, 8, 5, 2, 3
WINDOW = rj.Window.causal(SIZE, SINKS)
T = 21


@pytest.fixture(autouse=True)
def counting_from_zero():
    tb.reset_stats()


def tokens(seed=0, length=T, batch=B):
    torch.manual_seed(seed)
    return [torch.randn(batch, length, heads, H) for heads in (N, K, K)]


def empty(batch=B, slack=SLACK, **options):
    return tb.RingBuffer.empty(batch, K, H, WINDOW, slack=slack, dtype=torch.float32, **options)


def part(tensors, start, stop):
    return [x[:, start:stop].contiguous() for x in tensors]


def stream(tensors, cuts, ring, **options):
    outs = []
    for start, stop in pairwise(cuts):
        out, same = tb.attend(*part(tensors, start, stop), ring, **options)
        assert same is ring
        outs.append(out)
    return torch.cat(outs, dim=1)


CUTS = (0, 6, 7, 8, 14, 20, 21)


def test_stream_equals_batch_and_ringjax_to_the_bit():
    made, ring = tokens(), empty()
    mask = dense.causal(T, T, SIZE, SINKS)
    out = stream(made, CUTS, ring)
    exact, _ = dense.attention(*made, mask)
    torch.testing.assert_close(out, exact.float())

    theirs = rj.RingBuffer.empty(B, K, H, WINDOW, slack=SLACK, dtype=jnp.float32)
    step = jax.jit(lambda ring, q, k, v: rj.attend(q, k, v, ring))
    for start, stop in pairwise(CUTS):
        expected, theirs = step(theirs, *(jnp.asarray(x.numpy()) for x in part(made, start, stop)))
        assert np.array_equal(out[:, start:stop].numpy(), np.asarray(expected))
    for mine, leaf in zip(jax.tree.leaves(ring.to_jax()), jax.tree.leaves(theirs), strict=True):
        assert np.array_equal(np.asarray(mine), np.asarray(leaf))
    assert ring.length.tolist() == [T] * B
    assert tb.stats().copies == 0


def test_options_of_the_logits():
    made, ring = tokens(), empty()
    options = {"sink_logits": torch.linspace(-1, 1, N), "softcap": 2.0, "scale": 0.5}
    out = stream(made, (0, 1, 2, 3), ring, **options)
    exact, _ = dense.attention(*part(made, 0, 3), dense.causal(3, 3, SIZE, SINKS), **options)
    torch.testing.assert_close(out, exact.float())


def test_gradients_flow_back_through_the_ring():
    made, ring = [x.requires_grad_() for x in tokens()], empty()
    g = torch.randn(B, T, N, H)
    (stream(made, CUTS, ring) * g).sum().backward()
    assert ring.requires_grad
    wide = [x.detach().double().requires_grad_() for x in made]
    (dense.attention(*wide, dense.causal(T, T, SIZE, SINKS))[0] * g).sum().backward()
    for mine, exact in zip(made, wide, strict=True):
        torch.testing.assert_close(mine.grad, exact.grad.float(), atol=2e-5, rtol=2e-5)


def test_detach_cuts_the_tape():
    """Truncated backpropagation: later chunks see the earlier ones as constants."""
    made, ring = tokens(), empty()
    first = [x.clone().requires_grad_() for x in part(made, 0, 6)]
    tb.attend(*first, ring)
    assert ring.requires_grad
    assert not ring.detach().requires_grad
    later = [x.clone().requires_grad_() for x in part(made, 6, 7)]
    out, _ = tb.attend(*later, ring)
    out.sum().backward()
    assert all(x.grad is None for x in first)
    assert all(x.grad is not None for x in later)
    with torch.no_grad():  # so does a step without gradients
        tb.attend(*part(made, 7, 8), ring)
    assert not ring.requires_grad


def test_what_cannot_be_derived_through_a_ring_says_so():
    """Second derivatives, many gradients at once, torch.func: an error each, never a part of the gradient left out."""
    q, k, v = (x.requires_grad_() for x in tokens(length=6))
    ring = empty()
    out, _ = tb.attend(q, k, v, ring)
    loss = out.square().sum()
    gradients = torch.autograd.grad(loss, (q, k, v), create_graph=True)
    for mine, plain in zip(gradients, torch.autograd.grad(loss, (q, k, v), retain_graph=True), strict=True):
        assert torch.equal(mine, plain)
        with pytest.raises(NotImplementedError, match=r"^attend: the second derivative does not exist"):
            mine.sum().backward(retain_graph=True)
    with pytest.raises(NotImplementedError, match=r"^attend: gradients go through a ring one at a time, got many"):
        torch.autograd.grad(out, q, torch.ones(2, *out.shape), is_grads_batched=True)
    made = [x.detach() for x in (q, k, v)]
    for transform in (
        lambda: torch.func.grad(lambda q: tb.attend(q, *made[1:], ring)[0].sum())(made[0]),
        lambda: torch.vmap(lambda q: tb.attend(q[None], *made[1:], ring)[0])(made[0]),
    ):
        with pytest.raises(NotImplementedError, match=r"^attend: a ring is updated in place, which torch\.func's"):
            transform()
    assert ring.length.tolist() == [6] * B


def test_what_was_written_may_not_change_before_the_backward_pass():
    q, k, v = (x.requires_grad_() for x in part(tokens(), 0, 6))
    out, _ = tb.attend(q, k, v, empty())
    with torch.no_grad():
        v.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def pointers(ring):
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(ring._tree())]


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_step_writes_in_place_in_memory_that_does_not_grow():
    made, ring = part(tokens(), 0, 1), empty()
    tb.attend(*made, ring)
    where = pointers(ring)[:2]
    programs = _buffer._attend.cache_info().misses
    for i in range(3000):
        tb.attend(*made, ring)
        if i == 500 and Path("/proc/self/statm").exists():
            gc.collect()
            before = resident()
    assert pointers(ring)[:2] == where
    assert _buffer._attend.cache_info().misses == programs
    assert ring.length.tolist() == [3001] * B
    if Path("/proc/self/statm").exists():
        assert resident() - before < 8 * 2**20
    assert tb.stats().copies == 0


def test_rings_change_hands_without_a_copy():
    made, ring = tokens(), empty()
    stream(made, (0, 6, 7), ring)
    where = pointers(ring)
    taken = ring.release()
    assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(taken)] == where
    with pytest.raises(RuntimeError, match=r"^RingBuffer: the handle must hold its rings"):
        tb.attend(*part(made, 7, 8), ring)
    step = jax.jit(lambda ring, q, k, v: rj.attend(q, k, v, ring), donate_argnums=0)
    out, taken = step(taken, *(tb.to_jax(x) for x in part(made, 7, 8)))
    ring.adopt(taken)
    rest = stream(made, (8, 9, 15), ring)
    assert pointers(ring)[:2] == where[:2]
    assert tb.stats().copies == 0
    whole = tb.attention(*made, WINDOW)
    torch.testing.assert_close(torch.cat([tb.to_torch(out), rest], dim=1), whole[:, 7:15])


def test_a_ring_that_somebody_else_has_is_copied_once_and_stays_as_it_is():
    made, ring = tokens(), empty()
    stream(made, (0, 6), ring)
    shared = ring.to_jax()
    assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(shared)] == pointers(ring)
    before = [np.array(x) for x in jax.tree.leaves(shared)]
    stream(made, (6, 7, 8), ring)
    assert tb.stats().shared == tb.stats().copies == 1
    for old, leaf in zip(before, jax.tree.leaves(shared), strict=True):
        assert np.array_equal(old, np.asarray(leaf))
    other = tb.RingBuffer.from_jax(shared)
    again = stream(made, (6, 7, 8), other)
    torch.testing.assert_close(again, tb.attention(*made, WINDOW)[:, 6:8])
    for old, leaf in zip(before, jax.tree.leaves(shared), strict=True):
        assert np.array_equal(old, np.asarray(leaf))


def test_rollback_select_insert_and_reset_in_place():
    made, ring = tokens(), empty()
    whole = tb.attention(*made, WINDOW)
    stream(made, CUTS[:5], ring)
    assert ring.rollback(2) is ring
    assert ring.length.tolist() == [12, 12]
    ring.rollback(torch.tensor([1, 0]))
    assert ring.length.tolist() == [11, 12]
    ring.select(torch.tensor([1, 1]))
    assert ring.length.tolist() == [12, 12]
    second = [x[1:].expand(2, -1, -1, -1) for x in made]
    torch.testing.assert_close(stream(second, (12, 13, 19), ring), whole[1:, 12:19].expand(2, -1, -1, -1))
    one = empty(batch=1)
    assert stream([x[:1] for x in made], (0, 6), one).shape[0] == 1
    ring.insert(1, one).reset(torch.tensor([True, False]))
    assert ring.length.tolist() == [0, 6]
    torch.testing.assert_close(tb.attend(*(x[[1, 0], 6:7] for x in made), ring)[0][1], whole[0, 6:7])
    ring.reset()
    assert ring.length.tolist() == [0, 0]
    assert bool((ring.positions() == -1).all())


@pytest.mark.parametrize("change", ["rollback", "reset"])
def test_what_was_lent_stays_as_it_is_through_changes(change):
    """Rollback and reset keep the keys where they are: in memory that somebody else reads."""
    made, ring = tokens(), empty()
    stream(made, CUTS[:5], ring)
    lent = ring.to_jax()
    before = [np.array(x) for x in jax.tree.leaves(lent)]
    ring.rollback(1) if change == "rollback" else ring.reset()
    stream(made, (13, 14, 15), ring)
    for old, leaf in zip(before, jax.tree.leaves(lent), strict=True):
        assert np.array_equal(old, np.asarray(leaf))


def test_changes_of_a_state():
    """Rows and the decoder's positions, as ringjax's own methods change them; wrong numbers change nothing."""
    made, config = tokens(), tb.RingBufferConfig(buffer_size=8, slack=2)
    state = tb.init_state(config, B, kv_heads=made[1].shape[2], head_dim=made[1].shape[3], dtype=torch.float32)
    tb.encode(*made, state)
    for t in range(4):
        tb.decode(*(x[:, t : t + 1].contiguous() for x in made), state)
    native = state.clone().release()
    changes = [
        lambda x: x.rollback(2),
        lambda x: x.select(np.array([1, 0, 1])),
        lambda x: x.reset(np.array([False, True, False])),
    ]
    for change in changes:
        with pytest.raises(ValueError, match="n must be between 0 and the slack"):
            state.rollback(3)
        change(state)
        native = change(native)
        for a, b in zip(jax.tree.leaves(state.clone().release()), jax.tree.leaves(native), strict=True):
            assert np.array_equal(np.asarray(a), np.asarray(b))
    assert state.last_calculated.tolist() == [1, -1, 1]
    with pytest.raises(ValueError, match="rows must be between 0 and 2"):
        state.select(torch.tensor([3]))
    with pytest.raises(ValueError, match="n must fit int32"):
        state.rollback(torch.tensor(2**40))


def test_a_row_lost_in_jax_is_not_rolled_back_in_silence():
    """Inside JAX's jit a row rolled back too far is only marked; the next rollback says so, as ringjax's does."""
    native = rj.RingBuffer.empty(2, 1, 8, rj.Window.causal(4), slack=2, dtype="float32")
    native = native.append(*[np.ones((2, 9, 1, 8), np.float32)] * 2)
    native = jax.jit(rj.RingBuffer.rollback)(native, np.array([3, 0], np.int32))
    ring = tb.RingBuffer.from_jax(native)
    for count in (0, torch.tensor([0, 1])):
        with pytest.raises(ValueError, match="n must be between 0 and the slack"):
            ring.rollback(count)
    assert ring.reset(torch.tensor([True, False])).rollback(torch.tensor([0, 1])) is ring


def test_export_and_restore_change_the_capacity():
    made, ring = tokens(), empty()
    stream(made, CUTS[:5], ring)
    exported = ring.export()
    torch.testing.assert_close(exported.k[:, -4:], made[1][:, 10:14])
    assert exported.positions[0].tolist() == [0, 1, *range(6, 14)]
    other = tb.RingBuffer.restore(exported, WINDOW, slack=0)
    assert other.capacity == ring.capacity - SLACK
    torch.testing.assert_close(stream(made, (14, 15, T), other), tb.attention(*made, WINDOW)[:, 14:])


@pytest.mark.parametrize("how", ["state_dict", "pickle", "deepcopy", "clone"])
def test_saved_and_loaded_after_the_wrap(how, tmp_path):
    made, ring = tokens(), empty()
    stream(made, CUTS[:5], ring)
    if how == "state_dict":
        torch.save(ring.state_dict(), tmp_path / "ring.pt")
        other = empty().load_state_dict(torch.load(tmp_path / "ring.pt", weights_only=True))
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(ring))
    else:
        other = copy.deepcopy(ring) if how == "deepcopy" else ring.clone()
    expected = stream(made, (14, 15, T), ring)
    assert torch.equal(stream(made, (14, 15, T), other), expected)
    assert (other.window, other.slack, other.device) == (ring.window, ring.slack, ring.device)


def test_to_casts_keys_and_values():
    made, ring = tokens(), empty()
    stream(made, (0, 6), ring)
    assert ring.to(torch.bfloat16).dtype == torch.bfloat16
    assert ring.to("cpu").length.tolist() == [6, 6]
    torch.testing.assert_close(stream(made, (6, 7, 8), ring), tb.attention(*made, WINDOW)[:, 6:8], atol=0.03, rtol=0.03)


def test_lengths_and_buckets():
    made = tokens()
    whole = tb.attention(*made, WINDOW)
    program = _buffer._attend(_buffer._Options(None, None, None, (None, None, None)))
    ring, before = empty(), program.donated._cache_size()
    torch.testing.assert_close(stream(made, CUTS, ring, bucket=6), whole)
    assert ring.length.tolist() == [T] * B

    ring = empty()
    dirty = part(made, 0, 6)
    for x in dirty:
        x[0, 4:] = torch.nan
    out, _ = tb.attend(*dirty, ring, lengths=torch.tensor([4, 6]))
    torch.testing.assert_close(out[0, :4], whole[0, :4])
    assert not out[0, 4:].any()
    assert ring.length.tolist() == [4, 6]
    assert program.donated._cache_size() - before == 1  # one program for 6, 1 and 4 tokens


def test_a_call_that_fails_leaves_the_ring_as_it_was():
    made, ring = tokens(), empty()
    stream(made, (0, 6), ring)
    where, before = pointers(ring), [np.array(x) for x in jax.tree.leaves(ring._tree())]
    q, k, v = part(made, 6, 7)
    for wrong in ((q[..., :4], k, v), (q, k[:, :, :1], v[:, :, :1]), (q, k.bfloat16(), v)):
        with pytest.raises(ValueError, match="must agree on"):
            tb.attend(*wrong, ring)
    assert pointers(ring) == where
    assert all(np.array_equal(a, np.asarray(b)) for a, b in zip(before, jax.tree.leaves(ring._tree()), strict=True))
    torch.testing.assert_close(stream(made, (6, 7), ring), tb.attention(*made, WINDOW)[:, 6:7])


def test_what_a_handle_says_of_itself():
    ring = empty()
    assert repr(ring) == f"RingBuffer(float32[2, 2, 10, 8], {WINDOW}, slack=3, device=cpu)"
    assert (ring.batch, ring.capacity, ring.slack, ring.window) == (2, 10, 3, WINDOW)
    ring.release()
    assert repr(ring) == "RingBuffer(released)"


def test_what_jax_is_tracing_is_no_ring():
    ring = tb.RingBuffer.empty(1, 1, 8, tb.Window.causal(3), dtype=torch.float32).to_jax()
    first_line = r"^RingBuffer\.from_jax: ring must be made of arrays, got one traced by JAX\.(\n|$)"
    with pytest.raises(TypeError, match=first_line):
        jax.jit(tb.RingBuffer.from_jax)(ring)
