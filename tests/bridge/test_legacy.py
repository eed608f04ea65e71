"""The attention "ring_buffer" in old xFormers' registries; with a newer xFormers, how its absence is said.

`make test-legacy` runs this file beside xformers 0.0.28.post3, the last release with all three registries.
"""

import importlib.util
import warnings

import cases
import numpy as np
import pytest

torch = pytest.importorskip("torch", exc_type=ImportError)

import ringjax as rj  # noqa: E402
from torch_bridge import attention, legacy  # noqa: E402

# Old xFormers announces with every class that it will go, and uses what torch has deprecated since.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
W, MODEL, HEADS = 4, 16, 2


def has(module):
    with warnings.catch_warnings(action="ignore"):  # parents are imported
        try:
            return importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:
            return False


registry = pytest.mark.skipif(not has("xformers.components.attention"), reason="make test-legacy runs it")
dispatcher = pytest.mark.skipif(not has("xformers.components.multi_head_dispatch"), reason="make test-legacy runs it")
factory = pytest.mark.skipif(not has("xformers.factory"), reason="make test-legacy runs it")
absent = pytest.mark.skipif(has("xformers.components.attention"), reason="this xFormers has the registry")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def build(**options):
    from xformers.components.attention import build_attention

    legacy.register()
    return build_attention({"name": "ring_buffer", "dropout": 0.0, "num_heads": HEADS, "seq_len": 9} | options)


def seen(t, s, window):
    return np.asarray(window.visible(s - t + np.arange(t)[:, None], np.arange(s)[None]))


def compare(layer, q, k, v, mask):
    """Forward, and gradients for q, k and v, against plain attention in float64."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = layer(*leaves)
    found = [out, *torch.autograd.grad(out.square().sum(), leaves)]
    results = []
    for dtype in (torch.float64, torch.float32):
        wide = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        logits = wide[0] @ wide[1].transpose(-1, -2) * q.shape[-1] ** -0.5
        weights = logits.masked_fill(~torch.tensor(mask), -torch.inf).softmax(-1)
        out = weights @ wide[2]
        results.append([out, *torch.autograd.grad(out.square().sum(), wide)])
    for what, *values in zip(("out", "dq", "dk", "dv"), found, *results, strict=True):
        cases.assert_close(*(x.detach().numpy() for x in values), what)


@registry
@pytest.mark.parametrize(
    ("options", "window"),
    [
        ({"buffer_size": W}, rj.Window.causal(W)),
        ({"buffer_size": W, "causal": False}, rj.Window.symmetric(W - 1)),
        ({"buffer_size": W, "sinks": 2, "softcap": None}, rj.Window.causal(W, sinks=2)),
        ({}, rj.Window.causal(2048)),
    ],
)
def test_build_attention(options, window):
    layer = build(**options)
    assert layer.config == rj.RingBufferConfig(**{key: x for key, x in options.items() if x is not None})
    q, k, v = (torch.randn(2, HEADS, 9, 8) for _ in range(3))
    compare(layer, q, k, v, seen(9, 9, window))


@registry
def test_more_keys_than_queries_and_no_heads():
    layer = build(buffer_size=W)
    q, k, v = torch.randn(2, 5, 8), torch.randn(2, 9, 8), torch.randn(2, 9, 8)
    compare(layer, q, k, v, seen(5, 9, rj.Window.causal(W)))


@registry
def test_key_padding_mask():
    """Padding may be NaN."""
    layer, (q, k, v) = build(buffer_size=W), (torch.randn(2, HEADS, 9, 8) for _ in range(3))
    keep = torch.arange(9)[None] < torch.tensor([[9], [6]])
    clean = layer(q, k, v, key_padding_mask=keep)
    for x in (k, v):
        x[1, :, 6:] = torch.nan
    assert torch.equal(layer(q, k, v, key_padding_mask=keep), clean)
    torch.testing.assert_close(clean[:1], layer(q[:1], k[:1], v[:1]))


@registry
def test_registering_twice_and_from_a_config_object():
    from xformers.components.attention import ATTENTION_REGISTRY, build_attention

    assert legacy.register() is legacy.register()
    assert ATTENTION_REGISTRY["ring_buffer"].constructor is legacy.RingBufferAttention
    layer = build_attention(legacy.RingBufferConfig(name="ring_buffer", dropout=0.0, buffer_size=7, tile_size=16))
    assert layer.config == rj.RingBufferConfig(buffer_size=7, tile_size=16)


@registry
def test_wrong_configs():
    with pytest.raises(NotImplementedError) as caught:
        build(dropout=0.1)
    assert str(caught.value).splitlines()[0] == ("ring_buffer: dropout of attention weights is not supported, got 0.1.")
    with pytest.raises(ValueError, match=r"^RingBufferConfig: buffer_size must be at least 1, got 0\.$"):
        build(buffer_size=0)


@dispatcher
@pytest.mark.parametrize("rotary", [False, True])
def test_build_multi_head_attention(rotary):
    from xformers.components import build_multi_head_attention

    legacy.register()
    layer = build_multi_head_attention(
        {
            "num_heads": HEADS,
            "dim_model": MODEL,
            "residual_dropout": 0.0,
            "use_rotary_embeddings": rotary,
            "attention": {"name": "ring_buffer", "dropout": 0.0, "buffer_size": W},
        }
    )
    x = torch.randn(2, 9, MODEL, requires_grad=True)
    out = layer(x)
    # What position 8 depends on: the last W tokens.
    (gradient,) = torch.autograd.grad(out[:, 8].sum(), x)
    assert gradient.abs().sum(-1).gt(0).tolist() == [[False] * (9 - W) + [True] * W] * 2
    if not rotary:
        q, k, v = (y.unflatten(-1, (HEADS, -1)) for y in layer.in_proj_container(query=x, key=x, value=x))
        expected = layer.proj(attention(q, k, v, rj.Window.causal(W)).flatten(-2))
        assert torch.equal(out, expected)
    memory = torch.randn(2, 12, MODEL)
    assert layer(x, memory, memory).shape == (2, 9, MODEL)


@factory
def test_a_small_xformer_trains():
    from xformers.factory import xFormer, xFormerConfig

    legacy.register()
    block = {
        "block_type": "encoder",
        "num_layers": 2,
        "dim_model": MODEL,
        "residual_norm_style": "pre",
        "use_triton": False,
        "position_encoding_config": {"name": "vocab", "seq_len": 24, "vocab_size": 16},
        "multi_head_config": {
            "num_heads": HEADS,
            "residual_dropout": 0.0,
            "attention": {"name": "ring_buffer", "dropout": 0.0, "buffer_size": W},
        },
        "feedforward_config": {"name": "MLP", "dropout": 0.0, "activation": "gelu", "hidden_layer_multiplier": 2},
    }
    model = torch.nn.Sequential(xFormer.from_config(xFormerConfig([block])), torch.nn.Linear(MODEL, 16))
    # A text that repeats itself: two layers see far enough back to learn it.
    text = torch.tensor([3, 1, 4, 1, 5]).repeat(5)[:24].expand(2, 24)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(model(text)[:, :-1].flatten(0, 1), text[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 5
    # A layer sees W - 1 tokens further back than its own: two layers, 2 (W - 1).
    embedded = torch.randn(1, 24, MODEL, requires_grad=True)
    out = embedded
    for layer in model[0].encoders:
        layer.pose_encoding = None
        out = layer(out)
    (gradient,) = torch.autograd.grad(out[:, 20].sum(), embedded)
    reach = gradient[0].abs().sum(-1).nonzero()[:, 0]
    assert (reach.min().item(), reach.max().item()) == (20 - 2 * (W - 1), 20)


@absent
@pytest.mark.parametrize("name", ["register", "RingBufferAttention", "RingBufferConfig"])
def test_where_the_registry_is_gone(name):
    """An ImportError that names the versions and the way out."""
    with pytest.raises(ImportError) as caught:
        legacy.register() if name == "register" else getattr(legacy, name)
    if has("xformers"):
        import xformers

        got = f"xformers {xformers.__version__} has none"
    else:
        got = "xformers is not installed"
    lines = str(caught.value).splitlines()
    assert lines[0] == (f"torch_bridge.legacy: needs the component registry of xformers 0.0.33 or older, and {got}.")
    assert lines[1] == (
        "  register_attention and build_attention went in 0.0.34, build_multi_head_attention and xFormer in 0.0.29."
    )
    assert lines[2].startswith("  Hint: pip install --no-deps xformers==0.0.28.post3 brings all of it back")


def test_no_other_name():
    with pytest.raises(AttributeError, match="has no attribute 'RingBuffers'"):
        legacy.RingBuffers  # noqa: B018
