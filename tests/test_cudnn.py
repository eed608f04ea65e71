"""The row `cudnn`: it takes what means the same there as here, and says of everything else why it does not.

Its kernels need a GPU (`pytest -m gpu`). Elsewhere jax.nn's own XLA version stands in for them: the arguments that they
would get must mean our attention.
"""

import dataclasses
import sys
import types

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ringjax as rj
from ringjax import Window, _attention
from ringjax._kernels import IMPLEMENTATIONS, reasons_against, resolve
from ringjax._kernels.problem import Problem

cudnn = IMPLEMENTATIONS["cudnn"]
AMPERE = "gpu", "NVIDIA A100-SXM4-40GB"

pytestmark = pytest.mark.usefixtures("numpy_promotion")


def problem(**changes):
    facts = {"batch": 2, "queries": 64, "keys": 64, "heads": 4, "kv_heads": 2, "head_dim": 64, "value_dim": 64}
    dtypes = dict.fromkeys(("q_dtype", "kv_dtype", "out_dtype"), "bfloat16")
    device = {"platform": "gpu", "device_kind": AMPERE[1], "lse": False}
    return Problem(**(facts | dtypes | device | {"window": Window.causal(16)} | changes))


def with_heads(n):
    return {"head_dim": n, "value_dim": n}


NEW = [
    "NVIDIA A100-SXM4-40GB",
    "NVIDIA A10G",
    "NVIDIA RTX A6000",
    "NVIDIA GeForce RTX 3090",
    "NVIDIA L4",
    "NVIDIA L40S",
]
NEW += ["NVIDIA RTX 6000 Ada Generation", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 80GB HBM3", "NVIDIA H200"]
NEW += ["NVIDIA GH200 480GB", "NVIDIA B200", "NVIDIA GB300", "NVIDIA RTX PRO 6000 Blackwell Server Edition"]
NEW += ["NVIDIA A100-SXM4-80GB MIG 1g.10gb"]
OLD = ["Tesla V100-SXM2-16GB", "Tesla T4", "NVIDIA TITAN RTX", "Quadro RTX 6000", "NVIDIA GeForce RTX 2080 Ti"]
OLD += ["Tesla P100-PCIE-16GB", "AMD Instinct MI300X", "gfx942"]


def test_ampere_and_newer():
    for kind in NEW:
        assert cudnn.unsupported(problem(device_kind=kind)) == [], kind
    for kind in OLD:
        first = f"needs an NVIDIA GPU of the Ampere generation or newer, the device is {kind}"
        assert cudnn.unsupported(problem(device_kind=kind)) == [first]


def test_it_stands_behind_our_kernels_and_before_xla():
    assert list(IMPLEMENTATIONS) == ["mosaic", "cudnn", "xla"]
    assert resolve(problem(), "attention", None) == "cudnn"
    on_hopper = problem(device_kind="NVIDIA H200")
    ours = reasons_against(on_hopper)["mosaic"]
    assert resolve(on_hopper, "attention", None) == ("cudnn" if ours else "mosaic"), "jax < 0.11 has no Mosaic for us"


TAKEN = {
    "causal": {"window": Window.causal()},
    "window of one": {"window": Window.causal(1)},
    "no window": {"window": Window.full()},
    "no window, fewer queries": {"window": Window.full(), "queries": 6, "q_offset": 58},
    "no window, rows' own positions": {"window": Window.full(), "q_offset": None},
    "sinks that the window reaches anyway": {"window": Window.causal(64, sinks=3)},
    "both sides wider than the keys": {"window": Window(63, 63)},
    "float16": dict.fromkeys(("q_dtype", "kv_dtype", "out_dtype"), "float16"),
    "scale": {"scale": 0.3},
    "a deep head on Hopper": {"device_kind": "NVIDIA H100 PCIe", **with_heads(256)},
    "two queries": {"queries": 2, "keys": 2},
}
FEW = "needs as many queries as keys, the first query at the first key, if causal, got"
REFUSED = {
    "lse": ({"lse": True}, "gives the lse in 16 bits only: call it without return_lse"),
    "cpu": ({"platform": "cpu", "device_kind": "cpu"}, "needs a GPU, the platform is cpu"),
    "ring": ({"layout": "ring"}, "reads no rings"),
    "ragged": ({"ragged": True}, "takes no numbers of valid queries"),
    "segments": ({"segments": True}, "takes no segment ids"),
    "softcap": ({"softcap": 30.0}, "has no softcap"),
    "sink logits": ({"sink_logits": True}, "has no sink logits"),
    "sinks": ({"window": Window.causal(16, sinks=1)}, "pins no sinks"),
    "deterministic": ({"deterministic": True}, "is not deterministic"),
    "both sides": ({"window": Window.symmetric(16)}, "has no right side of a window but 0 or all, got 16"),
    "right only": ({"window": Window(None, 16)}, "has no right side of a window but 0 or all, got 16"),
    "left only": ({"window": Window(16, None)}, "bounds a window on the left only where it is causal"),
    "left only, said in numbers": ({"window": Window(16, 63)}, "bounds a window on the left only where it is causal"),
    "more keys": ({"keys": 80, "q_offset": 16}, f"{FEW} 64 and 80, the first query at 16"),
    "more keys, causal": ({"window": Window.causal(), "keys": 80, "q_offset": 16}, f"{FEW} 64 and 80, "),
    "more queries": ({"keys": 48, "q_offset": 0}, f"{FEW} 64 and 48, the first query at 0"),
    "offset": ({"q_offset": 1}, f"{FEW} 64 and 64, the first query at 1"),
    "offsets": ({"q_offset": None}, f"{FEW} 64 and 64, the first query at rows' own positions"),
    "deep": (with_heads(256), "needs head_dim = value_dim, a multiple of 8, at most 128, got 256 and 256"),
    "deeper": (
        {**with_heads(264), "device_kind": "NVIDIA H200"},
        "needs head_dim = value_dim, a multiple of 8, at most 256",
    ),
    "odd": (with_heads(60), "needs head_dim = value_dim, a multiple of 8, at most 128, got 60 and 60"),
    "values": ({"value_dim": 128}, "needs head_dim = value_dim, a multiple of 8, at most 128, got 64 and 128"),
    "an odd number": (
        {"queries": 63, "keys": 63},
        "needs even numbers of queries and keys, as jax.nn does for its deri",
    ),
    "mixed": ({"out_dtype": "float32"}, "needs one dtype for queries, keys and values, and output, got bfloat16, "),
}


@pytest.mark.parametrize("case", TAKEN)
def test_takes(case):
    assert cudnn.unsupported(problem(**TAKEN[case])) == []


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case):
    changes, reason = REFUSED[case]
    (found,) = cudnn.unsupported(problem(**changes))
    assert found.startswith(reason)


def test_refuses_wide_numbers():
    wide = dict.fromkeys(("q_dtype", "kv_dtype", "out_dtype"), "float32")
    assert cudnn.unsupported(problem(**wide)) == ["needs bfloat16 or float16, got float32"]


@pytest.fixture
def ampere(monkeypatch):
    """Calls take themselves to be on an A100."""
    monkeypatch.setattr(_attention, "_device", lambda x: AMPERE)


def test_a_call_that_reads_the_lse_goes_elsewhere(ampere):
    x = jax.ShapeDtypeStruct((1, 8, 2, 64), jnp.bfloat16)
    window = Window.causal(4)
    assert rj.explain(x, x, x, window).implementation == "cudnn"
    assert rj.explain(x, x, x, window, return_lse=True).implementation == "xla"
    with pytest.raises(
        NotImplementedError, match=r"^attention: implementation 'cudnn' cannot run this call\.\n  cudnn: gives"
    ):
        jax.eval_shape(lambda x: rj.attention(x, x, x, window, return_lse=True, implementation="cudnn"), x)


def test_a_derivative_from_the_lse_goes_elsewhere(ampere):
    """Of a lse rounded to 16 bits it would be wrong in the third digit."""
    x, lse = jax.ShapeDtypeStruct((1, 8, 2, 64), jnp.bfloat16), jax.ShapeDtypeStruct((1, 2, 8), jnp.float32)

    def gradients(x, lse, **options):
        return rj.attention_gradients(x, x, x, Window.causal(4), x, lse, x, **options)

    text = jax.jit(gradients).trace(x, lse).lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.dot_general" in text and "cudnn" not in text
    with pytest.raises(NotImplementedError, match=r"\n  cudnn: gives the lse in 16 bits only"):
        jax.eval_shape(lambda x, lse: gradients(x, lse, implementation="cudnn"), x, lse)


def even(case):
    """The case in 16 bits and with an even number of tokens: 22 or 8 for the 21 or 7 that the table has."""
    case = case if case.dtype != "float32" else case.replace(dtype="bfloat16")
    return case.replace(queries=case.queries + case.queries % 2, keys=case.keys + case.keys % 2)


def is_taken(case):
    window, offset = case.window, case.keys - case.queries if case.q_offset is None else case.q_offset
    offset = offset if isinstance(offset, int) else None
    facts = {f: getattr(case, f) for f in ("batch", "queries", "keys", "heads", "kv_heads", "head_dim", "value_dim")}
    options = {"softcap": case.softcap, "sink_logits": case.sink_logits, "segments": case.segments is not None}
    return not cudnn.unsupported(problem(**facts, **options, window=window, q_offset=offset))


SMALL = [case for case in map(even, cases.CASES) if is_taken(case)]
SMALL += [
    even(cases.Case("no-window-more-keys", Window.full(), queries=7)),
    even(cases.Case("no-window-more-queries", Window.full(), keys=7)),
    even(cases.Case("sinks-within-the-window", Window.causal(22, sinks=3))),
]


def test_the_table_of_cases_has_some_for_it():
    names = {case.name for case in SMALL}
    assert {"causal-1", "causal-8", "causal", "full", "one-kv-head", "scale", "causal-wider-than-keys"} <= names
    assert not names & {"sinks", "symmetric-2", "both-sides", "packed", "sink-logits", "softcap", "more-keys", "offset"}


def check(case, seed=0):
    made = cases.arrays(case, seed)
    made = made._replace(g_lse=jnp.zeros_like(made.g_lse))

    @jax.jit
    def both(q, k, v, g):
        out, vjp = jax.vjp(
            lambda q, k, v: rj.attention(
                q, k, v, case.window, scale=case.scale, q_offset=case.q_offset, implementation="cudnn"
            ),
            *(q, k, v),
        )
        return out, vjp(g)

    out, gradients = both(*made[:3], made.g)
    cases.assert_close(out, cases.exact(case, made)[0], cases.plain(case, made)[0], "out")
    exact, plain = cases.exact_gradients(case, made), cases.plain_gradients(case, made)
    for name, got, x, y in zip(("dq", "dk", "dv"), gradients, exact, plain, strict=False):
        cases.assert_close(got, x, y, name)


AS_OURS = {"causal-1", "causal-5", "causal", "causal-wider-than-keys", "full", "one-kv-head", "scale"}
AS_OURS |= {"no-window-more-keys", "sinks-within-the-window"}


@pytest.mark.parametrize("case", [case for case in SMALL if case.name in AS_OURS], ids=str)
def test_what_it_asks_for_is_our_attention(case, ampere, monkeypatch):
    """By jax.nn's other implementation of the same arguments."""
    attention, asked = jax.nn.dot_product_attention, []

    def by_xla(*arrays, implementation, **options):
        asked.append(implementation)
        return attention(*arrays, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    check(case)
    assert asked and set(asked) == {"cudnn"}


@pytest.fixture
def pretend_cudnn(ampere, monkeypatch):
    """jax.nn asks which cuDNN there is, of a library that a jaxlib for CPUs does not have: private, and needed here."""
    there = types.SimpleNamespace(cudnn_get_version=lambda: 91900)
    monkeypatch.setattr(sys.modules["jax._src.cudnn.fused_attention_stablehlo"], "cuda_versions", there)


def lowered(f, *shapes):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    text = jax.jit(f).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    return text, text.count("__cudnn$fmhaSoftmax("), text.count("__cudnn$fmhaSoftmaxBackward(")


def test_it_lowers_without_a_gpu(pretend_cudnn):
    """Forward and backward: one mask and one window in all calls, and no array of T x S."""
    q, k = (2, 300, 4, 64), (2, 300, 2, 64)

    def both(q, k, v):
        return jax.value_and_grad(
            lambda *qkv: rj.attention(*qkv, Window.causal(100)).astype(jnp.float32).sum(), (0, 1, 2)
        )(q, k, v)

    text, forward, backward = lowered(both, q, k, k)
    assert forward >= 1 and backward == 1
    calls = [line for line in text.splitlines() if "__cudnn$fmha" in line]
    for line in calls:
        line = line.replace("\\22", '"')
        assert '"mask_type": "CAUSAL"' in line and '"sliding_window_length": 100' in line
    assert "300x300" not in text
    text, *_ = lowered(lambda q, k: rj.attention(q, k, k, Window.full()), q, k)
    assert '"NO_MASK"' in text.replace("\\22", '"')


def test_jax_nn_differentiates_even_lengths_only(pretend_cudnn):
    """Why odd ones are refused. Where this fails, jax.nn has learnt it, and the refusal can go."""

    def loss(q, k):
        out = jax.nn.dot_product_attention(q, k, k, is_causal=True, implementation="cudnn")
        return out.astype(jnp.float32).sum()

    lowered(jax.grad(loss), (2, 64, 4, 64), (2, 64, 2, 64))
    with pytest.raises(NotImplementedError, match="Unsupported sequence length"):
        lowered(jax.grad(loss), (2, 63, 4, 64), (2, 63, 2, 64))


def test_its_vmap_is_a_larger_batch(pretend_cudnn):
    """Over any axis, and of some of the arrays: jax.nn's own cannot do either everywhere."""
    window = Window.causal(10)

    def gradients(q, k, v):
        return jax.grad(lambda *qkv: rj.attention(*qkv, window).astype(jnp.float32).sum(), (0, 1, 2))(q, k, v)

    q, k = (2, 64, 4, 64), (2, 64, 2, 64)
    for axes, shapes in (
        ((0, None, None), ((3, *q), k, k)),
        ((1, 0, 0), ((2, 3, 64, 4, 64), (3, *k), (3, *k))),
    ):
        text, forward, backward = lowered(jax.vmap(gradients, axes), *shapes)
        assert forward >= 1 and backward == 1
        assert "tensor<6x64x4x64xbf16>" in text


LARGE = cases.Case(
    "large", Window.causal(300), queries=1500, keys=1500, heads=4, kv_heads=2, head_dim=128, value_dim=128, tiles=None
).replace(dtype="bfloat16")


@pytest.fixture
def on_gpu():
    device = jax.devices()[0]
    reasons = cudnn.unsupported(
        dataclasses.replace(problem(), platform=device.platform, device_kind=device.device_kind)
    )
    if reasons:
        pytest.skip("; ".join(reasons))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        *SMALL,
        LARGE,
        LARGE.replace(name="large-64", head_dim=64, value_dim=64, window=Window.causal(1000)),
        LARGE.replace(name="large-80", head_dim=80, value_dim=80, dtype="float16", scale=0.2),
        LARGE.replace(name="large-causal", window=Window.causal(), queries=1026, keys=1026),
        LARGE.replace(name="large-no-window", window=Window.full(), queries=1000, keys=1100, kv_heads=1),
        LARGE.replace(name="large-one-key", window=Window.causal(1)),
    ],
    ids=str,
)
def test_every_case_on_a_gpu(case, on_gpu):
    check(case, seed=1)


@pytest.mark.gpu
def test_nothing_of_the_future_or_beyond_the_window_leaks(on_gpu):
    """Keys that no query up to t sees may be anything: jax#39576 is about another call."""
    made, window = cases.arrays(LARGE), LARGE.window
    first = 700

    @jax.jit
    def attend(q, k, v):
        return rj.attention(q, k, v, window, implementation="cudnn")

    out = np.asarray(attend(*made[:3]))
    later = [x.at[:, first:].set(7.0) for x in made[1:3]]
    np.testing.assert_array_equal(np.asarray(attend(made.q, *later))[:, :first], out[:, :first])
    earlier = [x.at[:, :first].set(7.0) for x in made[1:3]]
    np.testing.assert_array_equal(np.asarray(attend(made.q, *earlier))[:, first + 299 :], out[:, first + 299 :])


@pytest.mark.gpu
def test_forward_and_backward_in_one_program_are_two_launches(on_gpu):
    def gradients(q, k, v, g):
        out, vjp = jax.vjp(lambda *qkv: rj.attention(*qkv, LARGE.window, implementation="cudnn"), q, k, v)
        return out, vjp(g)

    made = cases.arrays(LARGE)
    text = jax.jit(gradients).lower(*made[:3], made.g).compile().as_text()
    launches = [line for line in text.splitlines() if " custom-call(" in line and "__cudnn$fmha" in line]
    assert len(launches) == 2, "XLA makes one of the two equal forward calls"
