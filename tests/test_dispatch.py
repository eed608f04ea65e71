"""Which implementation runs: a pure function of static facts, asked about devices that are not there."""

import dataclasses
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ringjax as rj
from ringjax import _kernels
from ringjax._kernels import IMPLEMENTATIONS, reasons_against, resolve
from ringjax._kernels.problem import Problem

DEVICES = [
    ("cpu", "cpu"),
    ("gpu", "NVIDIA H200"),
    ("gpu", "NVIDIA A100-SXM4-40GB"),
    ("gpu", "MI300X"),
    ("tpu", "TPU v5e"),
]


def problem(**changes):
    facts = {"batch": 2, "queries": 64, "keys": 64, "heads": 4, "kv_heads": 2, "head_dim": 64, "value_dim": 64}
    dtypes = {"q_dtype": "bfloat16", "kv_dtype": "bfloat16", "out_dtype": "bfloat16"}
    return Problem(**facts, **dtypes, window=rj.Window.causal(16), **changes)


@pytest.fixture
def table(monkeypatch):
    """A table with one implementation that runs on big GPUs only, before those that there are."""

    def fake_forward(problem, rows, q, k, v, sink_logits):
        shape = problem.batch, problem.queries, problem.heads, problem.value_dim
        return jnp.full(shape, 7.0, problem.out_dtype), jnp.zeros((problem.batch, problem.heads, problem.queries))

    def unsupported(problem):
        reasons = []
        if problem.platform != "gpu":
            reasons.append(f"it needs a GPU, this is a {problem.platform}")
        if problem.softcap is not None:
            reasons.append("it has no softcap")
        return reasons

    picky = types.SimpleNamespace(name="picky", unsupported=unsupported, forward=fake_forward, backward=None)
    monkeypatch.setattr(_kernels, "IMPLEMENTATIONS", {"picky": picky, **IMPLEMENTATIONS})
    monkeypatch.setattr("ringjax._partition.IMPLEMENTATIONS", _kernels.IMPLEMENTATIONS)
    return _kernels.IMPLEMENTATIONS


def test_every_implementation_is_what_the_table_says():
    for name, module in IMPLEMENTATIONS.items():
        assert module.name == name
        assert callable(module.forward) and callable(module.backward) and callable(module.unsupported)
    assert list(IMPLEMENTATIONS)[-1] == "xla", "the last resort stands last"


@pytest.mark.parametrize(("platform", "kind"), DEVICES)
def test_xla_runs_everywhere_and_something_always_does(platform, kind):
    for changes in (
        {},
        {"softcap": 30.0, "sink_logits": True, "segments": True},
        {"layout": "ring", "slack": 3, "q_offset": None, "ragged": True},
        {"q_offset": None},
        {"deterministic": True},
    ):
        facts = problem(platform=platform, device_kind=kind, **changes)
        assert reasons_against(facts)["xla"] == []
        assert resolve(facts, "attention", "xla") == "xla"
        chosen = resolve(facts, "attention", None)
        assert reasons_against(facts)[chosen] == []
        before = list(IMPLEMENTATIONS)[: list(IMPLEMENTATIONS).index(chosen)]
        assert all(reasons_against(facts)[name] for name in before), "the first without a reason against it"


@pytest.mark.parametrize(("platform", "kind"), DEVICES)
def test_reasons_are_sentences_and_asking_changes_nothing(platform, kind):
    facts = problem(platform=platform, device_kind=kind)
    first = reasons_against(facts)
    assert list(first) == list(IMPLEMENTATIONS)
    assert all(isinstance(reason, str) and reason for reasons in first.values() for reason in reasons)
    assert first == reasons_against(dataclasses.replace(facts))


def test_a_problem_is_a_value():
    """Equal facts are one compilation: hash and equality are those of the fields."""
    assert problem() == problem() and hash(problem()) == hash(problem())
    assert problem() != problem(softcap=1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        problem().batch = 3


def test_none_takes_the_first_without_a_reason_against_it(table):
    assert resolve(problem(platform="gpu", device_kind="NVIDIA H200"), "attention", None) == "picky"
    assert resolve(problem(platform="cpu"), "attention", None) != "picky"
    assert resolve(problem(platform="gpu", softcap=2.0), "attention", None) != "picky"


def test_a_named_one_runs_or_raises_with_all_its_reasons(table):
    assert resolve(problem(platform="gpu"), "attention", "picky") == "picky"
    assert resolve(problem(platform="gpu"), "attention", "xla") == "xla", "a slower one, if named, runs"
    with pytest.raises(NotImplementedError) as raised:
        resolve(problem(platform="cpu", softcap=2.0), "attend", "picky")
    assert str(raised.value).splitlines() == [
        "attend: implementation 'picky' cannot run this call.",
        "  picky: it needs a GPU, this is a cpu; it has no softcap",
    ]


def test_if_none_can_all_reasons_are_given(monkeypatch):
    def cannot(name, reason):
        return types.SimpleNamespace(name=name, unsupported=lambda problem: [reason])

    monkeypatch.setattr(_kernels, "IMPLEMENTATIONS", {"a": cannot("a", "too big"), "b": cannot("b", "too small")})
    with pytest.raises(NotImplementedError) as raised:
        resolve(problem(), "attention", None)
    assert str(raised.value).splitlines() == [
        "attention: no implementation can run this call.",
        "  a: too big",
        "  b: too small",
    ]


@pytest.mark.parametrize("name", ["cuda", "XLA", "", 3, ["xla"], True])
def test_an_unknown_name_is_a_wrong_call(name):
    known = ", ".join(repr(name) for name in IMPLEMENTATIONS)
    message = f"attention: implementation must be one of {known} or None, got {name!r}."
    x = jnp.ones((1, 2, 1, 4))
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        rj.attention(x, x, x, rj.Window.causal(2), implementation=name)
    ring = rj.RingBuffer.empty(1, 1, 4, rj.Window.causal(2), dtype=jnp.float32)
    with pytest.raises(ValueError, match=f"^{re.escape(message.replace('attention:', 'attend:'))}$"):
        rj.attend(x, x, x, ring, implementation=name)


def test_calls_take_what_the_table_says(table):
    """End to end: a named one that cannot run raises before anything is computed; one that can is the one that runs."""
    x = jnp.ones((1, 2, 1, 4))
    window = rj.Window.causal(2)
    ring = rj.RingBuffer.empty(1, 1, 4, window, slack=1, dtype=jnp.float32)
    with pytest.raises(NotImplementedError, match=r"^attention: implementation 'picky' cannot run this call\."):
        rj.attention(x, x, x, window, implementation="picky")
    with pytest.raises(NotImplementedError, match=r"^attend: implementation 'picky' cannot run this call\."):
        jax.eval_shape(lambda x: rj.attend(x, x, x, ring, implementation="picky"), x)
    np.testing.assert_array_equal(rj.attention(x, x, x, window), 1.0)  # None passes over it

    table["picky"].unsupported = lambda problem: []
    np.testing.assert_array_equal(rj.attention(x, x, x, window), 7.0)
    np.testing.assert_array_equal(rj.attention(x, x, x, window, implementation="xla"), 1.0)
    np.testing.assert_array_equal(rj.attend(x, x, x, ring)[0], 7.0)


def test_facts_are_those_of_the_call(table):
    """What an implementation is asked about: shapes, dtypes, options and the device, all static."""
    asked = []
    table["picky"].unsupported = lambda problem: asked.append(problem) or ["no"]
    q, k, v = (
        jnp.ones((2, 3, 4, 8), jnp.bfloat16),
        jnp.ones((2, 5, 2, 8), jnp.bfloat16),
        jnp.ones((2, 5, 2, 6), jnp.bfloat16),
    )
    jax.eval_shape(
        lambda q, k, v, n: rj.attention(q, k, v, rj.Window(2, 1), softcap=3.0, sink_logits=n, q_offset=4),
        q,
        k,
        v,
        q[0, 0, :, 0],
    )
    shapes = {"batch": 2, "queries": 3, "keys": 5, "heads": 4, "kv_heads": 2, "head_dim": 8, "value_dim": 6}
    dtypes = {"q_dtype": "bfloat16", "kv_dtype": "bfloat16", "out_dtype": "bfloat16"}
    options = {"q_offset": 4, "scale": 8**-0.5, "softcap": 3.0, "sink_logits": True}
    device = {"platform": "cpu", "device_kind": jax.devices()[0].device_kind}
    if jax.default_backend() == "cpu":
        assert asked[-1] == Problem(**shapes, **dtypes, window=rj.Window(2, 1), **options, **device, lse=False)
    ring = rj.RingBuffer.empty(2, 2, 8, rj.Window.causal(4, 1), slack=2, value_dim=6, dtype=jnp.bfloat16)
    jax.eval_shape(lambda q, k, v: rj.attend(q, k, v, ring), q, k[:, :3], v[:, :3])
    assert asked[-1].is_ring and asked[-1].keys == ring.capacity and asked[-1].slack == 2
    assert asked[-1].lse, "only `attention` without return_lse reads none"
