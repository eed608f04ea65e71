"""Prompts in chunks and one jitted loop of decoding steps, for any model."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.tree_util import Partial
from jaxtyping import Float, Int

from ringjax import _explicit, _inputs, _speculative
from ringjax._sampling import Sampling, greedy
from ringjax._speculative import Draft
from ringjax._state import BufferState, rings_of, rolled_back

Step = Callable[..., tuple[Any, Any]]
"""`step(tokens, state) -> (logits, state)`: tokens int32 [B, T], logits [B, T, V]; T = 1 in decoding, `prefill_size`
in a prompt. It may take a keyword `lengths`, int32 [B]: how many of the T tokens are real; ragged prompts need that."""


class Generation(NamedTuple):
    """What `generate` returns.

    Attributes:
      tokens: int32 [B, max_new_tokens]; after a row's end the end token is repeated.
      lengths: int32 [B], new tokens of each row, the end token included.
      state: of the model, after all but the last new token of each row.
      draft_state: with a draft, its state, after all but the last two; else None.
      calls: with a draft, int32: how often the model ran after the prompt; else None.
    """

    tokens: Array
    lengths: Array
    state: Any
    draft_state: Any = None
    calls: Any = None


def last_calculated(state: Any, batch: int) -> Int[Array, " B"]:
    """The last position that every ring in a state has seen, int32 [B]; -1 if there is none, or no ring.

    Args:
      state: any pytree. A `BufferState` counts with its decoder's positions.
      batch: B.
    """
    seen = [x.last_calculated if isinstance(x, BufferState) else x.length - 1 for x in rings_of(state)]
    least = jnp.full(batch, -1, jnp.int32) if not seen else seen[0]
    for other in seen[1:]:
        least = jnp.minimum(least, other)
    return least


def _takes_lengths(step: Any) -> bool:
    try:
        parameters = inspect.signature(step).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(p.name == "lengths" or p.kind is p.VAR_KEYWORD for p in parameters)


def _check_prompt(
    call: str, step: Any, state: Any, tokens: Any, lengths: Any, prefill_size: Any
) -> tuple[Any, Any, int]:
    if not callable(step):
        raise TypeError(
            f"{call}: step must be a function (tokens, state) -> (logits, state), got {type(step).__name__}."
        )
    if not hasattr(tokens, "dtype") or not np.issubdtype(tokens.dtype, np.integer):
        raise TypeError(f"{call}: tokens must be an integer array [B, T], got {_inputs.describe(tokens)}.")
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise ValueError(
            f"{call}: tokens must be an integer array [B, T] that is not empty, got {_inputs.describe(tokens)}."
        )
    size = _inputs.as_int(call, "prefill_size", prefill_size, least=1)
    tokens = jnp.asarray(tokens, jnp.int32)
    lengths = _inputs.as_row_integers(call, "lengths", lengths, tokens.shape[0])
    if lengths is not None:
        _inputs.check_lengths(call, lengths, tokens.shape[1])
        if _inputs.is_concrete(lengths) and bool((lengths == 0).any()):
            raise ValueError(f"{call}: every row needs a token to start from, got lengths {lengths.tolist()}.")
    for ring in rings_of(state):
        rows = ring.feedback.length if isinstance(ring, BufferState) else ring.length
        if rows.shape != tokens.shape[:1]:
            first = f"{call}: tokens and state must agree on batch, got {tokens.shape[0]} and {rows.shape[0]}."
            raise ValueError(_inputs.message(first, {"tokens": _inputs.describe(tokens)}))
    if not _takes_lengths(step):
        seen = last_calculated(state, tokens.shape[0])
        ragged = lengths is not None or (_inputs.is_concrete(seen) and len(set(seen.tolist())) > 1)
        if ragged:
            first = f"{call}: rows of different lengths need a step that takes a keyword `lengths`, got one without."
            hint = "step(tokens, state, *, lengths): pass them on to attend, which leaves padding out of the ring."
            raise TypeError(_inputs.message(first, hint=hint))
    return tokens, lengths, size


def _check_slack(call: str, state: Any, tokens: Array, lengths: Array | None) -> None:
    """Outside jit, raises where taking seen tokens back would make a row invalid, that is silently empty."""
    rings = [node.feedback if isinstance(node, BufferState) else node for node in rings_of(state)]
    counts = [x for ring in rings for x in (ring.length, ring.written)]
    if not rings or not _inputs.is_concrete(lengths, *counts):
        return
    batch, length = tokens.shape
    ends = np.full(batch, length) if lengths is None else np.asarray(lengths)
    seen = np.asarray(last_calculated(state, batch)) + 1
    back = np.maximum(seen - (ends - 1), 0)
    for ring in rings:
        depth = np.where(back > 0, np.asarray(ring.written).astype(np.int64) - ring.length + back, 0)
        if (depth > ring.slack).any():
            row = int(np.argmax(depth))
            first = (
                f"{call}: tokens that end within what was seen need slack of at least {depth[row]}, got {ring.slack}."
            )
            facts = {"tokens": ends.tolist(), "seen": seen.tolist()}
            hint = "the last token runs again for its logits: give the rings slack, or add a token."
            raise ValueError(_inputs.message(first, facts, hint))


def prefill(
    step: Step,
    state: Any,
    tokens: Int[Array, "B T"],
    *,
    prefill_size: int = 512,
    lengths: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "B V"], Any]:
    """Runs a model over prompts, `prefill_size` tokens at a time, in memory that does not depend on their length.

    `tokens` are whole streams, from position 0 on: what the state's rings have seen already (`last_calculated`) is
    not computed again, so that a longer prompt, or a conversation's next turn, costs its new tokens only. If all was
    seen, the last token is taken back and run again for its logits, which needs rings with slack.

    Args:
      step: the model; see `Step`. A `jax.tree_util.Partial` may carry parameters.
      state: any pytree with the model's rings.
      tokens: int32 prompts, padded on the right.
      prefill_size: tokens in a chunk.
      lengths: int32 [B], how many of each row are real, at least 1; None: all.

    Returns:
      The logits [B, V] after each row's last token, and the state.

    Raises:
      ValueError, TypeError: arguments of the wrong kind or shape; rows of different lengths and a step without
        `lengths`; outside jit, tokens that are to be taken back and rings without the slack for it.
    """
    tokens, lengths, size = _check_prompt("prefill", step, state, tokens, lengths, prefill_size)
    _check_slack("prefill", state, tokens, lengths)
    if _inputs.is_concrete(*jax.tree.leaves((state, tokens, lengths))):
        return _jitted_prefill(_as_partial(step), state, tokens, lengths, size)
    return _prefill(_as_partial(step), state, tokens, lengths, size)


def _as_partial(function: Any) -> Partial:
    # A pytree: what the function carries are arguments, not constants, and the same function compiles once.
    return function if isinstance(function, Partial) else Partial(function)


def _prefill(step: Partial, state: Any, tokens: Array, lengths: Array | None, size: int) -> tuple[Array, Any]:
    batch, length = tokens.shape
    size = min(size, length)
    ends = jnp.full(batch, length, jnp.int32) if lengths is None else lengths
    seen = last_calculated(state, batch) + 1
    start = jnp.minimum(seen, ends - 1)
    state = rolled_back(state, seen - start)
    ragged = _takes_lengths(step)

    def run(state: Any, at: Array, size: int) -> tuple[Array, Any, Array]:
        """The logits after each row's last real token of a chunk, the state, and how many were real."""
        real = jnp.clip(ends - at, 0, size)
        index = jnp.minimum(at[:, None] + jnp.arange(size, dtype=jnp.int32)[None], length - 1)
        chunk = jnp.take_along_axis(tokens, index, axis=1)
        logits, state = step(chunk, state, lengths=real) if ragged else step(chunk, state)
        last = jnp.maximum(real - 1, 0)[:, None, None]
        return jnp.take_along_axis(logits, last, axis=1)[:, 0], state, real

    def body(carry: Any, size: int) -> Any:
        state, at, logits = carry
        new, state, real = run(state, at, size)
        return state, at + size, jnp.where((real > 0)[:, None], new, logits)

    shape = jax.eval_shape(partial(run, size=size), state, start)[0]
    carry = (state, start, _explicit.zeros(shape))
    if ragged:
        state, _, logits = lax.while_loop(lambda c: (c[1] < ends).any(), partial(body, size=size), carry)
    else:  # all rows are alike: whole chunks, then what is left, token by token, so that nothing is ever padded
        carry = lax.while_loop(lambda c: c[1][0] + size <= ends[0], partial(body, size=size), carry)
        state, _, logits = lax.while_loop(lambda c: c[1][0] < ends[0], partial(body, size=1), carry)
    return logits, state


_jitted_prefill = jax.jit(_prefill, static_argnames="size")


def generate(
    step: Step,
    state: Any,
    prompt: Int[Array, "B T"],
    *,
    max_new_tokens: int,
    key: Array | None = None,
    sample: Callable[[Array, Array], Array] | None = None,
    eos: int | None = None,
    lengths: Int[Array, " B"] | None = None,
    prefill_size: int = 512,
    donate: bool = False,
    draft: Draft | None = None,
) -> Generation:
    """Continues prompts: `prefill`, then one jitted loop of decoding steps in memory that does not grow.

    One compilation serves the prompts and the loop, and every later call with the same step, shapes and options.

    Args:
      step: the model; see `Step`. Keep one function, or a `jax.tree_util.Partial` with the parameters as its
        arguments: a new closure for each call compiles anew.
      state: any pytree with the model's rings.
      prompt: int32 tokens of whole streams, as for `prefill`.
      max_new_tokens: new tokens per row, at least 1.
      key: of `jax.random`; needed unless the sampling is greedy.
      sample: `sample(logits [B, V], key) -> int32 [B]`, such as `Sampling(...)`; None: greedy.
      eos: the token that ends a row; the loop ends when all rows have; None: none.
      lengths: int32 [B], how many tokens of each prompt are real; None: all.
      prefill_size: tokens of a prompt's chunk.
      donate: whether `state` (and the draft's) may be overwritten, which saves a copy; it cannot be used afterwards.
      draft: a small model. It drafts tokens, the step takes them all in one call, and each row keeps those that are
        right: greedy tokens are the same as without it, sampled ones are of the same distribution (not the same for
        the same key). All rings need slack. What else is in a state is not taken back: positions come from the rings.

    Returns:
      The new tokens, how many of each row count, and the state: of each row, after all but its last new token. (A step
      without `lengths` cannot leave a row out: rows that end before others then go on seeing their end token.)

    Raises:
      ValueError, TypeError: as for `prefill`; no key for a sampling that is not greedy; with a draft, rings without
        slack for its tokens, a state without a ring, or a `sample` that is neither a `Sampling` nor greedy.
    """
    call = "generate"
    prompt, lengths, size = _check_prompt(call, step, state, prompt, lengths, prefill_size)
    _check_slack(call, state, prompt, lengths)
    count = _inputs.as_int(call, "max_new_tokens", max_new_tokens, least=1)
    if sample is not None and not callable(sample):
        raise TypeError(f"{call}: sample must be a function (logits, key) -> tokens, got {type(sample).__name__}.")
    if key is None:
        if sample is not None and sample is not greedy:
            first = f"{call}: sample needs a key, got None."
            raise ValueError(_inputs.message(first, hint="pass key=jax.random.key(0)."))
        key = jax.random.key(0)
    end = None if eos is None else jnp.int32(_inputs.as_int(call, "eos", eos, least=0))
    guessing: dict[str, Any] = {}
    if draft is not None:
        _speculative.check(call, draft, state, sample)
        _check_prompt(call, draft.step, draft.state, prompt, lengths, prefill_size)
        _check_slack(call, draft.state, prompt, lengths)
        names = ("draft_step", "draft_state", "guesses")
        guessing = dict(zip(names, (_as_partial(draft.step), draft.state, draft.tokens), strict=True))
    # A Sampling is a pytree; any other function travels as the static part of one.
    drawn = sample if isinstance(sample, Sampling) else _as_partial(sample or greedy)
    run: Callable[..., Generation] = _jitted_donating if donate else _jitted
    if not _inputs.is_concrete(*jax.tree.leaves((state, prompt, lengths, key, guessing))):
        run = _generate
    return run(_as_partial(step), state, prompt, lengths, key, drawn, end, count, size, **guessing)


def _generate(
    step: Partial,
    state: Any,
    prompt: Array,
    lengths: Array | None,
    key: Array,
    sample: Any,
    eos: Array | None,
    count: int,
    size: int,
    draft_step: Any = None,
    draft_state: Any = None,
    guesses: int = 0,
) -> Generation:
    logits, state = _prefill(step, state, prompt, lengths, size)
    batch = prompt.shape[0]

    def draw(logits: Array, i: Any, done: Array, before: Array) -> tuple[Array, Array]:
        token = jnp.asarray(sample(logits, jax.random.fold_in(key, i)), jnp.int32)
        if eos is None:
            return token, done
        token = jnp.where(done, before, token)
        return token, done | (token == eos)

    nobody = jnp.zeros_like(logits[:, 0], bool)  # like the logits, so that they lie on a mesh as those do
    token, done = draw(logits, 0, nobody, jnp.zeros_like(nobody, jnp.int32))
    filler = jnp.int32(0) if eos is None else eos
    tokens = jnp.broadcast_to(jnp.full_like(token, filler)[:, None], (batch, count))
    tokens = lax.dynamic_update_slice_in_dim(tokens, token[:, None], 0, axis=1)
    new_lengths = jnp.ones_like(token)
    if draft_step is not None:
        _, draft_state = _prefill(draft_step, draft_state, prompt, lengths, size)
        ends = jnp.full(batch, prompt.shape[1], jnp.int32) if lengths is None else lengths
        first = _speculative.Carry(
            i=jnp.int32(0),
            state=state,
            draft_state=rolled_back(draft_state, jnp.ones(batch, jnp.int32)),
            before=jnp.take_along_axis(prompt, ends[:, None] - 1, axis=1)[:, 0],
            token=token,
            tokens=tokens,
            lengths=new_lengths,
            done=done | (count == 1),
        )
        draft = Draft(draft_step, draft_state, guesses)
        last = _speculative.loop(step, draft, first, key=key, sample=sample, eos=eos, count=count)
        return Generation(last.tokens, last.lengths, last.state, last.draft_state, last.i)

    def unfinished(carry: Any) -> Array:
        i, _, _, _, _, done = carry
        return (i < count) & ~done.all()

    def body(carry: Any) -> Any:
        i, state, token, tokens, new_lengths, done = carry
        options = {"lengths": jnp.where(done, 0, 1)} if pads else {}
        logits, state = step(token[:, None], state, **options)
        new_lengths = new_lengths + jnp.where(done, 0, 1)
        token, done = draw(logits[:, -1], i, done, token)
        tokens = lax.dynamic_update_slice_in_dim(tokens, token[:, None], i, axis=1)
        return i + 1, state, token, tokens, new_lengths, done

    carry = (jnp.int32(1), state, token, tokens, new_lengths, done)
    # A row that has ended is padding: it writes nothing, and its state can be continued.
    pads = eos is not None and _takes_lengths(step)
    _, state, _, tokens, new_lengths, _ = lax.while_loop(unfinished, body, carry)
    return Generation(tokens, new_lengths, state)


_STATIC = ("count", "size", "guesses")
_jitted = jax.jit(_generate, static_argnames=_STATIC)
_jitted_donating = jax.jit(_generate, static_argnames=_STATIC, donate_argnames=("state", "draft_state"))
