"""What a call would do and what it would cost, told without doing it.

All numbers come from static facts and from integers (offsets, lengths). Pairs and tiles are those of one head, the rows
of the batch together.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ringjax import _inputs
from ringjax._attend import _ring_problem
from ringjax._attention import _canonical, _options
from ringjax._buffer import RingBuffer, _check_tokens
from ringjax._counting import Row, computed_pairs, full_and_edge_tiles, visible_pairs
from ringjax._kernels import IMPLEMENTATIONS, reasons_against, resolve
from ringjax._kernels.problem import Problem
from ringjax._kernels.tiles import Tiles, TileSizes
from ringjax._window import Window


@dataclasses.dataclass(frozen=True)
class Source:
    """One set of keys that the queries are attended to: all of them, or the ring, or the chunk itself.

    Counts are of one head and of all rows of the batch; None: not known here, `Explanation.notes` says why.

    Attributes:
      name: "keys", "ring" or "chunk".
      problem: the static facts; its `tiles` are the sizes asked for.
      sizes: the tile sizes that are used.
      full, edge, skipped: tiles in which every pair is visible, some are, none is, on a grid of `sizes` tiles that
        begins at query 0 and key (or slot) 0. A tile that overhangs the keys is never full.
      visible: pairs of a query and a key that it sees.
      computed: pairs whose logits the implementation computes, masked ones and overhang included.
    """

    name: str
    problem: Problem
    sizes: Tiles | None
    full: int | None
    edge: int | None
    skipped: int | None
    visible: int | None
    computed: int | None

    @property
    def tiles(self) -> int | None:
        """Tiles in all."""
        if self.sizes is None or self.sizes.tile_size is None or self.sizes.block_size is None:
            return None
        p = self.problem
        return p.batch * -(-p.queries // self.sizes.tile_size) * -(-p.keys // self.sizes.block_size)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `explain` found; `print` it. A number is None where it is not known, and `notes` says why.

    Attributes:
      call: what was explained, in words.
      path: how the keys are reached, in words.
      device: where it would run: platform and kind.
      implementation: the one that would run; None: none can, the call would raise NotImplementedError.
      against: for each implementation, why it cannot run this call; empty: it can.
      sources: the sets of keys, one after another.
      dense_pairs: pairs that attention without a window computes: queries times all keys of the stream so far.
      bytes: of q, k, v, out and lse (float32, kept for the backward pass).
      ring_bytes: of a ring for this window (or of the one given); None: a window without left bound has no ring.
      cache_tokens: tokens of the stream so far, the call's own included.
      cache_bytes: of a cache that holds all of them.
      notes: sizes that were rounded, and what is not known.
    """

    call: str
    path: str
    device: str
    implementation: str | None
    against: Mapping[str, tuple[str, ...]]
    sources: tuple[Source, ...]
    dense_pairs: int | None
    bytes: Mapping[str, int]
    ring_bytes: int | None
    cache_tokens: int | None
    cache_bytes: int | None
    notes: tuple[str, ...]

    def _sum(self, field: str) -> int | None:
        values = [getattr(source, field) for source in self.sources]
        return None if None in values else sum(values)

    @property
    def visible_pairs(self) -> int | None:
        return self._sum("visible")

    @property
    def computed_pairs(self) -> int | None:
        return self._sum("computed")

    def _flops(self, pairs: int | None, per_head_dim: int, per_value_dim: int) -> int | None:
        p = self.sources[0].problem
        per_pair = per_head_dim * p.head_dim + per_value_dim * p.value_dim
        return None if pairs is None else pairs * p.heads * per_pair

    @property
    def flops(self) -> int | None:
        """Forward, visible pairs only: 2 H + 2 Hv a pair and query head."""
        return self._flops(self.visible_pairs, 2, 2)

    @property
    def backward_flops(self) -> int | None:
        """Backward, visible pairs only: five matrix products, 6 H + 4 Hv; 2.5 times the forward ones if H = Hv."""
        return self._flops(self.visible_pairs, 6, 4)

    @property
    def computed_flops(self) -> int | None:
        """Forward, what the tiles compute."""
        return self._flops(self.computed_pairs, 2, 2)

    @property
    def dense_flops(self) -> int | None:
        """Forward, without a window."""
        return self._flops(self.dense_pairs, 2, 2)

    def __str__(self) -> str:
        return "\n".join([self.call, *(f"  {name + ':' if name else '':<8} {text}" for name, text in self._lines())])

    def _lines(self) -> Iterator[tuple[str, str]]:
        yield "path", self.path
        runs = f"{self.implementation!r}" if self.implementation else "nothing (it would raise NotImplementedError)"
        yield "runs", f"{runs} on {self.device}"
        for name, reasons in self.against.items():
            if name != self.implementation:
                yield "", f"not {name!r}: {'; '.join(reasons) or 'it could, but another one comes first'}"
        rows = self.sources[0].problem.batch
        of = "of one head" + (f" in {rows} rows" if rows > 1 else "")
        for s in self.sources:
            where, p = f"{s.name}, " if len(self.sources) > 1 else "", s.problem
            if s.sizes is not None:
                size = f"{s.sizes.tile_size} x {s.sizes.block_size} (queries x {'slots' if p.is_ring else 'keys'})"
                yield "tiles", f"{where}{size}, {s.sizes.head_tile_size} of {p.group} query heads of a kv head at once"
            if s.full is not None:
                yield "", f"{s.full:,} full, {s.edge:,} edge, {s.skipped:,} skipped, {s.tiles:,} in all, {of}"
        visible, dense = self.visible_pairs, self.dense_pairs
        if visible is None or dense is None:
            yield "pairs", "unknown, and so are FLOPs"
        else:
            yield "pairs", f"{visible:,} visible of {dense:,} ({visible / dense:.1%}), {of}"
            yield "FLOPs", f"forward {_si(self.flops)}, backward {_si(self.backward_flops)} (visible pairs, all heads)"
            for flops, what in ((self.computed_flops, "as the tiles compute it"), (self.dense_flops, "if dense")):
                if flops is not None:
                    more = f", {flops / self.flops:.2f} times as many" if self.flops else ""
                    yield "", f"forward {_si(flops)} {what}{more}"
        yield "bytes", ", ".join(f"{name} {_bytes(size)}" for name, size in self.bytes.items())
        ring, cache = "none: the window has no left bound", ""
        if self.ring_bytes is not None:
            ring = f"{_bytes(self.ring_bytes)}, however long the stream"
        if self.cache_bytes is not None:
            cache = f"; a cache that grows: {_bytes(self.cache_bytes)} after {self.cache_tokens:,} tokens"
        yield "ring", ring + cache
        yield from (("note", note) for note in self.notes)


def _si(n: int | None) -> str:
    assert n is not None
    power = min(5, (len(str(n)) - 1) // 3)
    return f"{n / 1000**power:.3g} {'kMGTP'[power - 1]}" if power else str(n)


def _bytes(n: int) -> str:
    power = min(3, (n.bit_length() - 1) // 10)
    return f"{n / 1024**power:.1f} {'KMG'[power - 1]}iB" if power else f"{n} B"


def explain(
    q: Any,
    k: Any,
    v: Any,
    window: Window | RingBuffer,
    *,
    segment_ids: Any = None,
    kv_segment_ids: Any = None,
    lengths: Any = None,
    sink_logits: Any = None,
    softcap: float | None = None,
    scale: float | None = None,
    q_offset: Any = None,
    return_lse: bool = False,
    implementation: str | None = None,
    config: TileSizes | None = None,
) -> Explanation:
    """What `attention(q, k, v, window)` or `attend(q, k, v, buffer)` would do and cost; nothing is computed.

    With a `Window` the call is `attention` and takes its arguments; with a `RingBuffer` it is `attend`, whose tokens
    come after those that the ring holds, and takes `lengths` but no segment ids, `q_offset` or `return_lse`.

    Args:
      q, k, v: [B, T, N, H], [B, S, K, H], [B, S, K, Hv]; arrays, tracers or `jax.ShapeDtypeStruct`.
      window: what a query sees, or a ring, whose arrays may be `ShapeDtypeStruct` too.
      segment_ids, kv_segment_ids, lengths, sink_logits, softcap, scale, q_offset, return_lse, implementation, config:
        as for `attention` and `attend`. Segment ids hide more pairs than the window; they are not looked at.

    Returns:
      An `Explanation`. What depends on traced offsets or lengths is None in it, and a note says so.

    Raises:
      ValueError, TypeError: the call explained would raise them.
    """
    call = "explain"
    if isinstance(window, RingBuffer):
        for name, value in (("segment_ids", segment_ids), ("kv_segment_ids", kv_segment_ids), ("q_offset", q_offset)):
            if value is not None:
                first = f"{call}: {name} must be None with a RingBuffer, got {_inputs.describe(value)}."
                raise ValueError(_inputs.message(first, hint="attend takes none: a ring knows its positions."))
        problem = _static(_ring_facts, call, q, k, v, window, lengths, sink_logits, softcap, scale, config)
        path, asked = _ring_sources(problem, window, lengths)
    else:
        if lengths is not None:
            first = f"{call}: lengths must be None with a Window, got {_inputs.describe(lengths)}."
            raise ValueError(_inputs.message(first, hint="attention takes segment_ids: a negative segment is padding."))
        problem = _static(
            lambda *args: _canonical(*args)[0],
            *(call, q, k, v, window, segment_ids, kv_segment_ids, sink_logits, softcap, scale, q_offset, config),
        )
        problem = dataclasses.replace(problem, lse=return_lse)
        path, asked = "no history: one set of keys", [("keys", problem, _offset_rows(problem, q_offset))]
    against = {name: tuple(reasons) for name, reasons in reasons_against(problem).items()}
    for _, p, _ in asked[1:]:  # of two sources, both must run
        for name, reasons in reasons_against(p).items():
            against[name] = tuple(dict.fromkeys(against[name] + tuple(reasons)))
    chosen = _choice(asked, call, implementation)
    extends = getattr(IMPLEMENTATIONS.get(chosen or ""), "extends", None)
    if len(asked) > 1 and extends is not None and extends(problem):
        path = path.replace("merged by lse", f"in one launch of {chosen!r} (its derivative: in others)")
    notes = _unknowns(asked, isinstance(window, RingBuffer))
    sources = tuple(_source(name, p, rows, chosen, notes, len(asked) > 1) for name, p, rows in asked)
    return Explanation(
        path=path,
        device=f"{problem.platform} ({problem.device_kind})",
        implementation=chosen,
        against=MappingProxyType(against),
        sources=sources,
        notes=tuple(dict.fromkeys(notes)),
        **_totals(problem, k, v, window, asked),
    )


def _static(f: Callable[..., Problem], *args: Any) -> Problem:
    """f(*args), where each ShapeDtypeStruct is an array that nothing is known of but that."""
    leaves, tree = jax.tree.flatten(args)
    where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.ShapeDtypeStruct)]
    if not where:
        return f(*args)
    found = []

    def traced(arrays: list[jax.Array]) -> None:
        known = dict(zip(where, arrays, strict=True))
        found.append(f(*jax.tree.unflatten(tree, [known.get(i, leaf) for i, leaf in enumerate(leaves)])))

    jax.eval_shape(traced, [leaves[i] for i in where])
    return found[0]


def _ring_facts(
    call: str, q: Any, k: Any, v: Any, ring: RingBuffer, lengths: Any, sinks: Any, softcap: Any, scale: Any, config: Any
) -> Problem:
    """The problem of the ring alone, for all T queries; raises what `attend` raises."""
    _inputs.check_qkv(call, q, k, v)
    texts = {"q": _inputs.describe(q), "k": _inputs.describe(k)}
    _inputs.check_agree(call, "length", {"q": (q.shape[1], texts["q"]), "k": (k.shape[1], texts["k"])})
    _check_tokens(call, ring, k, v)
    _inputs.check_sink_logits(call, sinks, q)
    lengths = _inputs.as_row_integers(call, "lengths", lengths, q.shape[0])
    _inputs.check_lengths(call, lengths, q.shape[1])
    return _ring_problem(q, ring, _options(call, q, sinks, softcap, scale, config), str(q.dtype), lengths)


def _known(x: Any) -> list[int] | None:
    """The integers of a concrete array; None: it is traced, or only a shape."""
    if not _inputs.is_concrete(x) or isinstance(x, jax.ShapeDtypeStruct):
        return None
    return [int(n) for n in np.asarray(x).reshape(-1)]


def _offset_rows(problem: Problem, q_offset: Any) -> list[Row] | None:
    offsets = [problem.q_offset] if problem.q_offset is not None else _known(q_offset)
    if offsets is None:
        return None
    offsets = offsets * problem.batch if len(offsets) == 1 else offsets
    return [Row(offset, problem.queries, problem.keys) for offset in offsets]


_Asked = tuple[str, Problem, list[Row] | None]


def _ring_sources(problem: Problem, ring: RingBuffer, lengths: Any) -> tuple[str, list[_Asked]]:
    """Which sets of keys `attend` reads, as it decides itself, with the rows of each."""
    chunk = problem.queries
    before, written = _known(ring.length), _known(ring.written)
    real = [chunk] * problem.batch if lengths is None else _known(lengths)
    ring_rows: list[Row] | None = None
    chunk_rows: list[Row] | None = None
    one_source = chunk <= ring.slack + 1
    assert problem.window.left is not None
    near = chunk if problem.window.sinks or one_source else min(chunk, problem.window.left)
    if before is not None and written is not None and real is not None:
        ring_rows, chunk_rows = [], []
        for length, most, n in zip(before, written, real, strict=True):
            alive = most - length <= ring.slack
            chunk_rows.append(Row(length, n, keys=n if alive else 0, kv_start=length))
            if one_source:
                length, most = length + n, max(most, length + n)
            ring_rows.append(Row(chunk_rows[-1].start, min(n, near), length=length, written=most))
    if one_source:
        what = "decoding step" if chunk == 1 else f"chunk of {chunk} <= slack + 1 tokens"
        return f"{what}, one source: the ring, which holds the new tokens too", [("ring", problem, ring_rows)]
    options: dict[str, Any] = {"sink_logits": False, "out_dtype": "float32"}  # both come after the merge
    linear: dict[str, Any] = {"layout": "linear", "keys": chunk, "slack": 0, "q_offset": 0}
    seen_as = problem.q_dtype if problem.quantised else problem.kv_dtype
    of_chunk = dataclasses.replace(problem, **options, **linear, kv_dtype=seen_as, segments=lengths is not None)
    if not near:
        path = f"chunk of {chunk} tokens, one source: the chunk, as a query sees its own key only"
        return path, [("chunk", of_chunk, chunk_rows)]
    of_ring = dataclasses.replace(problem, queries=near, **options)
    path = f"chunk of {chunk} > slack + 1 tokens, two sources: the ring as it was, and the chunk; merged by lse"
    return path, [("ring", of_ring, ring_rows), ("chunk", of_chunk, chunk_rows)]


def _choice(asked: list[_Asked], call: str, implementation: str | None) -> str | None:
    try:
        names = {resolve(problem, call, implementation) for _, problem, _ in asked}
    except NotImplementedError:
        return None
    return names.pop() if len(names) == 1 else " + ".join(sorted(names))


def _unknowns(asked: list[_Asked], ring: bool) -> list[str]:
    notes = []
    for _, problem, rows in asked:
        if rows is None and ring:
            notes.append("the rows' lengths are not known here (traced, or only shapes): no pairs, no tiles.")
        elif rows is None:
            notes.append("q_offset is not known here (traced, or only a shape): no pairs, no tiles.")
        elif problem.segments and not ring:
            notes.append("segment ids hide more pairs than the window: visible and computed pairs are at most these.")
        elif problem.segments:
            notes.append("blocks that hold nothing but padding are skipped: computed pairs are at most these.")
    return list(dict.fromkeys(notes))


def _totals(problem: Problem, k: Any, v: Any, window: Window | RingBuffer, asked: list[_Asked]) -> dict[str, Any]:
    """What does not depend on the implementation."""
    p, new = problem, k.shape[1]
    q_item, kv_item = jnp.dtype(p.q_dtype).itemsize, jnp.dtype(k.dtype).itemsize
    queries = p.batch * p.queries * p.heads
    shape = f"q {p.q_dtype}[{p.batch}, {p.queries}, {p.heads}, {p.head_dim}]"
    scales = 8 if p.quantised else 0  # two float32
    token = p.batch * p.kv_heads * ((p.head_dim + p.value_dim) * jnp.dtype(p.kv_dtype).itemsize + scales)
    counters = 8 * p.batch  # length and written, int32
    rows = asked[-1][2]
    if isinstance(window, RingBuffer):
        tokens = None if rows is None else max(row.start + row.queries for row in rows)
        dense = None if rows is None else sum(row.queries * (row.start + row.queries) for row in rows)
        call = f"attend: {shape} to {p.keys} slots {p.kv_dtype}[{p.batch}, {p.kv_heads}, {p.keys}, {p.head_dim}]"
        ring: int | None = token * p.keys + counters
    else:
        tokens, dense = p.keys, p.batch * p.queries * p.keys
        call = f"attention: {shape} to k {k.dtype}[{', '.join(map(str, k.shape))}]"
        ring = None if p.window.size is None else token * (p.window.sinks + p.window.size) + counters
    return {
        "call": f"{call}, {p.window}",
        "dense_pairs": dense,
        "bytes": MappingProxyType(
            {
                "q": queries * p.head_dim * q_item,
                "k": p.batch * new * p.kv_heads * p.head_dim * kv_item,
                "v": p.batch * new * p.kv_heads * p.value_dim * kv_item,
                "out": queries * p.value_dim * q_item,
                "lse": queries * 4,
            }
        ),
        "ring_bytes": ring,
        "cache_tokens": tokens,
        "cache_bytes": None if tokens is None else token * tokens,
    }


def _source(
    name: str, problem: Problem, rows: list[Row] | None, chosen: str | None, notes: list[str], several: bool
) -> Source:
    visible = None if rows is None else sum(visible_pairs(problem, row) * n for row, n in Counter(rows).items())
    walk = getattr(IMPLEMENTATIONS.get(chosen or ""), "walk", lambda problem: None)(problem)
    if walk is None:
        notes.append(f"which tiles {chosen!r} computes is not known here." if chosen else "no tiles are computed.")
        return Source(name, problem, None, None, None, None, visible, None)
    sizes = walk.sizes
    fixed = f"{chosen!r} has tiles of this size only" if walk.on_grid else None
    notes += _rounded(problem, sizes, f"{name}: " if several else "", fixed)
    source = Source(name, problem, sizes, None, None, None, visible, None)
    if rows is None:
        return source
    source = dataclasses.replace(source, computed=computed_pairs(problem, walk, rows))
    full = edge = 0
    for row, times in Counter(rows).items():
        counts = full_and_edge_tiles(problem, row, sizes)
        full, edge = full + counts[0] * times, edge + counts[1] * times
    total = source.tiles
    assert total is not None
    return dataclasses.replace(source, full=full, edge=edge, skipped=total - full - edge)


def _rounded(problem: Problem, sizes: Tiles, where: str, fixed: str | None) -> Iterator[str]:
    whole = {
        "tile_size": f"there are {problem.queries} queries",
        "block_size": f"there are {problem.keys} {'slots' if problem.is_ring else 'keys'}",
        "head_tile_size": f"it must divide the {problem.group} query heads of a kv head",
    }
    for field, asked in problem.tiles._asdict().items():
        used = getattr(sizes, field)
        if asked is not None and used != asked:
            yield f"{where}{field} is rounded: {asked} asked for, {used} used; {fixed or whole[field]}."
