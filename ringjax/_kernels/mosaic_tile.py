"""What the Mosaic GPU kernels share: which tiles a program walks over, the mask of one tile, shared memory for it.

Imported by the kernels only, when one is first built: `jax.experimental.pallas.mosaic_gpu` is heavy.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import mosaic_gpu

from ringjax._window import Window

plgpu: Any = mosaic_gpu  # its signatures differ from one jax to the next: no type is right for all

LOG2E = math.log2(math.e)
BY_ROW = plgpu.Layout.WGMMA.reduce(1)
"""Layout of one number per row of a product's result."""
BY_COLUMN = plgpu.Layout.WGMMA.reduce(0)


def swizzled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory in the form that TMA writes and WGMMA reads: 128-byte swizzle."""
    width = 128 // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(128)))


class Steps(NamedTuple):
    """The tiles one program visits, in order: a run of sink tiles from 0, then the run [first, first + count - sinks).

    Steps [full_first, full_end) need no mask. All are int32 scalars.
    """

    sinks: Any
    first: Any
    full_first: Any
    full_end: Any
    count: Any
    descending: bool = False

    def reversed(self) -> "Steps":
        """The same tiles from the last to the first; there must be no sink tiles."""
        full = {"full_first": self.count - self.full_end, "full_end": self.count - self.full_first}
        return self._replace(descending=not self.descending, **full)

    def tile(self, step: Any) -> Any:
        """The tile of a step."""
        if self.descending:
            return self.first + self.count - 1 - step
        if isinstance(self.sinks, int) and self.sinks == 0:
            return self.first + step
        return jnp.where(step < self.sinks, step, self.first + step - self.sinks)


def steps(sinks: Any, first: Any, full_first: Any, full_end: Any, end: Any, *, tiles: int) -> Steps:
    """The steps over tiles [0, sinks) and [first, end) of `tiles`; at least one, if only to find nothing visible."""
    count = jnp.maximum(jnp.asarray(end - first + sinks, jnp.int32), 1)
    start = jnp.minimum(jnp.asarray(first, jnp.int32), tiles - 1)
    return Steps(sinks, start, full_first - first + sinks, full_end - first + sinks, count)


class Positions(NamedTuple):
    """What decides whether a query of a tile sees a key of a tile.

    Attributes:
      window: what a query sees.
      keys: S if the last key tile overhangs it, None if nothing does.
      distance: position of the query tile's first query less that of the key tile's first key.
      k_first: index of the key tile's first key.
      q_segments, k_segments: of the tiles' queries and keys, or None.
      sinks: keys before this index are sinks; None: those before `window.sinks`.
    """

    window: Window
    keys: int | None
    distance: Any
    k_first: Any
    q_segments: Any = None
    k_segments: Any = None
    sinks: Any = None

    def visible(self, shape: tuple[int, int], q_axis: int) -> Any:
        """Boolean tile of `shape`, queries along `q_axis`; None if everything is visible."""

        def line(axis: int, start: Any) -> Any:
            layout = plgpu.Layout.WGMMA.reduce(1 - axis)
            x = plgpu.broadcasted_iota(jnp.int32, (shape[axis],), 0, layout=layout) + start
            # Behind the barrier no positions stay in registers from tile to tile (432 -> 220 B of spills).
            return lax.optimization_barrier(x)

        def along(axis: int, start: Any) -> Any:
            return lax.broadcast_in_dim(line(axis, start), shape, [axis])

        window, seen = self.window, []
        key = along(1 - q_axis, self.k_first)
        if window.left is not None or window.right is not None:
            behind = along(q_axis, self.distance + self.k_first) - key
            if window.left is not None:
                reach: Any = window.left
                if window.sinks:  # a limit for each key: a second mask would cost registers
                    sinks = window.sinks if self.sinks is None else self.sinks
                    pinned = line(1 - q_axis, self.k_first) < sinks
                    reach = jnp.where(pinned, jnp.iinfo(jnp.int32).max, window.left)
                    reach = lax.broadcast_in_dim(reach, shape, [1 - q_axis])
                seen.append(behind <= reach)
            if window.right is not None:
                seen.append(behind >= -window.right)
        if self.keys is not None:
            seen.append(key < self.keys)
        if self.q_segments is not None:
            k_segments = lax.broadcast_in_dim(self.k_segments, shape, [1 - q_axis])
            seen.append((lax.broadcast_in_dim(self.q_segments, shape, [q_axis]) == k_segments) & (k_segments >= 0))
        mask = None
        for part in seen:
            mask = part if mask is None else mask & part
        return mask


def within_segments(bounds: tuple[Any, ...], rows: Array, columns: Array) -> list[Array]:
    """Bounds of a window's tiles narrowed to the tiles that share a segment: (first, full_first, full_end, end).

    Args:
      bounds: of the window alone, each int32 [B or 1, row tiles].
      rows, columns: segment ids of the two sides of the plane, int32 [B, tiles, tile]; negative is padding.

    Returns:
      Four arrays [B, row tiles]. A run never leaves out a visible pair, and its full part holds full tiles only.
    """
    first, full_first, full_end, end = (x[:, :, None] for x in bounds)
    largest = jnp.iinfo(jnp.int32).max
    low = [jnp.where(x < 0, largest, x).min(-1) for x in (rows, columns)]
    high = [x.max(-1) for x in (rows, columns)]
    whole = [(x.min(-1) == x.max(-1)) & (x.min(-1) >= 0) for x in (rows, columns)]
    tile = jnp.arange(columns.shape[1], dtype=jnp.int32)[None, None]
    near = (low[0][:, :, None] <= high[1][:, None]) & (low[1][:, None] <= high[0][:, :, None])
    near = near & (tile >= first) & (tile < end)
    full = whole[0][:, :, None] & whole[1][:, None] & (high[0][:, :, None] == high[1][:, None])
    full = full & (tile >= full_first) & (tile < full_end)
    count = columns.shape[1]
    new_first = jnp.where(near, tile, count).min(-1)
    new_end = jnp.where(near, tile + 1, 0).max(-1)
    new_full_first = jnp.where(full, tile, count).min(-1)
    new_full_end = jnp.where(~full & (tile >= new_full_first[:, :, None]), tile, count).min(-1)
    none = new_first >= new_end
    new_first, new_end = jnp.where(none, first[:, :, 0], new_first), jnp.where(none, first[:, :, 0], new_end)
    new_full_first = jnp.clip(new_full_first, new_first, new_end)
    return [new_first, new_full_first, jnp.clip(new_full_end, new_full_first, new_end), new_end]


def hold_padding(sinks: Any, first: Any, end: Any, columns: Array) -> Array:
    """Whether any of the tiles [0, sinks) and [first, end) holds padding, int32 [B, row tiles], 1 or 0.

    Args:
      sinks, first, end: int32 [B, row tiles].
      columns: segment ids of the tiles, int32 [B, tiles, tile].
    """
    tile = jnp.arange(columns.shape[1], dtype=jnp.int32)[None, None]
    sinks, first, end = (x[:, :, None] for x in (sinks, first, end))
    met = (tile < sinks) | ((tile >= first) & (tile < end))
    return (met & (columns.min(-1) < 0)[:, None]).any(-1).astype(jnp.int32)


def pad_axis(x: Array, axis: int, size: int, value: Any = 0) -> Array:
    """`x` with its axis padded to `size`; TMA neither clips what it writes nor, in the interpreter, what it reads."""
    if x.shape[axis] == size:
        return x
    return jnp.pad(x, [(0, size - n if i == axis else 0) for i, n in enumerate(x.shape)], constant_values=value)


def rounded_up(size: int, multiple: int) -> int:
    """The least multiple that is not under `size`."""
    return -(-size // multiple) * multiple


def streaming_multiprocessors(device_kind: str) -> int:
    """How many programs a persistent grid needs. More than there are is right too, only slower."""
    if "H20" in device_kind and "H200" not in device_kind:
        return 78
    return 114 if "PCIe" in device_kind else 132
