"""The Hopper decode kernel on the GPU it is for: `pytest -m gpu tests/test_gpu_decode.py`, faster with `-n 8`."""

import dataclasses
import functools
import re

import beside_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import ring_cases
from ring_cases import RingCase

import ringjax as rj
from ringjax import Window
from ringjax._kernels import mosaic, resolve
from ringjax._kernels.tiles import MosaicDecodeTiles

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def hopper():
    """Skips where the kernel does not run."""
    device = jax.devices()[0]
    problem = dataclasses.replace(ONE.problem, platform=device.platform, device_kind=device.device_kind)
    if resolve(problem, "attend", None) != "mosaic":
        pytest.skip(f"the kernel is for Hopper GPUs and jax >= 0.11, not for {device.device_kind}")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


ONE = RingCase("one", Window.causal(1000), head_dim=128, value_dim=128, heads=8, kv_heads=2, batch=5)
CASES = [
    ONE,
    ONE.replace(name="64", head_dim=64, value_dim=64, slack=3),
    ONE.replace(name="256", head_dim=256, value_dim=256, window=Window.causal(300, sinks=2)),
    ONE.replace(name="80-96", head_dim=80, value_dim=96, dtype="float16"),
    ONE.replace(name="192-128", head_dim=192, value_dim=128),
    ONE.replace(name="group-1", heads=2, slack=1),
    ONE.replace(name="group-3", heads=6, dtype="float16"),
    ONE.replace(name="group-12", heads=24),
    ONE.replace(name="one-kv-head", heads=16, kv_heads=1),
    ONE.replace(name="one-row", batch=1, kv_heads=1, heads=4, window=Window.causal(2000), lengths=(5000,)),
    ONE.replace(name="tiny", window=Window.causal(1)),
    ONE.replace(name="narrow", window=Window.causal(5, sinks=3), slack=9),
    ONE.replace(name="many-sinks", window=Window.causal(300, sinks=200)),
    ONE.replace(name="logits", softcap=4.0, sink_logits=True, window=Window.causal(500, sinks=5), slack=7),
    ONE.replace(name="ragged", ragged=True, batch=8, slack=12, rolled_back=True),
    ONE.replace(name="much-slack", slack=1500, window=Window.causal(400), rolled_back=True),
    ONE.replace(name="chunk-4", queries=4, slack=5, window=Window.causal(700, sinks=3), rolled_back=True),
    ONE.replace(name="chunk-16", queries=16, slack=15, ragged=True, batch=6),
    ONE.replace(name="chunk-16-256", queries=16, slack=20, kv_heads=4, head_dim=256, value_dim=256, ragged=True),
    ONE.replace(name="chunk-8-narrow", queries=8, slack=9, window=Window.causal(3, sinks=2), ragged=True),
    ONE.replace(name="chunk-7-right", queries=7, slack=9, window=Window(200, 2, 4)),
    ONE.replace(
        name="chunk-logits", queries=3, slack=2, softcap=4.0, sink_logits=True, window=Window.causal(90, sinks=70)
    ),
]
EIGHT_BITS = [
    ONE.replace(name="8", kv_dtype="int8", rolled_back=True, slack=3),
    ONE.replace(name="8-64", kv_dtype="int8", head_dim=64, value_dim=64, dtype="float16"),
    ONE.replace(name="8-256", kv_dtype="int8", head_dim=256, value_dim=256, window=Window.causal(300, sinks=2)),
    ONE.replace(name="8-80-96", kv_dtype="int8", head_dim=80, value_dim=96, heads=24),
    ONE.replace(name="8-one-row", kv_dtype="int8", batch=1, kv_heads=1, heads=4, window=Window.causal(2000)),
    ONE.replace(
        name="8-chunk", kv_dtype="int8", queries=5, slack=9, ragged=True, softcap=4.0, sink_logits=True, batch=6
    ),
    ONE.replace(name="8-wide-chunk", kv_dtype="int8", queries=8, slack=15, window=Window(200, 2, 4)),
]
EIGHT_BITS += [
    case.replace(name=case.name.replace("8", "float8", 1), kv_dtype="float8_e4m3fn", dtype="bfloat16")
    for case in EIGHT_BITS
]
READING = [
    ONE.replace(name="read-8", kv_dtype="int8", memory=True, window=Window(399, 399), out_dtype="float32", queries=3),
    ONE.replace(name="long-chunk-8", kv_dtype="float8_e4m3fn", queries=100, slack=99, ragged=True),
    ONE.replace(name="read"),
    ONE.replace(name="memory", memory=True, window=Window(399, 399), out_dtype="float32", queries=3),
    ONE.replace(name="memory-ragged", memory=True, window=Window.causal(399, sinks=6), queries=5, ragged=True, slack=4),
    ONE.replace(name="long-chunk", queries=100, slack=99, out_dtype="float32", sink_logits=True),
    ONE.replace(name="long-chunk-256", queries=40, slack=99, head_dim=256, value_dim=128, ragged=True),
    ONE.replace(name="many-heads", heads=71, kv_heads=1),
]

MEMORY = ONE.replace(name="memory", memory=True, window=Window(399, 399), out_dtype="float32")
BESIDE = {
    "one": (ONE.replace(sink_logits=True), MEMORY),
    "two": (
        ONE.replace(slack=9, rolled_back=True, batch=8, window=Window.causal(300, sinks=3)),
        MEMORY.replace(rolled_back=True, slack=5, window=Window.causal(700, sinks=5)),
        MEMORY.replace(window=Window(99, 99)),
    ),
    "one-row": (ONE.replace(batch=1, window=Window.causal(2000)), MEMORY.replace(window=Window(1999, 1999))),
    "tiny": (ONE.replace(window=Window.causal(1)), MEMORY.replace(window=Window(0, 0)), MEMORY),
    "256": (ONE.replace(head_dim=256, value_dim=256, window=Window.causal(300)), MEMORY),
    "chunk": (ONE.replace(queries=5, slack=9, ragged=True, softcap=4.0, sink_logits=True, batch=7), MEMORY, MEMORY),
    "chunk-16": (ONE.replace(queries=16, slack=15, rolled_back=True, dtype="float16"), MEMORY),
    "8": (ONE.replace(kv_dtype="int8", slack=3, rolled_back=True), MEMORY, MEMORY.replace(window=Window.causal(77))),
    "float8-chunk": (
        ONE.replace(kv_dtype="float8_e4m3fn", queries=4, slack=5, ragged=True),
        MEMORY.replace(window=Window.causal(500, sinks=2)),
    ),
}


def beside(name):
    """The case of a decoder's call, and those of its memories, which are as its own ring in all but their windows."""
    own, *memories = BESIDE[name]
    own = own.replace(name=f"beside-{name}")
    fields = (
        "batch",
        "queries",
        "heads",
        "kv_heads",
        "head_dim",
        "value_dim",
        "dtype",
        "kv_dtype",
        "softcap",
        "ragged",
    )
    return own, [x.replace(**{field: getattr(own, field) for field in fields}) for x in memories]


def check_beside(name, tiles=None, seeds=3):
    case, memories = beside(name)

    def write(made, tokens, ring, sinks, stores):
        beside = [x._replace(k=k, v=v, rows=rows) for x, (rows, k, v) in zip(made, stores, strict=True)]
        return mosaic.append_attend(case.problem, tokens[0], *tokens[1:], *ring, sinks, beside, tiles=tiles)

    run = None
    for seed in range(seeds):
        made = beside_cases.make(case, memories, seed)
        own, stores = made.own, [(x.rows, x.k, x.v) for x in made.memories]
        run = run or jax.jit(functools.partial(write, made.memories))
        out, lse, *ring = run((own.rows_before, own.q, own.k, own.v), own.before, own.sinks, stores)
        beside_cases.check(made, out, lse)
        ring_cases.check_ring(own, *ring)


def runs(case):
    """Reading and, where there is one, the launch that writes too; jitted."""

    def read(rows, q, k, v, sinks, tiles=None):
        return mosaic.forward(case.problem, rows, q, k, v, sinks, tiles=tiles)

    def write(rows, q, k, v, ring_k, ring_v, sinks, tiles=None):
        return mosaic.append_attend(case.problem, rows, q, k, v, ring_k, ring_v, sinks, tiles=tiles)

    return jax.jit(read, static_argnames="tiles"), jax.jit(write, static_argnames="tiles")


def check(case, tiles=None, seeds=3):
    read, write = runs(case)
    for seed in range(seeds):
        made = ring_cases.make(case, seed)
        out, lse = read(made.rows_after, made.q, *made.after, made.sinks, tiles=tiles)
        ring_cases.check(made, out, lse)
        if mosaic.writes(case.problem):
            tokens = made.q, made.k, made.v
            out, lse, *ring = write(made.rows_before, *tokens, *made.before, made.sinks, tiles=tiles)
            ring_cases.check(made, out, lse)
            ring_cases.check_ring(made, *ring)


@pytest.mark.parametrize("case", [*CASES, *EIGHT_BITS], ids=str)
def test_write_and_read(case):
    assert mosaic.writes(case.problem)
    check(case)


@pytest.mark.parametrize("case", READING, ids=str)
def test_read(case):
    check(case)


@pytest.mark.parametrize("name", BESIDE)
def test_memories_in_the_same_launch(name):
    """Empty, in part filled, wrapped, rolled back: one softmax over all, and only the call's own ring is written to."""
    check_beside(name)


@pytest.mark.parametrize("splits", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["two", "chunk", "8"])
def test_memories_are_split_over_programs(name, splits):
    check_beside(name, MosaicDecodeTiles(block_size=128 if name == "8" else 64, stages=2, splits=splits), seeds=2)


@pytest.mark.parametrize("splits", [1, 2, 4, 8])
@pytest.mark.parametrize("case", [CASES[13], CASES[16], CASES[15], CASES[17], EIGHT_BITS[0], EIGHT_BITS[5]], ids=str)
def test_every_number_of_splits(case, splits):
    check(case, MosaicDecodeTiles(block_size=64 if case.kv_dtype is None else 128, stages=2, splits=splits))


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("block", [64, 128])
def test_every_tile(block, stages):
    check(ONE.replace(name="tiles", slack=37, rolled_back=True), MosaicDecodeTiles(block, stages, 2), seeds=2)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_attend_writes_in_place(tokens, dtype):
    """`attend` under jit takes the one launch, copies no ring, and gives what xla gives."""
    ring = rj.RingBuffer.empty(2, 2, 64, Window.causal(300, sinks=2), slack=3, dtype=dtype)
    shape = 2, tokens
    q, k, v = (jax.random.normal(jax.random.key(i), (*shape, n, 64), jnp.bfloat16) for i, n in enumerate((4, 2, 2)))

    def step(ring, implementation):
        return rj.attend(q, k, v, ring, implementation=implementation)

    ours = jax.jit(lambda ring: step(ring, None), donate_argnums=0).lower(ring).compile()
    text = ours.as_text()
    assert text.count('custom_call_target="mosaic_gpu') == 1 and "output_to_operand_aliasing" in text
    assert ours.memory_analysis().temp_size_in_bytes < ring.k.nbytes
    theirs = jax.jit(lambda ring: step(ring, "xla"))
    other = jax.tree.map(jnp.copy, ring)
    for _ in range(250):
        out, ring = ours(ring)
        exact, other = theirs(other)
    jax.tree.map(np.testing.assert_array_equal, ring, other)  # counters, numbers and scales
    np.testing.assert_allclose(np.float32(out), np.float32(exact), atol=0.02)


def test_counters_in_a_loop_are_neither_copied_nor_computed_elsewhere():
    """A step of a loop is one launch a layer and nothing beside it."""
    rings = [rj.RingBuffer.empty(3, 2, 64, Window.causal(100), slack=3) for _ in range(4)]

    def run(rings):
        def token(_, carry):
            q, rings = carry
            rings = list(rings)
            for i in range(len(rings)):
                q, rings[i] = rj.attend(q, *arrays(1, batch=3)[1:], rings[i])
            return q, rings

        return jax.lax.fori_loop(0, 400, token, (arrays(1, batch=3)[0], rings))

    compiled = jax.jit(run, donate_argnums=0).lower(rings).compile()
    text = compiled.as_text()
    assert text.count('custom_call_target="mosaic_gpu') == len(rings)
    beside = re.findall(r"= \(?s32\[3\][^=]* (?:copy|fusion|add|maximum)\(.*", text)
    assert not beside, beside
    _, rings = compiled(rings)
    for ring in rings:
        assert ring.length.tolist() == ring.written.tolist() == [400] * 3


@pytest.mark.parametrize("forward_dtype", [None, "int8"])
def test_a_decoder_is_one_launch(forward_dtype):
    """`decode` under jit, of rings of one dtype; another dtype's is read by a launch of its own. No ring is copied."""
    config = rj.RingBufferConfig(buffer_size=300, slack=3, forward_dtype=forward_dtype)
    state = rj.init_state(config, 2, kv_heads=2, head_dim=64)
    for grad in (False, True):
        _, state = rj.encode(*arrays(200 if grad else 400), state, requires_grad=grad)
    exact = jax.tree.map(jnp.copy, state)
    exact = dataclasses.replace(exact, config=dataclasses.replace(config, implementation="xla"))

    def step(q, k, v, state):
        return rj.decode(q, k, v, state, position=state.last_calculated + 1)

    found = rj.certify(jax.jit(step, donate_argnums=3), state, *arrays(2))
    text = found.executable.as_text()
    assert text.count('custom_call_target="mosaic_gpu') == (1 if forward_dtype is None else 2)
    for seed in range(3):
        out, state = found.executable(*arrays(2, seed), state)
        wanted, exact = jax.jit(step)(*arrays(2, seed), exact)
        np.testing.assert_allclose(np.float32(out), np.float32(wanted), atol=0.02)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(state), jax.tree.leaves(exact))


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("tokens, sizes", [(1, (128, 128)), (3, (80, 96)), (7, (256, 64))])
def test_tokens_are_quantised_to_the_same_bits(tokens, sizes, dtype):
    """As by XLA, whatever the numbers: of any magnitude, zeros, infinities and NaN, ties between two steps."""
    rng = np.random.default_rng(tokens)
    batch, kv_heads = 16, 8
    q = jnp.asarray(rng.standard_normal((batch, tokens, kv_heads, sizes[0])), jnp.bfloat16)

    def new(size):
        exponents = rng.integers(-126, 119, (batch, tokens, kv_heads, 1)).astype(np.float32)
        x = rng.standard_normal((batch, tokens, kv_heads, size)).astype(np.float32)
        x[:4] = rng.integers(-254, 255, x[:4].shape) / 2  # ties
        x = x * np.where(np.arange(batch)[:, None, None, None] % 2, np.exp2(exponents), 1)
        for at, value in enumerate((0.0, np.inf, np.nan, -np.inf, 1e-40)):
            x[8 + at, :, at, :: 1 + 3 * at] = value
        return jnp.asarray(x.astype(np.float32), jnp.bfloat16)

    k, v = (new(size) for size in sizes)
    ring = rj.RingBuffer.empty(batch, kv_heads, sizes[0], Window.causal(50), slack=8, value_dim=sizes[1], dtype=dtype)
    _, found = jax.jit(rj.attend)(q, k, v, ring)
    wanted = jax.jit(rj.RingBuffer.append)(ring, k, v)
    for name in ("k", "v", "k_scale", "v_scale"):
        x, y = (np.asarray(getattr(of, name)) for of in (found, wanted))
        if name in "kv":
            x, y = x.view(np.uint8), y.view(np.uint8)
        np.testing.assert_array_equal(x, y, name)


@pytest.mark.parametrize("dtype, bound", [("int8", 1e-2), ("float8_e4m3fn", 6e-2)])
def test_the_error_of_a_quantised_ring(dtype, bound):
    """Against float32 attention to what was appended, before it was quantised: relative, on normal inputs."""
    tokens, window = 700, Window.causal(512)
    # Drawn in bfloat16 they would have 256 values, and errors that do not average out.
    q, k, v = (
        jax.random.normal(jax.random.key(i), (2, tokens, n, 128)).astype("bfloat16") for i, n in enumerate((8, 2, 2))
    )
    ring = rj.RingBuffer.empty(2, 2, 128, window, dtype=dtype)
    ring = jax.jit(rj.RingBuffer.append)(ring, k[:, :-1], v[:, :-1])
    out, _ = jax.jit(rj.attend)(q[:, -1:], k[:, -1:], v[:, -1:], ring)
    with jax.default_matmul_precision("highest"):
        exact = rj.attention(*(x.astype(jnp.float32) for x in (q, k, v)), window, implementation="xla")[:, -1:]
    error = float(jnp.linalg.norm(out.astype(jnp.float32) - exact) / jnp.linalg.norm(exact))
    assert error < bound


def test_gradients_take_the_other_way():
    """Where a derivative is asked for, the tokens are written first; the derivative of reading is xla's."""
    ring = rj.RingBuffer.empty(2, 2, 64, Window.causal(100), slack=3)
    _, ring = rj.attend(*arrays(40), ring)

    def loss(tokens, implementation):
        out, after = rj.attend(*tokens, ring, implementation=implementation)
        return out.astype(jnp.float32).sum() + after.v.astype(jnp.float32).sum()

    tokens = arrays(2)
    found, exact = (jax.jit(jax.grad(loss), static_argnums=1)(tokens, name) for name in ("mosaic", "xla"))
    for x, y in zip(found, exact, strict=True):
        np.testing.assert_allclose(np.float32(x), np.float32(y), atol=0.03)


def arrays(tokens, seed=0, batch=2, heads=4, kv_heads=2, head_dim=64):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = ((batch, tokens, n, head_dim) for n in (heads, kv_heads, kv_heads))
    return tuple(jax.random.normal(key, s, jnp.bfloat16) for key, s in zip(keys, shapes, strict=True))


def test_vmap_of_attend():
    """Over a batch of calls the two steps are taken one after the other."""
    ring = rj.RingBuffer.empty(2, 2, 64, Window.causal(60), slack=3)
    rings = jax.tree.map(lambda x: jnp.stack([x] * 3), ring)
    tokens = tuple(jnp.stack(x) for x in zip(*(arrays(2, seed) for seed in range(3)), strict=True))
    out, after = jax.jit(jax.vmap(lambda q, k, v, ring: rj.attend(q, k, v, ring)))(*tokens, rings)
    for i in range(3):
        exact, alone = rj.attend(*(x[i] for x in tokens), ring)
        np.testing.assert_allclose(np.float32(out[i]), np.float32(exact), atol=0.02)
        np.testing.assert_array_equal(np.asarray(after.k[i]), np.asarray(alone.k))


SOAK_STEPS, SOAK_CHECKS = 200_000, 40


def test_soak():
    """200,000 tokens across thousands of wraps, as one stream; at random points, the same by a full forward pass."""
    window, slack, batch = Window.causal(50, sinks=3), 7, 2
    rng = np.random.default_rng(0)

    def tokens(start, count):
        """Of positions [start, start + count): the same whoever asks."""

        def one(position):
            return arrays(1, position, batch)

        q, k, v = jax.vmap(one)(start + jnp.arange(count))
        return tuple(jnp.moveaxis(x[:, :, 0], 0, 1) for x in (q, k, v))

    @jax.jit
    def run(ring, start, end):
        def step(position, carry):
            ring, _ = carry
            out, ring = rj.attend(*tokens(position, 1), ring, implementation="mosaic")
            return ring, out

        return jax.lax.fori_loop(start, end, step, (ring, jnp.zeros((batch, 1, 4, 64), jnp.bfloat16)))

    @jax.jit
    def full(position):
        near = 64
        first = tokens(0, 3)
        last = tokens(position - near + 1, near)
        q = last[0][:, -1:]
        k, v = (jnp.concatenate([a, b], axis=1) for a, b in zip(first[1:], last[1:], strict=True))
        at = jnp.concatenate([jnp.arange(3), position - near + 1 + jnp.arange(near)])
        return q, k, v, at

    ring = rj.RingBuffer.empty(batch, 2, 64, window, slack=slack)
    points = np.sort(rng.choice(np.arange(100, SOAK_STEPS), SOAK_CHECKS - 1, replace=False)).tolist()
    points = [*points, SOAK_STEPS]
    start = 0
    for end in points:
        ring, out = run(ring, start, end)
        q, k, v, at = (np.asarray(x) for x in full(end - 1))
        made = ring_cases.dense(q, k, v, at, end - 1, window)
        ring_cases.cases.assert_close(out, *made, f"token {end - 1}")
        start = end
