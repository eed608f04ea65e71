"""Attention as it is defined: dense, in NumPy and float64. Imports nothing of ringjax."""

import numpy as np


def visible(*, left, right, sinks, q_positions, k_positions, q_segments=None, k_segments=None):
    """bool [B or 1, T, S]: what each query sees. Positions are [T] and [S] or have a batch axis; a key < 0 is none."""
    p, j = np.atleast_2d(q_positions)[:, :, None], np.atleast_2d(k_positions)[:, None, :]
    left, right = (np.inf if side is None else side for side in (left, right))
    seen = ((-right <= p - j) & (p - j <= left)) | ((j >= 0) & (j < sinks) & (j <= p + right))
    if q_segments is not None:
        a, b = np.asarray(q_segments)[:, :, None], np.asarray(k_segments)[:, None, :]
        seen = seen & (a == b) & (b >= 0)
    return seen & (j >= 0)


def attention(q, k, v, *, sink_logits=None, softcap=None, scale=None, **what_is_seen):
    """Output [B, T, N, Hv] and lse [B, N, T] of q [B, T, N, H], k [B, S, K, H], v [B, S, K, Hv]; see `visible`."""
    q, k, v = (np.asarray(x).astype(np.float64) for x in (q, k, v))
    seen = visible(**what_is_seen)
    read = seen.any(axis=1)[:, :, None, None]
    k, v = (np.repeat(np.where(read, x, 0.0), q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    logits = np.einsum("btnh,bsnh->bnts", q, k) * (q.shape[3] ** -0.5 if scale is None else scale)
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
    logits = np.where(seen[:, None], logits, -np.inf)
    largest = logits.max(axis=-1, keepdims=True)
    largest = np.where(np.isneginf(largest), 0.0, largest)
    weights = np.exp(logits - largest)
    total = weights.sum(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (largest + np.log(total))[..., 0]
    if sink_logits is not None:
        total = total + np.exp(np.asarray(sink_logits).astype(np.float64)[None, :, None, None] - largest)
    weights = weights / np.where(total == 0.0, 1.0, total)
    return np.einsum("bnts,bsnh->btnh", weights, v), lse
