"""Tiny models of Hugging Face transformers with random weights, in pairs of one set of weights: eager, and ours."""

import copy
from functools import cache

import torch
import transformers

import torch_bridge.huggingface

DEVICE = torch.device("cpu")  # test_gpu_huggingface.py runs tests on another
WINDOW = 6
VOCABULARY = 64
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "sliding_window": WINDOW,
    "initializer_range": 0.3,  # large enough for every token to matter
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,  # tied, a random model repeats its last token
    "attention_dropout": 0.0,
}
MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
KINDS = {
    "mistral": ("Mistral", {}),
    "gemma3": ("Gemma3Text", MIXED | {"query_pre_attn_scalar": 8}),
    "gemma2": (
        "Gemma2",
        MIXED | {"query_pre_attn_scalar": 4, "attn_logit_softcapping": 2.0, "final_logit_softcapping": None},
    ),
    "gpt_oss": ("GptOss", MIXED | {"num_local_experts": 2, "num_experts_per_tok": 1}),
    "llama": ("Llama", {"sliding_window": None}),
}


def config_of(kind):
    name, options = KINDS[kind]
    config = getattr(transformers, f"{name}Config")
    made = config(**SIZES | options)
    made._experts_implementation = "eager"  # the others have no float64
    return made


def pair(kind):
    """The same model twice: with eager attention, and with ours."""
    return _pair(kind, DEVICE)


@cache
def _pair(kind, device):
    torch_bridge.huggingface.register()
    torch.manual_seed(0)
    made = getattr(transformers, f"{KINDS[kind][0].removesuffix('Text')}ForCausalLM")
    eager, ours = (made._from_config(config_of(kind), attn_implementation=name) for name in ("eager", "ringjax"))
    ours.load_state_dict(eager.state_dict())
    return eager.eval().to(device), ours.eval().to(device)


def tokens(batch, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (batch, length), generator=generator).to(DEVICE)


def padding(lengths, total, side="left"):
    """int64 [B, total], 1 where a token is real: `lengths[b]` of them, on the other side than the padding."""
    index = torch.arange(total)[None]
    lengths = torch.tensor(lengths)[:, None]
    return ((index >= total - lengths) if side == "left" else (index < lengths)).long().to(DEVICE)


def noise(kind):
    """How far eager attention in float32 is from the truth, on logits: the measure of law 13."""
    return _noise(kind, DEVICE)


@cache
def _noise(kind, device):
    eager, _ = pair(kind)
    with torch.no_grad():
        exact = copy.deepcopy(eager).double()(tokens(2, 11)).logits
        return (eager(tokens(2, 11)).logits - exact).abs().max().item()


def assert_equal_logits(kind, ours, eager):
    """Ours may be twice as far from the truth as eager's, and so three times as far from eager's."""
    error = (ours - eager).abs().max().item()
    assert error <= 3 * noise(kind), f"{kind}: error {error:.3g}, bound {3 * noise(kind):.3g}"
