"""A chunk in one launch, where an implementation offers that: `extends` and `extend`, and what is derived from them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ringjax as rj
from ringjax import Window, _attend, _attention, _kernels
from ringjax._kernels import mosaic, xla
from ringjax._kernels.problem import Problem

NEW = tuple(int(part) for part in jax.__version__.split(".")[:2]) >= (0, 11)
needs_new_jax = pytest.mark.skipif(not NEW, reason="Mosaic GPU as used here needs jax >= 0.11")
B, N, K, H = 3, 4, 2, 8


class Offering:
    """xla, with a launch that counts its calls."""

    name = "offering"
    unsupported, forward, backward = (staticmethod(getattr(xla, x)) for x in ("unsupported", "forward", "backward"))

    def __init__(self):
        self.calls = []

    def extends(self, problem):
        return problem.queries > 5

    def extend(self, problem, rows, q, k, v, ring_k, ring_v, sink_logits):
        self.calls.append(problem)
        ring = rj.RingBuffer(ring_k, ring_v, rows.length, rows.written, problem.window, problem.slack)
        options = {"sink_logits": sink_logits, "lengths": rows.q_length, "softcap": problem.softcap}
        out, lse, _ = _attend.attend_with_lse(
            "extend", q, k, v, ring, scale=problem.scale, implementation="xla", config=None, **options
        )
        return out, lse


@pytest.fixture
def offering(monkeypatch):
    made = Offering()
    monkeypatch.setitem(_kernels.IMPLEMENTATIONS, made.name, made)
    return made


def a_call(chunk, window, slack=0, seed=0):
    """Random tokens and a ring: one row is empty, one half full, one has wrapped and was rolled back by the slack."""
    keys = jax.random.split(jax.random.key(seed), 5)
    ring = rj.RingBuffer.empty(B, K, H, window, slack=slack, dtype="float32")
    k, v = (jax.random.normal(key, ring.k.shape) for key in keys[3:])
    at = jnp.array([0, 6, 77], jnp.int32)
    ring = dataclasses.replace(ring, k=k, v=v, length=at, written=at + jnp.array([0, 0, slack], jnp.int32))
    shapes = ((B, chunk, heads, H) for heads in (N, K, K))
    return tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=False)), ring


WINDOWS = [Window.causal(10), Window.causal(10, sinks=3), Window(9, 2), Window.causal(1)]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_a_chunk_is_one_launch_and_its_gradient_is_exact(window, offering):
    """In ragged rows too. The gradient is that of the ring's tokens in order, or, with sinks, of two parts."""
    tokens, ring = a_call(14, window, slack=2)
    lengths = jnp.array([14, 3, 9], jnp.int32)
    sinks = jnp.linspace(-1.0, 1.0, N)

    def loss(tokens, stores, sinks, implementation):
        before = dataclasses.replace(ring, k=stores[0], v=stores[1])
        given = {"lengths": lengths, "sink_logits": sinks, "softcap": 2.0, "implementation": implementation}
        out, after = rj.attend(*tokens, before, **given)
        return (out**2).sum() + (after.v**2).sum(), out

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True), static_argnums=3)
    (_, out), found = run(tokens, (ring.k, ring.v), sinks, "offering")
    assert not offering.calls, "a derivative takes no launch that has none"
    (_, exact_out), exact = run(tokens, (ring.k, ring.v), sinks, "xla")
    alone = jax.jit(loss, static_argnums=3)(tokens, (ring.k, ring.v), sinks, "offering")[1]
    assert [problem.queries for problem in offering.calls] == [14]
    for got in (out, alone):
        np.testing.assert_allclose(got, exact_out, atol=2e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), found, exact)


def test_slots_that_nobody_sees_may_hold_nan_in_the_gradient_too(offering):
    tokens, ring = a_call(14, Window.causal(10), slack=2)
    unseen = (ring.positions() < ring.length[:, None] - 9)[:, None, :, None]

    @jax.jit
    def gradients(hole):
        stores = [jnp.where(unseen, hole, x) for x in (ring.k, ring.v)]

        def loss(tokens, stores):
            before = dataclasses.replace(ring, k=stores[0], v=stores[1])
            return (rj.attend(*tokens, before, implementation="offering")[0] ** 2).sum()

        return jax.grad(loss, argnums=(0, 1))(tokens, stores)

    jax.tree.map(np.testing.assert_array_equal, gradients(jnp.nan), gradients(0.0))


def test_a_batch_of_calls_is_each_of_them(offering):
    tokens, ring = a_call(14, Window.causal(10))
    queries = jnp.stack([tokens[0], tokens[0] + 1])

    def call(q, implementation="offering"):
        return rj.attend(q, *tokens[1:], ring, implementation=implementation)[0]

    def wrong(problem, rows, q, *others):
        return jnp.full_like(q, jnp.nan), jnp.zeros((q.shape[0], q.shape[2], q.shape[1]))

    offering.extend = wrong
    found = jax.jit(jax.vmap(call))(queries)
    exact = [call(q, "xla") for q in queries]
    np.testing.assert_allclose(found, exact, atol=2e-6)


def test_layers_of_one_shape_are_traced_once(offering):
    tokens, ring = a_call(14, Window.causal(10), slack=1)

    def layers(ring):
        out, ring = rj.attend(*tokens, ring, implementation="offering")
        return out, *rj.attend(*tokens, ring, implementation="offering")

    jax.eval_shape(layers, ring)
    assert len(offering.calls) == 1


def test_what_is_not_offered_takes_two_parts(offering):
    tokens, ring = a_call(4, Window.causal(10))
    out, _ = rj.attend(*tokens, ring, implementation="offering")
    assert not offering.calls
    np.testing.assert_array_equal(out, rj.attend(*tokens, ring, implementation="xla")[0])


@needs_new_jax
@pytest.mark.parametrize("dtypes, launches", [(("bfloat16",) * 2, 1), (("bfloat16", "int8"), 2), (("float32",) * 2, 0)])
def test_on_a_hopper_a_chunk_is_one_kernel(dtypes, launches, monkeypatch):
    """As `attend` is called: lowered for a GPU that is pretended. A quantised ring is read by the decode kernel."""
    monkeypatch.setattr(_attention, "_device", lambda x: ("gpu", "NVIDIA H200"))
    dtype, stored = dtypes
    ring = jax.eval_shape(lambda: rj.RingBuffer.empty(2, 2, 64, Window.causal(300, sinks=2), slack=3, dtype=stored))
    q, k = (jax.ShapeDtypeStruct((2, 100, heads, 64), dtype) for heads in (4, 2))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        traced = jax.jit(lambda *arrays: rj.attend(*arrays)).trace(q, k, k, ring)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == launches
    assert ("in one launch of 'mosaic'" in rj.explain(q, k, k, ring).path) == (launches == 1)


@needs_new_jax
def test_a_few_tokens_are_for_the_decode_kernel():
    """Up to twice the queries of a kv head that it takes at once."""
    facts = {"batch": 1, "keys": 300, "heads": 8, "kv_heads": 2, "window": Window.causal(300), "layout": "ring"}
    facts |= dict.fromkeys(("q_dtype", "kv_dtype", "out_dtype"), "bfloat16") | {"q_offset": None}
    for head_dim, most in ((64, 32), (128, 32), (256, 16)):
        few = Problem(**facts, queries=most, head_dim=head_dim, value_dim=head_dim)
        assert not mosaic.extends(few)
        more = dataclasses.replace(few, queries=most + 1)
        assert mosaic.extends(more)
        assert not mosaic.extends(dataclasses.replace(more, q_stride=0))
        assert not mosaic.extends(dataclasses.replace(more, kv_dtype="int8"))
        assert not mosaic.extends(dataclasses.replace(more, layout="linear", q_offset=0))


@needs_new_jax
def test_who_differentiates_what_the_kernels_computed():
    """Padding counts for the backward kernels by its segments only, and so do sinks that are not the first keys."""
    facts = {"batch": 1, "queries": 9, "keys": 9, "heads": 2, "kv_heads": 2, "head_dim": 64, "value_dim": 64}
    facts |= dict.fromkeys(("q_dtype", "kv_dtype"), "bfloat16") | {"platform": "gpu", "device_kind": "NVIDIA H200"}
    problem = Problem(**facts, out_dtype="float32", window=Window.causal(5), ragged=True, segments=True)
    assert not mosaic.unsupported(problem) and mosaic.differentiates(problem)
    assert not mosaic.differentiates(dataclasses.replace(problem, segments=False))
    assert not mosaic.differentiates(dataclasses.replace(problem, window=Window.causal(5, sinks=1)))
