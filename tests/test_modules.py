"""The layers for Flax: nnx == linen == the definition by hand; stream == batch; Flax's transforms and modules."""

import inspect
import re
from functools import cache, partial

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import ringjax as rj
import ringjax.linen
import ringjax.nnx

B, T, D, N, K, H = 2, 12, 12, 4, 2, 8
W = rj.Window
PLAIN = {"window": W.causal(5)}
RICH = {
    "window": W.causal(4, sinks=2),
    "num_kv_heads": K,
    "head_dim": H,
    "out_features": 6,
    "rotary_base": 100.0,
    "rotary_fraction": 0.5,
    "normalize_qk": True,
    "use_sink_logits": True,
    "softcap": 2.0,
    "scale": 0.7,
    "out_use_bias": False,
    "config": rj.RingBufferConfig(block_size=8, tile_size=8),
}
SAME_WIDTH = RICH | {"out_features": D}
OPTIONS = {
    "plain": {**PLAIN, "num_heads": 2},
    "rich": RICH,
    "bare": {"window": W.symmetric(2), "head_dim": 6, "num_kv_heads": 1, "rotary_base": None, "use_bias": False},
    "frequencies": {"window": W.causal(3), "head_dim": 4, "rotary_frequencies": [1.0, 0.3], "rotary_base": None},
    "packed": {"window": W.causal(5), "head_dim": H, "num_kv_heads": K},
}


@cache
def layer(name="rich"):
    """A layer of the table with random parameters, also those that begin as zeros or ones."""
    return randomized(ringjax.nnx.SlidingWindowAttention(**complete(OPTIONS[name]), rngs=nnx.Rngs(0)))


def complete(options):
    return {"num_heads": N, "in_features": D} | options


def randomized(module):
    rng = np.random.default_rng(0)
    state = nnx.state(module, nnx.Param)
    nnx.update(module, jax.tree.map(lambda x: x + jnp.asarray(0.5 * rng.standard_normal(x.shape), x.dtype), state))
    return module


def in_linen(module, options):
    """The same layer in linen: the module and its variables."""
    params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    return ringjax.linen.SlidingWindowAttention(**complete(options)), {"params": params}


def inputs(seed=0, length=T, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((B, length, D)), dtype)


@nnx.jit
def call(module, x, buffer=None, lengths=None, segment_ids=None, positions=None):
    return module(x, buffer, lengths=lengths, segment_ids=segment_ids, positions=positions)


def by_hand(module, options, x, dtype, segments=None):
    """The layer from its definition, dense, in NumPy: float64 is exact, other dtypes are rounded to at each step."""
    options = {"rotary_base": 10_000.0, "rotary_fraction": 1.0, "softcap": None, "scale": None} | options
    wide = np.promote_types(dtype, np.float32) if dtype == "float64" else np.dtype(np.float32)

    def rounded(x):
        return np.asarray(x).astype(jnp.dtype(dtype)).astype(wide)

    params = jax.tree.map(rounded, nnx.to_pure_dict(nnx.state(module, nnx.Param)))

    def project(name, subscripts, x):
        return rounded(
            rounded(np.einsum(subscripts, x, params[name]["kernel"])) + params[name].get("bias", wide.type(0))
        )

    def turn(x):
        turning = options.get("rotary_frequencies")
        if options["rotary_base"] is not None:
            rotated = int(x.shape[3] * options["rotary_fraction"])
            turning = options["rotary_base"] ** (-np.arange(0, rotated, 2) / rotated)
        if turning is None:
            return x
        angles = np.arange(x.shape[1])[:, None] * np.asarray(turning)
        cos, sin = (f(angles)[None, :, None].astype(wide) for f in (np.cos, np.sin))
        half = len(turning)
        a, b = x[..., :half], x[..., half : 2 * half]
        return rounded(np.concatenate([a * cos - b * sin, b * cos + a * sin, x[..., 2 * half :]], axis=-1))

    def normalize(name, x):
        if name not in params:
            return x
        return rounded(x / np.sqrt((x * x).mean(-1, keepdims=True) + wide.type(1e-6)) * params[name]["scale"])

    q, k, v = (project(name, "btd,dnh->btnh", rounded(x)) for name in ("query", "key", "value"))
    q, k = turn(normalize("query_norm", q)), turn(normalize("key_norm", k))
    window, at = options["window"], np.arange(x.shape[1])
    sides = {"left": window.left, "right": window.right, "sinks": window.sinks}
    mask = oracle.visible(**sides, q_positions=at, k_positions=at, q_segments=segments, k_segments=segments)
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    logits = np.einsum("btnh,bsnh->bnts", q, k) * wide.type(options["scale"] or q.shape[3] ** -0.5)
    if options["softcap"] is not None:
        logits = wide.type(options["softcap"]) * np.tanh(logits / wide.type(options["softcap"]))
    weights = np.where(mask[:, None], np.exp(logits), wide.type(0))
    total = weights.sum(-1, keepdims=True)
    if "sink_logits" in params:
        total = total + np.exp(params["sink_logits"])[None, :, None, None]
    out = rounded(np.einsum("bnts,bsnh->btnh", rounded(weights / total), v))
    return project("out", "btnh,nhd->btd", out)


def exact_and_plain(module, options, x, dtype="float32", segments=None):
    return tuple(by_hand(module, options, x, precision, segments) for precision in ("float64", dtype))


def assert_by_hand(got, module, options, x, segments=None):
    cases.assert_close(got, *exact_and_plain(module, options, x, str(got.dtype), segments))


@cache
def whole(length=T):
    """Output of the rich layer for `inputs(length=length)`, exact and plain."""
    return exact_and_plain(layer(), RICH, inputs(length=length))


def assert_whole(got, rows, at, what=""):
    """`got` is the rich layer's output at the positions `at` (a slice) of `rows`."""
    exact, plain = whole()
    cases.assert_close(got, exact[rows, at], plain[rows, at], what)


ALL = slice(None)


# One meaning, three ways to write it.


@pytest.mark.parametrize("name", OPTIONS)
def test_nnx_and_linen_equal_the_operation_between_projections_by_hand(name):
    options, module, x = OPTIONS[name], layer(name), inputs()
    segments = jnp.asarray([[0] * 5 + [1] * 7, [3] * 2 + [4] * 10], jnp.int32) if name == "packed" else None
    got, nothing = call(module, x, segment_ids=segments)
    assert nothing is None
    assert_by_hand(got, module, options, x, segments)
    twin, variables = in_linen(module, options)
    got, nothing = jax.jit(lambda v, x: twin.apply(v, x, segment_ids=segments))(variables, x)
    assert nothing is None
    assert_by_hand(got, module, options, x, segments)


def test_bfloat16_with_float32_parameters():
    options = RICH | {"dtype": jnp.bfloat16}
    module = randomized(ringjax.nnx.SlidingWindowAttention(**complete(options), rngs=nnx.Rngs(0)))
    x = inputs(dtype="bfloat16")
    twin, variables = in_linen(module, options)
    got = call(module, x)[0], jax.jit(twin.apply)(variables, x)[0]
    for out in got:
        assert out.dtype == jnp.bfloat16
        assert_by_hand(out, module, options, x)
    gradients = nnx.jit(nnx.grad(lambda m, x: m(x)[0].astype(jnp.float32).sum()))(module, x)
    assert {str(g.dtype) for g in jax.tree.leaves(gradients)} == {"float32"}
    assert module.init_buffer(1).k.dtype == twin.init_buffer(1).k.dtype == jnp.bfloat16
    assert (
        module.init_buffer(1, dtype=jnp.float16).k.dtype == twin.init_buffer(1, dtype=jnp.float16).k.dtype == "float16"
    )


def test_same_arguments_same_parameters():
    ours, theirs = (
        {k: p for k, p in inspect.signature(c).parameters.items() if k not in ("self", "rngs", "parent", "name")}
        for c in (ringjax.nnx.SlidingWindowAttention.__init__, ringjax.linen.SlidingWindowAttention)
    )
    assert list(ours) == list(theirs)
    for name, parameter in ours.items():
        if not callable(parameter.default):
            assert parameter.default == theirs[name].default, name
    for method in ("__call__", "init_buffer"):
        pair = [getattr(m.SlidingWindowAttention, method) for m in (ringjax.nnx, ringjax.linen)]
        assert str(inspect.signature(pair[0])) == str(inspect.signature(pair[1]))
    for name in ("rich", "bare"):
        twin, variables = in_linen(layer(name), OPTIONS[name])
        made = jax.eval_shape(twin.init, jax.random.key(0), inputs())
        assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, variables)


# Stream equals batch.


@pytest.mark.parametrize(("chunks", "slack"), [((6, 4, 2), 0), ((1,) * 12, 0), ((11, 1), 0), ((4, 4, 4), 3)])
def test_any_partition_gives_the_whole(chunks, slack):
    """google-deepmind/gemma corrupts the positions of chunks (6, 4, 2), EasyDeL leaves holes after 6 and 4, and for
    litgpt#2182 any second chunk is wrong: features.md (c) 24, 25, 6."""
    module, x = layer(), inputs()
    ring, at = module.init_buffer(B, slack=slack), 0
    assert ring.capacity == 2 + 4 + slack  # the window's, not the stream's: gemma#648
    for chunk in chunks:
        got, ring = call(module, x[:, at : at + chunk], ring)
        assert_whole(got, ALL, slice(at, at + chunk), f"tokens {at}..{at + chunk - 1}")
        at += chunk
    np.testing.assert_array_equal(ring.length, [T, T])


def test_linen_streams_without_a_cache_collection():
    twin, variables = in_linen(layer(), RICH)
    step, x, ring = jax.jit(twin.apply), inputs(), twin.init_buffer(B)
    for chunk in (slice(0, 6), slice(6, 7), slice(7, 8)):
        got, ring = step(variables, x[:, chunk], ring)
        assert_whole(got, ALL, chunk)


@cache
def ragged_stream():
    graph, state = nnx.split(layer())

    @jax.jit
    def run(state, chunks, lengths):
        def step(ring, chunk):
            out, ring = nnx.merge(graph, state)(chunk[0], ring, lengths=chunk[1])
            return ring, out

        return jax.lax.scan(step, layer().init_buffer(B), (chunks, lengths))[1]

    return partial(run, state)


@given(st.lists(st.tuples(*[st.integers(0, 3)] * B), min_size=4, max_size=4))
def test_ragged_chunks_give_the_rows_one_by_one(lengths):
    """Padding is NaN, is not written, and comes out as 0; the rotary embedding goes on where the row's tokens end."""
    x, lengths = np.asarray(inputs()), np.asarray(lengths, np.int32)
    ends = np.cumsum(lengths, axis=0)
    chunks = np.full((4, B, 3, D), np.nan, np.float32)
    for i, row in np.ndindex(4, B):
        end, length = ends[i, row], lengths[i, row]
        chunks[i, row, :length] = x[row, end - length : end]
    got = np.asarray(ragged_stream()(jnp.asarray(chunks), jnp.asarray(lengths)))
    padding = np.arange(3)[None, None] >= lengths[:, :, None]
    np.testing.assert_array_equal(got[padding], 0.0)
    for row in range(B):
        if ends[-1, row]:
            assert_whole(jnp.asarray(got[:, row][~padding[:, row]]), row, slice(0, ends[-1, row]), f"row {row}")


def test_one_executable_for_every_position():
    """transformers#44609, features.md (c) 5; and flax's own cache writes over its last slot once it is full."""
    traces = []

    @nnx.jit
    def step(module, x, ring):
        traces.append(x.shape)
        return module(x, ring)

    x, ring = inputs(), layer().init_buffer(B)
    for t in range(T):
        got, ring = step(layer(), x[:, t : t + 1], ring)
        assert_whole(got, ALL, slice(t, t + 1), f"token {t}")
    assert len(traces) == 1


# Rows that hold several sequences, or fewer tokens than they could.


def test_packed_sequences_equal_each_alone():
    """A sequence's positions count from anywhere: the rotary embedding knows distances only."""
    module, x = layer("packed"), inputs()
    segments = jnp.asarray([[0] * 5 + [1] * 7, [4] * 5 + [2] * 7], jnp.int32)
    exact, plain = (
        np.concatenate(parts, axis=1)
        for parts in zip(
            *(exact_and_plain(module, OPTIONS["packed"], part) for part in (x[:, :5], x[:, 5:])), strict=True
        )
    )
    got, _ = call(module, x, segment_ids=segments)
    cases.assert_close(got, exact, plain)
    restarted = jnp.asarray([*range(5), *range(7)], jnp.int32)
    got, _ = call(module, x, segment_ids=segments, positions=restarted)
    cases.assert_close(got, exact, plain)


def test_positions_move_the_rotary_embedding_and_nothing_else():
    module, x = layer(), inputs()
    far = 10**6 + jnp.arange(T, dtype=jnp.int32)
    assert_whole(call(module, x, positions=far)[0], ALL, ALL)
    spread = 3 * jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
    ringed, _ = call(module, x, module.init_buffer(B), positions=spread)
    got, _ = call(module, x, positions=spread)
    cases.assert_close(ringed, np.asarray(got).astype(np.float64), whole()[1] - whole()[0] + np.asarray(got))
    assert np.abs(np.asarray(got) - whole()[0]).max() > 0.01


@pytest.mark.parametrize("said", ["lengths", "both"])
def test_padding_reaches_neither_outputs_nor_gradients(said):
    module, lengths = layer(), np.asarray([7, T], np.int32)
    real = np.arange(T)[None] < lengths[:, None]
    how = {"lengths": jnp.asarray(lengths)}
    if said == "both":  # a row's last five tokens twice in two ways: it is padding that either calls so
        segment_ids = np.where(real | (np.arange(T)[None] < 9), 0, -1)
        how |= {"segment_ids": jnp.asarray(segment_ids, jnp.int32)}

    @nnx.jit
    @partial(nnx.value_and_grad, has_aux=True)
    def gradient(module, x, how):
        out, _ = module(x, **how)
        return (out * inputs(1)[:, :, :6]).sum(), out

    clean = jnp.where(real[:, :, None], inputs(), 0.0)
    dirty = jnp.where(real[:, :, None], inputs(), jnp.nan)
    (_, out), gradients = gradient(module, dirty, how)
    (_, same), expected = gradient(module, clean, how)
    np.testing.assert_array_equal(out, same)
    jax.tree.map(np.testing.assert_array_equal, gradients, expected)
    np.testing.assert_array_equal(np.asarray(out)[~real], 0.0)
    assert_whole(out[0, :7], 0, slice(0, 7))
    assert_whole(out[1], 1, ALL)


# Flax's transforms.


def loss(out):
    return (out * inputs(1)[:, :, : out.shape[-1]]).sum()


@cache
def stack():
    """Two layers of one shape as one module with a leading axis, and the same layers one by one."""

    @nnx.split_rngs(splits=2)
    @nnx.vmap
    def create(rngs):
        return ringjax.nnx.SlidingWindowAttention(**complete(SAME_WIDTH), rngs=rngs)

    module = randomized(create(nnx.Rngs(0)))
    graph, state = nnx.split(module)
    return module, [nnx.merge(graph, jax.tree.map(lambda p, i=i: p[i], state)) for i in range(2)]


def stacked(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def rings():
    """One for each layer of the stack; with so much slack that one product reads all, which compiles faster."""
    return [module.init_buffer(B, slack=T - 1) for module in stack()[1]]


@cache
def unrolled():
    """Output, rings and gradients of the stack, layer by layer, with a leading axis of layers."""

    @nnx.jit
    @partial(nnx.value_and_grad, has_aux=True)
    def run(layers, x, rings):
        for i, module in enumerate(layers):
            out, rings[i] = module(x, rings[i])
            x = x + out
        return loss(x), (x, rings)

    (_, (out, after)), gradients = run(nnx.List(stack()[1]), inputs(), rings())
    gradients = nnx.to_pure_dict(gradients)
    return out, stacked(after), stacked([gradients[0], gradients[1]])


def assert_unrolled(*got):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, unrolled())


def test_nnx_scan_over_layers_and_remat():
    @nnx.remat
    def block(module, x, ring):
        out, ring = module(x, ring)
        return x + out, ring

    scanned = nnx.scan(block, in_axes=(0, nnx.Carry, 0), out_axes=(nnx.Carry, 0))

    @nnx.jit
    @partial(nnx.value_and_grad, has_aux=True)
    def run(module, x, rings):
        out, rings = scanned(module, x, rings)
        return loss(out), (out, rings)

    (_, (out, after)), gradients = run(stack()[0], inputs(), stacked(rings()))
    assert_unrolled(out, after, nnx.to_pure_dict(gradients))


class Block(nn.Module):
    """What users of linen write around a layer to scan it."""

    @nn.compact
    def __call__(self, x, ring):
        out, ring = ringjax.linen.SlidingWindowAttention(**complete(SAME_WIDTH), name="attention")(x, ring)
        return x + out, ring


def test_linen_scan_over_layers_and_remat():
    block = nn.remat(Block, prevent_cse=False)
    model = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=0, out_axes=0, length=2)()

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def run(params, rings):
        out, rings = model.apply({"params": {"attention": params}}, inputs(), rings)
        return loss(out), (out, rings)

    (_, (out, after)), gradients = run(nnx.to_pure_dict(nnx.state(stack()[0], nnx.Param)), stacked(rings()))
    assert_unrolled(out, after, gradients)


def test_gradients_flow_through_chunks_as_through_the_whole():
    """Law 10, with the projections around it: two chunks and the ring between them."""

    @nnx.jit
    def whole(module):
        return nnx.grad(lambda m: loss(m(inputs())[0]))(module)

    @nnx.jit
    def chunked(module):
        def run(m):
            first, ring = m(inputs()[:, :7], m.init_buffer(B))
            second, _ = m(inputs()[:, 7:], ring)
            return loss(jnp.concatenate([first, second], axis=1))

        return nnx.grad(run)(module)

    want = whole(layer())
    assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(want))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), chunked(layer()), want)


def test_optimizer_trains_every_parameter(numpy_promotion):
    optax = pytest.importorskip("optax")
    module = ringjax.nnx.SlidingWindowAttention(**complete(RICH), rngs=nnx.Rngs(1))
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    optimizer = nnx.Optimizer(module, optax.adam(3e-2), wrt=nnx.Param)
    target, _ = call(layer(), inputs())

    @nnx.jit
    def step(module, optimizer):
        value, gradients = nnx.value_and_grad(lambda m: jnp.square(m(inputs())[0] - target).mean())(module)
        optimizer.update(module, gradients)
        return value

    values = [float(step(module, optimizer)) for _ in range(50)]
    assert values[-1] < 0.2 * values[0]
    after = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    moved = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - b).max()), after, before)
    assert min(jax.tree.leaves(moved)) > 1e-3


def test_parameters_carry_their_sharding():
    """As Flax's users write it; the names follow the shapes of the kernels."""
    kernel, out = ("embed", "heads", None), ("heads", None, "embed")
    mesh = jax.make_mesh((1, 1), ("embed", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharded = {
        "kernel_init": (nnx.initializers.lecun_normal(), kernel),
        "sink_logits_init": (nnx.initializers.zeros, ("heads",)),
    }
    sharded["out_kernel_init"] = nnx.initializers.lecun_normal(), out

    def options(with_partitioning):
        return complete(RICH) | {name: with_partitioning(*pair) for name, pair in sharded.items()}

    with jax.set_mesh(mesh):
        module = ringjax.nnx.SlidingWindowAttention(**options(nnx.with_partitioning), rngs=nnx.Rngs(0))
        specs = nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(module, nnx.Param)))
    # Without a mesh around it: with one, linen itself asks for a kernel's sharding before the kernel has its shape.
    twin = ringjax.linen.SlidingWindowAttention(**options(nn.with_partitioning))
    variables = jax.eval_shape(twin.init, jax.random.key(0), inputs())
    twins = nn.get_partition_spec(variables)["params"]
    for found in (specs, twins):
        assert found["query"]["kernel"] == found["value"]["kernel"] == jax.P(*kernel)
        assert found["out"]["kernel"] == jax.P(*out)
        assert found["sink_logits"] == jax.P("heads")
    assert jax.eval_shape(twin.apply, variables, inputs())[0].shape == (B, T, 6)


# Flax's own modules with our attention.


def multihead(framework, attention_fn, *, jit=True, **options):
    """Flax's module as a function of x [..., T, D] and its keyword arguments; its parameters are always the same."""
    options = {"num_heads": N, "qkv_features": N * H} | options
    if attention_fn is not None:
        options["attention_fn"] = attention_fn
    if framework == "nnx":
        run = nnx.MultiHeadAttention(in_features=D, **options, decode=False, rngs=nnx.Rngs(0))
    else:
        module = nn.MultiHeadDotProductAttention(**options)
        # Without the attention, which is no part of the parameters and here may have its reasons to refuse.
        plain = module.clone(attention_fn=nn.dot_product_attention, deterministic=True)
        run = partial(module.apply, plain.init(jax.random.key(0), jnp.zeros((B, T, D))))
    return jax.jit(run, static_argnames=("is_causal", "deterministic")) if jit else run


OURS = {"nnx": ringjax.nnx.attention_fn, "linen": ringjax.linen.attention_fn}


def mask_of(window, length=T):
    at = np.arange(length)
    return jnp.asarray(
        oracle.visible(left=window.left, right=window.right, sinks=window.sinks, q_positions=at, k_positions=at)
    )


@pytest.mark.parametrize("framework", OURS)
@pytest.mark.parametrize("window", [W.causal(1), W.causal(2), W.causal(3, sinks=2), W.symmetric(2)], ids=str)
def test_drop_in_equals_flax_with_a_mask(framework, window, numpy_promotion):
    """Windows so small that one key more or less shows: features.md (c) 2, 12, 13. And no mask is needed: 10."""
    options = {"num_kv_heads": K} if framework == "nnx" else {"normalize_qk": True}
    got = multihead(framework, OURS[framework](window), **options)(inputs())
    want = multihead(framework, None, **options)(inputs(), mask=mask_of(window))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("framework", OURS)
def test_drop_in_takes_any_leading_axes_and_its_options(framework, numpy_promotion):
    run = multihead(framework, OURS[framework](W.causal(3)))
    out = run(inputs())
    np.testing.assert_allclose(run(inputs()[0]), out[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(run(inputs()[None, :, None]), out[None, :, None], rtol=1e-5, atol=1e-5)
    q, k, v = (jnp.asarray(np.random.default_rng(i).standard_normal((B, T, 2, 4)), jnp.float32) for i in range(3))
    options = {"softcap": 1.0, "sink_logits": jnp.asarray([0.0, 1.0]), "scale": 0.3, "implementation": "xla"}
    got = OURS[framework](W.causal(3), **options)(q, k, v)
    np.testing.assert_array_equal(got, rj.attention(q, k, v, W.causal(3), **options))
    low = OURS[framework](W.causal(3))(q, k, v, dtype=jnp.bfloat16)
    assert low.dtype == jnp.bfloat16


def test_drop_in_is_causal_cuts_off_the_right(numpy_promotion):
    got = multihead("nnx", OURS["nnx"](W.symmetric(2)))(inputs(), is_causal=True)
    want = multihead("nnx", OURS["nnx"](W.causal(3)))(inputs())
    np.testing.assert_array_equal(got, want)


# What is refused, and how.


def refused(kind, text, f):
    with pytest.raises(kind, match="^" + re.escape(text) + "(\n|$)"):
        f()


MASKED = "attention_fn: mask must be None, got "


@pytest.mark.parametrize("framework", OURS)
def test_drop_in_refuses_what_it_cannot_honour(framework, numpy_promotion):
    fn = OURS[framework](W.causal(3))
    q = jnp.zeros((B, T, 2, 4))
    run = multihead(framework, fn)
    with pytest.raises(
        NotImplementedError, match=re.escape(MASKED + "bool[1, 12, 12].") + "(.|\n)*segment_ids(.|\n)*lengths"
    ):
        run(inputs(), mask=mask_of(W.causal(3)))
    dropping = multihead(framework, fn, jit=False, dropout_rate=0.5)
    assert dropping(inputs(), deterministic=True).shape == (B, T, D)
    dropout = "attention_fn: dropout_rate must be 0 unless deterministic, got 0.5."
    rng = {"rngs": nnx.Rngs(0)} if framework == "nnx" else {"dropout_rng": jax.random.key(0)}
    for kind, text, f in (
        (NotImplementedError, dropout, lambda: dropping(inputs(), deterministic=False, **rng)),
        (
            NotImplementedError,
            "attention_fn: bias must be None, got float32[1].",
            lambda: fn(q, q, q, bias=jnp.ones(1)),
        ),
        (NotImplementedError, "attention_fn: module must be None, got object.", lambda: fn(q, q, q, module=object())),
        (
            NotImplementedError,
            "attention_fn: qk_attn_weights_einsum must be None, got function.",
            lambda: fn(q, q, q, qk_attn_weights_einsum=lambda: 0),
        ),
        (
            NotImplementedError,
            "attention_fn: input_positions must be None, got int32[12].",
            lambda: fn(q, q, q, input_positions=jnp.arange(T, dtype=jnp.int32)),
        ),
        (
            ValueError,
            "attention_fn: is_causal needs as many queries as keys, got 1 and 12.",
            lambda: fn(q[:, :1], q, q, is_causal=True),
        ),
        (
            ValueError,
            "attention_fn: key must have axes [..., length, heads, head_dim], got float32[2, 4].",
            lambda: fn(q, q[0, 0], q),
        ),
        (TypeError, "attention_fn: window must be a Window, got int.", lambda: OURS[framework](3)),
    ):
        refused(kind, text, f)


def test_decode_true_is_refused(numpy_promotion):
    """Flax's own cache makes a mask, and silently writes over its last slot once it is full."""
    module = nnx.MultiHeadAttention(N, D, N * H, attention_fn=OURS["nnx"](W.causal(3)), decode=True, rngs=nnx.Rngs(0))
    module.init_cache((B, T, D))
    refused(NotImplementedError, MASKED + "float32[2, 1, 1, 12].", lambda: module(inputs()[:, :1]))


WRONG_LAYERS = [
    (TypeError, {"window": 3}, "window must be a Window, got int."),
    (ValueError, {"num_heads": 0}, "num_heads must be at least 1, got 0."),
    (TypeError, {"in_features": 8.0}, "in_features must be an int, got float."),
    (ValueError, {"num_kv_heads": 3}, "num_heads must be a multiple of num_kv_heads, got 4 and 3."),
    (ValueError, {"num_heads": 5, "head_dim": None}, "in_features must be a multiple of num_heads, got 12 and 5."),
    (
        ValueError,
        {"head_dim": 7, "rotary_fraction": 1.0},
        "head_dim * fraction must be even, at least 2 and at most head_dim, got 7 * 1.",
    ),
    (ValueError, {"rotary_base": -1.0}, "base must be finite and above 0, got -1.0."),
    (ValueError, {"softcap": 0.0}, "softcap must be finite and above 0, got 0.0."),
    (TypeError, {"scale": "big"}, "scale must be a Python number, got str."),
]


@pytest.mark.parametrize(("kind", "options", "text"), WRONG_LAYERS)
def test_messages_of_construction(kind, options, text):
    options = complete(RICH) | options
    refused(kind, f"SlidingWindowAttention: {text}", lambda: ringjax.linen.SlidingWindowAttention(**options))
    text = f"SlidingWindowAttention: {text}"
    refused(kind, text, lambda: ringjax.nnx.SlidingWindowAttention(**options, rngs=nnx.Rngs(0)))


X = inputs()


def ring(**changes):
    fits = {"batch": B, "kv_heads": K, "head_dim": H, "window": RICH["window"]}
    return rj.RingBuffer.empty(**fits | changes, dtype=jnp.float32)


WRONG_CALLS = [
    (ValueError, (X[0],), {}, "x must have 3 axes [B, T, D], got float32[12, 12]."),
    (TypeError, (X.astype(jnp.int32),), {}, "x must be one of float32, bfloat16, float16, got int32[2, 12, 12]."),
    (ValueError, (X[:, :, :5],), {}, "x must have 12 features (in_features), got 5."),
    (TypeError, (X, X), {}, "buffer must be a RingBuffer, got ArrayImpl."),
    (
        ValueError,  # vLLM#51756, features.md (c) 27: a layer that reads a cache with another layer's window
        (X, ring(window=W.causal(5))),
        {},
        "layer and buffer must agree on window, got Window(left=3, sinks=2) and Window(left=4).",
    ),
    (ValueError, (X, ring(kv_heads=4)), {}, "layer and buffer must agree on kv heads, got 2 and 4."),
    (ValueError, (X, ring(head_dim=4)), {}, "layer and buffer must agree on head_dim, got 8 and 4."),
    (ValueError, (X, ring(batch=1)), {}, "x and buffer must agree on batch, got 2 and 1."),
    (
        ValueError,
        (X, ring()),
        {"segment_ids": jnp.zeros((B, T), jnp.int32)},
        "segment_ids must be None where a buffer is given, got int32[2, 12].",
    ),
    (ValueError, (X,), {"segment_ids": jnp.zeros(T, jnp.int32)}, "segment_ids must have shape [2, 12], got int32[12]."),
    (
        ValueError,
        (X,),
        {"lengths": np.asarray([3, 13])},
        "lengths must be between 0 and 12, the length of the chunk, got [3, 13].",
    ),
    (ValueError, (X,), {"lengths": np.asarray([3])}, "lengths must be int32[2], one per row, got int64[1]."),
    (
        ValueError,
        (X,),
        {"positions": jnp.zeros((T, B), jnp.int32)},
        "positions must be int32[12] or int32[2, 12], got int32[12, 2].",
    ),
    (TypeError, (X,), {"positions": 0}, "positions must be an array of integers, got int."),
]


@pytest.mark.parametrize(("kind", "arguments", "options", "text"), WRONG_CALLS)
def test_messages_of_calls(kind, arguments, options, text):
    twin, variables = in_linen(layer(), RICH)
    refused(kind, f"SlidingWindowAttention: {text}", lambda: layer()(*arguments, **options))
    refused(kind, f"SlidingWindowAttention: {text}", lambda: twin.apply(variables, *arguments, **options))


def test_unbounded_windows_have_no_ring():
    module = ringjax.nnx.SlidingWindowAttention(2, D, W.causal(), rngs=nnx.Rngs(0))
    text = "RingBuffer.empty: window must be bounded on the left, got Window(left=None)."
    refused(ValueError, text, lambda: module.init_buffer(B))
