"""A decoder's call reads its own ring and the encoder's in one launch: on a CPU, in Mosaic's interpreter, by its tiles.

tests/test_gpu_decode.py has the same on the GPU it is for.
"""

import dataclasses
from functools import cache, partial

import beside_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import ring_cases
from ring_cases import RingCase
from test_mosaic_decode import Offering, interpret, needs_new_jax, tiles_of  # noqa: F401 (a fixture)

import ringjax as rj
from ringjax import Window, _kernels
from ringjax._kernels import mosaic, xla
from ringjax._kernels import mosaic_ring_walk as ring_walk
from ringjax._kernels.problem import Memory
from ringjax._merge import apply_sinks
from ringjax._slots import position_in_slot

OWN = RingCase(
    "own",
    Window.causal(180, sinks=5),
    slack=7,
    batch=6,
    heads=4,
    kv_heads=1,
    ragged=True,
    sink_logits=True,
    softcap=3.0,
    rolled_back=True,
)
MEMORY = OWN.replace(
    window=Window(126, 126, sinks=2), slack=0, memory=True, out_dtype="float32", sink_logits=False, rolled_back=False
)
CHUNK = OWN.replace(name="chunk", queries=4, batch=3, dtype="float16", window=Window.causal(119, sinks=2), softcap=None)
BESIDE = {
    "token": (OWN, MEMORY, MEMORY.replace(window=Window.causal(60), slack=4, rolled_back=True)),
    "chunk": (
        CHUNK,
        MEMORY.replace(queries=4, batch=3, dtype="float16", window=Window(63, 63), softcap=None),
    ),
    "int8": (
        OWN.replace(name="int8", kv_dtype="int8", window=Window.causal(244, sinks=5)),
        MEMORY.replace(kv_dtype="int8", window=Window(127, 127)),
    ),
}


@needs_new_jax
@pytest.mark.parametrize("name", BESIDE)
def test_one_softmax_in_the_interpreter(name, interpret):  # noqa: F811
    case, *memories = BESIDE[name]
    made = beside_cases.make(case, memories)
    own = made.own
    assert mosaic.writes(case.problem, *beside_cases.problems(made.memories))
    arrays = jax.tree.map(jnp.asarray, (own.q, own.k, own.v, *own.before, own.sinks))
    out, lse, *ring = mosaic.append_attend(
        case.problem, own.rows_before, *arrays, made.memories, tiles=tiles_of(case), interpret=interpret
    )
    beside_cases.check(made, out, lse)
    ring_cases.check_ring(own, *ring)


@pytest.mark.parametrize("splits", [1, 2, 8])
@pytest.mark.parametrize("block", [4, 7])
def test_every_visible_tile_of_every_ring_is_one_programs(splits, block):
    """In rings of random sizes and states; a program's tiles go on from ring to ring, and the newest's comes last."""
    rng = np.random.default_rng(splits)
    for _ in range(12):
        cases, rows, visible = [], [], []
        for i in range(3):
            sinks, size, slack = rng.integers(0, 6), rng.integers(1, 40), rng.integers(0, 9)
            case = OWN.replace(window=Window(int(size) - 1, None if i else 0, int(sinks)), slack=int(slack))
            length = int(rng.choice([0, rng.integers(1, 200)]))
            written = length + int(rng.integers(0, slack + 1))
            problem = dataclasses.replace(case.problem, q_stride=0)
            numbers = map(jnp.int32, (length - 1, 1, length, written))
            rows.append(jax.tree.map(jnp.int32, ring_walk.row(problem, *numbers)))
            held = position_in_slot(
                np.arange(case.capacity), length, written, sinks=sinks, slack=slack, capacity=case.capacity
            )
            seen = (held >= 0) & ((held > length - 1 - size) | (held < sinks))
            visible.append(sorted(set((np.flatnonzero(seen) // block).tolist())))
            cases.append((problem, sinks + max(length - sinks - 1, 0) % (case.capacity - sinks)))
        found, counts = [[], [], []], []
        for split in range(splits):
            problems = [problem for problem, _ in cases]
            shares = ring_walk.shares(problems, rows, split=jnp.int32(split), splits=splits, block_size=block)
            newest = cases[0][1]
            shares[0] = shares[0].ending_with(jnp.int32(newest))
            visited = [share.tile(jnp.arange(int(share.count), dtype=jnp.int32)).tolist() for share in shares]
            counts.append(sum(map(len, visited)))
            assert newest // block not in visited[0][:-1]
            for ring, tiles in zip(found, visited, strict=True):
                ring += tiles
        assert [sorted(ring) for ring in found] == visible
        assert max(counts) == -(-sum(counts) // splits)


@needs_new_jax
@pytest.mark.parametrize("name", BESIDE)
def test_it_lowers_for_cuda_as_one_launch(name):
    """Which writes into the call's own ring, and into nothing of the memories."""
    case, *memories = BESIDE[name]
    made = jax.eval_shape(partial(_stores, case, memories))

    def call(tokens, own, others):
        *stores, counts = own
        rows = ring_cases.Rows(q_start=counts["length"], **counts)
        beside = [
            Memory(memory.problem, ring_cases.Rows(**counts), k, v)
            for memory, (k, v, counts) in zip(memories, others, strict=True)
        ]
        return mosaic.append_attend(case.problem, rows, *tokens, *stores, None, beside)

    case = case.replace(sink_logits=False, ragged=False)
    memories = [memory.replace(ragged=False) for memory in memories]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        text = jax.jit(call).trace(*made).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 1
    written = 2 + 2 + (2 if case.kv_dtype else 0)  # keys, values, two counters, scales
    assert text.count("#stablehlo.output_operand_alias") == written


def _stores(case, memories):
    def ring(case):
        empty = rj.RingBuffer.empty(
            case.batch,
            case.kv_heads,
            case.head_dim,
            case.window,
            slack=case.slack,
            dtype=case.kv_dtype or case.dtype,
        )
        names = ("length", "written", "k_scale", "v_scale")
        return empty.k, empty.v, {name: getattr(empty, name) for name in names}

    shapes = ((case.batch, case.queries, n, case.head_dim) for n in (case.heads, case.kv_heads, case.kv_heads))
    return tuple(jnp.zeros(shape, case.dtype) for shape in shapes), ring(case), [ring(x) for x in memories]


@needs_new_jax
def test_which_memories_it_reads():
    problem, memory = OWN.problem, MEMORY.problem
    assert mosaic.writes(problem, memory, memory)
    wrong = [{"kv_dtype": "int8"}, {"q_stride": 1}, {"head_dim": 72}, {"softcap": 1.0}, {"platform": "cpu"}]
    for changes in wrong:
        assert not mosaic.writes(problem, memory, dataclasses.replace(memory, **changes))


# --- who takes the one launch ------------------------------------------------------------------------------------


class Together(Offering):
    """One launch of `Offering`'s that reads memories too."""

    def writes(self, problem, *memories):
        return problem.queries < 4

    def append_attend(self, problem, rows, q, k, v, ring_k, ring_v, sink_logits, memories=()):
        own = dataclasses.replace(problem, out_dtype="float32", sink_logits=False)
        out, lse, *ring, after = super().append_attend(own, rows, q, k, v, ring_k, ring_v, None)
        self.calls[-1] = len(memories)
        parts = [(out, lse), *(xla.forward(x.problem, x.rows, q, x.k, x.v, None) for x in memories)]
        valid = (after.written - after.length <= problem.slack)[:, None, None]
        outs, lses = zip(*parts, strict=True)
        out, lse = rj.merge(outs, [jnp.where(valid, x, -jnp.inf) for x in lses], return_lse=True)
        out = out if sink_logits is None else apply_sinks(out, lse, sink_logits)
        return out.astype(problem.out_dtype), lse, *ring, after


@pytest.fixture
def offering(monkeypatch):
    made = Together()
    monkeypatch.setitem(_kernels.IMPLEMENTATIONS, made.name, made)
    return made


def tokens(count, seed=0, batch=2):
    keys = jax.random.split(jax.random.key(seed), 3)
    return tuple(jax.random.normal(key, (batch, count, n, 8)) for key, n in zip(keys, (4, 2, 2), strict=True))


@cache
def contents(forward_dtype):
    """A state whose three rings have wrapped, or have not, differently in each row."""
    config = rj.RingBufferConfig(buffer_size=9, slack=3, sinks=2, forward_dtype=forward_dtype, implementation="xla")

    @jax.jit
    def fill():
        state = rj.init_state(config, 2, kv_heads=2, head_dim=8, dtype=jnp.float32)
        rings = {
            name: getattr(state, name).append(*tokens(14, seed)[1:], lengths=jnp.array(lengths, jnp.int32))
            for seed, (name, lengths) in enumerate(
                {"forward": (14, 3), "backward": (1, 12), "feedback": (11, 5)}.items()
            )
        }
        return dataclasses.replace(state, **rings, last_calculated=rings["feedback"].length - 1)

    return fill()


def filled(forward_dtype=None, implementation="xla"):
    state = contents(forward_dtype)
    return dataclasses.replace(state, config=dataclasses.replace(state.config, implementation=implementation))


def decode(state, new, position=None, **options):
    position = state.last_calculated + 1 if position is None else position
    return rj.decode(*new, state, position=position, **options)


@pytest.mark.parametrize("forward_dtype, together", [(None, 2), ("int8", 1)])
def test_decode_takes_one_launch_for_all_rings_of_one_dtype(offering, forward_dtype, together):
    sinks, lengths = jnp.linspace(-1, 1, 4), jnp.array([2, 1], jnp.int32)
    results = []
    for name in ("offering", "xla"):
        state = filled(forward_dtype, name)
        offering.calls.clear()
        position = state.last_calculated + 1 - jnp.array([0, 2])  # one row rolls back
        step = jax.jit(partial(decode, lengths=lengths, sink_logits=sinks))
        out, state = step(state, tokens(2, 4), position=position)
        results.append((out, jax.tree.leaves(state)))
        assert offering.calls == ([together] if name == "offering" else [])
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), *results)
    jax.eval_shape(lambda: decode(filled(None, "offering"), tokens(4)))  # more than it writes
    assert offering.calls == []


def test_gradients_and_vmap_take_the_rings_apart(offering):
    """The gradient flows back into the ring that the encoder filled with `requires_grad`."""

    def both(state, new):
        def loss(ring, new):
            out, _ = decode(dataclasses.replace(state, backward=ring), new)
            return (out**2).sum()

        arrays = state.backward
        grads = jax.grad(lambda k, v, new: loss(dataclasses.replace(arrays, k=k, v=v), new), (0, 1, 2))
        batched = jax.vmap(lambda q: decode(state, (q, *new[1:]))[0])(jnp.stack([new[0], new[0] + 1]))
        return grads(arrays.k, arrays.v, new), batched

    def wrong(problem, rows, q, k, v, ring_k, ring_v, sink_logits, memories):
        lse = jnp.zeros((q.shape[0], q.shape[2], q.shape[1]))
        return jnp.full_like(q, jnp.nan), lse, ring_k, ring_v, rows

    wanted = jax.jit(both)(filled(None, "xla"), tokens(2))
    state = filled(None, "offering")
    offering.append_attend = wrong
    found = jax.jit(both)(state, tokens(2))
    assert np.abs(found[0][0]).max() > 0
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), found, wanted)


# --- in place ----------------------------------------------------------------------------------------------------


def test_certify_passes_on_a_decoders_loop():
    """Layers with states of their own, tokens one after the other: no ring is copied, the encoder's neither."""
    states = [
        rj.init_state(rj.RingBufferConfig(buffer_size=size), 2, kv_heads=2, head_dim=64, dtype=jnp.float32)
        for size in (300, 500)
    ]

    def loop(q, new, states):
        def token(carry, _):
            q, states = carry
            after = []
            for state in states:
                q, state = rj.decode(q, *new, state, position=state.last_calculated + 1)
                after.append(state)
            return (q, after), q

        (_, states), outs = jax.lax.scan(token, (q, states), None, length=5)
        return outs, states

    keys = jax.random.split(jax.random.key(0), 3)
    q, *new = (jax.random.normal(key, (2, 1, n, 64)) for key, n in zip(keys, (4, 2, 2), strict=True))
    found = rj.certify(loop, states, q, new)
    assert len(found.rings) == 12, "keys and values of three rings a layer"
