"""Sequences split over a mesh: the same numbers, and only what a window reaches is sent."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from on_meshes import AUTO, EXPLICIT, assert_same, mesh_of, normal, put, sent, spec_of

import ringjax as rj
from ringjax.sharding import (
    MeshAxes,
    ring_shardings,
    sequence_parallel_attend,
    sequence_parallel_attention,
    shard_rings,
)

B, T, N, K, H = 2, 64, 4, 2, 8
TOKENS = [normal(B, T, n, H, seed=i) for i, n in enumerate((N, K, K))]
W = rj.Window


def segments():
    ids = np.sort(np.random.default_rng(0).integers(0, 3, (B, T)).astype(np.int32), axis=1)
    ids[0, -5:] = -1
    return ids


CASES = {  # a mesh, the axes beside "s", a window, options
    "one neighbour": (partial(mesh_of, AUTO, s=8), {}, W.causal(5), {}),
    "all": (
        partial(mesh_of, EXPLICIT, d=2, s=4),
        {"batch_axis": "d"},
        W(40, 9, sinks=3),
        {"segment_ids": segments(), "sink_logits": normal(N), "softcap": 3.0, "scale": 0.4},
    ),
    "many sinks": (
        partial(mesh_of, d=2, m=2, s=2),
        {"batch_axis": "d", "heads_axis": "m"},
        W(3, 2, sinks=40),
        {"q_offset": 2},
    ),
    "right only": (partial(mesh_of, AUTO, d=2, s=4), {"batch_axis": "d"}, W(3, 12), {"q_offset": -5}),
}


def gradients(attention, options):
    """Output, lse, and gradients of both for q, k, v and the options that have some."""
    options = dict(options)
    learned = {name: options.pop(name) for name in ("sink_logits",) if name in options}

    def loss(q, k, v, learned):
        out, lse = attention(q, k, v, **learned, **options)
        return (out * jnp.cos(out)).sum() + jnp.where(lse == -jnp.inf, 0.0, jnp.sin(lse)).sum(), (out, lse)

    run = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))
    return run, learned


@pytest.mark.parametrize("case", CASES)
def test_attention_and_its_gradients(case):
    make, axes, window, options = CASES[case]
    mesh = make()
    split = partial(sequence_parallel_attention, window=window, mesh=mesh, axis="s", return_lse=True, **axes)
    run, learned = gradients(split, options)
    alone, _ = gradients(partial(rj.attention, window=window, return_lse=True), {"q_offset": 0} | options)
    layout = axes.get("batch_axis"), "s", axes.get("heads_axis")
    arguments = [put(mesh, x, *layout) for x in TOKENS]
    found, (out, lse) = run(*arguments, learned)
    assert_same((found, (out, lse)), alone(*TOKENS, learned))
    kept = layout if layout[2] else layout[:2]
    assert [spec_of(x) for x in (out, *found[:3])] == [kept] * 4
    if case == "one neighbour":
        # Keys and values of `left` tokens, and their gradients; nothing else, whatever the length.
        assert sent(run, *arguments, learned) == [("collective-permute", B * window.left * K * H * 4)] * 4


def test_what_is_sent_does_not_grow_with_the_sequence():
    mesh = mesh_of(AUTO, s=8)
    run = jax.jit(partial(sequence_parallel_attention, window=W.causal(13, sinks=3), mesh=mesh, axis="s"))
    counts = []
    for length in (64, 256):  # the window reaches two neighbours, then one
        shapes = [jax.ShapeDtypeStruct((1, length, n, H), jnp.float32) for n in (N, K, K)]
        found = sent(run, *shapes)
        assert {name for name, _ in found} == {"collective-permute"}
        counts.append(sum(size for _, size in found))
    # 12 tokens of the neighbours, and 3 sinks in each of 3 rounds.
    assert counts == [2 * (12 + 3 * 3) * K * H * 4] * 2


def test_low_precision_is_rounded_once():
    """Law 13's bound, against plain attention in the same dtype."""
    import cases

    case = cases.Case("sequence", W(40, 9), queries=T, keys=T, heads=N, kv_heads=K, dtype="bfloat16")
    arrays = cases.arrays(case)
    run = jax.jit(partial(sequence_parallel_attention, window=case.window, mesh=mesh_of(AUTO, s=8), axis="s"))
    exact, plain = cases.exact(case, arrays), cases.plain(case, arrays)
    cases.assert_close(run(*arrays[:3]), exact[0], plain[0], "output")


def test_a_prompt_leaves_the_ring_that_one_device_would_leave():
    """Bit for bit: short, long and ragged prompts, into empty rings and ones that have wrapped."""
    mesh, axes, sink_logits = mesh_of(d=2, s=4), {"batch_axis": "d"}, normal(N)
    split = jax.jit(partial(sequence_parallel_attend, mesh=mesh, axis="s", sink_logits=sink_logits, **axes))
    alone = jax.jit(partial(rj.attend, sink_logits=sink_logits))
    placed = [put(mesh, x, axes.get("batch_axis"), "s", axes.get("heads_axis")) for x in TOKENS]
    empty = rj.RingBuffer.empty(B, K, H, W(20, 2, sinks=6), slack=3, dtype=jnp.float32)
    before = jax.jit(rj.RingBuffer.append)
    for history, lengths in (([0, 0], [T, T]), ([9, 4], [T, 37]), ([2, 0], [3, 0]), ([9, 9], [0, 50])):
        history, lengths = (np.array(x, np.int32) for x in (history, lengths))
        ring = before(empty, *(normal(B, 9, K, H, seed=7 + i) for i in range(2)), lengths=history)
        on_mesh = shard_rings(ring, mesh, **axes)
        out, after = split(*placed, on_mesh, lengths=lengths)
        wanted, wanted_after = alone(*TOKENS, ring, lengths=lengths)
        assert_same(out, wanted)
        assert_same(after, wanted_after, atol=0)
        layout = ring_shardings(ring, mesh, **axes)
        assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), after, layout))


def test_gradients_flow_back_through_the_ring_of_a_split_chunk():
    mesh, ring = mesh_of(AUTO, s=8), rj.RingBuffer.empty(B, K, H, W.causal(9, sinks=2), dtype=jnp.float32)

    def loss(tokens, ring, attend):
        q, k, v = tokens
        out, ring = attend(q, k, v, ring.append(k[:, :8], v[:, :8]))
        return sum((x * jnp.cos(x)).sum() for x in (out, ring.k, ring.v))

    split = partial(sequence_parallel_attend, mesh=mesh, axis="s")
    got, wanted = (jax.jit(jax.grad(partial(loss, attend=f)))(TOKENS, ring) for f in (split, rj.attend))
    assert_same(got, wanted)


CAUSAL = W.causal(5)


def call(window=CAUSAL, *, length=T, tokens=None, **options):
    arguments = {"axis": "s", "mesh": mesh_of(AUTO, d=2, s=4)} | options
    tokens = [x[:, :length] for x in TOKENS] if tokens is None else tokens
    return lambda: sequence_parallel_attention(*tokens, window, **arguments)


def attend_call(length, window=CAUSAL, **options):
    ring = rj.RingBuffer.empty(B, K, H, window, dtype=jnp.float32)
    arguments = {"axis": "s", "mesh": mesh_of(AUTO, d=2, s=4)} | options
    return lambda: sequence_parallel_attend(*(x[:, :length] for x in TOKENS), ring, **arguments)


def rings(**options):
    ring = rj.RingBuffer.empty(B, K, H, W.causal(5), dtype=jnp.float32)
    return lambda: shard_rings(ring, mesh_of(AUTO, d=2, s=4), **options)


def explicit_length():
    mesh = mesh_of(EXPLICIT, s=8)
    return rj.attention(*(put(mesh, x, None, "s") for x in TOKENS), W.causal(5))


def explicit_head_dim():
    mesh = mesh_of(EXPLICIT, s=8)
    return rj.attention(*(put(mesh, x, None, None, None, "s") for x in TOKENS), W.causal(5))


S = "sequence_parallel_attention"
WRONG = [
    (call(axis="x"), ValueError, f"{S}: axis must name axes of the mesh, 'd', 's', got 'x'."),
    (call(axis=None), TypeError, f"{S}: axis must be the name of a mesh axis, got None."),
    (call(batch_axis="y"), ValueError, f"{S}: batch_axis must name axes of the mesh, 'd', 's', got 'y'."),
    (call(heads_axis="s"), ValueError, f"{S}: heads_axis must not be an axis that splits something else, got 's'."),
    (call(mesh=None), ValueError, f"{S}: mesh must have devices, got none."),
    (call(mesh=8), TypeError, f"{S}: mesh must be a jax.sharding.Mesh, got int."),
    (call(length=62), ValueError, f"{S}: the length must be a multiple of mesh axis 's', got 62 for 4 devices."),
    (
        call(heads_axis="s", axis="d"),
        ValueError,
        f"{S}: the kv heads must be a multiple of mesh axis 's', got 2 for 4 devices.",
    ),
    (
        call(tokens=[x[:1] for x in TOKENS], batch_axis="d"),
        ValueError,
        f"{S}: the batch must be a multiple of mesh axis 'd', got 1 for 2 devices.",
    ),
    (
        call(W.causal(T + 1)),
        ValueError,
        f"{S}: window must be shorter than the sequence on mesh axis 's', got left=64 for 64 tokens.",
    ),
    (
        call(W(3, None)),
        ValueError,
        f"{S}: window must be shorter than the sequence on mesh axis 's', got right=None for 64 tokens.",
    ),
    (call(length=1), ValueError, f"{S}: a decoding step must not be split over mesh axis 's', got T = 1."),
    (call(q_offset=jnp.arange(2)), TypeError, f"{S}: q_offset must be an int or None, got int32[2]."),
    (call(5), TypeError, f"{S}: window must be a Window, got int."),
    (
        call(tokens=[TOKENS[0], *(x[:, :32] for x in TOKENS[1:])]),
        ValueError,
        f"{S}: q and k must agree on length, got 64 and 32.",
    ),
    (
        attend_call(1),
        ValueError,
        "sequence_parallel_attend: a decoding step must not be split over mesh axis 's', got T = 1.",
    ),
    (
        attend_call(4, W.causal(5)),
        ValueError,
        "sequence_parallel_attend: window must be shorter than the sequence on mesh axis 's', got left=4 for 4 tokens.",
    ),
    (rings(batch_axis="x"), ValueError, "ring_shardings: batch_axis must name axes of the mesh, 'd', 's', got 'x'."),
    (
        rings(heads_axis="s"),
        ValueError,
        "ring_shardings: the kv heads must be a multiple of mesh axis 's', got 2 for 4 devices.",
    ),
    (explicit_length, ValueError, "attention: q must not be split over its length, got mesh axis 's'."),
    (explicit_head_dim, ValueError, "attention: q must not be split over its head_dim, got mesh axis 's'."),
    (
        lambda: MeshAxes("s", mesh=mesh_of(AUTO, d=8)).checked("call"),
        ValueError,
        "call: axis must name axes of the mesh, 'd', got 's'.",
    ),
]


@pytest.mark.parametrize(("wrong", "error", "first_line"), WRONG, ids=[line for _, _, line in WRONG])
def test_a_wrong_mesh_is_named(wrong, error, first_line):
    with pytest.raises(error) as caught:
        wrong()
    assert str(caught.value).splitlines()[0] == first_line


def test_messages_say_what_to_do():
    with pytest.raises(ValueError, match="pad the sequence at its end"):
        call(length=62)()
    with pytest.raises(ValueError, match="shard_rings"):
        call(length=1)()
    with pytest.raises(ValueError, match="sequence_parallel_attention"):
        explicit_length()


def test_a_flax_module_with_a_sequence_axis():
    """A prompt and a decoding step, as the same module without the axis."""
    linen = pytest.importorskip("ringjax.linen")
    mesh = mesh_of(AUTO, d=2, m=2, s=2)
    axes = MeshAxes(sequence="s", batch="d", heads="m", mesh=mesh)
    make = partial(linen.SlidingWindowAttention, N, 16, W.causal(9, sinks=1), num_kv_heads=K, use_sink_logits=True)
    split, alone = make(axes=axes), make()
    x = normal(B, T + 1, 16)
    variables = jax.jit(alone.init)(jax.random.key(0), x)

    def run(module, variables, x, buffer):
        whole, _ = module.apply(variables, x[:, :T], lengths=np.array([T, 50], np.int32))
        prompt, buffer = module.apply(variables, x[:, :T], buffer)
        step, buffer = module.apply(variables, x[:, T:], buffer)
        return whole, prompt, step, buffer

    rings = shard_rings(alone.init_buffer(B), mesh, batch_axis="d", heads_axis="m")
    got = jax.jit(partial(run, split))(variables, put(mesh, x, "d"), rings)
    assert_same(got, jax.jit(partial(run, alone))(variables, x, alone.init_buffer(B)))
    with pytest.raises(TypeError, match=r"^SlidingWindowAttention: axes must be a MeshAxes, got str\."):
        make(axes="s")
