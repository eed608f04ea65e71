"""jax's transformations, and law 5: constant memory, one executable, no copy of a ring, work linear in T."""

import re
from functools import partial

import cases
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ringjax as rj
from ringjax._kernels import xla
from ringjax._kernels.tiles import Tiles

W = rj.Window
CASE = cases.BY_NAME["all-logits"]


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def ring_of(batch, window, *, slack=0, kv_heads=1, dim=4):
    return rj.RingBuffer.empty(batch, kv_heads, dim, window, slack=slack, dtype=jnp.float32)


def close(a, b):
    chex.assert_trees_all_close(a, b, rtol=0, atol=8 * float(np.finfo(np.float32).eps) * 4)


def test_jit_is_eager():
    arrays = cases.arrays(CASE)
    close(jax.jit(lambda arrays: cases.run(CASE, arrays))(arrays), cases.run(CASE, arrays))


def test_vmap_of_attention_is_a_loop_also_differentiated():
    many = jax.tree.map(lambda *x: jnp.stack(x), *(cases.arrays(CASE, seed) for seed in range(3)))

    def f(arrays):
        def g(q, k, v):
            return cases.run(CASE, arrays._replace(q=q, k=k, v=v))

        out, vjp = jax.vjp(g, *arrays[:3])
        return out, vjp((arrays.g, arrays.g_lse))

    f = jax.jit(f)
    one_by_one = jax.tree.map(lambda *x: jnp.stack(x), *(f(cases.arrays(CASE, seed)) for seed in range(3)))
    close(jax.jit(jax.vmap(f))(many), one_by_one)


@pytest.mark.parametrize("tokens", [1, 6])
def test_vmap_of_attend_over_rings(tokens):
    """Rings with a further axis in front: an ensemble, or layers. Rows of different lengths, some wrapped."""
    q, past = normal(3, 2, tokens, 2, 4), normal(3, 2, 9, 1, 4, seed=1)
    lengths = jnp.array([[0, 9], [5, 2], [7, 8]], jnp.int32)

    def f(q, past, lengths):
        ring = ring_of(2, W.causal(4, sinks=1)).append(past, past, lengths=lengths)
        return rj.attend(q, q[:, :, :1], q[:, :, 1:], ring)

    one = jax.jit(f)
    one_by_one = jax.tree.map(lambda *x: jnp.stack(x), *(one(q[i], past[i], lengths[i]) for i in range(3)))
    close(jax.jit(jax.vmap(f))(q, past, lengths), one_by_one)


def test_remat_with_a_policy_runs_no_forward_pass_twice():
    """`ringjax_out` and `ringjax_lse` are the names to save; without them remat computes them again."""
    arrays = cases.arrays(CASE)

    def loss(q, k, v):
        # A nonlinear function on top, so that the gradient needs the output.
        return (cases.run(CASE, arrays._replace(q=q, k=k, v=v))[0] ** 2).sum()

    policy = jax.checkpoint_policies.save_only_these_names("ringjax_out", "ringjax_lse")
    ways = {"plain": loss, "remat": jax.checkpoint(loss), "policy": jax.checkpoint(loss, policy=policy)}
    gradients = {way: jax.jit(jax.grad(f, (0, 1, 2)))(*arrays[:3]) for way, f in ways.items()}
    close(gradients["remat"], gradients["plain"])
    close(gradients["policy"], gradients["plain"])
    products = {
        way: str(jax.make_jaxpr(jax.grad(f, (0, 1, 2)))(*arrays[:3])).count("dot_general[") for way, f in ways.items()
    }
    assert products["remat"] > products["policy"] == products["plain"]


def test_in_64_bits_types_stay_what_they_are():
    """`jax_enable_x64`: integers are int32 and scales float32 all the same, or loops and branches would not type."""
    window = W.causal(4, sinks=1)
    with jax.enable_x64(True):
        x = jnp.zeros((2, 9, 2, 4), jnp.float32)
        for dtype in (jnp.float32, jnp.int8):
            ring = rj.RingBuffer.empty(2, 2, 4, window, slack=3, dtype=dtype)
            out, after = jax.eval_shape(rj.attend, x, x, x, ring)
            assert out.dtype == jnp.float32
            chex.assert_trees_all_equal_shapes_and_dtypes(after, ring)

        def step(tokens, ring):
            x = jnp.broadcast_to(tokens[..., None, None].astype(jnp.float32), (*tokens.shape, 2, 4))
            out, ring = rj.attend(x, x, x, ring)
            return out.reshape(*tokens.shape, 8), ring

        def generate(ring, prompt):
            return rj.generate(step, ring, prompt, max_new_tokens=5, draft=rj.Draft(step, ring, tokens=2))

        found = jax.eval_shape(generate, ring, jnp.zeros((2, 3), jnp.int32))
        assert found.tokens.dtype == found.lengths.dtype == jnp.int32
        chex.assert_trees_all_equal_shapes_and_dtypes(found.state, ring)


def test_no_nan_is_made_on_the_way():
    """`jax_debug_nans` stops at the first one: an empty row's, or a placeholder that is thrown away later."""
    x = normal(1, 1, 1, 2)
    with jax.debug_nans(True):
        assert not rj.attention(x, x, x, W.causal(2), q_offset=-1).any()
        out, _ = rj.attend(x, x, x, rj.RingBuffer.empty(1, 1, 2, W.causal(600), dtype=jnp.float32))
    close(out, x)


def test_eval_shape_and_trees():
    """A ring is a pytree of arrays of any kind: shapes, NumPy arrays, with axes in front."""
    ring = ring_of(2, W.causal(4, sinks=1), slack=1, kv_heads=2)
    shapes = jax.eval_shape(lambda: ring)
    assert isinstance(shapes, rj.RingBuffer) and shapes.k.shape == (2, 2, 6, 4) and shapes.capacity == 6
    q, k = jax.ShapeDtypeStruct((2, 3, 4, 4), jnp.float32), jax.ShapeDtypeStruct((2, 3, 2, 4), jnp.float32)
    out, after = jax.eval_shape(rj.attend, q, k, k, shapes)
    assert out.shape == q.shape and jax.tree.structure(after) == jax.tree.structure(ring)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, ring)
    out, lse = jax.eval_shape(lambda q, k: rj.attention(q, k, k, W.causal(2), return_lse=True), q, k)
    assert out.shape == q.shape and (lse.shape, lse.dtype) == ((2, 4, 3), jnp.float32)
    assert len(jax.tree.leaves(ring)) == 4
    assert jax.tree.map(np.asarray, ring).window == ring.window


# Law 5.

CAPACITY = 4099  # sinks + W + slack: a number that is the size of nothing else
BIG = W.causal(4092, sinks=4)


def decode(steps, ring, q, k, v):
    """`steps` tokens, one by one, in one compiled loop."""

    def step(carry, _):
        ring, x = carry
        out, ring = rj.attend(q + x, k, v, ring)
        return (ring, out[:, :, :1, :1]), out

    return jax.lax.scan(step, (ring, jnp.zeros_like(q[:, :, :1, :1])), length=steps)


def copies(text, shape):
    """Instructions of an optimised HLO that copy, or write afresh, an array of a ring's shape."""
    name = f"f32[{','.join(map(str, shape))}]"
    # An instruction is `name = type opcode(`; fused computations are part of one pass over their output.
    return [
        line.strip() for line in text.splitlines() if re.search(rf"= {re.escape(name)}\S* (copy|broadcast)\(", line)
    ]


@pytest.mark.parametrize("batch", [1, 3])
def test_a_decoding_loop_copies_no_ring_and_holds_no_second_one(batch):
    """With donation: the rings that come out are those that went in (jax 17845, xla 45912, jax 40101)."""
    ring = ring_of(batch, BIG, slack=3, kv_heads=2, dim=16)
    assert ring.capacity == CAPACITY
    ring_bytes = ring.k.nbytes + ring.v.nbytes
    q, k = normal(batch, 1, 4, 16), normal(batch, 1, 2, 16)
    compiled = jax.jit(partial(decode, 5), donate_argnums=0).lower(ring, q, k, k).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= ring_bytes
    assert memory.temp_size_in_bytes < ring.k.nbytes / 2
    assert copies(compiled.as_text(), ring.k.shape) == []
    (after, _), _ = compiled(ring, q, k, k)
    assert ring.k.is_deleted() and ring.v.is_deleted()
    np.testing.assert_array_equal(after.length, 5)


def test_the_check_for_copies_finds_one():
    """A loop that needs the old ring as well must copy it: were that not seen, the test above would say nothing."""
    ring = ring_of(1, BIG, slack=3, kv_heads=2, dim=16)
    q, k = normal(1, 1, 4, 16), normal(1, 1, 2, 16)
    compiled = jax.jit(lambda ring: (decode(5, ring, q, k, k)[0][0], ring.k + 1)).lower(ring).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == 0
    assert copies(compiled.as_text(), ring.k.shape)


@pytest.mark.parametrize("tokens", [1, 5])
def test_a_single_call_with_donation_reuses_the_ring(tokens):
    ring = ring_of(2, BIG, slack=8, kv_heads=2, dim=64)
    q, k = normal(2, tokens, 4, 64), normal(2, tokens, 2, 64)
    compiled = jax.jit(rj.attend, donate_argnums=3).lower(q, k, k, ring).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= ring.k.nbytes + ring.v.nbytes
    assert memory.temp_size_in_bytes < ring.k.nbytes / 2
    assert copies(compiled.as_text(), ring.k.shape) == []


def test_one_executable_for_every_position():
    """Over three times the window, through every wrap phase (transformers 44609: one compilation per step)."""
    ring = ring_of(2, W.causal(8, sinks=2), slack=1)
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(rj.attend, n=1), donate_argnums=3)
    q, k = normal(2, 1, 2, 4), normal(2, 1, 1, 4)
    shapes = [(x.shape, x.dtype) for x in jax.tree.leaves(ring)]
    for _ in range(24):
        _, ring = step(q, k, k, ring)
        assert [(x.shape, x.dtype) for x in jax.tree.leaves(ring)] == shapes
    assert step._cache_size() == 1
    np.testing.assert_array_equal(ring.length, 24)


def compiled_attention(length, *, backward, tiles):
    arrays = [jax.ShapeDtypeStruct((1, length, heads, 8), jnp.float32) for heads in (2, 1, 1)]

    def f(q, k, v):
        out, lse = rj.attention(q, k, v, W.causal(64, sinks=3), return_lse=True, config=tiles)
        return (out**2).sum() + lse.sum()

    return jax.jit(jax.grad(f, (0, 1, 2)) if backward else f).lower(*arrays).compile()


@pytest.mark.parametrize("backward", [False, True])
def test_temporaries_grow_with_t_and_no_array_is_t_by_s(backward):
    """Beyond what does not grow at all (one tile), twice the tokens take at most twice the bytes."""
    tiles = Tiles(block_size=64, tile_size=64)
    short, long = (compiled_attention(n, backward=backward, tiles=tiles) for n in (2048, 4096))
    assert long.memory_analysis().temp_size_in_bytes < 2.1 * short.memory_analysis().temp_size_in_bytes
    sizes = [np.prod([int(n) for n in dims.split(",")]) for dims in re.findall(r"\w\[([\d,]+)\]", long.as_text())]
    inputs = 4096 * 2 * 8
    assert inputs <= max(sizes) <= 2 * inputs  # T x S would be 128 times as many


def operations_in(jaxpr):
    """Multiplications and additions of the products in a jaxpr without loops."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (axes, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * equation.outvars[0].aval.size * int(np.prod([shape[axis] for axis in axes]))
        total += sum(operations_in(inner.jaxpr) for inner in equation.params.values() if hasattr(inner, "jaxpr"))
    return total


def products_of(f, *args):
    """Operations that the xla implementation really does, loops and skipped tiles counted as run."""
    done = []
    original = xla._product

    def counted(a, b, *static):
        out = original(a, b, *static)
        operations = operations_in(jax.make_jaxpr(lambda a, b: original(a, b, *static))(a, b).jaxpr)
        jax.debug.callback(lambda: done.append(operations))
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla, "_product", counted)
        jax.block_until_ready(jax.jit(lambda *args: f(*args))(*args))  # a new function: nothing compiled before
        jax.effects_barrier()
    return sum(done)


def test_work_is_linear_in_t_and_as_small_as_the_window():
    """Counted while it runs, since the compiler's own count takes a loop for one pass."""
    window = W(20, 20, 3)
    tile = 16
    heads, dim = 2, 4

    def work(length, backward):
        x = normal(1, length, heads, dim)

        def f(x):
            return (rj.attention(x, x, x, window, config=Tiles(block_size=tile, tile_size=tile)) ** 2).sum()

        return products_of(jax.grad(f) if backward else f, x)

    for backward, products in ((False, 2), (True, 7)):
        short, long = work(256, backward), work(512, backward)
        assert 1.9 < long / short < 2.2
        span = window.left + window.right + 1
        pairs = 512 * (span + 2 * tile + window.sinks)  # a tile's rows see span + tile - 1 keys, in whole blocks
        assert long <= products * 2 * heads * dim * pairs
        assert long >= products * 2 * heads * dim * 512 * span * 0.9, "or the count misses something"


def test_tiles_without_a_visible_pair_are_not_computed():
    """Packed sequences: what another segment hides costs nothing."""
    x = normal(1, 256, 2, 4)
    segments = jnp.asarray(np.arange(256)[None] // 32, jnp.int32)

    def f(segments):
        return lambda x: rj.attention(
            x, x, x, W.causal(), segment_ids=segments, config=Tiles(block_size=16, tile_size=16)
        )

    whole, packed = products_of(f(jnp.zeros_like(segments)), x), products_of(f(segments), x)
    assert whole == 2 * 2 * 2 * 4 * 16 * 16 * (16 * 17 // 2)  # every tile on or under the diagonal
    assert packed == 2 * 2 * 2 * 4 * 16 * 16 * 8 * 3


def test_an_empty_part_of_the_ring_is_not_read():
    """A ring of 4096 slots that holds 5 tokens: one block of slots is loaded, not all."""
    ring = ring_of(1, BIG, slack=3)
    ring = ring.append(normal(1, 5, 1, 4), normal(1, 5, 1, 4))
    full = rj.RingBuffer(ring.k, ring.v, ring.length + 9999, ring.written + 9999, ring.window, ring.slack)
    q, k = normal(1, 1, 2, 4), normal(1, 1, 1, 4)

    def f(ring):
        return rj.attend(q, k, k, ring, config=Tiles(block_size=64))[0]

    few, all_of_them = products_of(f, ring), products_of(f, full)
    assert few * 30 < all_of_them
