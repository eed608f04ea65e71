"""The static facts of one attention call, and the arrays that go with it.

`Problem` holds all that decides which implementation runs and how it is compiled; it is hashable and holds no arrays,
so that a test can pretend to be on any device. `Rows` holds the integers of each row of the batch, and scales.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ringjax._kernels.tiles import AUTOMATIC, Tiles
from ringjax._quantised import is_quantised
from ringjax._slots import NOTHING, position_in_slot
from ringjax._window import Window


@dataclasses.dataclass(frozen=True)
class Problem:
    """One attention call, less its arrays.

    Attributes:
      batch, queries, keys: B, T, S (for a ring, S is its capacity).
      heads, kv_heads, head_dim, value_dim: N, K, H and the values' H.
      q_dtype, kv_dtype, out_dtype: names of the dtypes of the queries, of the keys and values, of the output. A ring
        may be "int8" or "float8_e4m3fn": then `Rows` has its scales.
      window: what a query sees.
      layout: "linear": keys and values are [B, S, K, H], key j of a row at position `kv_offset + j`.
        "ring": they are [B, K, C, H] in a ring's storage order.
      slack: of the ring (0 for the linear layout).
      q_offset: linear only: position of query 0 relative to key 0, the same in every row; None: `Rows.q_start` tells.
      q_stride: by how much the position grows from query to query: 1, or 0 if all queries stand at the first's.
      scale, softcap: of the logits.
      sink_logits, segments, ragged: whether sink logits, segment ids, numbers of valid queries are given.
      platform: "cpu", "gpu", "tpu"; device_kind: such as "NVIDIA H200".
      tiles: the caller's tile sizes; None in a field means the implementation's own choice.
      deterministic: whether two runs must agree bit for bit.
      lse: whether anybody reads the lse; if not, it may be rough, or nothing at all.
    """

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    q_dtype: str
    kv_dtype: str
    out_dtype: str
    window: Window
    layout: Literal["linear", "ring"] = "linear"
    slack: int = 0
    q_offset: int | None = 0
    q_stride: Literal[0, 1] = 1
    scale: float = 1.0
    softcap: float | None = None
    sink_logits: bool = False
    segments: bool = False
    ragged: bool = False
    platform: str = "cpu"
    device_kind: str = "cpu"
    tiles: Tiles = AUTOMATIC
    deterministic: bool = False
    lse: bool = True

    @property
    def group(self) -> int:
        """G: query heads per kv head."""
        return self.heads // self.kv_heads

    @property
    def is_ring(self) -> bool:
        return self.layout == "ring"

    @property
    def quantised(self) -> bool:
        """Whether keys and values are to be multiplied by scales."""
        return is_quantised(self.kv_dtype)


class Rows(NamedTuple):
    """What goes with each row of the batch, int32 but for the scales.

    Attributes:
      q_start: [B], position of query 0; None: `Problem.q_offset + kv_start`.
      kv_start: [B], position of key 0 (linear); None: 0.
      q_length: [B], number of valid queries, the rest is padding; None: all.
      length, written: [B], of the ring (see `ringjax._slots`); None for the linear layout.
      q_segments, kv_segments: [B, T] and [B, S] (linear); a query sees keys of its own segment only, and a negative
        segment is padding; None: one segment.
      k_scale, v_scale: float32 [B, K, C], of a quantised ring: the factor of the logits of each key, and of the weight
        of each value, by kv head and slot; None: none. Where a slot holds nothing they may be NaN.
    """

    q_start: jax.Array | None = None
    kv_start: jax.Array | None = None
    q_length: jax.Array | None = None
    length: jax.Array | None = None
    written: jax.Array | None = None
    q_segments: jax.Array | None = None
    kv_segments: jax.Array | None = None
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None


class Memory(NamedTuple):
    """A ring beside that of a call, which every query of the call sees all of, in the same softmax.

    Attributes:
      problem: of reading it alone, with the call's queries, all of which stand at its newest token (`q_stride` 0).
      rows: of that.
      k, v: [B, K, C, H] and [B, K, C, Hv], in storage order.
    """

    problem: Problem
    rows: Rows
    k: jax.Array
    v: jax.Array


class Walk(NamedTuple):
    """Which pairs of a query and a key an implementation computes, masked ones and overhang included: for `explain`.

    Attributes:
      sizes: of its tiles, none of them None.
      on_grid: whether its blocks lie on a grid from key (or slot) 0 on, and those with a visible pair are computed. If
        not, a query tile's blocks begin at the first key that any of it sees, and the rest tells which are computed:
      sinks: storage indices [0, sinks) are a block of their own, always computed.
      blocks: the most others that one query tile can need; a single one is always computed.
      rows_apart: whether each row of the batch computes what it needs itself, or what any row needs.
      skips: whether blocks between the first and the last that is needed are skipped if they are not.
      one_pass: from the slots of a ring in use, whether it is read as one block; None: never.
    """

    sizes: Tiles
    on_grid: bool = False
    sinks: int = 0
    blocks: int = 1
    rows_apart: bool = False
    skips: bool = False
    one_pass: Callable[[int], bool] | None = None


def zero_where_padding(x: jax.Array, real: jax.Array) -> jax.Array:
    """x [B, T, ...] with zeros where `real` [B, T] is False, and no gradient there."""
    return jnp.where(real[:, :, *[None] * (x.ndim - 2)], x, jnp.zeros((), x.dtype))


def without_padding(rows: Rows, queries: Sequence[jax.Array], keys: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """The arrays `queries` [B, T, ...] and then `keys` [B, S, ...] with zeros where the segments say padding."""
    if rows.q_segments is None or rows.kv_segments is None:
        return *queries, *keys
    real, kv_real = rows.q_segments >= 0, rows.kv_segments >= 0
    clean = [zero_where_padding(x, real) for x in queries]
    return *clean, *(zero_where_padding(x, kv_real) for x in keys)


def query_positions(problem: Problem, rows: Rows, queries: Any) -> jax.Array:
    """Positions of the queries with indices `queries` [t], as int32 [B or 1, t]."""
    if rows.q_start is not None:
        return rows.q_start[:, None] + problem.q_stride * queries[None]
    assert problem.q_offset is not None
    start = np.zeros(1, np.int32) if rows.kv_start is None else rows.kv_start
    return jnp.asarray(start + np.int32(problem.q_offset))[:, None] + queries[None]


def key_positions(problem: Problem, rows: Rows, slots: Any) -> jax.Array:
    """Positions of the keys stored at indices `slots` [s], as int32 [B or 1, s]; `NOTHING` where none is stored."""
    if problem.is_ring:
        assert rows.length is not None and rows.written is not None
        return position_in_slot(
            slots[None],
            rows.length[:, None],
            rows.written[:, None],
            sinks=problem.window.sinks,
            slack=problem.slack,
            capacity=problem.keys,
        )
    position = slots[None] if rows.kv_start is None else rows.kv_start[:, None] + slots[None]
    return jnp.where(slots[None] < problem.keys, position, NOTHING)
