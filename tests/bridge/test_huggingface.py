"""A transformers model with our attention equals its eager self: logits, gradients, generated tokens."""

import copy

import pytest

torch = pytest.importorskip("torch", exc_type=ImportError)
transformers = pytest.importorskip("transformers", exc_type=ImportError)

import tiny_transformers as tiny  # noqa: E402

from torch_bridge.huggingface import RingCache, register  # noqa: E402

PADDED = {
    "none": None,
    "left": tiny.padding([7, 11], 11),
    "right": tiny.padding([11, 8], 11, "right"),
    "inside": torch.tensor([[1, 1, 0, 0, 1, 1, 1, 1, 0, 1, 1], [1] * 11]),
}


def padded(side):
    return None if PADDED[side] is None else PADDED[side].to(tiny.DEVICE)


LOGITS = [*((kind, "none") for kind in tiny.KINDS), *(("mistral", side) for side in PADDED if side != "none")]
LOGITS.append(("gemma3", "left"))


@pytest.mark.parametrize(("kind", "side"), LOGITS)
def test_logits(kind, side):
    eager, ours = tiny.pair(kind)
    mask = padded(side)
    real = torch.ones(2, 11, dtype=torch.bool) if mask is None else mask.bool()
    with torch.no_grad():
        a, b = (model(tiny.tokens(2, 11), attention_mask=mask).logits[real] for model in (ours, eager))
    tiny.assert_equal_logits(kind, a, b)


@pytest.mark.parametrize("length", [3, tiny.WINDOW - 1, tiny.WINDOW, tiny.WINDOW + 1])
def test_lengths_around_the_window(length):
    eager, ours = tiny.pair("mistral")
    with torch.no_grad():
        a, b = (model(tiny.tokens(2, length)).logits for model in (ours, eager))
    tiny.assert_equal_logits("mistral", a, b)


@pytest.mark.parametrize("kind", ["mistral", "gemma3"])
def test_packed_sequences(kind):
    """Three sequences in a row, told apart by positions that begin again, as trainers pack them."""
    eager, ours = tiny.pair(kind)
    inputs = {
        "input_ids": tiny.tokens(2, 11),
        "position_ids": torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 0, 0, 1]] * 2, device=tiny.DEVICE),
        "use_cache": False,
    }
    with torch.no_grad():
        packed = ours(**inputs).logits
        tiny.assert_equal_logits(kind, packed, eager(**inputs).logits)
        alone = ours(input_ids=inputs["input_ids"][:, :8], use_cache=False).logits
    tiny.assert_equal_logits(kind, packed[:, :8], alone)


@pytest.mark.parametrize("kind", ["mistral", "gemma3", "gpt_oss"])
def test_gradients(kind):
    """Of every parameter; right padding has no label."""
    models = [copy.deepcopy(model) for model in tiny.pair(kind)]
    models.append(copy.deepcopy(models[0]).double())
    ids, mask = tiny.tokens(2, 11), padded("right")
    for model in models:
        model(input_ids=ids, attention_mask=mask, labels=torch.where(mask.bool(), ids, -100)).loss.backward()
    eager, ours, exact = (dict(model.named_parameters()) for model in models)
    assert sum(parameter.grad.any().item() for parameter in exact.values()) > 20  # an expert may not have been asked
    # Where eager's gradient is exact by chance, that of the whole model says how exact float32 is.
    error = max((eager[name].grad - exact[name].grad).abs().max() for name in exact)
    for name, parameter in ours.items():
        assert (parameter.grad - exact[name].grad).abs().max() <= 2 * error, name


def test_bidirectional_windows():
    """Encoders see as far forward as backward."""
    config = transformers.ModernBertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        local_attention=6, global_attn_every_n_layers=2, pad_token_id=0, initializer_range=0.3,
        bos_token_id=1, eos_token_id=1, cls_token_id=1, sep_token_id=1,
    )  # fmt: skip
    assert config.layer_types == ["full_attention", "sliding_attention"]
    register()
    eager, ours = (
        transformers.ModernBertModel._from_config(config, attn_implementation=name).eval().to(tiny.DEVICE)
        for name in ("eager", "ringjax")
    )
    ours.load_state_dict(eager.state_dict())
    mask = padded("right")
    for attention_mask in (None, mask):
        with torch.no_grad():
            a, b = (m(tiny.tokens(2, 11), attention_mask=attention_mask).last_hidden_state for m in (eager, ours))
        torch.testing.assert_close(a[mask.bool()], b[mask.bool()], atol=1e-4, rtol=1e-4)


def rings(model):
    return {"past_key_values": RingCache(model.config)}


def static(model):
    return {"cache_implementation": "static", "disable_compile": True}


CACHES = {"dynamic": lambda model: {}, "static": static, "rings": rings}
PROMPTS = {
    "short": {"input_ids": tiny.tokens(2, 3, seed=4)},
    "long": {"input_ids": tiny.tokens(2, 11)},
    "one": {"input_ids": tiny.tokens(1, 11, seed=5)},  # of two beams: the same shapes as two rows, compiled once
    "left-padded": {"input_ids": tiny.tokens(2, 9), "attention_mask": tiny.padding([4, 9], 9)},
}
HOW = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.7},
    "beams": {"num_beams": 2, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 2, "do_sample": True},
}
RUNS = [
    *[("greedy", "rings", prompt) for prompt in ("short", "long", "left-padded")],
    ("sampling", "rings", "left-padded"),
    *[(how, "rings", "one") for how in HOW if "beams" in how],
    *[("greedy", cache, prompt) for cache in ("dynamic", "static") for prompt in ("short", "left-padded")],
    ("beams", "dynamic", "one"),
]


def generate(model, cache, how, prompt):
    """8 new tokens, far enough for every ring to wrap."""
    torch.manual_seed(5)
    options = {"max_new_tokens": 8, "do_sample": False} | how | CACHES[cache](model)
    with torch.no_grad():
        return model.generate(**{name: x.to(tiny.DEVICE) for name, x in PROMPTS[prompt].items()}, **options)


@pytest.mark.parametrize(("how", "cache", "prompt"), RUNS)
@pytest.mark.parametrize("kind", ["mistral", "gemma3"])
def test_generate(kind, how, cache, prompt):
    eager, ours = tiny.pair(kind)
    expected = generate(eager, "dynamic", HOW[how], prompt)
    assert len(expected[:, -8:].unique()) > 4  # not one token over and over
    assert torch.equal(generate(ours, cache, HOW[how], prompt), expected)


def test_the_end_of_a_sequence():
    """Rows that end early are filled up with padding, which must not disturb the others."""
    eager, ours = tiny.pair("mistral")
    third = generate(eager, "dynamic", {}, "left-padded")[0, 9 + 2].item()
    how = {"eos_token_id": third, "pad_token_id": 0}
    expected = generate(eager, "dynamic", how, "left-padded")
    assert (expected[0, 9 + 3 :] == 0).all() and expected[1].all()
    assert torch.equal(generate(ours, "rings", how, "left-padded"), expected)
