"""Attention as it is defined, on some of a call's rows: what every result is held to before its time is taken.

With a mask of its own. `exact` is float64; `plain` makes the roundings that attention written without care
makes in the inputs' dtype, and twice its error is the bound (FlashAttention's, Dao et al., 2022).
"""

import jax.numpy as jnp
import numpy as np


class Wrong(Exception):
    """A result that is not attention: its time means nothing."""


def edge_rows(shape, count=3):
    """Rows where an implementation errs if it errs: the start, both sides of the window's edge, the middle, the end."""
    last = shape.queries - 1
    near = {0, 1, shape.left - 1, shape.left, shape.left + 1, last // 2, last - shape.right, last - shape.right - 1}
    near |= set(range(last - count + 1, last + 1))
    return sorted(row for row in near if 0 <= row <= last)


def edge_blocks(shape, count=8):
    """Starts of blocks of `count` tokens at the start, across the window's edge, in the middle and at the end."""
    last = max(0, shape.queries - count)
    return sorted({min(start, last) for start in (0, max(0, shape.left - count // 2), last // 2, last)})


def one_query(shape, q, k, v, sink_logits=None, dtype=np.float64):
    """Output [B, N, H] of one query [B, N, H] that sees all of the keys [B, S, K, H] given."""
    wide = _wide(dtype)
    q, k, v = (np.asarray(x).astype(dtype).astype(wide) for x in (q, k, v))
    groups = q.reshape(q.shape[0], shape.kv_heads, -1, shape.head_dim)
    logits = np.einsum("bkgh,bskh->bkgs", groups, k, optimize=True) * wide.type(shape.head_dim**-0.5)
    if shape.softcap is not None:
        logits = shape.softcap * np.tanh(logits / shape.softcap)
    weights = _softmax(logits, _grouped_sinks(shape, sink_logits, wide)).astype(dtype).astype(wide)
    out = np.einsum("bkgs,bskh->bkgh", weights, v, optimize=True)
    return out.reshape(q.shape[0], shape.heads, -1).astype(dtype).astype(np.float64)


def rows(shape, arrays, at, dtype=np.float64):
    """Outputs [B, len(at), N, H] of the queries with indices `at`."""
    q, k, v = (np.asarray(x) for x in arrays[:3])

    def one(row):
        seen = slice(max(0, row - shape.left), row + shape.right + 1)
        return one_query(shape, q[:, row], k[:, seen], v[:, seen], arrays.sink_logits, dtype)

    return np.stack([one(row) for row in at], axis=1)


def gradients(shape, arrays, start, count, dtype=np.float64):
    """Gradients of sum(g * out) for q, k and v of tokens [start, start + count), each [B, count, N or K, H]."""
    wide = _wide(dtype)
    # The roundings of plain attention are those of the library that its users write it in.
    xp = np if wide == np.float64 else jnp
    last = shape.queries - 1
    # Every query that sees one of these keys, and every key that one of those queries sees.
    q_first, q_last = max(0, start - shape.right), min(last, start + count - 1 + shape.left)
    k_first, k_last = max(0, q_first - shape.left), min(last, q_last + shape.right)
    q, g = (xp.asarray(x)[:, q_first : q_last + 1].astype(wide) for x in (arrays.q, arrays.g))
    k, v = (xp.asarray(x)[:, k_first : k_last + 1].astype(wide) for x in (arrays.k, arrays.v))
    q, g = (x.reshape(*x.shape[:2], shape.kv_heads, -1, shape.head_dim) for x in (q, g))
    scale = wide.type(shape.head_dim**-0.5)
    distance = np.arange(q_first, q_last + 1)[:, None] - np.arange(k_first, k_last + 1)[None]
    seen = (distance <= shape.left) & (distance >= -shape.right)
    logits, slope = xp.einsum("btkgh,bskh->bkgts", q, k, optimize=True) * scale, 1.0
    if shape.softcap is not None:
        capped = xp.tanh(logits / shape.softcap)
        logits, slope = shape.softcap * capped, 1 - capped * capped
    sinks = _grouped_sinks(shape, arrays.sink_logits, wide)
    weights = _softmax(
        xp.where(seen[None, None, None], logits, -np.inf), None if sinks is None else sinks[None, ..., None]
    )
    d_weights = xp.einsum("btkgh,bskh->bkgts", g, v, optimize=True)
    # What to take off is g . out, and is computed so: nobody who has no T x S weights can do better (FlashAttention).
    out = xp.einsum("bkgts,bskh->btkgh", weights, v, optimize=True)
    d_logits = weights * (d_weights - xp.einsum("btkgh,btkgh->bkgt", g, out, optimize=True)[..., None]) * slope
    weights, d_logits = (x.astype(dtype).astype(wide) for x in (weights, d_logits))
    dq = xp.einsum("bkgts,bskh->btkgh", d_logits, k, optimize=True) * scale
    dk = xp.einsum("bkgts,btkgh->bskh", d_logits, q, optimize=True) * scale
    dv = xp.einsum("bkgts,btkgh->bskh", weights, g, optimize=True)
    dq = dq.reshape(*dq.shape[:2], shape.heads, -1)[:, start - q_first :][:, :count]
    dk, dv = (x[:, start - k_first :][:, :count] for x in (dk, dv))
    return tuple(np.asarray(x.astype(dtype)).astype(np.float64) for x in (dq, dk, dv))


def hold(what, got, exact, plain, terms=64):
    """The error of a result as a share of what it may be.

    Args:
      what: whose result, for the message.
      got: the result, in its dtype.
      exact, plain: the reference in float64, and its roundings in `got`'s dtype.
      terms: of the longest sum; in whatever order, its roundings grow like the root of their number (Higham and Mary,
        2019).

    Raises:
      Wrong: the error is over twice that of plain attention (and over the roundings of the largest element).
    """
    dtype = np.asarray(got).dtype
    error = np.abs(np.asarray(got).astype(np.float64) - exact).max()
    roundings = max(float(jnp.finfo(dtype).eps), terms**0.5 * float(np.finfo(np.float32).eps)) / 2
    floor = max(1.0, np.abs(exact).max()) * roundings
    bound = 2 * np.abs(plain - exact).max() + floor
    if not error <= bound:  # a NaN is wrong too
        raise Wrong(f"{what} is wrong by {error:.3g}, at most {bound:.3g} is allowed: no speed of it is printed.")
    return float(error / bound)


def hold_rows(what, shape, arrays, out):
    """`hold` for an output [B, T, N, H], at the rows where errors show."""
    at = edge_rows(shape)
    got = np.asarray(out[:, np.asarray(at)])
    return hold(what, got, rows(shape, arrays, at), rows(shape, arrays, at, got.dtype))


def hold_gradients(what, shape, arrays, found, count=8):
    """`hold` for the gradients of q, k and v, at the tokens where errors show."""
    count = min(count, shape.queries)
    starts = list(edge_blocks(shape, count))
    exact = [gradients(shape, arrays, start, count) for start in starts]
    plain = [gradients(shape, arrays, start, count, np.asarray(found[0][:1, :1]).dtype) for start in starts]
    seen, group = min(shape.left + shape.right + 1, shape.queries), shape.heads // shape.kv_heads
    worst = 0.0
    for i, (name, terms) in enumerate((("dq", seen), ("dk", group * seen), ("dv", group * seen))):
        # All blocks at once: the largest error of a few elements alone is mostly luck, plain attention's too.
        got = np.concatenate([np.asarray(found[i][:, start : start + count]) for start in starts], axis=1)
        parts = (np.concatenate([block[i] for block in blocks], axis=1) for blocks in (exact, plain))
        worst = max(worst, hold(f"{what}, {name}", got, *parts, terms=max(64, terms)))
    return worst


def _wide(dtype):
    """Logits, softmax and sums: float64 for the exact result, float32 for any other."""
    return np.dtype(np.float64 if np.dtype(dtype) == np.float64 else np.float32)


def _grouped_sinks(shape, sink_logits, wide):
    return None if sink_logits is None else np.asarray(sink_logits).astype(wide).reshape(shape.kv_heads, -1, 1)


def _softmax(logits, sinks):
    largest = logits.max(-1, keepdims=True)
    weights = (np if isinstance(logits, np.ndarray) else jnp).exp(logits - largest)
    total = weights.sum(-1, keepdims=True)
    return weights / (
        total if sinks is None else total + (np if isinstance(logits, np.ndarray) else jnp).exp(sinks - largest)
    )
