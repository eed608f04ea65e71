"""`RingBufferAttention`: the README's snippets as written, both phases against dense attention, states that travel."""

import copy
import pickle

import jax
import pytest

import ringjax as rj

torch = pytest.importorskip("torch")

from bridge import dense  # noqa: E402 (torch may be missing)

import torch_bridge as tb  # noqa: E402
from torch_bridge import CompleteRingBufferAttention, RingBufferAttention, RingBufferConfig  # noqa: E402

B, N, K, H = 2, 4, 2, 8
SMALL = RingBufferConfig(buffer_size=5, sinks=1, slack=2)


def tokens(length, seed=0, requires_grad=False):
    torch.manual_seed(seed)
    return [torch.randn(B, length, heads, H).requires_grad_(requires_grad) for heads in (N, K, K)]


def union(decoder, encoder, config, seen, sink_logits=None):
    """What the decoder's tokens get: the encoder's last `buffer_size` keys and sinks, and the decoder's own past."""
    (q, k_own, v_own), (k, v) = decoder, encoder
    near = dense.causal(q.shape[1], q.shape[1], config.buffer_size, config.sinks)
    far = torch.arange(k.shape[1])
    kept = (far < config.sinks) | (far >= seen - config.buffer_size)
    mask = torch.cat([kept.expand(1, q.shape[1], -1), near], dim=2)
    both = torch.cat([k, k_own], dim=1), torch.cat([v, v_own], dim=1)
    return dense.attention(q, *both, mask, sink_logits=sink_logits)[0].to(q.dtype)


def test_the_first_snippet_as_written():
    query, key, value = tokens(24)
    decoder_query, decoder_key, decoder_value = tokens(1, seed=1)
    current_pos = 0

    config = RingBufferConfig(buffer_size=2048, block_size=128, tile_size=32, head_tile_size=4, prefill_size=512)
    model = CompleteRingBufferAttention(config)
    encoder_output, buffer_state = model(q=query, k=key, v=value, requires_grad=True)
    decoder_output = model(
        q=decoder_query,
        k=decoder_key,
        v=decoder_value,
        position=current_pos,
        is_decoder=True,
        buffer_state=buffer_state,
    )

    torch.testing.assert_close(
        encoder_output, dense.attention(query, key, value, dense.causal(24, 24, 2048))[0].float()
    )
    exact = union((decoder_query, decoder_key, decoder_value), (key, value), config, 24)
    torch.testing.assert_close(decoder_output, exact)
    assert buffer_state.last_calculated.tolist() == [0, 0]
    assert CompleteRingBufferAttention is RingBufferAttention


def test_training_decoding_and_inference_with_the_defaults():
    """The other three snippets: training, a decoder's step, inference under `torch.no_grad()`."""
    attention = RingBufferAttention(RingBufferConfig())
    assert attention.config == rj.RingBufferConfig() == RingBufferAttention().config

    q, k, v = tokens(24, requires_grad=True)
    output, state = attention(q, k, v, requires_grad=True)
    output.square().mean().backward()
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    dense.attention(*wide, dense.causal(24, 24, 2048))[0].square().mean().backward()
    for mine, exact in zip((q, k, v), wide, strict=True):
        torch.testing.assert_close(mine.grad, exact.grad.float(), atol=1e-6, rtol=1e-5)

    with torch.no_grad():
        output, state = attention(q, k, v)
        assert not output.requires_grad
        assert not state.requires_grad
        step = attention(*tokens(1, seed=1), position=0, is_decoder=True, buffer_state=state)
    torch.testing.assert_close(step, union(tokens(1, seed=1), (k.detach(), v.detach()), RingBufferConfig(), 24))


def test_a_decoders_loss_reaches_the_encoder_and_the_sink_logits():
    model = RingBufferAttention(SMALL, num_heads=N, kv_heads=K, head_dim=H, use_sink_logits=True)
    with torch.no_grad():
        model.sink_logits.copy_(torch.linspace(-1, 1, N))
    encoder, decoder = tokens(12, requires_grad=True), tokens(2, seed=1, requires_grad=True)
    state = model.init_state(B, dtype=torch.float32)
    first, same = model(*(x[:, :6] for x in encoder), buffer_state=state)
    second, _ = model(*(x[:, 6:] for x in encoder), buffer_state=state)
    assert same is state
    assert state.requires_grad  # train() mode: no need to say so
    out = model(*decoder, is_decoder=True, buffer_state=state)
    loss = out.square().sum() + first.sum() + second.square().sum()
    loss.backward()

    q, k, v, dq, dk, dv, sinks = wide = [
        x.detach().double().requires_grad_() for x in (*encoder, *decoder, model.sink_logits)
    ]
    whole, _ = dense.attention(q, k, v, dense.causal(12, 12, 5, 1), sink_logits=sinks)
    exact = union((dq, dk, dv), (k, v), SMALL, 12, sink_logits=sinks)
    (exact.square().sum() + whole[:, :6].sum() + whole[:, 6:].square().sum()).backward()
    torch.testing.assert_close(out, exact.float())
    for mine, theirs in zip((*encoder, *decoder, model.sink_logits), wide, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad.float(), atol=2e-5, rtol=2e-5)


def test_train_and_eval_choose_the_ring():
    model, made = RingBufferAttention(SMALL), tokens(6)
    for training, ring in ((True, "backward"), (False, "forward")):
        _, state = model.train(training)(*made)
        held = state.to_jax()
        assert {n: getattr(held, n).length.tolist() for n in ("forward", "backward")} == {
            "forward": [0, 0],
            "backward": [0, 0],
            ring: [6, 6],
        }
    _, state = model.eval()(*(x.requires_grad_() for x in made))
    assert not state.requires_grad  # no gradient flows through the forward ring


@pytest.fixture(scope="module")
def wrapped():
    """An eval module, and a state whose decoder has gone around its ring."""
    model = RingBufferAttention(SMALL).eval()
    _, state = model(*tokens(6))
    for position in range(9):
        model(*tokens(1, seed=position), position=position, is_decoder=True, buffer_state=state)
    return model, state


def step(model, state, position, seed=None):
    made = tokens(1, seed=position if seed is None else seed)
    return model(*made, position=position, is_decoder=True, buffer_state=state)


def test_decoding_goes_on_and_back(wrapped):
    model, state = wrapped[0], copy.deepcopy(wrapped[1])
    past = [torch.cat(each, dim=1) for each in zip(*(tokens(1, seed=i) for i in range(10)), strict=True)]
    expected = union(past, tokens(6)[1:], SMALL, 6)
    torch.testing.assert_close(step(model, state, 9), expected[:, 9:])
    torch.testing.assert_close(step(model, state, 8), expected[:, 8:9])  # an earlier position rolls back to it
    torch.testing.assert_close(step(model, state, None, seed=9), expected[:, 9:])  # None: the next one
    torch.testing.assert_close(step(model, state, torch.tensor([9, 9])[:1].expand(2), seed=9), expected[:, 9:])
    assert state.rollback(1).last_calculated.tolist() == [8, 8]
    twice = [x[[1, 1]] for x in tokens(1, seed=9)]
    out = model(*twice, position=9, is_decoder=True, buffer_state=state.select([1, 1]))
    torch.testing.assert_close(out, expected[[1, 1], 9:])


@pytest.mark.parametrize("how", ["state_dict", "pickle", "deepcopy", "clone", "to"])
def test_a_state_saved_and_loaded_after_the_wrap(wrapped, how):
    model, state = wrapped
    if how == "state_dict":
        fresh = model.init_state(B, kv_heads=K, head_dim=H, dtype=torch.float32)
        other = fresh.load_state_dict(state.state_dict())
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(state))
    else:
        other = {"deepcopy": copy.deepcopy, "clone": type(state).clone, "to": lambda s: s.clone().to("cpu")}[how](state)
    assert other.config == SMALL
    expected = step(model, state.clone(), 9)
    assert torch.equal(step(model, other, 9), expected)
    with pytest.raises(ValueError, match="position must be at most last_calculated"):
        step(model, other, 11)


def test_a_state_goes_to_ringjax_and_back_without_a_copy(wrapped):
    model, state = wrapped[0], copy.deepcopy(wrapped[1])
    expected = [step(model, state.clone(), 9), None]
    twin = state.clone()
    step(model, twin, 9)
    expected[1] = step(model, twin, 10)

    tb.reset_stats()
    taken = state.release()
    where = taken.feedback.k.unsafe_buffer_pointer()
    decode = jax.jit(lambda s, q, k, v, p: rj.decode(q, k, v, s, position=p), donate_argnums=0)
    out, taken = decode(taken, *(tb.to_jax(x) for x in tokens(1, seed=9)), 9)
    torch.testing.assert_close(tb.to_torch(out), expected[0])
    torch.testing.assert_close(step(model, state.adopt(taken), 10), expected[1])
    assert state.release().feedback.k.unsafe_buffer_pointer() == where
    assert tb.stats().copies == 0


def test_modules_are_copied_moved_and_saved():
    model = RingBufferAttention(SMALL, num_heads=N, use_sink_logits=True)
    with torch.no_grad():
        model.sink_logits.fill_(0.5)
    other = RingBufferAttention(SMALL, num_heads=N, use_sink_logits=True)
    other.load_state_dict(model.state_dict())
    made = tokens(6)
    expected, _ = model(*made)
    for copied in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(*made)[0], expected)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half.sink_logits.dtype == torch.bfloat16
    assert list(RingBufferAttention(SMALL).state_dict()) == []
    assert "num_heads=4" in repr(model) and "buffer_size=5" in repr(model)


def test_a_quantised_forward_ring():
    """`forward_dtype`, as every field of ringjax's config: kept in 8 bits, saved and loaded as they are."""
    config = RingBufferConfig(buffer_size=5, sinks=1, slack=2, forward_dtype="float8_e4m3fn")
    model = RingBufferAttention(config).eval()
    encoder, decoder = tokens(12), tokens(1, seed=1)
    with torch.no_grad():
        _, state = model(*encoder)
        saved = state.state_dict()
        out = model(*decoder, position=0, is_decoder=True, buffer_state=state)
    assert saved["forward.k"].dtype == torch.float8_e4m3fn and saved["backward.k"].dtype == torch.float32
    exact = union(decoder, encoder[1:], config, 12)
    assert 0 < (out - exact).abs().max() < 0.1
    again = model.init_state(B, kv_heads=K, head_dim=H, dtype=torch.float32).load_state_dict(saved)
    assert torch.equal(model(*decoder, position=0, is_decoder=True, buffer_state=again), out)
