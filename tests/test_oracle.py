"""The oracle is the definition, and plain attention, the measure of everybody's error, is the oracle."""

import itertools
import math

import cases
import jax
import numpy as np
import oracle
import pytest


def test_oracle_is_the_definition_written_out():
    """One query head at a time, one key at a time, in Python floats."""
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((1, 5, 4, 3)), rng.standard_normal((1, 6, 2, 3)), rng.standard_normal((1, 6, 2, 2))
    sink_logits = rng.standard_normal(4)
    at = [3, 0, -1, 5, 4, 1]  # in no order; -1 is no token
    out, lse = oracle.attention(
        *(q, k, v),
        left=1,
        right=1,
        sinks=1,
        q_positions=np.arange(2, 7),
        k_positions=at,
        sink_logits=sink_logits,
        softcap=1.5,
        scale=0.8,
    )
    for t, n in itertools.product(range(5), range(4)):
        p = t + 2
        total, value = 0.0, np.zeros(2)
        for j, key, token in zip(at, k[0, :, n // 2], v[0, :, n // 2], strict=True):
            if j >= 0 and (-1 <= p - j <= 1 or (j < 1 and j <= p + 1)):
                weight = math.exp(1.5 * math.tanh(0.8 * float(q[0, t, n] @ key) / 1.5))
                total, value = total + weight, value + weight * token
        np.testing.assert_allclose(lse[0, n, t], math.log(total), rtol=1e-12)
        np.testing.assert_allclose(out[0, t, n], value / (total + math.exp(sink_logits[n])), rtol=1e-12)


def test_oracle_of_rows_that_see_nothing():
    q, k, v = np.ones((1, 2, 1, 3)), np.full((1, 2, 1, 3), np.nan), np.full((1, 2, 1, 3), np.inf)
    out, lse = oracle.attention(
        q, k, v, left=1, right=0, sinks=1, q_positions=[5, 6], k_positions=[-1, 1], sink_logits=np.ones(1)
    )
    np.testing.assert_array_equal(out, np.zeros((1, 2, 1, 3)))
    np.testing.assert_array_equal(lse, np.full((1, 1, 2), -np.inf))


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_plain_attention_in_float64_is_the_oracle(case):
    """So that its gradients in float64 are the oracle's."""
    arrays = cases.arrays(case)
    out, lse = cases.exact(case, arrays)
    with jax.enable_x64(True):
        wide = [None if x is None else np.asarray(x).astype(np.float64) for x in arrays[:4]]
        plain, plain_lse = jax.jit(cases.plain_attention, static_argnames=("softcap", "scale"))(
            *wide, cases.seen(case, arrays), softcap=case.softcap, scale=case.scale
        )
        np.testing.assert_allclose(plain, out, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(plain_lse, lse, rtol=1e-12, atol=1e-12)


def test_the_bound_refuses_what_is_wrong():
    """The assertion that everything else rests on fails on NaN, on a row too many and on an error beyond the bound."""
    exact = np.array([1.0, 2.0, -np.inf])
    right = exact.astype(np.float32)
    plain = right + np.float32(1e-3)
    cases.assert_close(right, exact, plain)
    cases.assert_close(right + np.float32(1.9e-3), exact, plain)
    for wrong in (right + np.float32(2.1e-3), np.array([1, np.nan, -np.inf]), np.array([1, -np.inf, -np.inf])):
        with pytest.raises(AssertionError):
            cases.assert_close(wrong.astype(np.float32), exact, plain)
