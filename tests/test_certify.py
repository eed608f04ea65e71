"""`certify` passes on our loops and names the fault in others: the ring, the instruction, the operation of JAX."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import ringjax as rj
from ringjax import _certify, _hlo

# No length is the size of anything else.
WINDOWS = (rj.Window.causal(1021, sinks=2), rj.Window.causal(509))
X = jax.ShapeDtypeStruct((2, 1, 4, 16), jnp.float32)


def rings(batch=2, dtype="float32"):
    return [rj.RingBuffer.empty(batch, 2, 16, window, slack=1, dtype=dtype) for window in WINDOWS]


def step(x, state):
    after = []
    for ring in state:
        out, ring = rj.attend(x, x[:, :, :2], x[:, :, 2:], ring)
        x, after = x + out, [*after, ring]
    return x, after


def loop(x, state, steps=3):
    def body(carry, _):
        return step(*carry), None

    return lax.scan(body, (x, state), length=steps)[0]


# --- what passes ---


@pytest.mark.parametrize(("batch", "dtype"), [(1, "float32"), (2, "float32"), (2, "int8")])
def test_our_loop_passes(batch, dtype):
    """Layers of different windows in one carry; shapes suffice; all of the rings is held once."""
    state = jax.eval_shape(partial(rings, batch, dtype))
    found = rj.certify(loop, state, jax.ShapeDtypeStruct((batch, 1, 4, 16), jnp.float32))
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert sum(size for _, _, size in found.rings) == held - 2 * 2 * 4 * batch  # less the counters
    assert found.aliased_bytes >= held and found.argument_bytes < held + 2000
    assert found.platform == jax.default_backend() and found.temp_bytes > 0
    names = [name for name, _, _ in found.rings]
    assert names[:2] == ["state[0].k", "state[0].v"] and len(names) == (4 if dtype == "float32" else 8)
    lines = str(found).splitlines()
    assert (
        lines[0]
        == f"certified on {found.platform}: {len(names)} arrays of rings, {held - 16 * batch:,} bytes, all in place"
    )
    assert lines[1].startswith("  state[0].k: ") and lines[-1].startswith("  one executable for every position")


def test_what_is_certified_is_what_runs():
    """The executable of the certificate takes the state over, at every position of three wraps."""
    state = [rj.RingBuffer.empty(2, 2, 16, rj.Window.causal(5), dtype="float32")]
    x = jnp.ones((2, 1, 4, 16))
    run = jax.jit(step, donate_argnums=1)
    found = rj.certify(run, state, x)
    mine, own = state, jax.tree.map(jnp.copy, state)
    for _ in range(16):
        _, new = found.executable(x, mine)
        assert mine[0].k.is_deleted()
        (out, own), mine = run(x, own), new
    assert run._cache_size() == 1 and own[0].length.tolist() == [16, 16]
    np.testing.assert_array_equal(mine[0].k, own[0].k)
    assert out.shape == x.shape


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 2])
def test_our_loop_passes_on_a_gpu(batch):
    """With whatever implementation is chosen there; and a rolled cache does not."""
    state = [rj.RingBuffer.empty(batch, 2, 64, window, slack=1, dtype="bfloat16") for window in WINDOWS]
    found = rj.certify(loop, state, jax.ShapeDtypeStruct((batch, 1, 4, 64), jnp.bfloat16))
    assert found.platform == "gpu" and found.aliased_bytes >= sum(size for _, _, size in found.rings)
    assert refused(rolled, cache(), X)[0].startswith("certify: no temporary may be as large as a ring")


def test_parameters_travel_in_a_partial_and_unused_arguments_do_no_harm():
    def scaled(weights, unused, x, state):
        del unused
        return step(x * weights, state)

    weights = jnp.ones((2, 1, 4, 16))
    model = jax.tree_util.Partial(scaled, weights, jnp.ones(7))
    assert len(rj.certify(model, rings(), X).rings) == 4


# --- four planted faults ---


def refused(*args, **options):
    with pytest.raises(ValueError) as raised:
        rj.certify(*args, **options)
    return str(raised.value).splitlines()


def test_without_donation():
    lines = refused(jax.jit(step), rings(), X)
    assert lines == [
        "certify: every ring must be donated, got state[0].k without.",
        "  ring: state[0].k, float32[2, 2, 1024, 16], 262144 bytes",
        "  Hint: jax.jit(step, donate_argnums=1): each call makes a second ring otherwise.",
    ]


def cache():
    return {name: jnp.zeros((2, 1021, 2, 16)) for name in "kv"} | {"position": jnp.int32(0)}


def rolled(x, cache):
    k, v = (jnp.concatenate([cache[name][:, 1:], x[:, :, :2]], axis=1) for name in "kv")
    shares = jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", x[:, :, :2], k), axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", shares, v), {"k": k, "v": v, "position": cache["position"] + 1}


@pytest.mark.parametrize("looped", [False, True])
def test_a_rolled_cache(looped):
    def run(x, cache):
        out, cache = lax.scan(lambda cache, _: rolled(x, cache)[::-1], cache, length=3)[::-1]
        return out, cache

    lines = refused(run if looped else rolled, cache(), X)
    assert lines[0] in [
        f"certify: no temporary may be as large as a ring, got an array made of state['{name}']." for name in "kv"
    ]
    assert "float32[2, 1021, 2, 16], 261376 bytes" in lines[1]
    assert "[2,1021,2,16]" in lines[2]
    assert lines[3].startswith("  from:") and lines[3].endswith("concatenate")
    assert ("while/body" in lines[3]) == looped


def test_rings_as_xs_and_ys_of_a_scan_over_layers():
    """Also: the same layers, unrolled, pass."""
    layers = [rj.RingBuffer.empty(2, 2, 16, WINDOWS[0], dtype="float32") for _ in range(3)]

    def token(x, stack):
        def layer(x, ring):
            out, ring = rj.attend(x, x[:, :, :2], x[:, :, 2:], ring)
            return x + out, ring

        return lax.scan(layer, x, stack)

    def run(x, stack):
        return lax.scan(lambda carry, _: (token(*carry), None), (x, stack), length=3)[0]

    stack = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    lines = refused(run, stack, X)
    assert lines[0] in [
        f"certify: no temporary may be as large as a ring, got an array made of state.{n}." for n in "kv"
    ]
    assert lines[3].startswith("  from:") and "while/body" in lines[3]
    assert rj.certify(loop, layers, X).temp_bytes < layers[0].k.nbytes


@partial(jax.tree_util.register_dataclass, data_fields=["k"], meta_fields=["position"])
@dataclasses.dataclass
class Cache:
    k: jax.Array
    position: int


RULE = "certify: one executable must serve every position, got"


def test_a_position_that_is_a_python_int():
    """In the state, beside it, or read from an array: each position would be compiled anew."""

    def static_field(x, cache):
        k = cache.k.at[:, cache.position % 1021].set(x[:, 0, :2])
        return x, Cache(k, cache.position + 1)

    lines = refused(static_field, Cache(jnp.zeros((2, 1021, 2, 16)), 7), X)
    assert lines[0] == f"{RULE} a state whose tree or static fields change."
    assert "7" in lines[1] and "8" in lines[2]

    def static_input(x, position, k):
        return x, k.at[:, position % 1021].set(x[:, 0, :2])

    run = jax.jit(static_input, static_argnums=1, donate_argnums=2)
    assert refused(run, jnp.zeros((2, 1021, 2, 16)), X, 7)[0] == f"{RULE} a static input: 7."

    def concrete(x, state):
        return x * int(state[0].length[0]), state

    assert refused(concrete, rings(), X)[0] == f"{RULE} a step that reads one as a Python number."

    def growing(x, k):
        return x, jnp.concatenate([k, x[:, :, :2]], axis=1)

    lines = refused(growing, jnp.zeros((2, 1021, 2, 16)), X)
    assert lines[0] == f"{RULE} a state that changes: state from float32[2, 1021, 2, 16] to float32[2, 1022, 2, 16]."


# --- other faults ---


def test_a_ring_that_is_kept():
    """The step needs the old ring after the new one is written: a copy, wherever XLA puts it."""

    def keeps(x, state):
        out, after = step(x, state)
        return (out, jnp.tanh(state[0].k) @ jnp.ones((16, 1))), after

    assert refused(keeps, rings(), X)[0].startswith("certify: no temporary may be as large as a ring, got an array")


def test_a_ring_that_comes_back_from_elsewhere():
    """The old one is not even read: the new one does not lie in its place."""

    def fresh(x, cache):
        return x + cache["v"].sum(), cache | {"k": jnp.zeros_like(cache["k"])}

    lines = refused(fresh, {name: jnp.zeros((2, 1021, 2, 16)) for name in "kv"}, X)
    assert lines[0] == "certify: every ring must be updated in place, got state['k'] in a new array."


def test_messages():
    for call, error, first in (
        (
            lambda: rj.certify(3, rings(), X),
            TypeError,
            "certify: step must be a function (*inputs, state) -> (out, state), got int.",
        ),
        (
            lambda: rj.certify(step, {}, X),
            ValueError,
            "certify: state must hold a ring or another large array, got 0 leaves without one.",
        ),
        (
            lambda: rj.certify(step, rings(), X, least_bytes=0),
            ValueError,
            "certify: least_bytes must be at least 1, got 0.",
        ),
    ):
        with pytest.raises(error) as raised:
            call()
        assert str(raised.value).splitlines()[0] == first


# --- the reader of XLA's text ---

TEXT = """HloModule jit_f, input_output_alias={ {1}: (0, {}, may-alias), {2}: (3, {}, must-alias) }, x={1}

%update (p.0: f32[2,64], p.1: f32[1,64], p.2: s32[]) -> f32[2,64] {
  %p.0 = f32[2,64]{1,0} parameter(0)
  %p.1 = f32[1,64]{1,0} parameter(1)
  %p.2 = s32[] parameter(2)
  %b = f32[2,64]{1,0} bitcast(%p.0)
  ROOT %dus = f32[2,64]{1,0} dynamic-update-slice(%b, %p.1, %p.2, %p.2)
}

%roll (r.0: f32[2,64]) -> f32[2,64] {
  %r.0 = f32[2,64]{1,0} parameter(0)
  ROOT %n = f32[2,64]{1,0} negate(%r.0)
}

%body (s: (s32[], f32[2,64], /*index=2*/f32[1,64])) -> (s32[], f32[2,64], f32[1,64]) {
  %s = (s32[], f32[2,64]{1,0:T(8,128)}, /*index=2*/f32[1,64]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %ring = f32[2,64]{1,0} get-tuple-element(%s), index=1
  %new = f32[1,64]{1,0} get-tuple-element(%s), index=2
  %written = f32[2,64]{1,0} fusion(%ring, %new, %i), kind=kLoop, calls=%update
  %launched = (f32[2,64]{1,0}, f32[1,64]) custom-call(%new, %written), custom_call_target="k", \
output_to_operand_aliasing={{0}: (1, {})}
  %after = f32[2,64]{1,0} get-tuple-element(%launched), index=0
  ROOT %t = (s32[], f32[2,64]{1,0}, f32[1,64]) tuple(%i, %after, %new)
}

%condition (c: (s32[], f32[2,64], f32[1,64])) -> pred[] {
  %c = (s32[], f32[2,64], f32[1,64]) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (a: f32[2,64], w: bf16[128], x: f32[1,64], b: u8[3]) -> (bf16[128], f32[2,64]) {
  %a = f32[2,64]{1,0} parameter(0), metadata={op_name="a"}
  %w = bf16[128]{0} parameter(1)
  %x = f32[1,64]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %c = bf16[128]{0} copy(%w)
  %init = (s32[], f32[2,64]{1,0}, f32[1,64]) tuple(%zero, %a, %x)
  %loop = (s32[], f32[2,64]{1,0}, f32[1,64]) while(%init), condition=%condition, body=%body
  %out = f32[2,64]{1,0} get-tuple-element(%loop), index=1
  ROOT %result = (bf16[128], f32[2,64]) tuple(%c, %out)
}
"""


def test_the_flow_of_an_array_is_followed_through_a_loop():
    """In-place fusions and custom calls hand it on; a pass over it that is not in place is found."""
    module = _hlo.read(TEXT)
    assert (module.entry, module.aliased) == ("main", {0, 3})
    assert _hlo.made_of(module, {0: 65}) == []
    planted = TEXT.replace("tuple(%i, %after, %new)", "tuple(%i, %again, %new)").replace(
        "  ROOT %t =",
        '  %again = f32[2,64]{1,0} fusion(%after), kind=kLoop, calls=%roll, metadata={op_name="f/neg"}\n  ROOT %t =',
    )
    (made,) = _hlo.made_of(_hlo.read(planted), {0: 65})
    assert (str(made.instruction), made.instruction.origin, made.source) == (
        "again = f32[2,64] fusion(after)",
        "f/neg",
        0,
    )
    new = [(instruction.name, array.bytes) for instruction, array in _hlo.read(planted).new_arrays()]
    assert new == [("launched", 256), ("again", 512), ("c", 256)]
    assert [m.instruction.name for m in _hlo.made_of(module, {1: 128})] == ["c"]
    assert _hlo.made_of(_hlo.read(planted), {0: 129}) == []


def test_arguments_that_nothing_reads_are_told_by_their_shapes():
    """Where jax does not say which ones the executable leaves out."""
    kinds = [("float32", (2, 64)), ("float32", (3,)), ("bfloat16", (128,)), ("int32", ()), ("float32", (1, 64))]
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for dtype, shape in [*kinds, ("uint8", (3,))]]
    text = TEXT.replace("ROOT %result", "%b = u8[3]{0} parameter(3)\n  ROOT %result")
    found = _certify._parameters(None, _hlo.read(text), arguments)
    assert found == {0: 0, 2: 1, 4: 2, 5: 3}
