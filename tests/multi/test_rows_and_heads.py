"""Rows and kv heads split over a mesh: the same numbers, the same layout, and nothing sent."""

import types
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import Partial
from on_meshes import AUTO, EXPLICIT, assert_same, mesh_of, normal, put, sent, spec_of

import ringjax as rj
from ringjax._kernels import IMPLEMENTATIONS, xla
from ringjax.sharding import ring_shardings, shard_rings

B, T, N, K, H = 8, 24, 4, 2, 8
WINDOW = rj.Window.causal(7, sinks=2)
LAYOUTS = {  # a mesh, and the axes of rows and of heads
    "rows": (partial(mesh_of, AUTO, d=8), "d", None),
    "rows and heads": (partial(mesh_of, AUTO, d=4, m=2), "d", "m"),
    "explicit": (partial(mesh_of, EXPLICIT, d=4, m=2), "d", "m"),
    "two axes of rows": (partial(mesh_of, d=2, e=2, m=2), ("d", "e"), "m"),  # as jax.make_mesh makes it
}
both_kinds = pytest.mark.parametrize("layout", ["rows and heads", "explicit"])


def tokens(mesh=None, rows=None, heads=None, length=T, seed=0, kv_heads=K):
    made = [normal(B, length, n, H, seed=seed + i) for i, n in enumerate((N, kv_heads, kv_heads))]
    return made if mesh is None else [put(mesh, x, rows, None, heads) for x in made]


def empty(slack=0, kv_heads=K):
    return rj.RingBuffer.empty(B, kv_heads, H, WINDOW, slack=slack, dtype=jnp.float32)


def assert_ring_layout(ring, rows, heads):
    want = {3: (rows, heads), 1: (rows,)}
    for x in jax.tree.leaves(ring):
        assert spec_of(x) == tuple(axes for axes in want[min(x.ndim, 3)] if axes is not None)


@pytest.mark.parametrize("layout", ["rows", "explicit", "two axes of rows"])
def test_attention_and_its_gradients(layout):
    make, rows, heads = LAYOUTS[layout]
    ids = np.sort(np.random.default_rng(0).integers(0, 3, (B, T)).astype(np.int32), axis=1)
    ids[0, -5:] = -1

    @jax.jit
    def gradients(q, k, v, ids):
        def loss(q, k, v):
            out, lse = rj.attention(q, k, v, WINDOW, segment_ids=ids, softcap=3.0, return_lse=True)
            return (out * jnp.cos(out)).sum() + jnp.where(lse == -jnp.inf, 0.0, jnp.sin(lse)).sum(), (out, lse)

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)

    mesh = make()
    poisoned = (np.where(ids[:, :, None, None] < 0, np.float32(np.nan), x) for x in tokens())  # what is padding
    arguments = *(put(mesh, x, rows, None, heads) for x in poisoned), put(mesh, ids, rows)
    (dq, dk, dv), (out, lse) = got = gradients(*arguments)
    assert_same(got, gradients(*tokens(), ids))
    kept = (rows, None, heads) if heads else (rows,)
    assert [spec_of(x) for x in (dq, dk, dv, out)] == [kept] * 4
    assert spec_of(lse) == ((rows, heads) if heads else (rows,))
    assert sent(gradients, *arguments) == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_and_a_chunk_into_a_ring(layout):
    make, rows, heads = LAYOUTS[layout]
    mesh = make()

    @jax.jit
    def run(ring, token, chunk, lengths, sink_logits):
        first, ring = rj.attend(*token, ring, lengths=lengths)
        second, ring = rj.attend(*chunk, ring, sink_logits=sink_logits)
        return first, second, ring

    ring = shard_rings(empty, mesh, batch_axis=rows, heads_axis=heads)
    lengths, sinks = np.array([1, 0] * 4, np.int32), normal(N)
    parts = [(tokens(*m, length=1), tokens(*m, length=13, seed=9)) for m in ((mesh, rows, heads), ())]
    arguments = ring, *parts[0], put(mesh, lengths, rows), put(mesh, sinks, heads)
    got, wanted = run(*arguments), run(empty(), *parts[1], lengths, sinks)
    assert_same(got, wanted)
    assert [spec_of(x) for x in got[:2]] == [(rows, None, heads) if heads else (rows,)] * 2
    assert_ring_layout(got[2], rows, heads)
    assert sent(run, *arguments) == []


def test_an_array_that_is_split_by_in_shardings_alone():
    """No type tells of it, and yet nothing is gathered."""
    mesh = mesh_of(AUTO, d=4, m=2)
    split = NamedSharding(mesh, P("d", None, "m"))
    run = jax.jit(partial(rj.attention, window=WINDOW), in_shardings=split)
    assert_same(run(*tokens()), jax.jit(partial(rj.attention, window=WINDOW))(*tokens()))
    assert sent(run, *tokens()) == []


def test_more_devices_than_kv_heads():
    """Each device has some query heads of one kv head; of the gradients, its keys' are summed, and nothing else."""
    mesh = mesh_of(AUTO, d=2, m=4)

    @jax.jit
    def run(q, k, v):
        def loss(q, k, v):
            out = rj.attention(q, k, v, WINDOW)
            return (out * jnp.cos(out)).sum(), out

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)

    q, k, v = tokens()
    arguments = put(mesh, q, "d", None, "m"), put(mesh, k, "d"), put(mesh, v, "d")
    got = run(*arguments)
    assert_same(got, run(q, k, v))
    assert spec_of(got[1]) == ("d", None, "m")
    names = {name for name, _ in sent(run, *arguments)}
    assert names == {"all-reduce"}


def test_a_batch_of_calls_on_a_mesh():
    mesh = mesh_of(AUTO, d=4, m=2)
    run = jax.jit(jax.vmap(partial(rj.attention, window=WINDOW)))
    two = [np.stack([x, x[::-1]]) for x in tokens()]
    got = run(*(put(mesh, x, None, "d", None, "m") for x in two))
    assert_same(got, run(*two))


@both_kinds
def test_the_methods_of_a_ring_keep_its_layout(layout):
    make, rows, heads = LAYOUTS[layout]
    mesh = make()
    _, k, v = tokens(length=15)
    other = jax.tree.map(lambda x: x[:1], empty(slack=2).append(k[:, :5], v[:, :5]))
    order = np.array([3, 3, 0, 7, 1, 2, 4, 5], np.int32)

    @jax.jit
    def methods(ring, k, v, other):
        ring = ring.append(k, v).insert(2, other).rollback(1)
        exported = ring.export()
        return ring, rj.RingBuffer.restore(exported, WINDOW, slack=2), exported

    split = shard_rings(empty(slack=2), mesh, batch_axis=rows, heads_axis=heads)
    got = methods(split, *(put(mesh, x, rows, None, heads) for x in (k, v)), other)
    wanted = methods(empty(slack=2), k, v, other)
    assert_same(got, wanted, atol=0)
    for ring in got[:2]:
        assert_ring_layout(ring, rows, heads)
    assert spec_of(got[2].k) == (rows, None, heads)
    selected = got[0].select(order)
    assert_same(selected, wanted[0].select(order), atol=0)
    assert_ring_layout(selected, rows, heads)


def test_a_ring_is_restored_onto_another_mesh(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        _, k, v = tokens()
        ring = empty().append(k, v)
        there, here = mesh_of(AUTO, d=4, m=2), mesh_of(AUTO, d=2, m=2, unused=2)
        split = shard_rings(ring, there, batch_axis="d", heads_axis="m")
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "ring", split)
            checkpointer.wait_until_finished()
            layout = ring_shardings(ring, here, batch_axis="d", heads_axis="m")
            shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), ring, layout)
            again = checkpointer.restore(tmp_path / "ring", shapes)
    assert_same(again, ring, atol=0)
    assert again.k.sharding == layout.k
    assert_ring_layout(again, "d", "m")


VOCABULARY, WIDTH = 32, 16
PARAMS = {
    "embed": normal(VOCABULARY, WIDTH) / 4,
    **{name: normal(WIDTH, n, H, seed=i) for i, (name, n) in enumerate({"q": N, "k": K, "v": K}.items())},
    "out": normal(N, H, WIDTH) / 5,
}


def model(params, tokens, ring, *, lengths=None, layout=None):
    """One layer; on an `Explicit` mesh it says how a sum over heads and a look-up are laid out."""
    said = {} if layout is None else {"out_sharding": layout}
    x = params["embed"].at[tokens].get(**said)
    q, k, v = (jnp.einsum("btd,dnh->btnh", x, params[name]) for name in "qkv")
    attended, ring = rj.attend(q, k, v, ring, lengths=lengths)
    x = x + jnp.einsum("btnh,nhd->btd", attended, params["out"], **said)
    return jnp.einsum("btd,vd->btv", x, params["embed"]), ring


def params_on(mesh, rows, heads):
    specs = {"embed": P(), "q": P(None, heads), "k": P(None, heads), "v": P(None, heads), "out": P(heads)}
    return {name: put(mesh, x, *specs[name]) for name, x in PARAMS.items()}


def test_generate():
    """On `Explicit` axes; on `Auto` ones tests/test_sharding.py sees the example do it."""
    make, rows, heads = LAYOUTS["explicit"]
    mesh = make()
    rng = np.random.default_rng(0)
    prompt, lengths = rng.integers(0, VOCABULARY, (B, 11)).astype(np.int32), np.arange(4, 12, dtype=np.int32)
    run = partial(rj.generate, max_new_tokens=6, prefill_size=4)
    wanted = run(Partial(model, PARAMS), empty(), prompt, lengths=lengths)
    with jax.set_mesh(mesh):
        step = Partial(partial(model, layout=P(rows)), params_on(mesh, rows, heads))
        ring = shard_rings(empty, batch_axis=rows, heads_axis=heads)
        got = run(step, ring, put(mesh, prompt, rows), lengths=put(mesh, lengths, rows))
    assert_same(got.tokens, wanted.tokens, atol=0)
    assert_same(got.state, wanted.state)
    assert_ring_layout(got.state, rows, heads)


@cache
def chunked_gradients():
    """One function for all meshes: on one device it is compiled once."""

    def loss(params, chunk, ring):
        logits, ring = model(params, chunk, ring)
        return (logits * jnp.cos(logits)).mean(), ring

    return jax.jit(rj.chunked_value_and_grad(loss, chunk_size=8))


@pytest.mark.parametrize(
    ("sizes", "rows", "heads"),
    [({"d": 8}, "d", None), ({"d": 4, "m": 2}, "d", "m"), ({"d": 2, "e": 2, "m": 2}, ("d", "e"), "m")],
    ids=["rows", "rows and heads", "two axes of rows"],
)
def test_training_in_chunks(sizes, rows, heads):
    """Gradients flow back through rings that are split."""
    mesh = mesh_of(AUTO, **sizes)
    stream = np.random.default_rng(0).integers(0, VOCABULARY, (B, 24)).astype(np.int32)
    run = chunked_gradients()
    ring = shard_rings(empty(), mesh, batch_axis=rows, heads_axis=heads)
    (value, after), gradients = run(params_on(mesh, rows, heads), ring, put(mesh, stream, rows))
    assert_same(((value, after), gradients), run(PARAMS, empty(), stream))
    assert_ring_layout(after, rows, heads)
    assert spec_of(gradients["k"]) == ((None, heads) if heads else ())


def test_on_a_mesh_no_implementation_writes_the_tokens_itself(monkeypatch):
    """XLA would gather the ring for it; in a `shard_map` each device has its own, and it may."""

    def append_attend(*_):
        raise AssertionError("called on a mesh")

    new = types.SimpleNamespace(**vars(xla) | {"writes": lambda _: True, "append_attend": append_attend})
    monkeypatch.setitem(IMPLEMENTATIONS, "xla", new)
    attend = partial(rj.attend, implementation="xla")
    run, mesh = jax.jit(attend), mesh_of(AUTO, d=4, m=2)
    rings = jax.tree.map(lambda x: P("d") if x.ndim == 1 else P("d", "m"), empty())
    each = P("d", None, "m")
    apart = jax.shard_map(attend, mesh=mesh, in_specs=(each, each, each, rings), out_specs=(each, rings))
    with pytest.raises(AssertionError, match="called on a mesh"):
        jax.eval_shape(apart, *tokens(length=1), empty())
    arguments = *tokens(mesh, "d", "m", length=1), shard_rings(empty(), mesh, batch_axis="d", heads_axis="m")
    assert sent(run, *arguments) == []
