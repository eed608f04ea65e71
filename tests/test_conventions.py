"""Every other project's number for a window sees the same keys as ours: in its own mask, real or documented.

Windows here are small on purpose: a large one hides a key too many (TransformerEngine issue 1197, at 1024).
"""

import importlib
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ringjax._window import Window

SIZES = [1, 2, 3, 5, 8]
T = 13  # more than any window here, so that each is full in some rows


def seen(window, queries=range(T), keys=range(T)):
    """Our mask; test_window.py proves that it is the definition."""
    return window.visible(np.array(queries)[:, None], np.array(keys)[None, :])


# --- Their numbers in their masks ---


def by_attention(attention, value, **arguments):
    """Which keys an attention function reads: with equal logits and one-hot values, its output is its mask."""
    zeros, one_hot = jnp.zeros((1, T, 1, T)), jnp.eye(T)[None, :, None, :]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        out = attention(zeros, zeros, one_hot, local_window_size=value, implementation="xla", **arguments)
    return np.asarray(out[0, :, 0]) > 0


def jax_nn(value, **arguments):
    return by_attention(jax.nn.dot_product_attention, value, **arguments)


def tokamax(value, **arguments):
    attention = pytest.importorskip("tokamax").dot_product_attention
    flags = importlib.import_module("absl.flags").FLAGS
    if not flags.is_parsed():
        flags.mark_as_parsed()  # else tokamax parses pytest's own command line
    return by_attention(attention, value, **arguments)


def splash(value):
    name = "jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask"
    return pytest.importorskip(name).LocalMask((T, T), value, 0)[:, :]


def transformers(function, value):
    torch = pytest.importorskip("torch")
    masking_utils = pytest.importorskip("transformers.masking_utils")
    q, kv = torch.arange(T)[:, None], torch.arange(T)[None, :]
    return getattr(masking_utils, function)(value)(0, 0, q, kv).broadcast_to(T, T).numpy()


def attn_bias():
    pytest.importorskip("torch")
    return pytest.importorskip("xformers.ops.fmha.attn_bias", exc_type=ImportError)


def materialized(bias, shape=(T, T)):
    return (bias.materialize(shape) == 0).numpy()


def recurrentgemma(value):
    modules = pytest.importorskip("recurrentgemma.jax.modules", exc_type=ImportError)
    p = jnp.arange(T)[None]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return np.asarray(modules._compute_causal_mask(p, p, value, None, None))[0]


REAL = {
    "jax": jax_nn,
    "tokamax": tokamax,
    "splash": splash,
    "huggingface": lambda w: transformers("sliding_window_causal_mask_function", w),
    "huggingface-bidirectional": lambda w: transformers("sliding_window_bidirectional_mask_function", w),
    "xformers": lambda w: materialized(attn_bias().LowerTriangularFromBottomRightLocalAttentionMask(w)),
    "xformers-sides": lambda w: materialized(attn_bias().LocalAttentionFromBottomRightMask(*w)),
    "recurrentgemma": recurrentgemma,
}


def inclusive(value, p, j):
    left, right = value
    return (left < 0 or j >= p - left) and (right < 0 or j <= p + right)


# What each project documents, or its source says, for the query at p and the key at j.
DOCUMENTED = {
    # flash_attn_func: "attend to keys between [i + seqlen_k - seqlen_q - window_size[0],
    # i + seqlen_k - seqlen_q + window_size[1]] inclusive"; -1 means infinite
    "flash": inclusive,
    # transformer_engine/jax/attention.py, make_swa_mask: "[i - window_size[0], i + window_size[1]] inclusive. A
    # negative number means an infinite window"
    "transformer-engine": inclusive,
    # onnx docs/Operators.md, Attention of opset 25: "p - left_window_size <= j <= p + right_window_size for each
    # nonnegative bound"
    "onnx": inclusive,
    # onnxruntime, GroupQueryAttention since pull request 25927: "The window size includes new token"; -1 is unused
    "onnxruntime": lambda w, p, j: j <= p and (w < 0 or p - j < w),
    # axlearn/common/attention_bias.py, sliding_window_causal_mask: query_position - key_position <= sliding_window_size
    "axlearn": lambda w, p, j: j <= p and p - j <= w,
    # recurrentgemma/jax/modules.py, _compute_causal_mask: q_positions <= k_positions + window_size
    "recurrentgemma": lambda w, p, j: j <= p and p <= j + w,
    # flashinfer/include/flashinfer/attention/variants.cuh, with causal=True; negative: the length of the keys
    "flashinfer": lambda w, p, j: j <= p and (w < 0 or j + w >= p),
    # gemma/gm/nn/_modules.py, _create_sliding_mask: cache_positions > positions - sliding_window_size
    "gemma": lambda w, p, j: j <= p and (w is None or j > p - w),
    # gpt_oss/torch/model.py, sdpa: triu(-inf, diagonal=1); if sliding_window > 0: tril(-inf, diagonal=-sliding_window)
    "gpt-oss": lambda w, p, j: not (j - p >= 1) and not (w > 0 and j - p <= -w),
    # llama.cpp src/llama-hparams.h, is_masked_swa: p1 - p0 >= n_swa is masked; n_swa = 0 is LLAMA_SWA_TYPE_NONE
    "llama.cpp": lambda w, p, j: j <= p and not (w and p - j >= w),
    # mistral_inference/cache.py: a cache of sliding_window tokens, the new one written first
    "mistral": lambda w, p, j: j in range(p + 1)[-w:] if w else j <= p,
    # mlx_lm/models/base.py, create_causal_mask: linds >= rinds and linds < rinds + window_size
    "mlx": lambda w, p, j: p >= j and (w is None or p < j + w),
    # vllm/v1/attention/backends/flash_attn.py: None is (-1, -1), else (sliding_window - 1, 0); causal=True
    "vllm": lambda w, p, j: j <= p and inclusive((-1, -1) if w is None else (w - 1, 0), p, j),
    # xformers 0.0.28 components/attention/local.py, causal=True: local_1d_pattern(2 * window_size + 1) and causal
    "xformers-legacy": lambda w, p, j: abs(p - j) <= (2 * w + 1) // 2 and j <= p,
}

CAUSAL = [Window.causal(size) for size in (*SIZES, None)]
SYMMETRIC = [Window.symmetric(radius) for radius in (0, 1, 2, 3, 5)]
WINDOWS = {
    "size": CAUSAL,
    "left": CAUSAL,
    "radius": [*SYMMETRIC, Window.full()],
    "sides": [*CAUSAL, *SYMMETRIC[:3], Window(3, 1), Window(1, 4), Window(None, 2), Window(2, None), Window.full()],
}


def sayable(project):
    """The windows that a project has a value for."""
    convention = Window.conventions()[project]
    pair = convention.counts == "sides"
    for window in WINDOWS[convention.counts]:
        unbounded = [window.left, window.right].count(None)
        if convention.unbounded or not unbounded or (pair and unbounded == 2):
            yield window


every_project = pytest.mark.parametrize("project", Window.conventions())


def test_every_project_is_tested():
    assert REAL.keys() | DOCUMENTED.keys() == Window.conventions().keys()
    for convention in Window.conventions().values():
        assert convention.argument and convention.source


@every_project
def test_round_trip(project):
    for window in sayable(project):
        value = window.to_convention(project)
        assert Window.from_convention(project, value) == window
        assert not isinstance(value, np.generic)


@pytest.mark.parametrize("project", DOCUMENTED)
def test_documented_mask(project):
    for window in sayable(project):
        value = window.to_convention(project)
        theirs = [[DOCUMENTED[project](value, p, j) for j in range(T)] for p in range(T)]
        np.testing.assert_array_equal(theirs, seen(window), f"{window} as {value!r}")


@pytest.mark.parametrize("project", REAL)
def test_real_mask(project):
    for window in sayable(project):
        value = window.to_convention(project)
        if value is None and project not in ("jax", "tokamax"):
            continue  # no mask at all: there is nothing to call
        np.testing.assert_array_equal(REAL[project](value), seen(window), f"{window} as {value!r}")


@every_project
@pytest.mark.parametrize("size", SIZES)
def test_what_a_project_calls_its_number(project, size):
    """W, or W - 1, or the pair that ends in 0; and, for one number that means both sides, the radius."""
    convention = Window.conventions()[project]
    number = {"size": size, "left": size - 1, "sides": (size - 1, 0), "radius": size}[convention.counts]
    window = Window.symmetric(size) if convention.counts == "radius" else Window.causal(size)
    assert window.to_convention(project) == number
    assert Window.from_convention(project, number) == window
    for unbounded in convention.unbounded:
        free = (unbounded, unbounded) if convention.counts == "sides" else unbounded
        full = convention.counts in ("sides", "radius")
        assert Window.from_convention(project, free) == (Window.full() if full else Window.causal())


# --- The converters with a name ---


@pytest.mark.parametrize("size", SIZES)
def test_named_converters(size):
    causal, both = Window.causal(size), Window.symmetric(size)
    assert Window.from_flash(size - 1, 0) == Window.from_flash(size - 1, causal=True) == causal
    assert Window.from_flash(size, size) == both
    assert (causal.to_flash(), both.to_flash()) == ((size - 1, 0), (size, size))
    assert Window.from_jax((size - 1, 0)) == Window.from_jax(size - 1, is_causal=True) == causal
    assert Window.from_jax(size) == Window.from_jax((size, size)) == Window.from_convention("tokamax", size) == both
    assert (causal.to_jax(), causal.to_jax(is_causal=True), both.to_jax()) == (
        (size - 1, 0),
        (size - 1, 0),
        (size, size),
    )
    assert Window.from_huggingface(size) == causal and Window.from_huggingface(size, causal=False) == both
    assert (causal.to_huggingface(), both.to_huggingface(causal=False)) == (size, size)
    assert Window.from_xformers(size) == Window.from_xformers((size - 1, 0)) == causal
    assert Window.from_xformers(np.int64(size)) == causal and Window.from_xformers((size, size)) == both
    assert causal.to_xformers() == size
    assert Window.from_mlx(size) == causal and causal.to_mlx() == (size, 0)
    assert Window.from_mlx(size + 4, keep=4) == Window.causal(size, sinks=4)
    assert Window.causal(size, sinks=4).to_mlx() == (size + 4, 4)


def test_no_window():
    assert Window.from_flash() == Window.from_flash(None, -1) == Window.full()
    assert Window.from_flash(causal=True) == Window.from_flash(-1, 0) == Window.causal()
    assert (Window.full().to_flash(), Window.causal().to_flash()) == ((-1, -1), (-1, 0))
    assert Window.from_jax() == Window.full() and Window.from_jax(is_causal=True) == Window.causal()
    assert Window.full().to_jax() is None and Window.causal().to_jax(is_causal=True) is None
    assert Window.from_huggingface(None) == Window.causal()
    assert Window.from_huggingface(None, causal=False) == Window.full()
    assert Window.from_xformers(None) == Window.full()
    assert Window.causal(sinks=2).to_flash() == (-1, 0)  # sinks beside an unbounded left are no loss


@pytest.mark.parametrize("theirs", [jax_nn, tokamax])
@pytest.mark.parametrize("value", [*SIZES, (0, 0), (3, 1), (2, 0), None])
@pytest.mark.parametrize("is_causal", [False, True])
def test_jax_and_tokamax_with_their_flag(theirs, value, is_causal):
    window = Window.from_jax(value, is_causal=is_causal)
    np.testing.assert_array_equal(theirs(value, is_causal=is_causal), seen(window))
    if is_causal:
        np.testing.assert_array_equal(theirs(window.to_jax(is_causal=True), is_causal=True), seen(window))


@pytest.mark.parametrize("size", SIZES)
def test_xformers_masks(size):
    """Every mask of xFormers that is a window, read from the mask itself; the oddly documented ones included."""
    bias = attn_bias()
    block, square = bias.BlockDiagonalMask.from_seqlens([T]), (T, T)
    causal = bias.BlockDiagonalCausalMask.from_seqlens([T])
    padded = bias.BlockDiagonalPaddedKeysMask.from_seqlens([T], T, [T])
    offset = bias.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens([T], T, [T])
    for theirs, ours in [
        (bias.LowerTriangularMask(), Window.causal()),
        (bias.LowerTriangularFromBottomRightMask(), Window.causal()),
        (bias.LowerTriangularFromBottomRightMask().make_local_attention(size), Window.causal(size)),
        (bias.LocalAttentionFromBottomRightMask(size, 2), Window(size, 2)),
        (block, Window.full()),
        (causal, Window.causal()),
        (block.make_causal_from_bottomright(), Window.causal()),
        (causal.make_local_attention(size), Window.causal(size)),
        (block.make_local_attention_from_bottomright(size), Window.causal(size)),
        (padded, Window.full()),
        (offset, Window.causal()),
        # Its docstring says left + right - 1 keys; it sees left + 1 + right.
        (padded.make_local_attention(size, 2), Window(size, 2)),
        (
            bias.BlockDiagonalCausalLocalAttentionPaddedKeysMask.from_seqlens_local([T], T, [T], size),
            Window.causal(size),
        ),
    ]:
        assert Window.from_xformers(theirs) == ours, theirs
        np.testing.assert_array_equal(materialized(theirs, square), seen(ours), type(theirs).__name__)


@pytest.mark.parametrize("size", SIZES)
def test_xformers_aligns_bottom_right(size):
    """With fewer queries than keys, the last query sits at the last key: positions say it, the window does not."""
    bias = attn_bias().LowerTriangularFromBottomRightLocalAttentionMask(size)
    expected = seen(Window.from_xformers(bias), range(T - 4, T))
    np.testing.assert_array_equal(materialized(bias, (4, T)), expected)


def test_xformers_is_read_by_name_and_fields():
    """Nothing is imported: a look-alike will do, which is how mslk's masks work too."""
    assert Window.from_xformers(SimpleNamespace(_window_size=4)) == Window.causal(4)
    assert Window.from_xformers(SimpleNamespace(window_left=4, window_right=1)) == Window(4, 1)
    assert Window.from_xformers(type("LowerTriangularMask", (), {})()) == Window.causal()


@pytest.mark.parametrize("max_size", range(1, 8))
def test_mlx_rotating_cache(max_size):
    """mlx_lm/models/cache.py, RotatingKVCache._update_in_place: at `max_size` the write index goes back to `keep`."""
    for keep in range(max_size):
        window, slots, index = Window.from_mlx(max_size, keep), {}, 0
        for p in range(4 * max_size):
            index = keep if index == max_size else index
            slots[index] = p
            index += 1
            assert sorted(slots.values()) == [j for j in range(p + 1) if window.visible(p, j)]


# --- Bugs that a number for a window brought about elsewhere ---


@pytest.mark.parametrize("size", SIZES)
def test_transformers_39408_flash_path_saw_one_key_too_many(size):
    """Passed (W, W) to FlashAttention, which sees W + 1 keys. Counted with one-hot values."""
    left, right = Window.from_huggingface(size).to_flash()
    assert left + 1 + right == size
    assert (jax_nn((left, right)).sum(axis=1)[size - 1 :] == size).all()


@pytest.mark.parametrize("size", SIZES)
def test_transformer_engine_1197_projects_agree_on_small_windows(size):
    """Two of its backends differed by one key, and only windows too large to show it were tested."""
    window = Window.causal(size)
    for (one, from_one), (other, to_other) in itertools.permutations(Window.conventions().items(), 2):
        if "radius" not in (from_one.counts, to_other.counts):
            value = Window.from_convention(one, window.to_convention(one)).to_convention(other)
            assert value == window.to_convention(other)
            if other in DOCUMENTED:
                assert sum(DOCUMENTED[other](value, T - 1, j) for j in range(T)) == size


@pytest.mark.parametrize("size", SIZES)
def test_maxtext_4289_onnxruntime_25927_mlx_390_off_by_one(size):
    """MaxText gave Splash and Transformer Engine W for W - 1; the others mistook whether W counts the query's own."""
    window = Window.from_huggingface(size)
    assert window.to_convention("splash") == (size - 1, 0)
    assert window.to_convention("transformer-engine") == (size - 1, 0)
    assert window.to_convention("onnxruntime") == window.to_convention("mlx") == size
    assert window.to_convention("axlearn") == window.to_convention("recurrentgemma") == size - 1
    assert splash(window.to_convention("splash"))[-1].sum() == size


def test_jax_39576_to_jax_offers_is_causal():
    """cuDNN takes (L, 0) without `is_causal` for an unbounded right side; with it, all agree."""
    value = Window.causal(3).to_jax(is_causal=True)
    np.testing.assert_array_equal(jax_nn(value, is_causal=True), jax_nn(value))


# --- What they refuse, and how they say so ---

FLASH = "Window.from_flash: left of window_size must be an int >= 0 or -1 or None"
WRONG = [
    (lambda: Window.from_flash(-2, 0), ValueError, f"{FLASH}, got -2."),
    (lambda: Window.from_flash(False, 0), TypeError, f"{FLASH}, got False."),
    (
        lambda: Window.from_jax(-1),
        ValueError,
        "Window.from_jax: local_window_size must be an int >= 0, got -1.",
    ),
    (
        lambda: Window.from_jax((3, -1)),
        ValueError,
        "Window.from_jax: right of local_window_size must be an int >= 0, got -1.",
    ),
    (
        lambda: Window.from_jax((1, 2, 3)),
        TypeError,
        "Window.from_jax: local_window_size must be a pair (left, right), got (1, 2, 3).",
    ),
    (
        lambda: Window.from_huggingface(0),
        ValueError,
        "Window.from_huggingface: sliding_window must be an int >= 1 or None, got 0.",
    ),
    (
        lambda: Window.from_huggingface(-1, causal=False),
        ValueError,
        "Window.from_huggingface: sliding_window must be an int >= 0 or None, got -1.",
    ),
    (lambda: Window.from_xformers(0), ValueError, "Window.from_xformers: window_size must be an int >= 1, got 0."),
    (
        lambda: Window.from_xformers(np.zeros((2, 2))),
        TypeError,
        "Window.from_xformers: attn_bias must be a window size, (window_left, window_right) or a mask that is a "
        "window, got ndarray.",
    ),
    (lambda: Window.from_mlx(4, keep=4), ValueError, "Window.from_mlx: max_size must exceed keep, got 4 and 4."),
    (
        lambda: Window.from_convention("flash", 4),
        TypeError,
        "Window.from_convention: window_size must be a pair (left, right), got 4.",
    ),
    (
        lambda: Window.from_convention("vllm", 0),
        ValueError,
        "Window.from_convention: sliding_window must be an int >= 1 or None, got 0.",
    ),
    (
        lambda: Window.from_convention("vLLM", 4),
        ValueError,
        "Window.from_convention: project must be a known one, got 'vLLM'.",
    ),
    (
        lambda: Window(3).to_convention("torch"),
        ValueError,
        "Window.to_convention: project must be a known one, got 'torch'.",
    ),
    (
        lambda: Window(3, sinks=2).to_flash(),
        ValueError,
        "Window.to_flash: window_size cannot say sinks, got Window(left=3, sinks=2).",
    ),
    (
        lambda: Window(3, 1).to_huggingface(),
        ValueError,
        "Window.to_huggingface: sliding_window cannot say what follows a query, got Window(left=3, right=1).",
    ),
    (
        lambda: Window.full().to_xformers(),
        ValueError,
        "Window.to_xformers: window_size cannot say what follows a query, got Window(left=None, right=None).",
    ),
    (
        lambda: Window(3, 1).to_huggingface(causal=False),
        ValueError,
        "Window.to_huggingface: sliding_window holds one number for both sides, got Window(left=3, right=1).",
    ),
    (
        lambda: Window.causal().to_xformers(),
        ValueError,
        "Window.to_xformers: window_size cannot say unbounded, got Window(left=None).",
    ),
    (
        lambda: Window.causal().to_jax(),
        ValueError,
        "Window.to_jax: local_window_size cannot say unbounded, got Window(left=None).",
    ),
    (
        lambda: Window(3, 1).to_jax(is_causal=True),
        ValueError,
        "Window.to_jax: is_causal=True needs a causal window, got Window(left=3, right=1).",
    ),
    (
        lambda: Window.causal().to_mlx(),
        ValueError,
        "Window.to_mlx: RotatingKVCache needs a causal window with a size, got Window(left=None).",
    ),
]


@pytest.mark.parametrize(("call", "error", "first_line"), WRONG, ids=[line for _, _, line in WRONG])
def test_message(call, error, first_line):
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    assert str(caught.value).split("\n")[0] == first_line


def test_hints():
    """The second line says what to do."""
    for call, hint in [
        (lambda: Window(-1), "None stands for unbounded."),
        (lambda: Window.from_convention("onnxruntime", 0), "-1 stands for unbounded."),
        (lambda: Window(3, 1).to_xformers(), "dataclasses.replace(window, right=0) is its causal part."),
        (lambda: Window.causal().to_xformers(), "a bound of at least the longest sequence sees the same keys."),
    ]:
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value).split("\n")[1:] == [f"  Hint: {hint}"]


def test_tensors_are_no_windows():
    torch, bias = pytest.importorskip("torch"), attn_bias()
    for tensor in (torch.zeros(2, 2), bias.LowerTriangularMaskWithTensorBias(torch.zeros(2, 2))):
        with pytest.raises(TypeError, match=r"^Window.from_xformers: attn_bias must be a window size"):
            Window.from_xformers(tensor)
