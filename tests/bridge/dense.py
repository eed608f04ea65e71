"""Attention as everybody writes it first, in torch and in float64: what the bridge's numbers and gradients must be."""

import torch


def attention(q, k, v, mask, *, sink_logits=None, softcap=None, scale=None):
    """Output and lse; `mask` is bool [B or 1, T, S]."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    logits = torch.einsum("btnh,bsnh->bnts", q, k) * (q.shape[3] ** -0.5 if scale is None else scale)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = torch.where(mask[:, None], logits, -torch.inf)
    lse = torch.logsumexp(torch.where(mask.any(-1)[:, None, :, None], logits, 0.0), dim=-1)
    lse = torch.where(mask.any(-1)[:, None], lse, -torch.inf)
    total = lse if sink_logits is None else torch.logaddexp(lse, sink_logits.double()[None, :, None])
    weights = torch.where(mask[:, None], torch.exp(logits - total[..., None]), 0.0)
    return torch.einsum("bnts,bsnh->btnh", weights, v), lse


def causal(queries, keys, size, sinks=0):
    """bool [1, T, S]: the mask of `Window.causal(size, sinks)`, the last query at the last key."""
    p, j = torch.arange(queries)[:, None] + keys - queries, torch.arange(keys)[None]
    return ((j <= p) & ((p - j < size) | (j < sinks)))[None]
