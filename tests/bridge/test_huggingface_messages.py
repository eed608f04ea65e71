"""Wrong uses of our transformers attention and cache: what they say, and that nothing is harmed."""

import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", exc_type=ImportError)
transformers = pytest.importorskip("transformers", exc_type=ImportError)

import tiny_transformers as tiny  # noqa: E402
from transformers.masking_utils import chunked_causal_mask_function, or_masks  # noqa: E402

from torch_bridge._huggingface_masks import make_mask, seen_of  # noqa: E402
from torch_bridge.huggingface import RingCache, register  # noqa: E402

NOT_A_WINDOW = "torch_bridge.huggingface: a mask must be a window, over packed sequences or padding, got {}."


def model(kind="mistral"):
    return tiny.pair(kind)[1]


def eager_with_rings():
    eager = tiny.pair("mistral")[0]
    return eager(tiny.tokens(1, 4), past_key_values=RingCache(eager.config))


def two_updates():
    cache = RingCache(model().config)
    keys = torch.zeros(1, 2, 3, 8)
    cache.update(keys, keys, 0)
    cache.update(keys, keys, 0)


def crop(tokens, **options):
    cache = RingCache(model().config, **options)
    with torch.no_grad():
        model()(tiny.tokens(1, 9), past_key_values=cache)
    cache.crop(tokens)


def dropout():
    config = tiny.config_of("mistral")
    config.attention_dropout = 0.1
    made = transformers.MistralForCausalLM._from_config(config, attn_implementation=register())
    return made.train()(tiny.tokens(1, 4))


def cache_of(**changes):
    config = tiny.config_of("gemma3")
    for name, value in changes.items():
        setattr(config, name, value)
    return RingCache(config)


def without_the_ring():
    """Keys that have lost their layer, as after a cast."""
    made = model()
    cache, keys = RingCache(made.config), torch.zeros(1, 2, 3, 8)
    layer = made.model.layers[0].self_attn
    call = transformers.AttentionInterface()["ringjax"]
    mask = make_mask(1, 3, 9, 6)
    cache.update(keys, keys, 0)
    return call(layer, torch.zeros(1, 4, 3, 8), keys, keys, mask)


def another_window():
    made, keys = model(), torch.zeros(1, 2, 3, 8)
    given, values = RingCache(made.config).update(keys, keys, 0)
    call = transformers.AttentionInterface()["ringjax"]
    return call(made.model.layers[0].self_attn, torch.zeros(1, 4, 3, 8), given, values, make_mask(1, 3, 3))


WRONG = {
    "a mask of pairs": (
        lambda: model()(tiny.tokens(1, 4), attention_mask=torch.ones(1, 1, 4, 4, dtype=torch.bool)),
        NotImplementedError,
        "torch_bridge.huggingface: a mask must be 2-D padding, or not given, got one of shape [1, 1, 4, 4].",
    ),
    "a mask that the model has cut": (
        lambda: transformers.AttentionInterface()["ringjax"](
            model().model.layers[0].self_attn, *[torch.zeros(1, 4, 3, 8)] * 3, make_mask(1, 3, 5)[..., :3]
        ),
        NotImplementedError,
        "torch_bridge.huggingface: a mask must be 2-D padding, or not given, got one of shape [1, 1, 3, 3].",
    ),
    "a chunked mask": (
        lambda: make_mask(1, 3, 3, mask_function=chunked_causal_mask_function(2, torch.zeros(1, dtype=torch.int64))),
        NotImplementedError,
        NOT_A_WINDOW.format("chunked_overlay"),
    ),
    "a mask of images": (
        lambda: make_mask(1, 3, 3, mask_function=or_masks(lambda *_: True)),
        NotImplementedError,
        NOT_A_WINDOW.format("or_masks"),
    ),
    "somebody's mask": (
        lambda: make_mask(1, 3, 3, mask_function=dropout),
        NotImplementedError,
        NOT_A_WINDOW.format(f"{__name__}.dropout"),
    ),
    "dropout": (
        dropout,
        NotImplementedError,
        "torch_bridge.huggingface: dropout of attention weights is not supported, got 0.1.",
    ),
    "weights": (
        lambda: transformers.AttentionInterface()["ringjax"](
            None, *[torch.zeros(1, 4, 3, 8)] * 3, None, output_attentions=True
        ),
        NotImplementedError,
        "torch_bridge.huggingface: output_attentions must be off: the weights never exist as a whole.",
    ),
    "a bias": (
        lambda: transformers.AttentionInterface()["ringjax"](
            None, *[torch.zeros(1, 4, 3, 8)] * 3, None, position_bias=torch.zeros(1)
        ),
        NotImplementedError,
        "torch_bridge.huggingface: a bias that is added to the logits (position_bias) is not supported.",
    ),
    "a name of transformers": (
        lambda: register("sdpa"),
        ValueError,
        "torch_bridge.huggingface.register: name must not be one of transformers' own, got 'sdpa'.",
    ),
    "rings for another attention": (
        eager_with_rings,
        ValueError,
        "RingCache: the model's attn_implementation must be one that torch_bridge.huggingface.register() gave, "
        "got 'eager'.",
    ),
    "two updates": (
        two_updates,
        RuntimeError,
        "RingCache: every update must be followed by the attention of its layer, got two updates.",
    ),
    "keys without their ring": (
        without_the_ring,
        ValueError,
        "torch_bridge.huggingface: the mask and the keys must agree on length, got 9 and 3.",
    ),
    "a mask of another window": (
        another_window,
        ValueError,
        "RingCache: the mask must want the layer's window, Window(left=5), got Window(left=None).",
    ),
    "beyond the slack": (
        lambda: crop(-3, slack=2),
        ValueError,
        "RingCache.crop: at most 2 tokens can be removed, got 3.",
    ),
    "no slack": (lambda: crop(-1), ValueError, "RingCache.crop: at most 0 tokens can be removed, got 1."),
    "beyond the start": (
        lambda: crop(-10, slack=20),
        ValueError,
        "RingCache.crop: at most 9 tokens can be removed, got 10.",
    ),
    "a length": (
        lambda: crop(3, slack=4),
        ValueError,
        "RingCache.crop: tokens_to_remove must be 0 or negative, got 3.",
    ),
    "negative slack": (
        lambda: RingCache(model().config, slack=-1),
        ValueError,
        "RingCache: slack must be at least 0, got -1.",
    ),
    "no length": (
        lambda: RingCache(model().config, length=0),
        ValueError,
        "RingCache: length must be at least 1, got 0.",
    ),
    "slack that is no number": (
        lambda: RingCache(model().config, slack=True),
        TypeError,
        "RingCache: slack must be an int, got True.",
    ),
    "chunked layers": (
        lambda: cache_of(layer_types=["chunked_attention", "full_attention"]),
        NotImplementedError,
        "RingCache: layers must be of full_attention or sliding_attention, got chunked_attention.",
    ),
    "linear layers": (
        lambda: cache_of(layer_types=["linear_attention", "conv"]),
        NotImplementedError,
        "RingCache: layers must be of full_attention or sliding_attention, got conv, linear_attention.",
    ),
    "shared keys": (
        lambda: cache_of(num_kv_shared_layers=1),
        NotImplementedError,
        "RingCache: layers must be of full_attention or sliding_attention, got layers that share keys.",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_use_says_what_is_wrong(name):
    call, error, first_line = WRONG[name]
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    assert str(caught.value).splitlines()[0] == first_line


def test_a_cache_survives_a_wrong_crop():
    """The rings are as they were, and the right crop still works."""
    eager, ours = tiny.pair("mistral")
    cache, ids = RingCache(ours.config, slack=4), tiny.tokens(2, 16)
    with torch.no_grad():
        ours(ids[:, :13], past_key_values=cache)
        for wrong in (-5, 2):
            with pytest.raises(ValueError):
                cache.crop(wrong)
        cache.crop(-1)
        got = ours(ids[:, 12:], past_key_values=cache).logits
        tiny.assert_equal_logits("mistral", got, eager(ids).logits[:, 12:])


def test_masks_take_no_memory():
    mask = make_mask(2, 1000, 1000)
    assert mask.untyped_storage().nbytes() == 1 and seen_of(mask).q_offset == 0
    assert seen_of(mask.contiguous()) is seen_of(mask) and seen_of(mask[:, :, :3]) is None


def test_registering_again_changes_nothing():
    assert register() == register() == "ringjax"
    assert sum(name == "ringjax" for name in transformers.AttentionInterface().valid_keys()) == 1


ALONE = """
import sys
sys.modules["transformers"] = None
try:
    import torch_bridge.huggingface
except ImportError as error:
    print(str(error).splitlines()[0])
"""


def test_without_transformers():
    result = subprocess.run(
        [sys.executable, "-c", ALONE], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120
    )
    assert result.stdout.strip() == "torch_bridge.huggingface: needs transformers 5.14 or newer.", result.stderr
