"""The three rings: what `encode` writes, what `decode` sees, and where a decoder may stand."""

import dataclasses
from functools import cache, partial

import cases
import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ringjax as rj

BATCH, HEADS, KV_HEADS, DIM = 3, 4, 2, 8
STREAM = 24  # tokens that a stream of the model below has room for
CHUNK = 7
CONFIGS = {
    "causal": rj.RingBufferConfig(buffer_size=5, prefill_size=4, sinks=2, slack=3, softcap=2.0),
    "both-sides": rj.RingBufferConfig(buffer_size=4, prefill_size=3, causal=False, sinks=1, slack=1),
    "one-key": rj.RingBufferConfig(buffer_size=1, prefill_size=3),
}
jitted_encode = jax.jit(rj.encode, static_argnames="requires_grad")
jitted_decode = jax.jit(rj.decode)


def new_state(config, batch=BATCH):
    return rj.init_state(config, batch, kv_heads=KV_HEADS, head_dim=DIM, dtype=jnp.float32)


def sink_logits_of(config):
    # A logit of -inf is no sink at all.
    return jnp.linspace(-1, 1, HEADS, dtype=jnp.float32).at[0].set(-jnp.inf) if config.softcap else None


def encode(q, k, v, state, *, requires_grad=False, lengths=None):
    """With all arguments given, so that few executables serve all tests; likewise `decode`."""
    lengths = np.full(q.shape[0], q.shape[1]) if lengths is None else lengths
    options = {"lengths": np.asarray(lengths, np.int32), "sink_logits": sink_logits_of(state.config)}
    return jitted_encode(q, k, v, state, requires_grad=requires_grad, **options)


def decode(q, k, v, state, *, position, lengths=None):
    lengths = np.full(q.shape[0], q.shape[1]) if lengths is None else lengths
    options = {"lengths": np.asarray(lengths, np.int32), "sink_logits": sink_logits_of(state.config)}
    position = np.broadcast_to(np.asarray(position, np.int32), q.shape[:1])
    return jitted_decode(q, k, v, state, position=position, **options)


def tokens(rng, chunk, batch=BATCH):
    shapes = [(batch, chunk, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


@cache
def plain(softcap):
    return jax.jit(lambda *args: cases.plain_attention(*args, softcap=softcap)[0])


def check(got, q, k, v, mask, config, what):
    """Compares with one softmax over the keys that `mask` [B, T, S] names."""
    batch, chunk = q.shape[:2]
    q = np.where(mask.any(-1)[:, :, None, None], q, 0)  # padding may hold NaN
    alone = {
        "q": q.reshape(batch * chunk, 1, *q.shape[2:]),
        "k": np.repeat(k, chunk, axis=0),
        "v": np.repeat(v, chunk, axis=0),
        "k_positions": np.where(mask, np.arange(k.shape[1]), -1).reshape(batch * chunk, -1),
    }
    logits = sink_logits_of(config)
    everything = {"left": None, "right": None, "sinks": 0, "q_positions": [0]}
    exact, _ = oracle.attention(**alone, **everything, sink_logits=logits, softcap=config.softcap)
    cases.assert_close(got, exact.reshape(got.shape), plain(config.softcap)(q, k, v, logits, mask), what)


class Model:
    """The three streams as plain arrays from which nothing is ever evicted."""

    RINGS = ("forward", "backward", "feedback")

    def __init__(self, config, batch=BATCH):
        self.config = config
        self.k, self.v = (
            {ring: np.zeros((batch, STREAM, KV_HEADS, DIM), np.float32) for ring in self.RINGS} for _ in "kv"
        )
        self.count = {ring: np.zeros(batch, int) for ring in self.RINGS}
        self.written = np.zeros(batch, int)
        self.valid = np.ones(batch, bool)

    def append(self, ring, k, v, lengths):
        for row, n in enumerate(lengths):
            at = self.count[ring][row]
            self.k[ring][row, at : at + n], self.v[ring][row, at : at + n] = k[row, :n], v[row, :n]
            self.count[ring][row] += n

    def all(self, of):
        return np.concatenate([of[ring] for ring in self.RINGS], axis=1)

    def mask(self, at, chunk, lengths, **seen):
        """bool [B, T, 3 STREAM] from a mask for each ring; queries of the padding see nothing."""
        parts = [np.zeros((len(at), chunk, STREAM), bool) | seen.get(ring, False) for ring in self.RINGS]
        return np.concatenate(parts, axis=2) & (np.arange(chunk) < lengths[:, None])[:, :, None]

    def encoded(self, ring, at, chunk, lengths):
        """What the queries of an encoder's chunk see, after the chunk was appended."""
        window, index = self.config.window, np.arange(STREAM)
        seen = oracle.visible(
            left=window.left,
            right=window.right,
            sinks=window.sinks,
            q_positions=at[:, None] + np.arange(chunk),
            k_positions=np.where(index < self.count[ring][:, None], index, -1),
        )
        return self.mask(at, chunk, lengths, **{ring: seen})

    def decoded(self, at, chunk, lengths):
        """What a decoder's queries see: all of both memories, and a causal window of the decoder's own past."""
        index, size, sinks = np.arange(STREAM), self.config.buffer_size, self.config.sinks
        memories = {}
        for ring in ("forward", "backward"):
            count = self.count[ring][:, None]
            memories[ring] = ((index < count) & ((index >= count - size) | (index < sinks)))[:, None]
        own = oracle.visible(
            left=size - 1, right=0, sinks=sinks, q_positions=at[:, None] + np.arange(chunk), k_positions=index
        )
        return self.mask(at, chunk, lengths, feedback=own, **memories) & self.valid[:, None, None]


def poisoned(arrays, lengths):
    """The same tokens with NaN in the padding."""
    real = np.arange(arrays[0].shape[1]) < lengths[:, None]
    return [np.where(real[:, :, None, None], x, np.float32("nan")) for x in arrays]


@pytest.mark.parametrize("name", CONFIGS)
@given(seed=st.integers(0, 2**32 - 1))
def test_random_streams_equal_the_oracle(name, seed):
    """Any order of encoding and decoding, ragged, with rollbacks and refused positions, all inside jit."""
    config, rng = CONFIGS[name], np.random.default_rng(seed)
    model, state = Model(config), new_state(config)
    for _ in range(8):
        action = rng.choice(["forward", "backward", "decode", "decode", "decode"])
        if action != "decode":
            at = model.count[action].copy()
            lengths = np.minimum(rng.integers(0, CHUNK + 1, BATCH), STREAM - at)
            q, k, v = tokens(rng, CHUNK)
            out, state = encode(
                *poisoned((q, k, v), lengths),
                state,
                requires_grad=action == "backward",
                lengths=lengths,
            )
            model.append(action, k, v, lengths)
            mask = model.encoded(action, at, CHUNK, lengths)
        else:
            chunk = int(rng.choice([1, 3]))
            length = model.count["feedback"]
            at = length - np.where(rng.random(BATCH) < 0.3, rng.integers(0, config.slack + 2, BATCH), 0)
            at = at + (rng.random(BATCH) < 0.03)
            model.valid &= (at >= 0) & (at <= length) & (model.written - at <= config.slack)
            lengths = np.minimum(rng.integers(1 if chunk == 1 else 0, chunk + 1, BATCH), STREAM - np.maximum(at, 0))
            q, k, v = tokens(rng, chunk)
            out, state = decode(
                *poisoned((q, k, v), lengths),
                state,
                position=at,
                lengths=lengths,
            )
            model.count["feedback"] = np.where(model.valid, at, length)
            model.append("feedback", k, v, np.where(model.valid, lengths, 0))
            model.written = np.maximum(model.written, model.count["feedback"])
            mask = model.decoded(at, chunk, lengths)
            last = np.asarray(state.last_calculated)
            np.testing.assert_array_equal(last[model.valid], model.count["feedback"][model.valid] - 1)
        check(out, q, model.all(model.k), model.all(model.v), mask, config, f"{name} {action}")
        for ring in ("forward", "backward"):
            np.testing.assert_array_equal(getattr(state, ring).length, model.count[ring])


# --- encode ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("name", ["causal", "both-sides"])
def test_encode_writes_one_ring_and_leaves_the_others(name, requires_grad):
    config, rng = CONFIGS[name], np.random.default_rng(0)
    _, state = encode(*tokens(rng, CHUNK), new_state(config), requires_grad=True)
    _, state = encode(*tokens(rng, CHUNK), state, requires_grad=False)
    _, state = decode(*tokens(rng, 3), state, position=0)
    _, after = encode(*tokens(rng, CHUNK), state, requires_grad=requires_grad)
    written, kept = ("backward", "forward") if requires_grad else ("forward", "backward")
    for field in (kept, "feedback", "last_calculated"):
        chex.assert_trees_all_equal(getattr(after, field), getattr(state, field))
    np.testing.assert_array_equal(getattr(after, written).length, 2 * CHUNK)
    assert (np.asarray(getattr(after, written).k) != np.asarray(getattr(state, written).k)).any()


@pytest.mark.parametrize("size", [1, 3, 4])
def test_prefill_size_changes_nothing(size):
    rng = np.random.default_rng(0)
    q, k, v = tokens(rng, CHUNK)
    states = [new_state(dataclasses.replace(CONFIGS["causal"], prefill_size=n)) for n in (size, 512)]
    for lengths in ([7, 5, 0], [6, 7, 3]):
        outs, states = zip(*(encode(q, k, v, state, lengths=lengths) for state in states), strict=True)
        np.testing.assert_allclose(*outs, rtol=0, atol=1e-6)
        chex.assert_trees_all_equal(*(state.forward.export() for state in states))


def test_encode_checks_lengths_before_it_cuts_chunks():
    config = rj.RingBufferConfig(buffer_size=5, prefill_size=4)
    q, k, v = tokens(np.random.default_rng(0), 8)
    more = np.concatenate([k, k], axis=1)
    with pytest.raises(ValueError, match=r"^encode: q and k must agree on length, got 8 and 16\.\n"):
        rj.encode(q, more, more, new_state(config))
    with pytest.raises(ValueError, match=r"^encode: q and k must agree on length, got 8 and 5\.\n"):
        rj.encode(q, k[:, :5], v[:, :5], new_state(config))


# --- decode: what it sees ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[4, 5, 6], [1, 10, 14]])
def test_encoder_memories_at_and_beyond_the_window(lengths):
    """Bug 29: transformers#45521, PR#45540: mask and keys of a merged cache differ in length once encoder >= W."""
    config = CONFIGS["causal"]
    size, rng, lengths = config.buffer_size, np.random.default_rng(0), np.array(lengths)
    model, state = Model(config), new_state(config)
    for part in (np.minimum(lengths, CHUNK), lengths - np.minimum(lengths, CHUNK)):
        q, k, v = tokens(rng, CHUNK)
        _, state = encode(q, k, v, state, lengths=part)
        model.append("forward", k, v, part)
    one = np.ones_like(lengths)
    for at in range(2 * size):
        q, k, v = tokens(rng, 1)
        out, state = decode(q, k, v, state, position=at)
        model.append("feedback", k, v, one)
        mask = model.decoded(at * one, 1, one)
        # Neither memory grows, and the slots that slack adds are not part of one.
        assert (mask.sum((1, 2)) == np.minimum(lengths, size + 2) + min(at + 1, size + 2)).all()
        check(out, q, model.all(model.k), model.all(model.v), mask, config, f"position {at}")


def test_one_executable_serves_all_positions():
    config, rng = CONFIGS["causal"], np.random.default_rng(0)
    step = jax.jit(chex.assert_max_traces(rj.decode, n=1))
    state = new_state(config)
    for at in range(5 * config.buffer_size):
        _, state = step(*tokens(rng, 1), state, position=jnp.int32(at))
    for back in (1, 2, 3):
        _, state = step(*tokens(rng, 1), state, position=jnp.int32(5 * config.buffer_size - back))
    assert step._cache_size() == 1


# --- decode: where it stands -------------------------------------------------------------------------------------


def decoded_state(config, count, seed=0):
    rng = np.random.default_rng(seed)
    _, state = encode(*tokens(rng, CHUNK), new_state(config))
    for at in range(count):
        _, state = decode(*tokens(rng, 1), state, position=at)
    return state


def test_a_new_state_stands_before_the_first_position():
    state = new_state(CONFIGS["causal"])
    assert state.last_calculated.dtype == jnp.int32
    np.testing.assert_array_equal(state.last_calculated, -1)


def test_going_back_forgets_what_came_after():
    config, rng = CONFIGS["causal"], np.random.default_rng(3)
    before = decoded_state(config, 9)
    junk, new = tokens(rng, 3), tokens(rng, 1)
    _, state = decode(*junk, before, position=9)
    np.testing.assert_array_equal(state.last_calculated, 11)
    wanted, wanted_after = decode(*new, before, position=9)
    out, after = decode(*new, state, position=9)
    np.testing.assert_allclose(out, wanted, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(after.last_calculated, 9)
    # By hand; outside jit; row by row.
    out, _ = decode(*new, state.rollback(3), position=9)
    np.testing.assert_allclose(out, wanted, rtol=0, atol=1e-6)
    out, after = rj.decode(*new, state, position=9, sink_logits=sink_logits_of(config))
    np.testing.assert_allclose(out, wanted, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(after.last_calculated, 9)
    out, after = decode(*new, state, position=[9, 12, 10])
    np.testing.assert_allclose(out[0], wanted[0], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(after.last_calculated, [9, 12, 10])
    assert (np.abs(np.asarray(out - wanted))[1:].max((1, 2, 3)) > 1e-3).all()
    chex.assert_trees_all_equal(after.forward, wanted_after.forward)


@pytest.mark.parametrize(
    ("position", "first"),
    [
        (8, "decode: position must be at most last_calculated + 1 = 7, got 8."),
        ([7, 9, 7], "decode: position must be at most last_calculated + 1 = 7, got 9."),
        (-1, "decode: position must be at least 0, got -1."),
        (3, "decode: position may go back by at most slack = 3 tokens, got 4."),
        ([7, 7, 2], "decode: position may go back by at most slack = 3 tokens, got 5."),
    ],
)
def test_a_position_that_cannot_be(position, first):
    """Outside jit an error that changes nothing; inside, the row reads as empty, and so do all its later steps."""
    config, rng = CONFIGS["causal"], np.random.default_rng(4)
    state = decoded_state(config, 7)
    kept = jax.tree.map(np.array, state)
    new = tokens(rng, 1)
    with pytest.raises(ValueError) as error:
        rj.decode(*new, state, position=position)
    assert str(error.value).splitlines()[0] == first
    chex.assert_trees_all_equal(jax.tree.map(np.array, state), kept)

    positions = np.broadcast_to(np.array(position, np.int32), BATCH)
    wrong = (positions > 7) | (positions < 4)
    wanted, wanted_after = decode(*new, state, position=7)
    out, after = decode(*new, state, position=positions)
    assert (np.asarray(out)[wrong] == 0).all()
    np.testing.assert_array_equal(np.asarray(out)[~wrong], np.asarray(wanted)[~wrong])
    np.testing.assert_array_equal(after.feedback.valid, ~wrong)
    for at in (8, 9):
        new = tokens(rng, 1)
        out, after = decode(*new, after, position=at)
        wanted, wanted_after = decode(*new, wanted_after, position=at)
        assert (np.asarray(out)[wrong] == 0).all()
        np.testing.assert_array_equal(np.asarray(out)[~wrong], np.asarray(wanted)[~wrong])
    with pytest.raises(ValueError, match=r"^decode: every row must be valid, got row \d lost inside jit\.\n"):
        rj.decode(*new, after, position=10)


def test_select_reorders_beams():
    """Bug 29's last: transformers#46612: a beam reorder that is silently skipped."""
    config, rng = CONFIGS["causal"], np.random.default_rng(5)
    _, state = encode(*tokens(rng, CHUNK), new_state(config), requires_grad=True)
    _, state = encode(*tokens(rng, CHUNK), state, lengths=[7, 2, 5])
    for at in range(8):
        _, state = decode(*tokens(rng, 1), state, position=at)
    _, state = decode(*tokens(rng, 3), state, position=8, lengths=[3, 0, 2])
    rows = np.array([2, 0, 0])
    chosen = state.select(rows)
    np.testing.assert_array_equal(chosen.last_calculated, [9, 10, 10])
    new = tokens(rng, 1)
    out, _ = decode(*(x[rows] for x in new), chosen, position=chosen.last_calculated + 1)
    wanted, _ = decode(*new, state, position=state.last_calculated + 1)
    np.testing.assert_array_equal(out, np.asarray(wanted)[rows])
    unmoved, _ = decode(*(x[rows] for x in new), state, position=state.last_calculated + 1)
    assert (np.abs(np.asarray(out - unmoved)).max((1, 2, 3)) > 1e-3)[:2].all()
    fewer = jax.jit(rj.BufferState.select)(state, jnp.array([1]))
    chex.assert_trees_all_equal(fewer.feedback.export(), jax.tree.map(lambda x: x[1:2], state.feedback.export()))


# --- gradients ---------------------------------------------------------------------------------------------------


def through_rings(config, requires_grad, arrays, sink_logits):
    """Outputs of an encoder's two calls and of a decoder's two, after T = 1 and T = 3."""
    source, target = arrays
    state, outs = new_state(config, 2), []
    for part in (slice(0, 7), slice(7, 11)):
        out, state = rj.encode(*(x[:, part] for x in source), state, requires_grad=requires_grad)
        outs.append(out)
    for at, part in ((0, slice(0, 1)), (1, slice(1, 4))):
        out, state = rj.decode(*(x[:, part] for x in target), state, position=at, sink_logits=sink_logits)
        outs.append(out)
    return jnp.concatenate(outs, axis=1)


def dense(config, arrays, sink_logits):
    """The same with masks."""
    (q, k, v), (own_q, own_k, own_v) = arrays
    i, own = np.arange(11), np.arange(4)
    encoded = (i[:, None] >= i) & ((i[:, None] - i < config.buffer_size) | (i < config.sinks))
    memory = (i >= 11 - config.buffer_size) | (i < config.sinks)
    union = np.concatenate([np.broadcast_to(memory, (4, 11)), own[:, None] >= own], axis=1)
    out, _ = cases.plain_attention(q, k, v, None, encoded[None], softcap=config.softcap)
    k, v = jnp.concatenate([k, own_k], axis=1), jnp.concatenate([v, own_v], axis=1)
    own_out, _ = cases.plain_attention(own_q, k, v, sink_logits, union[None], softcap=config.softcap)
    return jnp.concatenate([out, own_out], axis=1)


def gradients(f, g, arrays, sink_logits):
    return jax.jit(jax.grad(lambda a, s: (f(a, s) * g).sum(), argnums=(0, 1)))(arrays, sink_logits)


def test_gradients_flow_through_backward():
    """From the decoder's outputs, and the encoder's later ones, back to the keys and values of every chunk."""
    config = CONFIGS["causal"]
    rng = np.random.default_rng(6)
    arrays = (tokens(rng, 11, 2), tokens(rng, 4, 2))
    sink_logits = np.linspace(-1, 1, HEADS).astype(np.float32)
    g = rng.standard_normal((2, 15, HEADS, DIM)).astype(np.float32)
    got = gradients(partial(through_rings, config, True), g, arrays, sink_logits)
    plain = gradients(partial(dense, config), g, arrays, sink_logits)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(np.float64), (g, arrays, sink_logits))
        exact = jax.tree.map(np.asarray, gradients(partial(dense, config), *wide))
    assert all((np.abs(x) > 0).any() for x in jax.tree.leaves(exact))
    jax.tree.map(cases.assert_close, got, exact, plain)


def test_no_gradient_flows_through_forward():
    config = CONFIGS["causal"]
    rng = np.random.default_rng(7)
    arrays = (tokens(rng, 11, 2), tokens(rng, 4, 2))
    g = rng.standard_normal((2, 15, HEADS, DIM)).astype(np.float32)
    g[:, :11] = 0  # the decoder's outputs only
    (source, target), _ = gradients(partial(through_rings, config, False), g, arrays, None)
    assert all((np.asarray(x) == 0).all() for x in source)
    assert all((np.asarray(x) != 0).any() for x in target)


def test_config_windows():
    config = rj.RingBufferConfig()
    assert dataclasses.astuple(config)[:8] == (2048, 128, 32, 4, 512, True, 0, 0)
    assert config.window == config.feedback_window == rj.Window.causal(2048)
    config = rj.RingBufferConfig(buffer_size=np.int64(6), causal=False, sinks=2, block_size=None)
    assert type(config.buffer_size) is int
    assert config.window == rj.Window(5, 5, 2) and config.feedback_window == rj.Window.causal(6, 2)
    assert hash(config) == hash(dataclasses.replace(config)) and config != rj.RingBufferConfig()
