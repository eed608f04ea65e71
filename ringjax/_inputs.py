"""The only place that raises about what a user passed in.

Every message names the call, the rule and what was got on its first line; then the facts; then what to do. All checks
look at shapes, dtypes and static values, or at concrete integers outside jit; the values of arrays are never looked at
inside jit.
"""

import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

FLOATS = ("float32", "bfloat16", "float16")

_INT32 = np.iinfo(np.int32)


def describe(x: Any) -> str:
    """An array as `bfloat16[2, 4, 8, 64]`; anything else by its type."""
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"{x.dtype}[{', '.join(map(str, x.shape))}]"
    return type(x).__name__


def message(first: str, facts: dict[str, Any] | None = None, hint: str | None = None) -> str:
    """A message in the house's form."""
    lines = [first]
    width = max((len(name) for name in facts or {}), default=0) + 1
    lines += [f"  {name + ':':<{width}} {fact}" for name, fact in (facts or {}).items()]
    lines += [f"  Hint: {hint}"] if hint else []
    return "\n".join(lines)


def is_concrete(*values: Any) -> bool:
    """Whether values can be looked at: none is traced."""
    return not any(isinstance(value, jax.core.Tracer) for value in values)


def check_type(call: str, name: str, value: Any, kind: type, hint: str | None = None) -> None:
    """Raises TypeError unless `value` is an instance of `kind`."""
    if not isinstance(value, kind):
        first = f"{call}: {name} must be a {kind.__name__}, got {type(value).__name__}."
        raise TypeError(message(first, hint=hint))


def as_int(call: str, name: str, value: Any, *, least: int) -> int:
    """A static int of at least `least`."""
    if isinstance(value, bool):
        raise TypeError(f"{call}: {name} must be an int, got {value!r}.")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{call}: {name} must be an int, got {describe(value)}.") from None
    if number < least:
        raise ValueError(f"{call}: {name} must be at least {least}, got {number}.")
    return number


def as_positive(call: str, name: str, value: Any) -> float:
    """A static, finite float above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating | np.integer):
        raise TypeError(f"{call}: {name} must be a Python number, got {describe(value)}.")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{call}: {name} must be finite and above 0, got {value}.")
    return float(value)


def as_dtype(call: str, name: str, value: Any, also: tuple[str, ...] = ()) -> Any:
    """One of the dtypes that keys and values may have, `also` included."""
    try:
        dtype = None if value is None else jnp.dtype(value)
    except TypeError:
        dtype = None
    if dtype is None or dtype.name not in (*FLOATS, *also):
        got = repr(value) if dtype is None else dtype.name
        raise TypeError(f"{call}: {name} must be one of {', '.join((*FLOATS, *also))}, got {got}.")
    return dtype


def as_list(call: str, name: str, value: Any) -> list[Any]:
    """Several arrays, from whatever holds them."""
    try:
        return list(value)
    except TypeError:
        raise TypeError(f"{call}: {name} must be a list of arrays, got {describe(value)}.") from None


def as_index(call: str, name: str, value: Any, axes: int) -> jax.Array:
    """Integers that number rows, as an array: one of them (`axes` = 0) or a list (`axes` = 1)."""
    rule = f"{name} must be " + ("one integer" if axes == 0 else "integers of one axis")
    integers, got = _integers(call, rule, value)
    if integers.ndim != axes:
        raise ValueError(f"{call}: {rule}, got {got}.")
    check_int32(call, name, integers)
    return jnp.asarray(integers, jnp.int32)


def _integers(call: str, rule: str, value: Any) -> tuple[Any, str]:
    """An int array, from one or from Python's ints and lists of them; and its description."""
    shaped, got = value, describe(value)
    if isinstance(value, list | tuple) and is_concrete(*value):
        try:
            shaped = np.asarray(value)
            got = describe(shaped)
        except ValueError:  # lists of unequal lengths
            shaped = value
    elif isinstance(value, list | tuple):
        shaped = jnp.asarray(value)
    elif isinstance(value, int) and not isinstance(value, bool):
        shaped = np.asarray(value)
    if not hasattr(shaped, "dtype") or not np.issubdtype(shaped.dtype, np.integer):
        raise TypeError(f"{call}: {rule}, got {got}.")
    return shaped, got


def check_array(call: str, name: str, x: Any, axes: str) -> None:
    """Raises unless `x` is an array of floats with the axes named in `axes`, such as "B T N H"."""
    if not isinstance(x, jax.Array | np.ndarray):
        hint = "torch tensors go through torch_bridge." if type(x).__module__.startswith("torch") else None
        raise TypeError(message(f"{call}: {name} must be a jax or NumPy array, got {type(x).__name__}.", hint=hint))
    wanted = axes.split()
    if x.ndim != len(wanted):
        hint = "the head axis is the third: [batch, length, heads, head_dim]." if len(wanted) == 4 else None
        first = f"{call}: {name} must have {len(wanted)} axes [{', '.join(wanted)}], got {describe(x)}."
        raise ValueError(message(first, hint=hint))
    if str(x.dtype) not in FLOATS:
        raise TypeError(f"{call}: {name} must be one of {', '.join(FLOATS)}, got {describe(x)}.")


def check_agree(call: str, what: str, facts: dict[str, tuple[Any, Any]], hint: str | None = None) -> None:
    """Raises unless values agree. `facts`: for each name, its value and its description."""
    values = [value for value, _ in facts.values()]
    if any(value != values[0] for value in values):
        names = list(facts)
        listed = ", ".join(names[:-1]) + " and " + names[-1]
        got = " and ".join([", ".join(map(str, values[:-1])), str(values[-1])])
        first = f"{call}: {listed} must agree on {what}, got {got}."
        raise ValueError(message(first, {name: text for name, (_, text) in facts.items()}, hint))


def check_qkv(call: str, q: Any, k: Any, v: Any) -> None:
    """Checks q [B, T, N, H] against k [B, S, K, H] and v [B, S, K, Hv]."""
    check_array(call, "q", q, "B T N H")
    check_array(call, "k", k, "B S K H")
    check_array(call, "v", v, "B S K Hv")
    texts = {"q": describe(q), "k": describe(k), "v": describe(v)}
    check_agree(call, "batch", {n: (x.shape[0], texts[n]) for n, x in (("q", q), ("k", k), ("v", v))})
    check_agree(call, "length", {n: (x.shape[1], texts[n]) for n, x in (("k", k), ("v", v))})
    check_agree(call, "kv heads", {n: (x.shape[2], texts[n]) for n, x in (("k", k), ("v", v))})
    check_agree(call, "head_dim", {n: (x.shape[3], texts[n]) for n, x in (("q", q), ("k", k))})
    hint = "cast them first, for instance with x.astype(q.dtype)."
    check_agree(call, "dtype", {n: (str(x.dtype), texts[n]) for n, x in (("q", q), ("k", k), ("v", v))}, hint)
    check_heads(call, q.shape[2], k.shape[2], {"q": texts["q"], "k": texts["k"]})
    for name, x in (("q", q), ("k", k), ("v", v)):
        if 0 in x.shape:
            raise ValueError(f"{call}: {name} must not be empty, got {describe(x)}.")


def check_heads(call: str, heads: int, kv_heads: int, facts: dict[str, str]) -> None:
    """Query heads come in whole groups."""
    if kv_heads == 0 or heads % kv_heads:
        first = f"{call}: the query heads must be a multiple of the kv heads, got {heads} and {kv_heads}."
        raise ValueError(message(first, facts))


def check_sink_logits(call: str, sink_logits: Any, q: Any) -> None:
    """Sink logits are float [N]."""
    if sink_logits is None:
        return
    check_array(call, "sink_logits", sink_logits, "N")
    if sink_logits.shape[0] != q.shape[2]:
        first = f"{call}: sink_logits must have one entry per query head, got {sink_logits.shape[0]} for {q.shape[2]}."
        raise ValueError(message(first, {"q": describe(q), "sink_logits": describe(sink_logits)}))


def as_row_integers(call: str, name: str, value: Any, batch: int, *, scalar: bool = False) -> jax.Array | None:
    """An int32 [B] from an int array [B] (or, if `scalar`, from one integer for all rows); None stays None."""
    if value is None:
        return None
    shaped, got = _integers(call, f"{name} must be integers", value)
    if shaped.shape != (batch,) and not (scalar and shaped.ndim == 0):
        also = "an int or " if scalar else ""
        raise ValueError(f"{call}: {name} must be {also}int32[{batch}], one per row, got {got}.")
    check_int32(call, name, shaped)
    row = jnp.asarray(shaped, jnp.int32)
    return jnp.broadcast_to(row[None], (batch,)) if row.ndim == 0 else row


def check_int32(call: str, name: str, values: Any) -> None:
    """Raises rather than lets a wider integer wrap around; values of at most 32 bits are not looked at."""
    if not isinstance(values, int) and np.iinfo(values.dtype).max <= _INT32.max:
        return
    if is_concrete(values) and np.size(values):
        least, most = int(np.min(values)), int(np.max(values))
        if least < _INT32.min or most > _INT32.max:
            got = f"{least}" if least == most else f"{least} to {most}"
            raise ValueError(f"{call}: {name} must fit int32, got {got}.")


def check_lengths(call: str, lengths: Any, chunk: int) -> None:
    """Outside jit, lengths are 0..T."""
    if lengths is None or not is_concrete(lengths):
        return
    values = np.asarray(lengths)
    if ((values < 0) | (values > chunk)).any():
        first = f"{call}: lengths must be between 0 and {chunk}, the length of the chunk, got {values.tolist()}."
        raise ValueError(first)


def check_segments(call: str, segment_ids: Any, kv_segment_ids: Any, q: Any, k: Any) -> tuple[Any, Any]:
    """Segment ids of queries [B, T] and keys [B, S], both given or neither; one array serves both if T = S."""
    if segment_ids is None and kv_segment_ids is None:
        return None, None
    if segment_ids is None:
        raise ValueError(f"{call}: kv_segment_ids needs segment_ids, got None.")
    if kv_segment_ids is None:
        if q.shape[1] != k.shape[1]:
            first = f"{call}: segment_ids needs kv_segment_ids when T != S, got T={q.shape[1]} and S={k.shape[1]}."
            raise ValueError(message(first, {"q": describe(q), "k": describe(k)}))
        kv_segment_ids = segment_ids
    for name, ids, x in (("segment_ids", segment_ids, q), ("kv_segment_ids", kv_segment_ids, k)):
        if not hasattr(ids, "dtype") or not np.issubdtype(ids.dtype, np.integer):
            raise TypeError(f"{call}: {name} must be integers, got {describe(ids)}.")
        if ids.shape != x.shape[:2]:
            raise ValueError(f"{call}: {name} must have shape {list(x.shape[:2])}, got {describe(ids)}.")
        check_int32(call, name, ids)
    return jnp.asarray(segment_ids, jnp.int32), jnp.asarray(kv_segment_ids, jnp.int32)
