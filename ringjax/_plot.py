"""Pictures of a window's tiles and of a ring's slots (matplotlib, extra `plot`)."""

import importlib
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import numpy as np

from ringjax import _inputs
from ringjax._buffer import RingBuffer
from ringjax._schedule import key_tiles
from ringjax._slots import position_in_slot, slot_of_position
from ringjax._window import Window

# Okabe and Ito's palette (2008), which colour-blind readers can tell apart; greys and white for what is not there.
_TILES = {"full": "#0072B2", "edge": "#E69F00", "skipped": "#F2F2F2"}
_SLOTS = {
    "sink": ("#CC79A7", "pinned sink"),
    "window": ("#0072B2", "window: the newest query sees it"),
    "slack": ("#56B4E9", "slack: kept for a rollback"),
    "stale": ("#BBBBBB", "stale: rolled back"),
    "empty": ("#FFFFFF", "empty: never written"),
}
# Below the axes, at a distance in units of the font, whatever the axes' size.
_LEGEND: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "frameon": False, "fontsize": 9}
_LEGEND |= {"handlelength": 1.2, "handleheight": 1.0, "columnspacing": 1.2}
_HEAD, _LINE, _INK = "#D55E00", "#FFFFFF", "#333333"


def _matplotlib(call: str, module: str) -> Any:
    try:
        return importlib.import_module(f"matplotlib.{module}")
    except ImportError as error:
        raise ImportError(f"{call}: needs matplotlib.\n  Hint: pip install ringjax[plot]") from error


def plot_tiles(
    window: Window,
    T: int,
    S: int | None = None,
    *,
    tile_size: int | None = None,
    block_size: int | None = None,
    q_offset: int | None = None,
    ax: Any = None,
) -> Any:
    """Draws the T x S plane: which pairs are visible (dark), and the class of each tile (colour).

    Full tiles need no mask, edge tiles one, skipped tiles are never loaded. One collection is drawn for each class, its
    `get_gid()` the class's name.

    Args:
      window: what a query sees.
      T: queries.
      S: keys; None: T.
      tile_size, block_size: queries and keys in a tile; None: about 16 tiles a side.
      q_offset: position of query 0, key 0 being at 0; None: S - T, so that the last query is at the last key.
      ax: matplotlib `Axes` to draw on; None: a new figure's.

    Returns:
      The `Axes`.

    Raises:
      ImportError: matplotlib is not installed.
      TypeError, ValueError: a window that is none, a size that is not an int of at least 1.
    """
    call = "plot_tiles"
    _inputs.check_type(call, "window", window, Window, "Window.causal(size) sees the last `size` keys.")
    T = _inputs.as_int(call, "T", T, least=1)
    S = T if S is None else _inputs.as_int(call, "S", S, least=1)
    tile = -(-T // 16) if tile_size is None else _inputs.as_int(call, "tile_size", tile_size, least=1)
    block = -(-S // 16) if block_size is None else _inputs.as_int(call, "block_size", block_size, least=1)
    offset = S - T if q_offset is None else _inputs.as_int(call, "q_offset", q_offset, least=-(2**31))
    collections = _matplotlib(call, "collections")
    ax = _axes(call, ax, (6.4, 6.4 * min(max(T / S, 0.4), 1.4) + 0.8))

    boxes: dict[str, list[Any]] = {name: [] for name in _TILES}
    for kind, row, column in _tile_classes(window, T, S, tile, block, offset):
        left, right = column * block, min(column * block + block, S)
        top, bottom = row * tile, min(row * tile + tile, T)
        boxes[kind].append([(left, top), (right, top), (right, bottom), (left, bottom)])
    line = 0.8 if max(T / tile, S / block) <= 64 else 0.0
    for kind, polygons in boxes.items():
        # A line as light as the neighbour's face would not part two skipped tiles.
        colors = {"facecolors": _TILES[kind], "edgecolors": "#D5D5D5" if kind == "skipped" else _LINE}
        label = f"{kind} ({len(polygons):,})"
        ax.add_collection(collections.PolyCollection(polygons, linewidths=line, gid=kind, label=label, **colors))

    # What each query sees is a run of keys and the sinks: two bands, exact for any T and S.
    query = np.arange(T + 1).repeat(2)[1:-1]
    for first, end in _visible_runs(window, np.arange(T) + offset, S):
        where = (end > first).repeat(2)
        style: dict[str, Any] = {"color": "#000000", "alpha": 0.28, "linewidth": 0}
        ax.fill_betweenx(query, first.repeat(2), end.repeat(2), where=where, gid="visible", **style)

    ax.set(xlim=(0, S), ylim=(T, 0), xlabel=f"key (tiles of {block})", ylabel=f"query (tiles of {tile})")
    ax.set_title(f"{window}, {T} queries x {S} keys", fontsize=11, color=_INK)
    ax.set_aspect("equal" if 0.4 <= T / S <= 2.5 else "auto")
    _frame(ax)
    handles = [collection for collection in ax.collections if collection.get_gid() in _TILES]
    shade = _matplotlib(call, "patches").Patch(facecolor="#000000", alpha=0.28, label="darker: visible pairs")
    ax.legend(handles=[*handles, shade], borderaxespad=4.5, ncols=4, **_LEGEND)
    return ax


def plot_ring(buffer: RingBuffer, row: int = 0, ax: Any = None) -> Any:
    """Draws the slots of a ring's row as they are stored: the ring itself, and the pinned sinks beside it.

    The window is what the newest query saw, its own key included. One wedge (or box, for sinks) is drawn for each slot
    up to 128 of them, for more one for each run of slots of a class; its `get_gid()` is the class's name. An arrow
    points at the slot that the next token is written to.

    Args:
      buffer: a ring with concrete lengths.
      row: which row of its batch.
      ax: matplotlib `Axes` to draw on; None: a new figure's.

    Returns:
      The `Axes`.

    Raises:
      ImportError: matplotlib is not installed.
      TypeError, ValueError: a buffer that is none or is traced, a row that does not exist.
    """
    call = "plot_ring"
    _inputs.check_type(call, "buffer", buffer, RingBuffer)
    row = _inputs.as_int(call, "row", row, least=0)
    if not _inputs.is_concrete(buffer.length, buffer.written):
        raise TypeError(f"{call}: buffer must be concrete, got one that is traced.")
    if row >= buffer.length.shape[0]:
        raise ValueError(f"{call}: row must be less than {buffer.length.shape[0]}, the batch, got {row}.")
    patches = _matplotlib(call, "patches")
    ax = _axes(call, ax, (6.4, 6.6))
    sinks, capacity = buffer.window.sinks, buffer.capacity
    length = int(buffer.length[row])
    kinds, positions = _slot_classes(buffer, row)
    around = capacity - sinks
    apart = capacity <= 128  # slots that can be told apart
    text = {"ha": "center", "va": "center", "fontsize": 8 if capacity <= 48 else 6}

    def angle(slot: float) -> float:  # clockwise from the top, in degrees
        return 90.0 - 360.0 * slot / around

    def runs(first: int, end: int) -> Iterator[tuple[str, int, int]]:
        at = first
        for kind, members in groupby(range(first, end), key=lambda s: (kinds[s], s if apart else -1)):
            count = len(list(members))
            yield kind[0], at, at + count
            at += count

    def style(kind: str) -> dict[str, Any]:
        edge = "#999999" if kind == "empty" else _LINE if apart else "none"
        return {"facecolor": _SLOTS[kind][0], "edgecolor": edge, "linewidth": 1.0, "gid": kind}

    def write(x: float, y: float, slot: int) -> None:
        if capacity <= 64 and positions[slot] >= 0:
            color = "#FFFFFF" if kinds[slot] == "window" else "#000000"
            ax.text(x, y, str(positions[slot]), color=color, **text)

    for kind, first, end in runs(sinks, capacity):
        ends = angle(end - sinks), angle(first - sinks)
        ax.add_patch(patches.Wedge((0, 0), 1.0, *ends, width=0.3, **style(kind)))
        middle = np.deg2rad(angle(first - sinks + 0.5))
        write(0.85 * np.cos(middle), 0.85 * np.sin(middle), first)
    side = min(0.14, 1.1 / max(sinks, 1))
    for kind, first, end in runs(0, sinks):
        left = (first - sinks / 2) * side
        ax.add_patch(patches.Rectangle((left, -0.3), (end - first) * side, 0.14, **style(kind)))
        write(left + side / 2, -0.23, first)

    slot = int(slot_of_position(length, sinks=sinks, capacity=capacity))
    if slot < sinks:  # the next token is a sink itself
        tip, tail = ((slot + 0.5 - sinks / 2) * side, -0.31), ((slot + 0.5 - sinks / 2) * side, -0.46)
    else:
        way = np.deg2rad(angle(slot - sinks + 0.5))
        tip, tail = ((r * np.cos(way), r * np.sin(way)) for r in (1.01, 1.2))
    arrow = {"arrowstyle": "-|>,head_width=0.35,head_length=0.6", "color": _HEAD, "linewidth": 2.5}
    ax.annotate("", tip, tail, arrowprops=arrow, annotation_clip=False)
    parts = [f"{sinks} sinks"] * bool(sinks) + [f"window {buffer.window.size}"]
    parts += [f"slack {buffer.slack}"] * bool(buffer.slack)
    ax.text(0, 0.27, f"{length:,} tokens", ha="center", va="center", fontsize=15, color=_INK)
    ax.text(0, 0.08, f"in {capacity:,} slots", ha="center", va="center", fontsize=11, color=_INK)
    ax.text(0, -0.05, " + ".join(parts), ha="center", va="center", fontsize=9, color=_INK)
    ax.set(xlim=(-1.25, 1.25), ylim=(-1.25, 1.25), xticks=[], yticks=[])
    ax.set_title(f"ring of row {row}" + (", positions in their slots" if capacity <= 64 else ""), color=_INK)
    ax.set_aspect("equal")
    ax.set_frame_on(False)
    ax.set_xlabel("slots clockwise from the top, in storage order", fontsize=9, color=_INK)
    drawn = [kind for kind in _SLOTS if kind in kinds]
    handles = [patches.Patch(facecolor=_SLOTS[k][0], edgecolor="#999999", label=_SLOTS[k][1]) for k in drawn]
    lines = _matplotlib(call, "lines")
    head = {"color": _HEAD, "marker": ">", "linestyle": "-", "linewidth": 2.5}
    handles.append(lines.Line2D([], [], label="write head: the next token's slot", **head))
    ax.legend(handles=handles, borderaxespad=2.5, ncols=2, **_LEGEND)
    return ax


def _axes(call: str, ax: Any, size: tuple[float, float]) -> Any:
    if ax is None:
        ax = _matplotlib(call, "pyplot").subplots(figsize=size, layout="constrained")[1]
    return ax


def _frame(ax: Any) -> None:
    ax.tick_params(colors=_INK, labelsize=9)
    for spine in ax.spines.values():
        spine.set_color("#BBBBBB")


def _tile_classes(
    window: Window, queries: int, keys: int, tile: int, block: int, offset: int
) -> Iterator[tuple[str, int, int]]:
    """Class, row and column of each tile."""
    sides = {"tile_size": tile, "block_size": block, "queries": queries, "keys": keys, "q_offset": offset}
    for row in range(-(-queries // tile)):
        t = key_tiles(window, row, **sides)
        for column in range(-(-keys // block)):
            full = column < t.sink_full or t.full_first <= column < t.full_end
            seen = column < t.sink_end or t.first <= column < t.end
            yield "full" if full else "edge" if seen else "skipped", row, column


def _visible_runs(window: Window, positions: Any, keys: int) -> Iterator[tuple[Any, Any]]:
    """For each query, its runs of visible keys as half-open ranges: the window's, and the sinks left of it."""
    end = np.full_like(positions, keys)
    if window.right is not None:
        end = np.clip(positions + window.right + 1, 0, keys)
    first = np.zeros_like(positions)
    if window.left is not None:
        first = np.clip(positions - window.left, 0, keys)
    yield first, end
    if window.left is not None and window.sinks:
        yield np.zeros_like(positions), np.minimum(np.minimum(window.sinks, end), first)


def _slot_classes(buffer: RingBuffer, row: int) -> tuple[list[str], list[int]]:
    """What each slot holds, and its token's position; -1 where there is none any more, or never was."""
    length, written = int(buffer.length[row]), int(buffer.written[row])
    sizes = {"sinks": buffer.window.sinks, "slack": buffer.slack, "capacity": buffer.capacity}
    slots = np.arange(buffer.capacity)
    positions = position_in_slot(slots, length, written, **sizes)
    ever = position_in_slot(slots, written, written, **sizes)  # as if nothing had been rolled back
    left = buffer.window.left
    assert left is not None
    kinds = []
    for slot, position in enumerate(positions.tolist()):
        if position < 0:
            kinds.append("stale" if ever[slot] >= 0 else "empty")
        elif slot < buffer.window.sinks:
            kinds.append("sink")
        else:
            kinds.append("window" if length - 1 - position <= left else "slack")
    return kinds, positions.tolist()
