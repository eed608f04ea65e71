"""Rows of the GPU's tables: shapes, windows and options, their inputs, and what is right at sampled places."""

import dataclasses
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np

import ringjax as rj

PLACE = 512  # queries that are checked at each place


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table: a shape (B, T, N, K, H), a window of `size` keys (None: causal without bound)."""

    name: str
    shape: tuple[int, int, int, int, int]
    size: int | None
    softcap: float | None = None
    sink_logits: bool = False
    segment: int | None = None  # mean length of the packed sequences

    @property
    def window(self):
        return rj.Window.causal(self.size)

    @property
    def is_plain(self):
        """Whether every peer can run it."""
        return self.softcap is None and not self.sink_logits and self.segment is None

    @cached_property
    def ids(self):
        """Segment ids int32 [B, T]; None: one segment a row."""
        if self.segment is None:
            return None
        starts = np.random.default_rng(0).random(self.shape[:2]) < 1 / self.segment
        return np.cumsum(starts, axis=1).astype(np.int32)

    @property
    def pairs(self):
        """Visible pairs of a query and a key, in all rows and heads."""
        b, t, n = self.shape[:3]
        at = np.broadcast_to(np.arange(t), (b, t))
        first = np.zeros_like(at) if self.size is None else np.maximum(at - self.size + 1, 0)
        if self.ids is not None:
            begins = np.diff(self.ids, axis=1, prepend=-1) != 0
            first = np.maximum(first, np.maximum.accumulate(np.where(begins, at, 0), axis=1))
        return int((at - first + 1).sum()) * n

    def flops(self, what):
        """Of the visible pairs: two products forward, five more backward (FlashAttention's count)."""
        return {"forward": 4, "with backward": 14}[what] * self.shape[4] * self.pairs

    @property
    def specs(self):
        """Shapes and dtypes of q, k, v, g, the sink logits and the segment ids; None where there are none."""
        b, t, n, k, h = self.shape
        heads = (n, k, k, n)
        arrays = [jax.ShapeDtypeStruct((b, t, x, h), jnp.bfloat16) for x in heads]
        sinks = jax.ShapeDtypeStruct((n,), jnp.float32) if self.sink_logits else None
        return *arrays, sinks, None if self.ids is None else jax.ShapeDtypeStruct((b, t), jnp.int32)

    def arrays(self, make=None):
        """q, k, v, g, sink logits and segment ids; never zeros, which the chip multiplies faster. `make`: compiled."""
        return *(make or jax.jit(self.normal))(jax.random.key(0)), None if self.ids is None else jnp.asarray(self.ids)

    def normal(self, key):
        """All but the segment ids, normal."""
        specs = self.specs[:5]
        keys = jax.random.split(key, len(specs))
        return tuple(
            None if x is None else jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, specs, strict=True)
        )


LONG = (1, 16384, 32, 8, 128)
SHAPES = [
    Row("A", (1, 32768, 32, 8, 128), 4096),
    Row("B", (4, 8192, 16, 16, 128), 1024),
    Row("C", (8, 4096, 32, 8, 64), 1024),
    Row("D", (1, 32768, 16, 8, 256), 1024),
    Row("E", (2, 8192, 32, 8, 128), None),
    Row("F", (1, 131072, 8, 2, 128), 4096),
]
FEATURES = [
    Row("A, softcap 50", (1, 32768, 32, 8, 128), 4096, softcap=50.0),
    Row("A, sink logits", (1, 32768, 32, 8, 128), 4096, sink_logits=True),
    Row("A, packed 4096", (1, 32768, 32, 8, 128), 4096, segment=4096),
]
WINDOWS = [Row(f"W={size}", LONG, size) for size in (128, 256, 512, 1024, 2048, 4096, 8192)] + [
    Row("no bound", LONG, None)
]
GROUPS = {"shapes": SHAPES, "features": FEATURES, "windows": WINDOWS}
ROWS = [row for group in GROUPS.values() for row in group]


def chosen(names):
    """The rows of these names, or of groups of these names; None: all."""
    if names is None:
        return ROWS
    known = {row.name: [row] for row in ROWS} | GROUPS
    for name in names:
        if name not in known:
            raise SystemExit(f"--only: a row or group must be one of {', '.join(known)}, got {name!r}")
    return list(dict.fromkeys(row for name in names for row in known[name]))


def exact(row, arrays, b, kv_head, first, last):
    """Float32 out and dq of queries [first, last) of a group's heads, and dk and dv of keys [first, last) from them."""
    q, k, v, g, sinks, ids = arrays
    group = row.shape[2] // row.shape[3]
    head = kv_head * group
    with jax.default_matmul_precision("highest"):
        low = 0 if row.size is None else max(0, first - row.size + 1)
        q, g = (x[b, first:last, head : head + group].astype(jnp.float32) for x in (q, g))
        k, v = (x[b, low:last, kv_head].astype(jnp.float32) for x in (k, v))
        logits = jnp.einsum("tnh,sh->nts", q, k) * row.shape[4] ** -0.5
        slope = 1.0
        if row.softcap:
            capped = jnp.tanh(logits / row.softcap)
            logits, slope = row.softcap * capped, 1 - capped * capped
        at, key = jnp.arange(first, last)[:, None], jnp.arange(low, last)[None]
        seen = row.window.visible(at, key)
        if ids is not None:
            seen = seen & (ids[b, first:last, None] == ids[b, None, low:last])
        logits = jnp.where(seen, logits, -jnp.inf)
        lse = jax.nn.logsumexp(logits, axis=-1)
        if sinks is not None:
            lse = jnp.logaddexp(lse, sinks[head : head + group, None])
        weights = jnp.exp(logits - lse[..., None])
        out = jnp.einsum("nts,sh->tnh", weights, v)
        d = weights * (jnp.einsum("tnh,sh->nts", g, v) - (g * out).sum(-1).T[..., None]) * slope
        dq = jnp.einsum("nts,sh->tnh", d, k) * row.shape[4] ** -0.5
        dk = jnp.einsum("nts,tnh->sh", d, q)[first - low :] * row.shape[4] ** -0.5
        dv = jnp.einsum("nts,tnh->sh", weights, g)[first - low :]
        return out, dq, dk, dv


def errors(row, arrays, *found):
    """The relative errors at the start and at the end; keys of the last rows are seen by these rows alone."""
    group, (b, t, _, kv_heads, _) = row.shape[2] // row.shape[3], row.shape
    place, all_of_them = min(PLACE, t), []
    for at, head, first in ((0, 0, 0), (b - 1, kv_heads - 1, t - place)):
        rows, heads = slice(first, first + place), slice(head * group, (head + 1) * group)
        wanted = exact(row, arrays, at, head, first, first + place)
        got = [x[at, rows, heads] for x in found[:2]]
        if first or place == t:
            got += [x[at, rows, head] for x in found[2:]]
        for x, y in zip(got, wanted, strict=False):
            all_of_them.append(jnp.linalg.norm(x.astype(jnp.float32) - y) / jnp.linalg.norm(y))
    return jnp.stack(all_of_them)


def error(row, arrays, found):
    """The largest relative error of an output, or of an output and gradients."""
    return float(jnp.max(errors(row, arrays, *found)))  # NaN, if there is one
