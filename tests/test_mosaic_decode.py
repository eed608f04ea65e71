"""The Hopper decode kernel without a GPU: the tiles it visits, its results in Mosaic's interpreter, that it lowers.

The interpreter checks for races. It knows no clusters that store into each other, and no loads past an array's end:
tests/test_gpu_decode.py has splits and capacities of any size.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import ring_cases
from ring_cases import RingCase

import ringjax as rj
from ringjax import Window, _kernels
from ringjax._kernels import backward_of, mosaic, reasons_against, resolve, xla
from ringjax._kernels.tiles import AUTOMATIC, MosaicDecodeTiles, Tiles, merging_programs, mosaic_decode_tiles
from ringjax._schedule import slot_tiles
from ringjax._slots import INVALID, position_in_slot

NEW = tuple(int(part) for part in jax.__version__.split(".")[:2]) >= (0, 11)
needs_new_jax = pytest.mark.skipif(not NEW, reason="Mosaic GPU as used here needs jax >= 0.11")


@pytest.mark.parametrize("sinks", [0, 1, 5, 9])
@pytest.mark.parametrize("block", [1, 4, 7])
def test_the_tiles_visited_are_those_that_hold_what_is_seen(sinks, block):
    """By brute force over every length, every number of tokens in view, every number of pinned ones."""
    for around in (1, 2, 6, 11):
        capacity = sinks + around
        slots = np.arange(capacity)
        for length in range(3 * capacity):
            held = position_in_slot(slots, length, length, sinks=sinks, slack=0, capacity=capacity)
            pinned = min(length, sinks)
            newest = sinks + max(length - sinks - 1, 0) % around
            for count in range(min(max(length - sinks, 0), around) + 1):
                seen = (held >= max(sinks, length - count)) | ((held >= 0) & (held < pinned))
                found = slot_tiles(newest, count, pinned, sinks=sinks, capacity=capacity, block_size=block)
                visited = [*range(found.low), *range(found.first, found.end)]
                assert visited == sorted(set((slots[seen] // block).tolist())), (capacity, length, count)
                assert found.low <= found.first <= found.end


def test_tile_choices_fit_into_shared_memory_and_keep_what_was_asked():
    for programs in (1, 8, 64, 128, 1000):
        for rows in (8, 16, 64):
            sizes = [(2, 64), (2, 128), (1, 128), *([(2, 256), (1, 256)] if rows < 64 else [])]
            for itemsize, dim in sizes:
                facts = {"programs": programs, "slots": 5000, "rows": rows, "head_dim": dim, "value_dim": dim}
                found = mosaic_decode_tiles(AUTOMATIC, **facts, itemsize=itemsize)
                held = 2 * itemsize * found.stages * found.block_size * dim
                held += 4 * (found.splits - 1) * (dim + 128) * rows
                if itemsize == 1:
                    assert found.block_size == 128
                assert held + rows * (6 * dim + 2 * found.block_size + 256) <= 227 * 1024
                assert found.splits in (1, 2, 4, 8) and found.block_size % 64 == 0 and found.stages >= 1
                assert mosaic_decode_tiles(Tiles(block_size=64), **facts).block_size == 64
    # Of many queries, each of several programs merges some: as many programs then share a head's tiles.
    many = {"programs": 8, "slots": 4111, "rows": 64, "head_dim": 128, "value_dim": 128}
    alone, spread = (mosaic_decode_tiles(AUTOMATIC, **many, spread=x).splits for x in (False, True))
    assert (alone, spread) == (2, 8) and merging_programs(8, 64) == 8
    assert [merging_programs(8, rows) for rows in (8, 24, 40, 48)] == [1, 3, 5, 6] and merging_programs(2, 24) == 1
    # Few rows fill the machine with splits, many do not need them.
    small = {"slots": 4096, "rows": 8, "head_dim": 128, "value_dim": 128}
    assert mosaic_decode_tiles(AUTOMATIC, programs=8, **small).splits == 8
    assert mosaic_decode_tiles(AUTOMATIC, programs=128, **small).splits == 1


@needs_new_jax
@pytest.mark.parametrize("slack", [0, 1, 5])
@pytest.mark.parametrize("readers", [1, 8, 130])
def test_counters_are_told_while_programs_count_themselves_in(slack, readers):
    """For every state of a row, and any number of programs that have read it already, the sum may overflow."""
    from ringjax._kernels import mosaic_counters

    length = np.array([0, 1, 7, 10**6, 2**31 - 1 - 2 * (slack + 1) * readers], np.int32)[:, None]
    before = np.concatenate([length + np.arange(slack + 1, dtype=np.int32), np.full_like(length, INVALID)], axis=1)
    for arrived in range(readers):
        now = (before.astype(np.int64) + arrived * (slack + 1)).astype(np.uint32).view(np.int32)
        found = mosaic_counters.undisturbed(jnp.asarray(length), jnp.asarray(now), slack=slack, readers=readers)
        np.testing.assert_array_equal(found, before)


@pytest.fixture
def interpret():
    """Parameters of the interpreter; a test that failed leaves nothing behind for the next."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
    from jax.experimental.pallas import mosaic_gpu as plgpu

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield plgpu.InterpretGPUParams(detect_races=True)
    interpret_pallas_call.reset_gpu_interpret_mode_state()


SMALL = RingCase("small", Window.causal(128), batch=2, heads=4, kv_heads=1)
INTERPRETED = [
    SMALL.replace(
        name="everything",
        window=Window.causal(180, sinks=5),
        slack=7,
        ragged=True,
        sink_logits=True,
        softcap=3.0,
        rolled_back=True,
        batch=4,
        lengths=(3, 150, 1000, 1000),
    ),
    SMALL.replace(
        name="chunk",
        window=Window.causal(120, sinks=3),
        slack=5,
        queries=4,
        ragged=True,
        dtype="float16",
        lengths=(126, 1133),
    ),
]
# Where scales are read, the interpreter allows nothing past the ring's end; tiles have 128 slots then.
EIGHT_BITS = [
    INTERPRETED[0].replace(name="everything-8", window=Window.causal(244, sinks=5), kv_dtype="int8"),
    INTERPRETED[1].replace(
        name="chunk-8", window=Window.causal(120, sinks=3), kv_dtype="float8_e4m3fn", dtype="bfloat16"
    ),
]
MEMORY = SMALL.replace(name="memory", window=Window(127, 127), queries=2, memory=True, out_dtype="float32")


def tiles_of(case):
    return MosaicDecodeTiles(block_size=64 if case.kv_dtype is None else 128, stages=2)


@needs_new_jax
@pytest.mark.parametrize("case", [*INTERPRETED, *EIGHT_BITS, MEMORY], ids=str)
def test_reading_in_the_interpreter(case, interpret):
    made = ring_cases.make(case)
    assert not mosaic.unsupported(case.problem)
    arrays = jax.tree.map(jnp.asarray, (made.q, *made.after, made.sinks))
    out, lse = mosaic.forward(case.problem, made.rows_after, *arrays, tiles=tiles_of(case), interpret=interpret)
    ring_cases.check(made, out, lse)


@needs_new_jax
@pytest.mark.parametrize("case", [*INTERPRETED, *EIGHT_BITS], ids=str)
def test_writing_and_reading_in_the_interpreter(case, interpret):
    made = ring_cases.make(case)
    assert mosaic.writes(case.problem)
    arrays = jax.tree.map(jnp.asarray, (made.q, made.k, made.v, *made.before, made.sinks))
    out, lse, *ring = mosaic.append_attend(
        case.problem, made.rows_before, *arrays, tiles=tiles_of(case), interpret=interpret
    )
    ring_cases.check(made, out, lse)
    ring_cases.check_ring(made, *ring)


@pytest.mark.parametrize("case", [*INTERPRETED, *EIGHT_BITS, MEMORY], ids=str)
def test_xla_gives_the_same(case):
    """The twin of every path, on the same rings."""
    made = ring_cases.make(case)
    arrays = jax.tree.map(jnp.asarray, (made.q, *made.after, made.sinks))
    out, lse = jax.jit(lambda rows, *arrays: xla.forward(case.problem, rows, *arrays))(made.rows_after, *arrays)
    ring_cases.check(made, out, lse)


LOWERED = [
    RingCase("token", Window.causal(4096), batch=1, heads=32, kv_heads=8, head_dim=128, value_dim=128),
    RingCase("rows", Window.causal(1001, sinks=3), slack=6, batch=64, ragged=True, sink_logits=True, softcap=9.0),
    RingCase("256", Window.causal(1024), batch=4, heads=16, kv_heads=8, head_dim=256, value_dim=256, dtype="float16"),
    RingCase("narrow-heads", Window.causal(100), head_dim=80, value_dim=96),
    RingCase("chunk", Window.causal(1000), slack=15, queries=16, heads=32, kv_heads=8, head_dim=128, value_dim=128),
    RingCase("int8", Window.causal(1000), slack=3, heads=32, kv_heads=8, head_dim=128, value_dim=128, kv_dtype="int8"),
    RingCase(
        "float8", Window.causal(500, sinks=4), queries=3, slack=2, head_dim=80, ragged=True, kv_dtype="float8_e4m3fn"
    ),
    RingCase("memory", Window(999, 999), memory=True, out_dtype="float32", queries=5),
    RingCase("long-chunk", Window.causal(500, sinks=4), slack=99, queries=100, out_dtype="float32"),
]


@needs_new_jax
@pytest.mark.parametrize("case", LOWERED, ids=str)
def test_it_lowers_for_cuda(case):
    """Shapes, layouts and shared memory are checked on a machine without CUDA; of capacities of any size."""
    problem = case.problem
    assert not mosaic.unsupported(problem)
    shape = {"batch": case.batch, "chunk": case.queries, "slots": case.capacity}

    def spec(*sizes, dtype=case.dtype):
        return jax.ShapeDtypeStruct(tuple(shape.get(size, size) for size in sizes), dtype)

    q = spec("batch", "chunk", case.heads, case.head_dim)
    new = [spec("batch", "chunk", case.kv_heads, size) for size in (case.head_dim, case.value_dim)]
    stored = problem.kv_dtype
    ring = [spec("batch", case.kv_heads, "slots", size, dtype=stored) for size in (case.head_dim, case.value_dim)]
    count = spec("batch", dtype="int32")
    sinks = spec(case.heads, dtype="float32") if case.sink_logits else None
    rows = ring_cases.Rows(q_start=count, length=count, written=count, q_length=count if case.ragged else None)
    if problem.quantised:
        scale = spec("batch", case.kv_heads, "slots", dtype="float32")
        rows = rows._replace(k_scale=scale, v_scale=scale)

    def call(rows, q, new, ring, sinks):
        if mosaic.writes(problem):
            return mosaic.append_attend(problem, rows, q, *new, *ring, sinks)
        return mosaic.forward(problem, rows, q, *ring, sinks)

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        traced = jax.jit(call).trace(rows, q, new, ring, sinks)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 1, "one launch"
    assert ("output_operand_alias" in text) == mosaic.writes(problem)


ONE = LOWERED[0].problem


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"platform": "cpu"}, "needs a GPU"),
        ({"device_kind": "NVIDIA A100-SXM4-80GB"}, "Hopper"),
        ({"q_dtype": "float32", "kv_dtype": "float32", "out_dtype": "float32"}, "needs bfloat16"),
        ({"kv_dtype": "float16"}, "one dtype"),
        ({"kv_dtype": "int8", "head_dim": 72}, "multiples of 16"),
        ({"kv_dtype": "float8_e4m3fn", "q_dtype": "float16", "out_dtype": "float16"}, "for bfloat16 queries only"),
        ({"out_dtype": "float16"}, "one dtype"),
        ({"head_dim": 320}, "head_dim and value_dim <="),
        ({"value_dim": 100}, "multiples of 8"),
    ],
    ids=lambda x: None if isinstance(x, dict) else x,
)
def test_what_it_cannot_do_falls_to_xla(changes, reason):
    problem = dataclasses.replace(ONE, **changes)
    assert any(reason in found for found in reasons_against(problem)["mosaic"])
    assert resolve(problem, "attend", None) != "mosaic"
    with pytest.raises(NotImplementedError, match=reason):
        resolve(problem, "attend", "mosaic")


def test_who_differentiates_reading_a_ring():
    assert backward_of(ONE, "mosaic") == "xla"
    assert backward_of(dataclasses.replace(ONE, layout="linear", q_offset=0), "mosaic") == "mosaic"
    assert backward_of(ONE, "xla") == "xla"


@needs_new_jax
@pytest.mark.parametrize(
    "changes, answer",
    [
        ({}, True),
        ({"queries": 16, "heads": 32}, True),
        ({"queries": 17, "heads": 8}, False),  # tokens
        ({"queries": 16, "heads": 64}, False),  # queries of one kv head: two programs would read what one writes
        ({"queries": 8, "heads": 32, "kv_dtype": "int8"}, True),
        ({"queries": 9, "heads": 32, "kv_dtype": "int8"}, False),  # two parts of each
        ({"q_stride": 0}, False),
        ({"layout": "linear"}, False),
    ],
)
def test_what_it_writes_itself(changes, answer):
    assert mosaic.writes(dataclasses.replace(ONE, **changes)) is answer


class Offering:
    """xla, with a launch that writes and reads, which counts its calls."""

    name = "offering"
    unsupported, backward = staticmethod(xla.unsupported), staticmethod(xla.backward)
    forward = staticmethod(xla.forward)

    def __init__(self):
        self.calls = []

    def writes(self, problem):
        return problem.queries < 4

    def append_attend(self, problem, rows, q, k, v, ring_k, ring_v, sink_logits):
        self.calls.append(problem)
        scales = {"k_scale": rows.k_scale, "v_scale": rows.v_scale}
        ring = rj.RingBuffer(ring_k, ring_v, rows.length, rows.written, problem.window, problem.slack, **scales)
        after = ring.append(k, v, lengths=rows.q_length)
        rows = rows._replace(**{name: getattr(after, name) for name in ("length", "written", *scales)})
        return *xla.forward(problem, rows, q, after.k, after.v, sink_logits), after.k, after.v, rows


@pytest.fixture
def offering(monkeypatch):
    made = Offering()
    monkeypatch.setitem(_kernels.IMPLEMENTATIONS, made.name, made)
    return made


def ring_and_tokens(count):
    """Of random contents; one row has wrapped."""
    keys = jax.random.split(jax.random.key(count), 5)
    ring = rj.RingBuffer.empty(2, 2, 8, Window.causal(10, sinks=1), slack=5, dtype="float32")
    at = jnp.array([3, 50], jnp.int32)
    k, v = (jax.random.normal(key, ring.k.shape) for key in keys[3:])
    ring = dataclasses.replace(ring, k=k, v=v, length=at, written=at + 1)
    shapes = ((2, count, heads, 8) for heads in (4, 2, 2))
    return ring, tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=False))


def test_attend_takes_the_one_launch_where_it_is_offered(offering):
    """Traced once for all layers of one shape, and not for more tokens than it writes; the results are the same."""
    ring, few = ring_and_tokens(3)
    lengths = jnp.array([3, 1], jnp.int32)

    def steps(ring, implementation):
        first, ring = rj.attend(*few, ring, lengths=lengths, implementation=implementation)
        return first, rj.attend(*few, ring, lengths=lengths, implementation=implementation)

    found = jax.jit(steps, static_argnums=1)(ring, "offering")
    assert len(offering.calls) == 1
    jax.tree.map(np.testing.assert_array_equal, found, jax.jit(steps, static_argnums=1)(ring, "xla"))
    jax.eval_shape(lambda: rj.attend(*ring_and_tokens(4)[1], ring, implementation="offering"))
    assert len(offering.calls) == 1


def test_a_gradient_and_vmap_take_the_two_steps(offering):
    ring, few = ring_and_tokens(2)

    def both(few, ring, implementation):
        def loss(few):
            out, after = rj.attend(*few, ring, implementation=implementation)
            return (out**2).sum() + (after.v**2).sum()

        def call(q):
            return rj.attend(q, *few[1:], ring, implementation=implementation)

        return jax.grad(loss)(few), jax.vmap(call)(jnp.stack([few[0], few[0] + 1]))

    def wrong(problem, rows, q, k, v, ring_k, ring_v, sink_logits):
        lse = jnp.zeros((q.shape[0], q.shape[2], q.shape[1]))
        return jnp.full_like(q, jnp.nan), lse, ring_k, ring_v, rows

    offering.append_attend = wrong
    found = jax.jit(both, static_argnums=2)(few, ring, "offering")
    exact = jax.jit(both, static_argnums=2)(few, ring, "xla")
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), found, exact)


def test_a_gradient_of_queries_alone_goes_through_a_quantised_ring(offering):
    """Written in one launch or in two steps; a gradient of keys is refused either way."""
    _, (q, k, v) = ring_and_tokens(2)
    quantised = rj.RingBuffer.empty(2, 2, 8, Window.causal(10, sinks=1), slack=5, dtype="int8")
    quantised = quantised.append(k, v)

    def loss(q, k, implementation):
        return (rj.attend(q, k, v, quantised, implementation=implementation)[0] ** 2).sum()

    found, exact = (jax.jit(jax.grad(loss), static_argnums=2)(q, k, name) for name in ("offering", "xla"))
    np.testing.assert_allclose(found, exact, atol=1e-6)
    with pytest.raises(NotImplementedError, match="for gradients of keys and values"):
        jax.grad(loss, argnums=1)(q, k, "offering")
