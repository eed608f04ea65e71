"""How tokens are drawn: against the exact probabilities, and at the edges of every cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ringjax as rj

VOCABULARY, DRAWS = 12, 4096


@jax.jit
def counts(sample, logits, seed):
    """How often each token is drawn, [B, V]."""
    keys = jax.random.split(jax.random.key(seed), DRAWS)
    drawn = jax.vmap(lambda key: sample(logits, key))(keys)
    return jax.nn.one_hot(drawn, logits.shape[-1], dtype=jnp.int32).sum(0)


def softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def exact(logits, temperature=1.0, top_k=None, top_p=None):
    """The probabilities, token by token, by the definitions."""
    rows = []
    for row in np.asarray(logits, np.float64) / temperature:
        kept = set(range(len(row)))
        if top_k is not None:
            kept = {i for i in kept if sum(row > row[i]) < top_k}
        if top_p is not None:
            shares = softmax(np.where([i in kept for i in range(len(row))], row, -np.inf))
            kept = {i for i in kept if shares[row > row[i]].sum() < top_p}
        rows.append(softmax(np.where([i in kept for i in range(len(row))], row, -np.inf)))
    return np.stack(rows)


def assert_drawn_from(found, wanted):
    """Nothing impossible, and a chi-square that a true sample exceeds once in ten million draws of the seed."""
    found = np.asarray(found, np.float64)
    assert (found.sum(-1) == DRAWS).all()
    assert (found[wanted == 0] == 0).all()
    expected = np.where(wanted == 0, 1, wanted * DRAWS)
    chi_square = np.where(wanted == 0, 0, (found - expected) ** 2 / expected).sum(-1)
    freedom = (wanted > 0).sum(-1) - 1
    # Wilson and Hilferty (1931): the cube root of chi-square is nearly normal; 5.2 standard deviations. Where only one
    # token is possible nothing is left to chance.
    spread = 2 / (9 * np.maximum(freedom, 1))
    assert (chi_square <= np.where(freedom == 0, 0, freedom * (1 - spread + 5.2 * np.sqrt(spread)) ** 3)).all()


@pytest.mark.parametrize("top_k", [None, 1, 4, 50])
@pytest.mark.parametrize("top_p", [None, 0.05, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2])
def test_distribution(temperature, top_k, top_p):
    logits = np.random.default_rng(0).standard_normal((3, VOCABULARY)).astype(np.float32)
    found = counts(rj.Sampling(temperature, top_k=top_k, top_p=top_p), logits, 1)
    assert_drawn_from(found, exact(logits, temperature, top_k, top_p))


def test_distribution_check_can_fail():
    logits = np.random.default_rng(0).standard_normal((3, VOCABULARY)).astype(np.float32)
    found = counts(rj.Sampling(1.0), logits, 1)
    for other in ({"temperature": 1.2}, {"top_k": VOCABULARY - 1}, {"top_p": 0.99}):
        with pytest.raises(AssertionError):
            assert_drawn_from(found, exact(logits, **other))


def test_top_p_at_its_boundaries():
    logits = np.log([[0.5, 0.25, 0.125, 0.125]]).astype(np.float32)

    def kept(p):
        return (np.asarray(counts(rj.Sampling(top_p=p), logits, 2)) > 0).tolist()[0]

    assert kept(1e-9) == kept(0.49) == [True, False, False, False]
    assert kept(0.51) == kept(0.74) == [True, True, False, False]
    assert kept(0.76) == [True, True, True, True]  # the third and the fourth tie
    assert kept(1.0) == [True, True, True, True]


def test_ties_are_kept_together():
    logits = np.array([[1.0, 3, 3, 3, 0], [2, 2, 2, 2, 2]], np.float32)
    for sample in (rj.Sampling(top_k=2), rj.Sampling(top_p=0.01), rj.Sampling(1e-30)):
        assert_drawn_from(counts(sample, logits, 3), np.array([[0, 1 / 3, 1 / 3, 1 / 3, 0], [1 / 5] * 5]))


def test_top_p_of_one_cuts_nothing(monkeypatch):
    """In float32 the sum of the probabilities is 1 long before the last token."""
    seen = []
    monkeypatch.setattr(jax.random, "categorical", lambda key, logits, axis: seen.append(logits) or logits.argmax(axis))
    logits = -jnp.arange(40, dtype=jnp.float32)[None]
    rj.Sampling(top_p=1.0)(logits, jax.random.key(0))
    rj.Sampling(top_p=0.999999)(logits, jax.random.key(0))
    assert np.isfinite(seen[0]).all() and not np.isfinite(seen[1]).all()


def test_masked_tokens_are_never_drawn():
    logits = np.array([[0.0, -np.inf, 1.0, -np.inf]], np.float32)
    for sample in (rj.Sampling(), rj.Sampling(top_p=1.0), rj.Sampling(0.7, top_k=3, top_p=0.999)):
        assert (np.asarray(counts(sample, logits, 4))[:, [1, 3]] == 0).all()


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-38, 1e-44])
def test_small_temperatures_are_greedy(temperature):
    """Down to where the logits would be divided to infinity and the temperature is no normal float32."""
    logits = 5 * np.random.default_rng(5).standard_normal((8, VOCABULARY)).astype(np.float32)
    greedy = rj.greedy(logits, jax.random.key(0))
    np.testing.assert_array_equal(greedy, logits.argmax(-1))
    found = counts(rj.Sampling(temperature), logits, 5)
    np.testing.assert_array_equal(np.asarray(found).argmax(-1), greedy)
    assert (np.asarray(found).max(-1) == DRAWS).all()


def test_draws_are_reproducible_and_typed():
    logits = np.random.default_rng(6).standard_normal((64, VOCABULARY)).astype(np.float32)
    sample = rj.Sampling(1.3, top_k=9, top_p=0.95)
    one, same, other = (sample(jnp.asarray(logits, jnp.bfloat16), jax.random.key(seed)) for seed in (7, 7, 8))
    assert one.dtype == jnp.int32 and one.shape == (64,)
    np.testing.assert_array_equal(one, same)
    assert (np.asarray(one) != np.asarray(other)).any()


def test_numbers_compile_nothing_anew():
    logits = jnp.zeros((1, 3))
    run = jax.jit(lambda sample: sample(logits, jax.random.key(0)))
    for temperature in (0.1, 1.0, 3.0):
        for top_p in (0.2, 1.0):
            run(rj.Sampling(temperature, top_p=top_p))
    assert run._cache_size() == 1


@pytest.mark.parametrize(
    ("fields", "error", "first"),
    [
        ({"temperature": 0}, ValueError, "Sampling: temperature must be finite and above 0, got 0."),
        ({"temperature": -1.0}, ValueError, "Sampling: temperature must be finite and above 0, got -1.0."),
        ({"temperature": float("nan")}, ValueError, "Sampling: temperature must be finite and above 0, got nan."),
        ({"temperature": True}, TypeError, "Sampling: temperature must be a Python number, got bool."),
        ({"top_p": 0.0}, ValueError, "Sampling: top_p must be finite and above 0, got 0.0."),
        ({"top_p": 1.5}, ValueError, "Sampling: top_p must be at most 1, got 1.5."),
        ({"top_k": 0}, ValueError, "Sampling: top_k must be at least 1, got 0."),
        ({"top_k": 2.0}, TypeError, "Sampling: top_k must be an int, got float."),
    ],
)
def test_messages(fields, error, first):
    with pytest.raises(error) as raised:
        rj.Sampling(**fields)
    assert str(raised.value).splitlines()[0] == first
