"""Prompts in chunks and the jitted loop, against a model that computes everything anew for every token."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.tree_util import Partial

import ringjax as rj
from ringjax import _generation

VOCABULARY, WIDTH, HEADS, KV_HEADS, DIM = 11, 16, 2, 1, 8
BATCH, PROMPT, NEW = 3, 13, 6
ONE = (rj.Window.causal(4, sinks=1),)
TWO = (rj.Window.causal(3), rj.Window.causal(6, sinks=2))


def parameters(layers):
    rng = np.random.default_rng(layers)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape) / shape[0] ** 0.5, jnp.float32)

    heads, kv = HEADS * DIM, KV_HEADS * DIM
    layer = {"q": (WIDTH, heads), "k": (WIDTH, kv), "v": (WIDTH, kv), "o": (heads, WIDTH)}
    return {
        "embed": 3 * normal(VOCABULARY, WIDTH),
        "place": 3 * normal(64, WIDTH),
        "layers": [{name: 2 * normal(*shape) for name, shape in layer.items()} for _ in range(layers)],
        "out": normal(WIDTH, VOCABULARY),
    }


PARAMETERS = {len(windows): parameters(len(windows)) for windows in (ONE, TWO)}


def rings(windows, slack=1, batch=BATCH):
    """The state of a model: its rings, and how many steps and real tokens it has run."""
    empty = [rj.RingBuffer.empty(batch, KV_HEADS, DIM, w, slack=slack, dtype=jnp.float32) for w in windows]
    return {"rings": empty, "steps": jnp.int32(0), "tokens": jnp.zeros(batch, jnp.int32)}


def step(params, tokens, state, *, lengths=None):
    batch, chunk = tokens.shape
    positions = state["rings"][0].length[:, None] + jnp.arange(chunk, dtype=jnp.int32)[None]
    x = params["embed"][tokens] + params["place"][positions % 64]
    after = []
    for layer, ring in zip(params["layers"], state["rings"], strict=True):
        q, k, v = ((x @ layer[name]).reshape(batch, chunk, -1, DIM) for name in "qkv")
        out, ring = rj.attend(q, k, v, ring, lengths=lengths)
        x = x + out.reshape(batch, chunk, -1) @ layer["o"]
        after.append(ring)
    real = jnp.full(batch, chunk, jnp.int32) if lengths is None else lengths
    return x @ params["out"], {"rings": after, "steps": state["steps"] + 1, "tokens": state["tokens"] + real}


def step_without_lengths(params, tokens, state):
    return step(params, tokens, state)


def naive_logits(params, windows, tokens, memory=None):
    """The logits after the last token, in float64 and without a cache."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    count, index = len(tokens), np.arange(len(tokens))
    x = (params["embed"][np.asarray(tokens)] + params["place"][index % 64])[None]
    for layer, window in zip(params["layers"], windows, strict=True):
        q, k, v = ((x @ layer[name]).reshape(1, count, -1, DIM) for name in "qkv")
        sides = {"left": window.left, "right": 0, "sinks": window.sinks, "q_positions": index}
        if memory is None:
            out, _ = oracle.attention(q, k, v, k_positions=index, **sides)
        else:  # one softmax over a memory that all see and a window: each query alone
            seen = oracle.visible(k_positions=index, **sides)[0]
            out = np.concatenate(
                [alone(q[:, i : i + 1], k[:, row], v[:, row], memory) for i, row in enumerate(seen)], 1
            )
        x = x + out.reshape(1, count, -1) @ layer["o"]
    return x[0, -1] @ params["out"]


def alone(q, k, v, memory):
    k, v = (np.concatenate(pair, axis=1) for pair in zip(memory, (k, v), strict=True))
    everything = {"left": None, "right": None, "sinks": 0, "q_positions": [0], "k_positions": np.arange(k.shape[1])}
    return oracle.attention(q, k, v, **everything)[0]


def naive(windows, prompt, count, eos=None, memory=None):
    """New tokens, the end repeated, and how many count."""
    tokens, new = list(prompt), []
    while len(new) < count and (not new or new[-1] != eos):
        new.append(int(naive_logits(PARAMETERS[len(windows)], windows, tokens + new, memory).argmax()))
    return new + [eos] * (count - len(new)), len(new)


def prompts(seed, length=PROMPT, batch=BATCH):
    return np.random.default_rng(seed).integers(0, VOCABULARY, (batch, length)).astype(np.int32)


STEPS = {len(windows): Partial(step, PARAMETERS[len(windows)]) for windows in (ONE, TWO)}
PLAIN = Partial(step_without_lengths, PARAMETERS[1])


def closure(tokens, state):
    return step(PARAMETERS[2], tokens, state)


# --- generate ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("windows", [ONE, TWO], ids=["one-layer", "two-layers"])
@settings(max_examples=100)  # of three rows and two turns each
@given(seed=st.integers(0, 2**32 - 1))
def test_ragged_generation_equals_rows_computed_anew(windows, seed):
    """Prompts shorter and longer than windows and chunks, any end token; a row does not know of the others.

    Then the conversation goes on with what the rows have become, also those that ended early.
    """
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, PROMPT - NEW + 1, BATCH).astype(np.int32)
    prompt, eos = prompts(seed), int(rng.integers(VOCABULARY))
    options = {"max_new_tokens": NEW, "prefill_size": 4, "eos": eos}
    state = rings(windows)
    for turn in range(2):
        found = rj.generate(STEPS[len(windows)], state, prompt, lengths=lengths, **options)
        wanted = [naive(windows, row[:n], NEW, eos) for row, n in zip(prompt, lengths, strict=True)]
        np.testing.assert_array_equal(found.tokens, [tokens for tokens, _ in wanted])
        np.testing.assert_array_equal(found.lengths, [count for _, count in wanted])
        last = lengths + np.asarray(found.lengths) - 2
        np.testing.assert_array_equal(rj.last_calculated(found.state, BATCH), last)
        # Each token ran once, in the first turn or in this one.
        np.testing.assert_array_equal(found.state["tokens"], last + 1)
        if turn == 0:
            for row, (tokens, count) in enumerate(wanted):
                prompt[row, lengths[row] : lengths[row] + count] = tokens[:count]
            # What the model said, and a token or none of the user's.
            lengths = np.minimum(lengths + np.asarray(found.lengths) + 1, PROMPT)
        state = found.state


@pytest.mark.parametrize(
    ("windows", "model", "size"),
    [(ONE, PLAIN, 4), (ONE, STEPS[1], 512), (TWO, closure, 512)],
    ids=["partial", "with-lengths", "closure"],
)
def test_even_prompts(windows, model, size):
    for seed in range(3):
        found = rj.generate(model, rings(windows, slack=0), prompts(seed), max_new_tokens=NEW, prefill_size=size)
        wanted = [naive(windows, row, NEW)[0] for row in prompts(seed)]
        np.testing.assert_array_equal(found.tokens, wanted)
        np.testing.assert_array_equal(found.lengths, NEW)


def test_many_windows_deep():
    """A prompt of 5 windows, and 8 windows of new tokens, around the ring again and again."""
    found = rj.generate(PLAIN, rings(ONE, slack=0), prompts(0, 20), max_new_tokens=32, prefill_size=3)
    np.testing.assert_array_equal(found.tokens, [naive(ONE, row, 32)[0] for row in prompts(0, 20)])


def decoder(params, tokens, state, *, lengths=None):
    batch, chunk = tokens.shape
    position = state.last_calculated + 1
    x = params["embed"][tokens] + params["place"][(position[:, None] + jnp.arange(chunk, dtype=jnp.int32)[None]) % 64]
    (layer,) = params["layers"]
    q, k, v = ((x @ layer[name]).reshape(batch, chunk, -1, DIM) for name in "qkv")
    out, state = rj.decode(q, k, v, state, position=position, lengths=lengths)
    return (x + out.reshape(batch, chunk, -1) @ layer["o"]) @ params["out"], state


def test_a_decoder_with_three_rings():
    config = rj.RingBufferConfig(buffer_size=4, sinks=1, slack=1)
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((BATCH, 9, heads, DIM)).astype(np.float32) for heads in (HEADS, KV_HEADS, KV_HEADS))
    state = rj.init_state(config, BATCH, kv_heads=KV_HEADS, head_dim=DIM, dtype=jnp.float32)
    _, state = jax.jit(rj.encode)(q, k, v, state)
    lengths = np.array([5, 13, 1], np.int32)
    options = {"max_new_tokens": NEW, "prefill_size": 4, "lengths": lengths}
    model = Partial(decoder, PARAMETERS[1])
    found = rj.generate(model, state, prompts(0), **options)
    kept = [0, 5, 6, 7, 8]
    for row, n in enumerate(lengths):
        memory = (k[row : row + 1, kept], v[row : row + 1, kept])
        wanted, _ = naive(ONE, prompts(0)[row, :n], NEW, memory=memory)
        np.testing.assert_array_equal(found.tokens[row], wanted)
    np.testing.assert_array_equal(found.state.last_calculated, lengths + NEW - 2)
    chex.assert_trees_all_equal(found.state.forward, state.forward)


def test_the_loop_ends_when_all_rows_have():
    wanted = [naive(ONE, row, NEW)[0] for row in prompts(0)]
    for eos in range(VOCABULARY):
        found = rj.generate(STEPS[1], rings(ONE), prompts(0), max_new_tokens=NEW, prefill_size=4, eos=eos)
        lengths = [row.index(eos) + 1 if eos in row else NEW for row in wanted]
        np.testing.assert_array_equal(found.lengths, lengths)
        assert int(found.state["steps"]) == -(-PROMPT // 4) + max(lengths) - 1
        for row, tokens, n in zip(np.asarray(found.tokens), wanted, lengths, strict=True):
            assert row.tolist() == tokens[:n] + [eos] * (NEW - n)


def test_donation_spares_a_copy_and_changes_nothing():
    state, options = rings(ONE), {"max_new_tokens": NEW, "prefill_size": 4}
    wanted = rj.generate(STEPS[1], state, prompts(0), **options)
    assert not any(x.is_deleted() for x in jax.tree.leaves(state))
    found = rj.generate(STEPS[1], state, prompts(0), donate=True, **options)
    chex.assert_trees_all_equal(found, wanted)
    assert state["rings"][0].k.is_deleted() and state["rings"][0].v.is_deleted()


def test_one_compilation():
    """For the whole generation; and none for other tokens, lengths, keys, temperatures and end tokens."""
    model = chex.assert_max_traces(step, n=3)  # the logits' shape, a chunk of the prompt, a decoding step
    model = Partial(model, PARAMETERS[1])
    before = _generation._jitted._cache_size()
    for seed in range(4):
        rj.generate(
            model,
            rings(ONE),
            prompts(seed),
            max_new_tokens=5 * PROMPT,
            prefill_size=4,
            lengths=jnp.array([seed + 1, 13, 5]),
            key=jax.random.key(seed),
            sample=rj.Sampling(0.5 + seed, top_k=5, top_p=0.9 - seed / 10),
            eos=seed,
        )
    assert _generation._jitted._cache_size() == before + 1


def test_sampling_is_reproducible():
    options = {"max_new_tokens": 32, "prefill_size": 4, "sample": rj.Sampling(1.5)}
    runs = [rj.generate(STEPS[1], rings(ONE), prompts(0), key=jax.random.key(i), **options).tokens for i in (0, 0, 1)]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert (np.asarray(runs[0]) != np.asarray(runs[2])).mean() > 0.3
    assert len(set(np.asarray(runs[0]).ravel().tolist())) > 3


def test_any_function_samples():
    def second(logits, key):
        del key
        return jnp.argsort(logits, axis=-1)[:, -2].astype(jnp.int32)

    found = rj.generate(STEPS[1], rings(ONE), prompts(0), max_new_tokens=1, key=jax.random.key(0), sample=second)
    wanted = [np.argsort(naive_logits(PARAMETERS[1], ONE, row))[-2] for row in prompts(0)]
    np.testing.assert_array_equal(found.tokens[:, 0], wanted)


def test_inside_jit():
    run = jax.jit(lambda state, prompt: rj.generate(PLAIN, state, prompt, max_new_tokens=NEW, prefill_size=4))
    np.testing.assert_array_equal(run(rings(ONE), prompts(0)).tokens, [naive(ONE, row, NEW)[0] for row in prompts(0)])


# --- prefill -----------------------------------------------------------------------------------------------------


def assert_logits(found, prompt, lengths):
    wanted = [naive_logits(PARAMETERS[1], ONE, row[:n]) for row, n in zip(prompt, lengths, strict=True)]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)


def test_seen_tokens_are_not_computed_again():
    prompt = prompts(1)
    logits, state = rj.prefill(STEPS[1], rings(ONE), prompt, prefill_size=4, lengths=jnp.array([3, 9, 4]))
    assert_logits(logits, prompt, [3, 9, 4])
    assert int(state["steps"]) == 3
    np.testing.assert_array_equal(state["tokens"], [3, 9, 4])
    logits, state = rj.prefill(STEPS[1], state, prompt, prefill_size=4, lengths=jnp.array([6, 13, 5]))
    assert_logits(logits, prompt, [6, 13, 5])
    assert int(state["steps"]) == 4  # one chunk holds what is new: 3, 4 and 1 tokens
    np.testing.assert_array_equal(state["tokens"], [6, 13, 5])
    np.testing.assert_array_equal(rj.last_calculated(state, BATCH), [5, 12, 4])


def test_an_exact_hit_counts_no_token_twice():
    """Bug 17: Rapid-MLX PR#1124: the last token, run again for its logits, stood in the cache twice."""
    prompt, lengths = prompts(2), jnp.array([6, 13, 1])
    logits, state = rj.prefill(STEPS[1], rings(ONE), prompt, prefill_size=4, lengths=lengths)
    again, after = rj.prefill(STEPS[1], state, prompt, prefill_size=4, lengths=lengths)
    np.testing.assert_allclose(again, logits, rtol=0, atol=1e-6)
    assert_logits(again, prompt, lengths)
    np.testing.assert_array_equal(after["rings"][0].length, lengths)
    np.testing.assert_array_equal(after["tokens"] - state["tokens"], 1)
    np.testing.assert_array_equal(after["rings"][0].export().positions, state["rings"][0].export().positions)
    # Without slack the token cannot be taken back: outside jit that is an error, not a row without a past.
    _, state = rj.prefill(STEPS[1], rings(ONE, slack=0), prompt, prefill_size=4, lengths=lengths)
    for call, run in (("prefill", rj.prefill), ("generate", lambda *a, **k: rj.generate(*a, max_new_tokens=2, **k))):
        with pytest.raises(ValueError) as error:
            run(STEPS[1], state, prompt, prefill_size=4, lengths=lengths)
        first = f"{call}: tokens that end within what was seen need slack of at least 1, got 0."
        assert str(error.value).splitlines()[0] == first


def test_last_calculated_of_any_state():
    np.testing.assert_array_equal(rj.last_calculated({"weights": jnp.ones(3)}, 2), [-1, -1])
    k = jnp.ones((2, 3, 1, 8))
    long = rj.RingBuffer.empty(2, 1, 8, rj.Window.causal(4), dtype=jnp.float32).append(k, k)
    short = long.reset().append(k, k, lengths=jnp.array([1, 3]))
    np.testing.assert_array_equal(rj.last_calculated([long, {"other": short}], 2), [0, 2])


# --- messages ----------------------------------------------------------------------------------------------------

SEEN = {"max_new_tokens": 2}
WRONG = {
    "step": (
        lambda: rj.prefill(None, rings(ONE), prompts(0)),
        TypeError,
        "prefill: step must be a function (tokens, state) -> (logits, state), got NoneType.",
    ),
    "tokens float": (
        lambda: rj.prefill(PLAIN, rings(ONE), jnp.ones((3, 2))),
        TypeError,
        "prefill: tokens must be an integer array [B, T], got float32[3, 2].",
    ),
    "tokens empty": (
        lambda: rj.prefill(PLAIN, rings(ONE), prompts(0)[:, :0]),
        ValueError,
        "prefill: tokens must be an integer array [B, T] that is not empty, got int32[3, 0].",
    ),
    "prefill_size": (
        lambda: rj.prefill(PLAIN, rings(ONE), prompts(0), prefill_size=0),
        ValueError,
        "prefill: prefill_size must be at least 1, got 0.",
    ),
    "batch": (
        lambda: rj.prefill(PLAIN, rings(ONE, batch=2), prompts(0)),
        ValueError,
        "prefill: tokens and state must agree on batch, got 3 and 2.",
    ),
    "lengths": (
        lambda: rj.prefill(STEPS[1], rings(ONE), prompts(0), lengths=jnp.array([1, 14, 1])),
        ValueError,
        "prefill: lengths must be between 0 and 13, the length of the chunk, got [1, 14, 1].",
    ),
    "no token": (
        lambda: rj.generate(STEPS[1], rings(ONE), prompts(0), lengths=jnp.array([1, 0, 1]), **SEEN),
        ValueError,
        "generate: every row needs a token to start from, got lengths [1, 0, 1].",
    ),
    "ragged": (
        lambda: rj.generate(PLAIN, rings(ONE), prompts(0), lengths=jnp.array([1, 2, 1]), **SEEN),
        TypeError,
        "generate: rows of different lengths need a step that takes a keyword `lengths`, got one without.",
    ),
    "max_new_tokens": (
        lambda: rj.generate(PLAIN, rings(ONE), prompts(0), max_new_tokens=0),
        ValueError,
        "generate: max_new_tokens must be at least 1, got 0.",
    ),
    "sample": (
        lambda: rj.generate(PLAIN, rings(ONE), prompts(0), sample=0.7, **SEEN),
        TypeError,
        "generate: sample must be a function (logits, key) -> tokens, got float.",
    ),
    "key": (
        lambda: rj.generate(PLAIN, rings(ONE), prompts(0), sample=rj.Sampling(), **SEEN),
        ValueError,
        "generate: sample needs a key, got None.",
    ),
    "eos": (
        lambda: rj.generate(PLAIN, rings(ONE), prompts(0), eos=-1, **SEEN),
        ValueError,
        "generate: eos must be at least 0, got -1.",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_messages(name):
    call, error, first = WRONG[name]
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value).splitlines()[0] == first
