"""Rings in 8 bits: how near they are, that nothing a ring can do changes them, and that no gradient goes through."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from token_lists import TokenList

import ringjax as rj
from ringjax import _quantised

W = rj.Window
DTYPES = pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
BATCH, HEADS, KV_HEADS, DIM, VALUE_DIM = 3, 4, 2, 8, 5
attend = jax.jit(rj.attend, static_argnames=("softcap", "implementation"))
append = jax.jit(rj.RingBuffer.append)
rollback = jax.jit(rj.RingBuffer.rollback)
export = jax.jit(rj.RingBuffer.export)
restore = jax.jit(rj.RingBuffer.restore, static_argnames=("window", "slack", "dtype"))


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def tokens(length, seed=0, batch=BATCH):
    shapes = [(HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, VALUE_DIM)]
    return [normal(batch, length, *shape, seed=seed + i) for i, shape in enumerate(shapes)]


WINDOW = W.causal(5, sinks=2)


def empty(dtype, window=WINDOW, slack=3, batch=BATCH):
    return rj.RingBuffer.empty(batch, KV_HEADS, DIM, window, slack=slack, value_dim=VALUE_DIM, dtype=dtype)


def meant(x, dtype):
    """The numbers that are kept of x, by the definition: a scale of 16 bits, and the nearest step.

    Where a scale is half way between two of 16 bits, float32 and float64 may round it to different sides.
    """
    largest = _quantised.LARGEST[dtype]
    share = np.abs(x).max(-1, keepdims=True).astype(np.float64) / largest
    mantissa, exponent = np.frexp(share)
    scale = np.ldexp(np.round(mantissa * 2**16), exponent - 16)
    steps = np.divide(x, scale, out=np.zeros(x.shape), where=scale > 0)
    steps = np.round(steps) if dtype == "int8" else np.asarray(jnp.asarray(steps, jnp.float32).astype(dtype))
    return (steps.astype(np.float64) * scale).astype(np.float32)


# --- the numbers ---


@DTYPES
def test_numbers_and_scales(dtype):
    """Of any size, down to the least normal number; a token of zeros; and again, bit for bit."""
    sizes = np.float32(10.0) ** np.arange(-30, 31, 5, dtype=np.float32)
    x = np.concatenate([normal(40, len(sizes), DIM) * sizes[:, None], np.zeros((1, len(sizes), DIM), np.float32)])
    quantise = jax.jit(_quantised.quantise, static_argnames="dtype")
    kept, scale = quantise(x, dtype=dtype)
    assert kept.dtype == dtype and scale.dtype == jnp.float32
    found = _quantised.dequantise(kept, scale)
    np.testing.assert_allclose(found, meant(x, dtype), rtol=2.0**-15, atol=0)
    chex.assert_trees_all_equal(quantise(found, dtype=dtype), (kept, scale))
    error = np.abs(np.asarray(found) - x)
    bound = np.abs(x).max(-1, keepdims=True) / 253 if dtype == "int8" else np.abs(x) / 15.9
    assert (error <= bound + np.abs(x).max(-1, keepdims=True) * 2e-3 * (dtype != "int8")).all()
    assert not np.asarray(kept[-1].astype(jnp.float32)).any() and not np.asarray(scale[-1]).any()


@DTYPES
def test_tokens_that_are_not_finite_are_nan_as_a_whole(dtype):
    """As they would be in attention, whatever the rest of the token is; others are not touched."""
    x = normal(4, DIM)
    x[1, 2], x[3, 0] = np.nan, -np.inf
    found = np.asarray(_quantised.dequantise(*_quantised.quantise(jnp.asarray(x), dtype)))
    assert np.isnan(found[[1, 3]]).all() and np.isfinite(found[[0, 2]]).all()


def test_tokens_too_small_to_tell_apart_are_zero():
    tiny = np.full((2, DIM), np.finfo(np.float32).tiny, np.float32)
    kept, scale = _quantised.quantise(jnp.asarray(tiny), "int8")
    assert not np.asarray(kept).any() and not np.asarray(scale).any()


# --- attention ---


def test_attention_is_within_one_percent_in_int8():
    """Of the unquantised float32 result, on normal inputs, relative in the L2 norm, at head sizes 64 and 128.

    The step grows with the largest of a token's numbers, and so, as the root of a logarithm, with the head size: at 256
    it is 1%. float8_e4m3 has 3 bits behind the leading one: a number is off by up to 1/16, 2.6% root mean square, and
    no scale helps.
    """
    for dim, bounds in ((64, {"int8": 0.01, "float8_e4m3fn": 0.04}), (128, {"int8": 0.01})):
        length = 700
        window = W.causal(length)
        q, k, v = (normal(1, length, heads, dim, seed=i) for i, heads in enumerate((4, 1, 1)))
        exact, _ = oracle.attention(
            q[:, -8:],
            k,
            v,
            left=window.left,
            right=0,
            sinks=0,
            q_positions=np.arange(length - 8, length),
            k_positions=np.arange(length),
        )
        for dtype, bound in bounds.items():
            ring = append(rj.RingBuffer.empty(1, 1, dim, window, slack=8, dtype=dtype), k[:, :-8], v[:, :-8])
            out, _ = attend(q[:, -8:], k[:, -8:], v[:, -8:], ring)
            error = np.linalg.norm(out - exact) / np.linalg.norm(exact)
            assert error < bound, (dtype, dim, error)
            assert error > bound / 4, "nothing was quantised"


@pytest.mark.parametrize(
    ("dtype", "q_dtype"), [("int8", "float32"), ("float8_e4m3fn", "float32"), ("int8", "bfloat16")]
)
def test_a_stream_is_attention_to_the_numbers_that_are_kept(dtype, q_dtype):
    """Law 2 in 8 bits: any chunks, ragged, wrapped, with sink logits and softcap, equal the oracle on those numbers.

    The output has the queries' dtype. A chunk longer than the slack sees its own keys in the queries' dtype.
    """
    window, sink_logits = W.causal(5, sinks=2), jnp.linspace(-1.0, 1.0, HEADS)
    q, k, v = (np.asarray(jnp.asarray(x, q_dtype).astype(jnp.float32)) for x in tokens(40))
    exact, _ = oracle.attention(
        q,
        meant(k, dtype),
        meant(v, dtype),
        left=window.left,
        right=0,
        sinks=window.sinks,
        q_positions=np.arange(40),
        k_positions=np.arange(40),
        sink_logits=sink_logits,
        softcap=3.0,
    )
    for chunks in ([2] * 15, [13, 2, 13, 2]):
        ring, at, outs = empty(dtype), 0, []
        for length in chunks:
            part = (jnp.asarray(x[:, at : at + length], q_dtype) for x in (q, k, v))
            out, ring = attend(*part, ring, sink_logits=sink_logits, softcap=3.0)
            assert out.dtype == q_dtype
            outs.append(out.astype(jnp.float32))
            at += length
        error = np.abs(np.concatenate(outs, 1) - exact[:, :at]).max()
        assert error < (1e-4 if q_dtype == "float32" else 0.03), (chunks, error)


@DTYPES
def test_slots_that_hold_nothing_may_hold_nan(dtype):
    """Law 7: NaN in the numbers (float8) and in the scales."""
    q, k, v = tokens(1)
    clean = empty(dtype, slack=0)
    floats = ("k", "v", "k_scale", "v_scale") if dtype != "int8" else ("k_scale", "v_scale")
    leaves = {name: getattr(clean, name) for name in ("k", "v", "length", "written", "k_scale", "v_scale")}
    poisoned = {name: jnp.full_like(x, jnp.nan) if name in floats else x for name, x in leaves.items()}
    dirty = rj.RingBuffer(window=clean.window, slack=0, **poisoned)
    for seed in range(9):
        q, k, v = tokens(1, seed=3 * seed)
        one, clean = attend(q, k, v, clean)
        other, dirty = attend(q, k, v, dirty)
        np.testing.assert_array_equal(one, other)
    chex.assert_trees_all_equal(export(clean), export(dirty))


def test_the_ring_is_never_copied_in_another_dtype():
    """A compiled loop of int8 holds blocks of the ring in float32, never half of it: a third of what it takes as such.

    Not float8: XLA's CPU backend has no 8-bit floats and converts the whole ring at every update; a GPU has them.
    """
    window = W.causal(4092, sinks=4)
    for batch in (1, 3):
        ring = rj.RingBuffer.empty(batch, 2, 16, window, slack=3, dtype="int8")

        def loop(x, ring):
            def body(carry, _):
                x, ring = carry
                return rj.attend(x, x[:, :, :2], x[:, :, 2:], ring), None

            return jax.lax.scan(body, (x, ring), length=4)[0]

        found = rj.certify(loop, ring, jax.ShapeDtypeStruct((batch, 1, 4, 16), jnp.float32))
        assert len(found.rings) == 4
        assert found.temp_bytes < 4 * (ring.k.size + ring.v.size) // 3


# --- what a ring can do ---


@DTYPES
def test_it_holds_what_a_list_of_tokens_says(dtype):
    """Appends of any length across wraps, per-row rollback, select, insert, reset; export; all in jit."""
    window, slack = W.causal(4, sinks=2), 3
    ring = empty(dtype, window, slack)
    lists = [TokenList(window, slack) for _ in range(BATCH)]
    rng = np.random.default_rng(0)
    select, insert, reset = (jax.jit(f) for f in (rj.RingBuffer.select, rj.RingBuffer.insert, rj.RingBuffer.reset))

    def assert_holds():
        exported = export(ring)
        assert exported.k.dtype == exported.v.dtype == jnp.float32
        for row, one in enumerate(lists):
            held = sorted(one.held)
            assert exported.positions[row].tolist() == held + [-1] * (ring.capacity - len(held))
            for x, which in ((exported.k, 0), (exported.v, 1)):
                wanted = np.zeros(x.shape[1:], np.float32)
                if held:
                    wanted[: len(held)] = meant(np.stack([one.tokens[p][which] for p in held]), dtype)
                np.testing.assert_allclose(x[row], wanted, rtol=2.0**-15, atol=0)

    for turn in range(24):
        length = (1, 2, 6, 13)[turn % 4]
        _, k, v = tokens(length, seed=3 * turn)
        lengths = rng.integers(0, length + 1, BATCH).astype(np.int32)
        ring = append(ring, k, v, lengths=lengths)
        for row, n in enumerate(lengths):
            lists[row].append(k[row, :n], v[row, :n])
        back = [rng.integers(0, 1 + max(0, min(len(x.tokens), slack - x.written + len(x.tokens)))) for x in lists]
        ring = rollback(ring, np.array(back, np.int32))
        for one, n in zip(lists, back, strict=True):
            one.rollback(n)
        if turn % 3 == 0:
            rows = rng.integers(0, BATCH, BATCH).astype(np.int32)
            ring, lists = select(ring, rows), [lists[row].copy() for row in rows]
        if turn % 5 == 4:
            row = np.int32(turn % BATCH)
            _, k, v = tokens(6, seed=100 + turn, batch=1)
            new = append(empty(dtype, window, slack, batch=1), k, v)
            ring, lists[row] = insert(ring, row, new), TokenList(window, slack).append(k[0], v[0])
        if turn % 7 == 6:
            gone = np.arange(BATCH) == turn % BATCH
            ring = reset(ring, gone)
            lists = [TokenList(window, slack) if out else one for one, out in zip(lists, gone, strict=True)]
        assert_holds()


@DTYPES
def test_export_and_restore_are_exact(dtype):
    """Into the same dtype, whatever the capacity; from floats into 8 bits and back into any dtype."""
    window = W.causal(5, sinks=2)
    _, k, v = tokens(21)
    ring = rollback(append(empty(dtype, window), k, v, lengths=np.array([21, 6, 0], np.int32)), np.array([2, 1, 0]))
    exported = export(ring)
    again = restore(exported, window, slack=3, dtype=dtype)
    chex.assert_trees_all_equal(export(again), exported)
    chex.assert_trees_all_equal(
        *(export(append(x, *tokens(2, seed=9)[1:])) for x in (restore(exported, window, slack=3, dtype=dtype), ring))
    )
    wider = restore(exported, window, slack=9, dtype=dtype)
    held = np.asarray(exported.positions) >= 0
    np.testing.assert_array_equal(np.asarray(export(wider).k)[:, : held.shape[1]][held], np.asarray(exported.k)[held])
    plain = restore(exported, window, slack=3)
    assert plain.k.dtype == jnp.float32 and plain.k_scale is None
    chex.assert_trees_all_equal(export(plain), exported)
    chex.assert_trees_all_equal(export(restore(export(plain), window, slack=3, dtype=dtype)), exported)
    assert restore(exported, window, slack=3, dtype="bfloat16").v.dtype == jnp.bfloat16


@DTYPES
def test_it_is_a_pytree_of_arrays(dtype, tmp_path, numpy_promotion):
    """With two leaves more than a plain ring; orbax saves and restores it as it is, in mid-stream."""
    ocp = pytest.importorskip("orbax.checkpoint")
    _, k, v = tokens(12)
    ring = append(empty(dtype), k, v)
    assert len(jax.tree.leaves(ring)) == 6 and len(jax.tree.leaves(empty("float32"))) == 4
    assert ring.k_scale.shape == ring.v_scale.shape == (BATCH, KV_HEADS, ring.capacity)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "ring", ring)
        checkpointer.wait_until_finished()
        again = checkpointer.restore(tmp_path / "ring", jax.tree.map(ocp.utils.to_shape_dtype_struct, ring))
    chex.assert_trees_all_equal(again, ring)
    other = rj.RingBuffer.empty(BATCH, KV_HEADS, DIM, ring.window, slack=3, value_dim=VALUE_DIM, dtype="bfloat16")
    with pytest.raises(ValueError, match="must have the same window, slack, heads, dims and dtype"):
        other.insert(0, ring)


# --- gradients ---


@DTYPES
def test_no_gradient_goes_through_the_ring(dtype):
    """For keys and values that is an error, in a step and in a chunk, not zeros that look like a gradient."""
    past = tokens(9, seed=20)[1:]
    ring, new = append(empty(dtype), *past), [jnp.asarray(x) for x in tokens(9 if dtype == "int8" else 1)]
    first = f"RingBuffer: dtype must be float32, bfloat16 or float16 for gradients of keys and values, got {dtype}."
    for argument in (1, 2):
        with pytest.raises(NotImplementedError) as raised:
            jax.grad(lambda *x: rj.attend(*x, ring)[0].sum(), argument)(*new)
        assert str(raised.value).splitlines()[0] == first


def test_queries_have_their_gradient():
    """That of a ring that holds the same numbers in float32; of a chunk, which sees its own keys too."""
    ring, new = append(empty("int8"), *tokens(9, seed=20)[1:]), [jnp.asarray(x) for x in tokens(9)]

    def loss(q, sinks, ring, *kv):
        return (attend(q, *kv, ring, sink_logits=sinks)[0] ** 2).sum()

    q, *kv = new
    sinks = jnp.linspace(-1.0, 1.0, HEADS)
    plain = restore(export(ring), ring.window, slack=ring.slack)
    stored = [jnp.asarray(meant(np.asarray(x), "int8")) for x in kv]
    found, exact = (jax.grad(loss, (0, 1))(q, sinks, r, *x) for r, x in ((ring, kv), (plain, stored)))
    chex.assert_trees_all_close(found, exact, rtol=0, atol=1e-3 * float(jnp.abs(exact[0]).max()))


def test_the_three_rings():
    """`forward` alone by `forward_dtype`: decoding reads it beside the float rings, in training too; through it, no."""
    config = rj.RingBufferConfig(buffer_size=6, slack=2, forward_dtype=jnp.int8)
    assert config.forward_dtype == "int8" and hash(config) == hash(
        rj.RingBufferConfig(6, slack=2, forward_dtype="int8")
    )
    state = rj.init_state(config, BATCH, kv_heads=KV_HEADS, head_dim=DIM, value_dim=VALUE_DIM, dtype=jnp.float32)
    assert [str(ring.k.dtype) for ring in (state.forward, state.backward, state.feedback)] == ["int8"] + 2 * ["float32"]
    plain = rj.init_state(
        rj.RingBufferConfig(buffer_size=6, slack=2), BATCH, kv_heads=KV_HEADS, head_dim=DIM, value_dim=VALUE_DIM,
        dtype=jnp.float32,
    )  # fmt: skip
    outs = []
    for one in (state, plain):
        _, one = jax.jit(rj.encode)(*tokens(9), one)
        out, one = jax.jit(rj.decode)(*tokens(1, seed=5), one, position=0)
        outs.append(out)
    error = np.linalg.norm(outs[0] - outs[1]) / np.linalg.norm(outs[1])
    assert 1e-4 < error < 0.02

    def loss(v):
        out, _ = rj.decode(*tokens(1, seed=5), rj.encode(*tokens(9)[:2], v, state, requires_grad=True)[1], position=0)
        return (out**2).sum()

    assert bool(jax.jit(jax.grad(loss))(jnp.asarray(tokens(9)[2]))[:, 3:].any(axis=(2, 3)).all())
    everything = rj.init_state(config, BATCH, kv_heads=KV_HEADS, head_dim=DIM, value_dim=VALUE_DIM, dtype="int8")
    with pytest.raises(ValueError) as raised:
        rj.encode(*tokens(9), everything, requires_grad=True)
    first = "encode: requires_grad needs a backward ring of float32, bfloat16 or float16, got int8."
    assert str(raised.value).splitlines()[0] == first
    with pytest.raises(TypeError) as raised:
        rj.RingBufferConfig(forward_dtype="int4")
    dtypes = "float32, bfloat16, float16, int8, float8_e4m3fn"
    assert str(raised.value) == f"RingBufferConfig: forward_dtype must be one of {dtypes}, got int4."


def test_explain_counts_the_scales():
    ring = empty("int8")
    found = rj.explain(*tokens(1), ring)
    assert found.ring_bytes == sum(x.nbytes for x in jax.tree.leaves(ring))
    chunk = rj.explain(*tokens(9), ring)
    assert chunk.implementation == "xla" and chunk.ring_bytes == found.ring_bytes
