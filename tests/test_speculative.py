"""Speculative decoding says what decoding says: the same greedy tokens, the same distribution of sampled ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from tiny_model import LAYERS, parameters, prompts, rings, step

import ringjax as rj

BATCH, PROMPT, NEW = 3, 60, 36  # new tokens: six times the larger window
OPTIONS = {"max_new_tokens": NEW, "prefill_size": 4}
GUESSES = 3
MODEL = Partial(step, parameters())
SLACK = GUESSES + 1


def noisy(noise):
    """The model's own weights with noise: a draft that is right now and then."""
    rng = np.random.default_rng(7)
    return jax.tree.map(lambda x: x + noise * jnp.asarray(rng.standard_normal(x.shape), x.dtype), parameters())


def draft(params, batch=BATCH, slack=SLACK):
    return rj.Draft(Partial(step, params), rings(batch, LAYERS, slack), GUESSES)


def generated(seed, **options):
    return rj.generate(MODEL, rings(BATCH, LAYERS, SLACK), prompts(seed, BATCH, PROMPT), **OPTIONS | options)


DRAFTS = {"right": parameters(), "often right": noisy(0.03), "random": parameters(seed=1)}


@pytest.mark.parametrize("kind", DRAFTS)
def test_greedy_tokens_are_those_without_a_draft(kind):
    """Token for token, over six windows and many wraps, ragged prompts, any end token; and so is the state."""
    calls = []
    for seed in range(6):
        lengths = np.random.default_rng(seed).integers(1, 10, BATCH).astype(np.int32)
        options = {"lengths": lengths, "eos": seed}
        plain, found = generated(seed, **options), generated(seed, draft=draft(DRAFTS[kind]), **options)
        np.testing.assert_array_equal(found.tokens, plain.tokens)
        np.testing.assert_array_equal(found.lengths, plain.lengths)
        seen = lengths + np.asarray(plain.lengths) - 2
        np.testing.assert_array_equal(rj.last_calculated(found.state, BATCH), seen)
        np.testing.assert_array_equal(rj.last_calculated(found.draft_state, BATCH), seen - 1)
        for ring, wanted in zip(found.state, plain.state, strict=True):
            exported, exact = ring.export(), wanted.export()
            for row in range(BATCH):
                # The same newest tokens; how many older ones are left depends on what was taken back.
                held, kept = (np.asarray(x.positions[row]) for x in (exported, exact))
                both = np.intersect1d(held, kept[kept >= seen[row] + 1 - ring.window.size])
                assert len(both[both >= 0]) >= min(seen[row] + 1, ring.window.size)
                for of, at in ((exported, held), (exact, kept)):
                    assert np.isfinite(np.asarray(of.k)[row, np.isin(at, both)]).all()
                np.testing.assert_allclose(
                    np.asarray(exported.k)[row, np.isin(held, both)],
                    np.asarray(exact.k)[row, np.isin(kept, both)],
                    rtol=0,
                    atol=1e-4,
                )
        calls.append((int(found.calls), int(np.max(np.asarray(plain.lengths))) - 1))
    ran, plainly = (sum(x) for x in zip(*calls, strict=True))
    if kind == "right":  # each call keeps all guesses and one more
        assert all(n == -(-count // (GUESSES + 1)) for n, count in calls)
    else:
        assert ran < plainly if kind == "often right" else ran <= plainly


def test_a_conversation_goes_on():
    """The states of both models continue where their rows ended: two turns are one prompt with all that was said."""
    prompt, lengths = prompts(0, BATCH, PROMPT), np.array([9, 3, 6], np.int32)
    state, small = rings(BATCH, LAYERS, SLACK), rings(BATCH, LAYERS, SLACK)
    for turn in range(2):
        made = rj.Draft(Partial(step, DRAFTS["often right"]), small, GUESSES)
        found = rj.generate(MODEL, state, prompt, lengths=lengths, draft=made, eos=12, **OPTIONS)
        plain = rj.generate(MODEL, rings(BATCH, LAYERS, SLACK), prompt, lengths=lengths, eos=12, **OPTIONS)
        np.testing.assert_array_equal(found.tokens, plain.tokens)
        state, small = found.state, found.draft_state
        for row, n in enumerate(lengths if turn == 0 else ()):
            prompt[row, n : n + NEW] = found.tokens[row]
        lengths = lengths + NEW + 2  # and two words of the user's


def test_more_guesses_than_a_window_holds():
    """And the states of both are donated, but no parameters."""
    prompt, lengths = prompts(3, BATCH, PROMPT), np.array([30, 1, 7], np.int32)
    plain = rj.generate(MODEL, rings(BATCH, LAYERS, SLACK), prompt, lengths=lengths, eos=3, **OPTIONS)
    state, small = rings(BATCH, LAYERS, 8), rings(BATCH, LAYERS, 8)

    def run(state, small, donate=False):
        made = rj.Draft(Partial(step, DRAFTS["random"]), small, 7)
        return rj.generate(MODEL, state, prompt, lengths=lengths, draft=made, eos=3, donate=donate, **OPTIONS)

    assert jax.eval_shape(run, state, small).tokens.shape == (BATCH, NEW)  # inside jit
    found = run(state, small, donate=True)
    np.testing.assert_array_equal(found.tokens, plain.tokens)
    assert state[0].k.is_deleted() and small[0].k.is_deleted()
    assert not MODEL.args[0]["embed"].is_deleted() and not DRAFTS["random"]["embed"].is_deleted()


def test_no_ring_is_copied():
    """Neither the model's nor the draft's: tokens are taken back by counting. The logits are as large as a ring."""
    windows = (rj.Window.causal(509, sinks=2),)

    def run(prompt, state):
        model, small = (Partial(step, parameters(seed, layers=1)) for seed in (0, 1))
        found = rj.generate(model, state[0], prompt, draft=rj.Draft(small, state[1], GUESSES), **OPTIONS)
        return found.tokens, (found.state, found.draft_state)

    state = jax.eval_shape(lambda: (rings(2, windows, SLACK), rings(2, windows, SLACK)))
    found = rj.certify(run, state, jax.ShapeDtypeStruct((2, PROMPT), jnp.int32))
    assert [name for name, _, _ in found.rings] == [f"state[{i}][0].{part}" for i in range(2) for part in "kv"]


# --- sampled -----------------------------------------------------------------------------------------------------

ROWS = 4096


def chain(table, tokens, state):
    """A model whose next token depends on the last one only: logits `table[token]`."""
    x = jnp.zeros((*tokens.shape, 1, 1), jnp.float32)
    _, ring = rj.attend(x, x, x, state)
    return table[tokens], ring


def test_sampled_tokens_have_the_models_distribution():
    """Each of the first new tokens, against the exact Markov chain; the draft has another distribution.

    The number of times that a token is drawn in 4096 rows lies within five standard deviations.
    """
    rng, sample = np.random.default_rng(0), rj.Sampling(0.8, top_k=4)
    table, other = (jnp.asarray(rng.standard_normal((5, 5)) * 1.5, jnp.float32) for _ in range(2))
    ring = rj.RingBuffer.empty(ROWS, 1, 1, rj.Window.causal(2), slack=4, dtype=jnp.float32)
    prompt = jnp.zeros((ROWS, 1), jnp.int32)
    found = rj.generate(
        Partial(chain, table),
        ring,
        prompt,
        max_new_tokens=5,
        key=jax.random.key(1),
        sample=sample,
        draft=rj.Draft(Partial(chain, other), ring, 3),
    )
    step_of = np.asarray(jax.nn.softmax(sample.adjust(table), axis=-1), np.float64)
    shares = np.eye(5)[0]
    for t in range(5):
        shares = shares @ step_of
        counts = np.bincount(np.asarray(found.tokens)[:, t], minlength=5)
        assert (counts[shares == 0] == 0).all()
        np.testing.assert_array_less(abs(counts - ROWS * shares), 5 * np.sqrt(ROWS * shares * (1 - shares)) + 1e-6)
    # Pairs of neighbours too: what follows a refused guess must be drawn given what came before it.
    pairs = np.asarray(found.tokens)[:, 2:4]
    for a in range(5):
        after, of = np.bincount(pairs[pairs[:, 0] == a, 1], minlength=5), (pairs[:, 0] == a).sum()
        spread = 5 * np.sqrt(of * step_of[a] * (1 - step_of[a])) + 1e-6
        np.testing.assert_array_less(abs(after - of * step_of[a]), spread)
    assert 2 <= int(found.calls) <= 4 and (found.calls > 1), "neither all guesses kept nor none"


# --- messages ----------------------------------------------------------------------------------------------------


def second(logits, key):
    del key
    return jnp.argsort(logits, axis=-1)[:, -2].astype(jnp.int32)


WRONG = {
    "draft": (
        lambda: generated(0, draft=MODEL),
        TypeError,
        "generate: draft must be a Draft, got Partial.",
    ),
    "tokens": (lambda: rj.Draft(MODEL, None, 0), ValueError, "Draft: tokens must be at least 1, got 0."),
    "step": (lambda: rj.Draft(None, None), TypeError, "Draft: step must be a function (tokens, state), got NoneType."),
    "slack": (
        lambda: generated(0, draft=draft(parameters(), slack=3)),
        ValueError,
        "generate: a draft of 3 tokens needs slack of at least 4, got 3.",
    ),
    "no ring": (
        lambda: generated(0, draft=rj.Draft(MODEL, {"x": jnp.zeros(3)}, GUESSES)),
        ValueError,
        "generate: draft.state must have a ring where a draft is given, got none.",
    ),
    "sample": (
        lambda: generated(0, draft=draft(parameters()), sample=second, key=jax.random.key(0)),
        TypeError,
        "generate: sample must be a Sampling or greedy where a draft is given, got function.",
    ),
    "batch": (
        lambda: generated(0, draft=draft(parameters(), batch=2)),
        ValueError,
        "generate: tokens and state must agree on batch, got 3 and 2.",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_messages(name):
    call, error, first = WRONG[name]
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value).splitlines()[0] == first
