"""Wrong calls of torch_bridge: what is raised, the exact first line, and that no ring was touched."""

import types

import jax
import numpy as np
import pytest

import ringjax as rj

torch = pytest.importorskip("torch")

from bridge.wrong_bridge_calls import WRONG  # noqa: E402 (torch may be missing)

import torch_bridge as tb  # noqa: E402


@pytest.fixture(scope="module")
def fixtures():
    """Tensors that fit each other, rings and a state that hold tokens, all with B=2, T=3, N=4, K=2, H=8."""
    q, k, v = torch.ones(2, 3, 4, 8), torch.ones(2, 3, 2, 8), torch.randn(2, 3, 2, 8)
    window = rj.Window.causal(4, sinks=1)
    ring = tb.RingBuffer.empty(2, 2, 8, window, slack=2, dtype=torch.float32)
    tb.attend(q, k, v, ring)
    learning = tb.RingBuffer.empty(2, 2, 8, window, dtype=torch.float32)
    tb.attend(q, k.clone().requires_grad_(), v, learning)
    model = tb.RingBufferAttention(tb.RingBufferConfig(buffer_size=4, slack=1))
    state = model.init_state(2, kv_heads=2, head_dim=8, dtype=torch.float32)
    token = tuple(x[:, :1].contiguous() for x in (q, k, v))
    for position in range(2):
        model(*token, position=position, is_decoder=True, buffer_state=state)
    return types.SimpleNamespace(
        q=q, k=k, v=v, token=token, window=window, ring=ring, learning=learning, model=model, state=state
    )


@pytest.mark.parametrize("wrong", WRONG, ids=[wrong.first_line for wrong in WRONG])
def test_a_wrong_call_says_what_is_wrong_and_touches_no_ring(wrong, fixtures):
    held = (fixtures.ring, fixtures.state, fixtures.learning)
    before = [np.array(leaf) for handle in held for leaf in jax.tree.leaves(handle._tree())]
    with pytest.raises(wrong.error) as raised:
        wrong.call(fixtures)
    assert type(raised.value) is wrong.error
    assert str(raised.value).splitlines()[0] == wrong.first_line
    after = [leaf for handle in held for leaf in jax.tree.leaves(handle._tree())]
    for old, leaf in zip(before, after, strict=True):
        assert old.dtype == leaf.dtype
        assert old.tobytes() == np.asarray(leaf).tobytes()


def test_messages_give_the_facts_and_a_hint(fixtures):
    with pytest.raises(ValueError) as raised:
        tb.decode(*fixtures.token, fixtures.state, position=5)
    assert str(raised.value).splitlines()[1:] == [
        "  position:        [5, 5]",
        "  last_calculated: [1, 1]",
        "  Hint: decode the positions in between first.",
    ]


def test_a_cuda_tensor_that_jax_does_not_see(monkeypatch):
    from torch_bridge import _dlpack

    with pytest.raises(ValueError) as raised:
        _dlpack.jax_device("attention", torch.device("cuda", 7))
    first, hint = str(raised.value).splitlines()
    assert first == f"attention: JAX must see the torch device, got cuda:7, and JAX sees {jax.devices()}."
    assert "ringjax[cuda]" in hint


def test_a_cuda_graph_cannot_capture_jax(monkeypatch):
    from torch_bridge import _ops

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    on_gpu = types.SimpleNamespace(device=torch.device("cuda", 0))
    with pytest.raises(RuntimeError, match=r"^attention: a CUDA graph cannot capture a call of JAX"):
        _ops.run("attention", None, (on_gpu,))
