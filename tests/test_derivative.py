"""`attention_gradients`: the derivative of `attention`, from its output."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ringjax as rj


@pytest.mark.parametrize("name", ["all-logits", "padded"])
def test_it_is_the_derivative_of_attention_to_the_bit(name):
    case = cases.BY_NAME[name]

    @jax.jit
    def both(made):
        options = cases.options(case, made)
        sinks = options.pop("sink_logits")

        def f(q, k, v, sinks):
            return rj.attention(q, k, v, case.window, sink_logits=sinks, return_lse=True, **options)

        (out, lse), vjp = jax.vjp(f, *made[:3], sinks)
        mine = rj.attention_gradients(
            *made[:3], case.window, out, lse, made.g, made.g_lse, sink_logits=sinks, **options
        )
        without = rj.attention_gradients(*made[:3], case.window, out, lse, made.g, sink_logits=sinks, **options)
        return vjp((made.g, made.g_lse)), mine, vjp((made.g, jnp.zeros_like(made.g_lse))), without

    theirs, mine, theirs_without, without = both(cases.arrays(case))
    for a, b in zip((*theirs, *theirs_without), (*mine, *without), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            assert np.array_equal(np.asarray(a), np.asarray(b))


def test_wrong_residuals():
    q, k = jnp.ones((2, 3, 4, 8)), jnp.ones((2, 3, 2, 8))
    lse, window = jnp.ones((2, 4, 3)), rj.Window.causal(2)
    for wrong, message in (
        (lambda: rj.attention_gradients(q, k, k, window, q[:, :2], lse, q), "out must have shape [2, 3, 4, 8], got"),
        (lambda: rj.attention_gradients(q, k, k, window, q, lse[:, :2], q), "lse must have shape [2, 4, 3], got"),
        (lambda: rj.attention_gradients(q, k, k, window, q, lse, q[..., :4]), "g must have shape [2, 3, 4, 8], got"),
        (
            lambda: rj.attention_gradients(q, k, k, window, q, lse, q, lse[:1]),
            "g_lse must have shape [2, 4, 3], got float32[1, 4, 3].",
        ),
        (
            lambda: rj.attention_gradients(q, k, k, window, q, lse, None),
            "g must be a jax or NumPy array, got NoneType.",
        ),
        (lambda: rj.attention_gradients(q[0], k, k, window, q, lse, q), "q must have 4 axes [B, T, N, H], got"),
    ):
        with pytest.raises((ValueError, TypeError)) as raised:
            wrong()
        assert str(raised.value).startswith(f"attention_gradients: {message}")
