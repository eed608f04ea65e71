"""Speculative decoding: a small model drafts tokens, the model checks them all in one call (Leviathan et al., 2023)."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from ringjax import _inputs
from ringjax._buffer import RingBuffer
from ringjax._sampling import Sampling, greedy
from ringjax._state import rings_of, rolled_back


@partial(jax.tree_util.register_dataclass, data_fields=["step", "state"], meta_fields=["tokens"])
@dataclasses.dataclass(frozen=True)
class Draft:
    """A small model that guesses what a model will say: `generate(..., draft=Draft(step, state))`.

    Attributes:
      step: like the model's: `step(tokens, state) -> (logits, state)`, over the same vocabulary.
      state: any pytree with its own rings; their slack, like that of the model's rings, must be `tokens + 1` at least.
      tokens: how many tokens it drafts for each call of the model.

    Raises:
      ValueError, TypeError: `tokens` below 1 or no int; a step that is no function.
    """

    step: Any
    state: Any
    tokens: int = 4

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", _inputs.as_int("Draft", "tokens", self.tokens, least=1))
        # In tree maps a leaf may be anything.
        if isinstance(self.step, int | float | str | None):
            raise TypeError(f"Draft: step must be a function (tokens, state), got {type(self.step).__name__}.")


def check(call: str, draft: Any, state: Any, sample: Any) -> None:
    """Raises unless a draft and a model can work together."""
    _inputs.check_type(call, "draft", draft, Draft, "Draft(step, state, tokens=4) is a small model and its own rings.")
    if not (sample is None or sample is greedy or isinstance(sample, Sampling)):
        first = f"{call}: sample must be a Sampling or greedy where a draft is given, got {type(sample).__name__}."
        raise TypeError(_inputs.message(first, hint="a draft is judged by the probabilities of its tokens."))
    for name, of in (("state", state), ("draft.state", draft.state)):
        rings = [ring if isinstance(ring, RingBuffer) else ring.feedback for ring in rings_of(of)]
        slack = min((ring.slack for ring in rings), default=None)
        if slack is None:
            raise ValueError(f"{call}: {name} must have a ring where a draft is given, got none.")
        if slack < draft.tokens + 1:
            first = f"{call}: a draft of {draft.tokens} tokens needs slack of at least {draft.tokens + 1}, got {slack}."
            hint = f"RingBuffer.empty(..., slack={draft.tokens + 1}): tokens that are refused are taken back."
            raise ValueError(_inputs.message(first, {"rings": f"those of {name}"}, hint))


class Carry(NamedTuple):
    """Between two calls of the model.

    Attributes:
      i: how many there were.
      state, draft_state: the model has seen all tokens but the last, the draft all but the last two.
      before, token: int32 [B], the last two tokens.
      tokens: int32 [B, count].
      lengths: int32 [B], new tokens so far.
      done: bool [B].
    """

    i: Array
    state: Any
    draft_state: Any
    before: Array
    token: Array
    tokens: Array
    lengths: Array
    done: Array


def loop(
    step: Callable[..., Any],
    draft: Draft,
    carry: Carry,
    *,
    key: Array,
    sample: Any,
    eos: Array | None,
    count: int,
) -> Carry:
    """Drafts and checks until every row has `count` new tokens, or its end."""
    guesses = draft.tokens
    rows = carry.token.shape[0]
    adjust = sample.adjust if isinstance(sample, Sampling) else None

    def guess(carry: Carry, key: Array) -> tuple[Any, Array, Any]:
        """The draft's state, its tokens [B, guesses] and, if sampled, the probabilities they were drawn from."""

        def one(at: Any, i: Any) -> Any:
            state, given = at
            logits, state = draft.step(given, state)
            token, shares = draw(logits[:, -1], jax.random.fold_in(key, i))
            return (state, token[:, None]), (token, shares)

        # The first call takes two tokens: the one before the last, too, is new to the draft, whatever was accepted.
        at, (first, first_shares) = one((carry.draft_state, jnp.stack([carry.before, carry.token], 1)), 0)
        (state, _), (others, shares) = lax.scan(one, at, jnp.arange(1, guesses, dtype=jnp.int32))
        tokens = jnp.concatenate([first[:, None], jnp.moveaxis(others, 0, 1)], axis=1)
        if adjust is not None:
            shares = jnp.concatenate([first_shares[:, None], jnp.moveaxis(shares, 0, 1)], axis=1)
        return state, tokens, shares

    def draw(logits: Array, key: Array) -> tuple[Array, Any]:
        if adjust is None:
            return greedy(logits, key), None
        logits = adjust(logits)
        return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32), jax.nn.softmax(logits, axis=-1)

    def judge(logits: Array, guessed: Array, shares: Any, key: Array) -> tuple[Array, Array]:
        """How many guesses are kept, int32 [B], and what comes after each number of them, [B, guesses + 1]."""
        if adjust is None:
            after = greedy(logits, key)
            right = guessed == after[:, :-1]
        else:
            # Kept with the chance p / q; else drawn from what p has more than q. Together that is p.
            wanted = jax.nn.softmax(adjust(logits), axis=-1)
            p, q = (jnp.take_along_axis(x, guessed[..., None], axis=2)[..., 0] for x in (wanted[:, :-1], shares))
            chance, other = jax.random.split(key)
            right = jax.random.uniform(chance, q.shape) * q < p
            more = jnp.maximum(wanted[:, :-1] - shares, 0.0)
            # Where p = q no guess is ever refused, and rounding leaves nothing to draw from.
            more = jnp.where(more.sum(-1, keepdims=True) > 0.0, more, wanted[:, :-1])
            rest = jnp.log(jnp.concatenate([more, wanted[:, -1:]], axis=1))
            after = jax.random.categorical(other, rest, axis=-1).astype(jnp.int32)
        return jnp.cumprod(right, axis=1, dtype=jnp.int32).sum(1, dtype=jnp.int32), after

    def body(carry: Carry) -> Carry:
        keys = jax.random.split(jax.random.fold_in(key, carry.i))
        draft_state, guessed, shares = guess(carry, keys[0])
        logits, state = step(jnp.concatenate([carry.token[:, None], guessed], axis=1), carry.state)
        kept, after = judge(logits, guessed, shares, keys[1])
        index = jnp.arange(guesses + 1, dtype=jnp.int32)[None]
        padded = jnp.pad(guessed, ((0, 0), (0, 1)))
        new = jnp.where(index < kept[:, None], padded, jnp.take_along_axis(after, kept[:, None], axis=1))
        # A row takes no more than it still lacks, and nothing after its end; one that is done takes nothing.
        taken = jnp.minimum(kept + 1, count - carry.lengths)
        done = carry.lengths + taken >= count
        if eos is not None:
            ended = (new == eos) & (index < taken[:, None])
            taken = jnp.where(ended.any(1), jnp.argmax(ended, axis=1).astype(jnp.int32) + 1, taken)
            done = done | ended.any(1)
        taken = jnp.where(carry.done, 0, taken)
        at = jnp.where(index < taken[:, None], carry.lengths[:, None] + index, carry.tokens.shape[1] + index)
        row = jnp.arange(rows, dtype=jnp.int32)[:, None]
        last_two = jnp.concatenate([carry.before[:, None], carry.token[:, None], new], axis=1)
        last_two = jnp.take_along_axis(last_two, taken[:, None] + jnp.arange(2, dtype=jnp.int32)[None], axis=1)
        # Both have seen guesses + 1 tokens more than before; what was not taken, and the last one, they have not.
        back = guesses + 1 - taken
        return Carry(
            i=carry.i + 1,
            state=rolled_back(state, back),
            draft_state=rolled_back(draft_state, back),
            before=last_two[:, 0],
            token=last_two[:, 1],
            tokens=carry.tokens.at[row, at].set(new, mode="drop", unique_indices=True),
            lengths=carry.lengths + taken,
            done=carry.done | done,
        )

    return lax.while_loop(lambda carry: ~carry.done.all(), body, carry)
