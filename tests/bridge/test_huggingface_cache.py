"""RingCache: chunks, rollback after the wrap, reordering and growth leave a model's answers as they were."""

import copy
import itertools

import jax
import pytest

torch = pytest.importorskip("torch", exc_type=ImportError)
pytest.importorskip("transformers", exc_type=ImportError)

import tiny_transformers as tiny  # noqa: E402

import torch_bridge  # noqa: E402
from torch_bridge.huggingface import LENGTHS, RingCache  # noqa: E402

KINDS = ["mistral", "gemma3"]
TOTAL, SLACK = 16, 4  # few shapes: each is compiled
IDS = tiny.tokens(2, TOTAL)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def feed(model, cache, ids, real=None, before=None):
    """Logits of the next tokens; with padding, `real` [B, T] says which are real, `before` which were."""
    mask = None if real is None else torch.cat([before, real], dim=1) if before is not None else real
    return model(ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits


@pytest.mark.parametrize("chunks", [[16], [1] * 16, [3, 1, 8, 1, 3], [7, 9]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_of_any_length(kind, chunks):
    """Shorter and longer than the window and the ring, and tokens one by one: as in one call without a cache."""
    eager, ours = tiny.pair(kind)
    cache = RingCache(ours.config, slack=SLACK)
    got = torch.cat([feed(ours, cache, part) for part in IDS.split(chunks, dim=1)], dim=1)
    tiny.assert_equal_logits(kind, got, eager(IDS).logits)
    assert cache.get_seq_length() == TOTAL and cache.layers[0].buffer.length.tolist() == [TOTAL] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_with_padding(kind):
    """Left padding of the prompt; padding is not stored, so that the rows of a batch are of different lengths."""
    eager, ours = tiny.pair(kind)
    real = tiny.padding([13, 16], TOTAL)
    positions = (real.cumsum(1) - 1).clamp(min=0)
    expected = eager(IDS, attention_mask=real, position_ids=positions).logits
    cache, got = RingCache(ours.config, slack=SLACK), []
    for start, end in ((0, 9), (9, 10), (10, 16)):
        got.append(
            ours(
                IDS[:, start:end],
                attention_mask=real[:, :end],
                position_ids=positions[:, start:end],
                past_key_values=cache,
            ).logits
        )
    tiny.assert_equal_logits(kind, torch.cat(got, dim=1)[real.bool()], expected[real.bool()])
    assert cache.layers[0].buffer.length.tolist() == [13, 16]


@pytest.mark.parametrize("first", [4, 12], ids=["before the wrap", "after the wrap"])
@pytest.mark.parametrize("kind", KINDS)
def test_crop(kind, first):
    """Tokens taken back leave no trace: others may come in their place."""
    eager, ours = tiny.pair(kind)
    cache = RingCache(ours.config, slack=SLACK)
    feed(ours, cache, IDS[:, :first])
    for wrong in (3, 1, 4):
        feed(ours, cache, tiny.tokens(2, wrong, seed=wrong))
        cache.crop(-wrong)
        assert cache.get_seq_length() == first
    got = feed(ours, cache, IDS[:, first:])
    tiny.assert_equal_logits(kind, got, eager(IDS).logits[:, first:])


def test_crop_of_padding():
    """transformers counts padding: taking back n tokens takes back the real ones among the last n."""
    eager, ours = tiny.pair("mistral")
    cache = RingCache(ours.config, slack=SLACK)
    before = torch.ones(2, 9, dtype=torch.long, device=tiny.DEVICE)
    real = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]], device=tiny.DEVICE)
    feed(ours, cache, IDS[:, :9])
    feed(ours, cache, tiny.tokens(2, 4, seed=9), real, before)
    assert cache.layers[0].buffer.length.tolist() == [11, 13]
    cache.crop(-3)
    assert cache.layers[0].buffer.length.tolist() == [10, 10]
    cache.crop(-1)
    tiny.assert_equal_logits("mistral", feed(ours, cache, IDS[:, 9:]), eager(IDS).logits[:, 9:])


@pytest.mark.parametrize("kind", KINDS)
def test_assisted_decoding(kind):
    """Candidates from the prompt are tried and mostly rolled back; what comes out is what greedy decoding gives."""
    eager, ours = tiny.pair(kind)
    prompt = IDS[:1, :5].repeat(1, 2)
    options = {"max_new_tokens": 10, "do_sample": False}
    expected = eager.generate(prompt, **options)
    cache = RingCache(ours.config, slack=SLACK)
    assert torch.equal(ours.generate(prompt, past_key_values=cache, prompt_lookup_num_tokens=3, **options), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_reordered_selected_and_repeated(kind):
    eager, ours = tiny.pair(kind)
    cache = RingCache(ours.config, slack=SLACK)
    feed(ours, cache, IDS[:, :13])
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_select_indices(torch.tensor([0]))
    cache.batch_repeat_interleave(2)
    cache.crop(0)
    rows = IDS[[1, 1]]
    tiny.assert_equal_logits(kind, feed(ours, cache, rows[:, 13:]), eager(rows).logits[:, 13:])


def test_a_full_layer_grows_and_a_sliding_one_does_not():
    eager, ours = tiny.pair("gemma3")
    cache = RingCache(ours.config, slack=SLACK, length=2)
    got = torch.cat([feed(ours, cache, part) for part in IDS.split([3, 1, 12], dim=1)], dim=1)
    tiny.assert_equal_logits("gemma3", got, eager(IDS).logits)
    sliding, full = cache.layers
    assert sliding.buffer.capacity == tiny.WINDOW + SLACK and full.buffer.capacity == TOTAL + SLACK
    assert cache.is_sliding == [True, False] and (cache.get_max_length(0), cache.get_max_length(1)) == (6, -1)


def test_reset_and_copies():
    eager, ours = tiny.pair("gemma3")
    cache = RingCache(ours.config, slack=SLACK)
    feed(ours, cache, IDS[:, :13])
    other = copy.deepcopy(cache)
    cache.reset()
    assert cache.get_seq_length() == 0 and other.get_seq_length() == 13
    tiny.assert_equal_logits("gemma3", feed(ours, cache, IDS), eager(IDS).logits)
    tiny.assert_equal_logits("gemma3", feed(ours, other, IDS[:, 13:]), eager(IDS).logits[:, 13:])


def test_a_step_copies_no_ring_and_compiles_nothing():
    """Each token writes one slot per row, whatever the phase of the ring."""
    _, ours = tiny.pair("mistral")
    cache = RingCache(ours.config, slack=SLACK)
    feed(ours, cache, IDS[:, :3])
    feed(ours, cache, IDS[:, 3:4])
    compiled = []

    def listener(event, *_, **__):
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        torch_bridge.reset_stats()
        for t in range(4, TOTAL):
            feed(ours, cache, IDS[:, t : t + 1])
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert compiled == [] and torch_bridge.stats().shared == 0
    assert cache.layers[0].buffer.capacity == tiny.WINDOW + SLACK


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8), (torch.int8, 7)])
def test_other_dtypes_are_kept(dtype, bits):
    """Fewer bits, in sliding and full layers, through chunks, growth, rollback and reordering."""
    eager, ours = tiny.pair("gemma3")
    cache = RingCache(ours.config, slack=SLACK, dtype=dtype, length=TOTAL // 2)
    got = torch.cat([feed(ours, cache, part) for part in IDS.split([7, 1, 8], dim=1)], dim=1)
    assert got.dtype == torch.float32 and all(layer.buffer.dtype == dtype for layer in cache.layers)
    exact = eager(IDS).logits
    error = (got - exact).abs().max() / exact.abs().max()
    assert 0 < error < 8 * 2**-bits  # a rounding each in keys and values of two layers, some of them amplified
    cache.crop(-3)
    cache.reorder_cache(torch.tensor([1, 0]))
    again = feed(ours, cache, IDS[[1, 0], 13:])[[1, 0]]
    # The same, beside what the dtype loses: other chunks are other sums.
    assert (again - got[:, 13:]).abs().max() < (got - exact).abs().max() / 100


def test_gradients_flow_through_the_rings():
    """A loss on the second chunk reaches, through the ring, what was computed in the first."""
    eager, ours = tiny.pair("mistral")
    with torch.enable_grad():
        inputs = eager.get_input_embeddings()(IDS[:, :12]).detach()
        found = []
        for model, parts in ((eager, [12]), (ours, [7, 5])):
            leaf = inputs.clone().requires_grad_()
            cache = RingCache(ours.config) if model is ours else None
            out = [
                model(inputs_embeds=part, past_key_values=cache, use_cache=cache is not None).logits
                for part in leaf.split(parts, dim=1)
            ]
            torch.cat(out, dim=1)[:, 7:].square().sum().backward()
            found.append(leaf.grad)
    assert found[0][:, :7].any()
    torch.testing.assert_close(found[1], found[0], atol=2e-3, rtol=2e-3)


def test_lengths_that_are_compiled_for():
    assert LENGTHS[:6] == (1, 16, 24, 32, 48, 64)
    assert all(b * 2 <= a * 3 for a, b in itertools.pairwise(LENGTHS[1:]))
