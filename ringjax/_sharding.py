"""Attention of one sequence split over devices: neighbours exchange the keys that a window reaches, and no others.

Each of n devices holds a stretch of T / n tokens. A query sees `left` keys back, so a device needs the last `left` keys
before its stretch, from as many left neighbours as hold them, and nothing of the rest; and `right` keys after it. What
it sees of its own stretch does not wait for them: the parts are merged by their logsumexps. (For windows as long as
the sequence this becomes ring attention, Liu et al., 2023; that is what other libraries are for.)
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ringjax import _inputs
from ringjax._attend import _ring_problem, _ring_rows, _run
from ringjax._attention import _options, attention
from ringjax._buffer import RingBuffer, _as_seen
from ringjax._kernels.problem import zero_where_padding
from ringjax._kernels.tiles import TileSizes
from ringjax._merge import apply_sinks, merge
from ringjax._window import Window

AxisName = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class MeshAxes:
    """Which axes of a mesh split what.

    Attributes:
      sequence: the axis over which sequences are split; None: they are not.
      batch: the axis, or several, that split the rows; None: all devices have all rows.
      heads: the axis that splits kv heads, and the query heads with them; None: all devices have all heads.
      mesh: a `jax.sharding.Mesh`; None: that of `jax.set_mesh`.
    """

    sequence: str | None = None
    batch: AxisName = None
    heads: AxisName = None
    mesh: Any = None

    def checked(self, call: str) -> "MeshAxes":
        """The same with a mesh that has these axes.

        Raises:
          ValueError: there is no mesh, or it lacks an axis, or an axis is given twice.
        """
        mesh = self.mesh if self.mesh is not None else jax.sharding.get_abstract_mesh()
        if not isinstance(mesh, jax.sharding.Mesh | jax.sharding.AbstractMesh):
            raise TypeError(f"{call}: mesh must be a jax.sharding.Mesh, got {type(mesh).__name__}.")
        if mesh.empty:
            hint = "make one with jax.make_mesh((4, 2), ('data', 'model')), or enter it with jax.set_mesh(mesh)."
            raise ValueError(_inputs.message(f"{call}: mesh must have devices, got none.", hint=hint))
        known = ", ".join(repr(name) for name in mesh.axis_names)
        taken: set[str] = set()
        for what, axes in (("axis", self.sequence), ("batch_axis", self.batch), ("heads_axis", self.heads)):
            for axis in names(axes):
                if axis not in mesh.axis_names:
                    raise ValueError(f"{call}: {what} must name axes of the mesh, {known}, got {axis!r}.")
                if axis in taken:
                    raise ValueError(f"{call}: {what} must not be an axis that splits something else, got {axis!r}.")
                taken.add(axis)
        return dataclasses.replace(self, mesh=mesh)

    def ways(self, axes: AxisName) -> int:
        """How many parts these axes make."""
        count = 1
        for axis in names(axes):
            count *= self.mesh.shape[axis]
        return count

    def check_divides(self, call: str, what: str, size: int, axes: AxisName, hint: str | None = None) -> None:
        """Raises ValueError unless the axes cut `size` into equal parts."""
        if size % self.ways(axes):
            listed = " x ".join(repr(name) for name in names(axes))
            first = (
                f"{call}: {what} must be a multiple of mesh axis {listed}, got {size} for {self.ways(axes)} devices."
            )
            raise ValueError(_inputs.message(first, {"mesh": dict(self.mesh.shape)}, hint))


def names(axes: AxisName) -> tuple[str, ...]:
    """The names of an axis, of several, or of none."""
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def _checked(call: str, axes: MeshAxes, q: Any, k: Any, window: Window) -> MeshAxes:
    axes, length = axes.checked(call), q.shape[1]
    if axes.sequence is None:
        raise TypeError(f"{call}: axis must be the name of a mesh axis, got None.")
    if length == 1:
        first = f"{call}: a decoding step must not be split over mesh axis {axes.sequence!r}, got T = 1."
        hint = "decode with attend, the ring split over rows and kv heads: ringjax.sharding.shard_rings."
        raise ValueError(_inputs.message(first, {"q": _inputs.describe(q)}, hint))
    _inputs.check_agree(call, "length", {"q": (length, _inputs.describe(q)), "k": (k.shape[1], _inputs.describe(k))})
    hint = "pad the sequence at its end: segment -1 and lengths mark padding."
    axes.check_divides(call, "the length", length, axes.sequence, hint)
    axes.check_divides(call, "the batch", q.shape[0], axes.batch)
    axes.check_divides(call, "the kv heads", k.shape[2], axes.heads, "leave heads_axis out, or repeat the kv heads.")
    for side, reach in (("left", window.left), ("right", window.right)):
        if reach is None or reach >= length:
            first = f"{call}: window must be shorter than the sequence on mesh axis {axes.sequence!r}, "
            first += f"got {side}={reach} for {length} tokens."
            hint = "a query that sees all needs all keys: call attention, and split rows or heads instead."
            raise ValueError(_inputs.message(first, {"window": window}, hint))
    return axes


class _Options(NamedTuple):
    """What all parts of a call share; static."""

    axis: str
    devices: int
    window: Window
    softcap: float | None
    scale: float | None
    implementation: str | None
    config: TileSizes | None

    def part(
        self, q: Array, k: Array, v: Array, ids: tuple[Any, Any], q_offset: Any, window: Window
    ) -> tuple[Array, Array]:
        """Attention to some keys, and its lse."""
        return attention(
            q,
            k,
            v,
            window,
            segment_ids=ids[0],
            kv_segment_ids=ids[1],
            softcap=self.softcap,
            scale=self.scale,
            q_offset=q_offset,
            return_lse=True,
            implementation=self.implementation,
            config=self.config,
        )


def _from(x: Any, distance: int, options: _Options) -> Any:
    """x of the device `distance` places to the left (if negative, to the right); zeros where there is none."""
    pairs = [(i, i + distance) for i in range(options.devices) if 0 <= i + distance < options.devices]
    return jax.tree.map(lambda y: lax.ppermute(y, options.axis, pairs), x)


def _from_first(x: Any, source: int, options: _Options) -> Any:
    """x of the device `source`, on all: in each round, those that have it send it to as many that do not."""
    have = 1
    while have < options.devices:
        n = options.devices
        pairs = [((source + i) % n, (source + i + have) % n) for i in range(min(have, n - have))]
        here = (lax.axis_index(options.axis) - source) % n < have
        sent = jax.tree.map(lambda y, pairs=pairs: lax.ppermute(y, options.axis, pairs), x)
        x = jax.tree.map(lambda mine, new, here=here: jnp.where(here, mine, new), x, sent)
        have *= 2
    return x


def _sinks(tokens: Any, count: int, options: _Options) -> Any:
    """The first `count` tokens of the whole sequence, from stretches [B, T / n, ...]."""
    stretch = jax.tree.leaves(tokens)[0].shape[1]
    parts = []
    for source in range(-(-count // stretch)):
        size = min(stretch, count - source * stretch)
        parts.append(_from_first(jax.tree.map(lambda x, size=size: x[:, :size], tokens), source, options))
    return jax.tree.map(lambda *xs: jnp.concatenate(xs, axis=1), *parts)


def _stretch(
    q: Array, k: Array, v: Array, ids: tuple[Any, Any], q_offset: int, pinned: Any, options: _Options
) -> list[tuple[int, Array, Array]]:
    """What a device's queries see of the sequence, in parts: the first query that each is about, output and lse.

    `pinned`: int32 [B], how many of the sequence's first tokens are pinned; None: the window's sinks.
    """
    window, size, rank = options.window, q.shape[1], lax.axis_index(options.axis)
    assert window.left is not None and window.right is not None
    near = dataclasses.replace(window, sinks=0)
    q_ids, kv_ids = ids
    parts = [(0, *options.part(q, k, v, ids, q_offset, near))]

    def add(tokens: Any, rows: slice, offset: Any, window: Window, seen: Any) -> None:
        k, v, kv_ids = tokens
        cut = (None if q_ids is None else q_ids[:, rows], kv_ids)
        out, lse = options.part(q[:, rows], k, v, cut, offset, window)
        parts.append((rows.start, out, jnp.where(seen, lse, -jnp.inf)))

    # In indices of tokens, and not in positions, a query sees `left - q_offset` back and `right + q_offset` ahead.
    for sign, reach in ((1, window.left - q_offset), (-1, window.right + q_offset)):
        for hop in range(1, options.devices):
            count = min(size, reach - (hop - 1) * size)
            if count <= 0:
                break
            end = slice(size - count, size)
            start = slice(0, count)
            theirs, mine = (end, start) if sign > 0 else (start, end)
            tokens = _from(jax.tree.map(lambda x, theirs=theirs: x[:, theirs], (k, v, kv_ids)), sign * hop, options)
            seen = rank >= hop if sign > 0 else rank < options.devices - hop
            add(tokens, mine, mine.start + sign * hop * size - theirs.start + q_offset, near, seen)
    if sinks := min(window.sinks, size * options.devices):
        # The sinks that the window itself does not see: position p sees all up to p - left - 1.
        tokens = _sinks((k, v, kv_ids), sinks, options)
        if pinned is not None:
            real = jnp.arange(sinks, dtype=jnp.int32)[None] < pinned[:, None]
            sink_ids = jnp.where(real, jnp.int32(0) if tokens[2] is None else tokens[2], jnp.int32(-1))
            tokens = (*tokens[:2], sink_ids)
            q_ids = jnp.zeros(q.shape[:2], jnp.int32) if q_ids is None else q_ids
        offset = rank * size + q_offset - window.left - 1
        add(tokens, slice(0, size), jnp.full(q.shape[0], offset, jnp.int32), Window.causal(), True)
    return parts


def _joined(parts: list[tuple[int, Array, Array]]) -> tuple[Array, Array]:
    """Output and lse of the first part, which is about all queries, with the others merged in."""
    (_, out, lse), *others = parts
    if len(others) > 1:  # one rounding, not one for each
        out = out.astype(jnp.float32)
    for first, part, part_lse in others:
        rows = slice(first, first + part.shape[1])
        new, new_lse = merge((out[:, rows], part), (lse[:, :, rows], part_lse), return_lse=True)
        out, lse = _replaced(out, new, rows, 1), _replaced(lse, new_lse, rows, 2)
    return out, lse


def _replaced(x: Array, new: Array, rows: slice, axis: int) -> Array:
    """x with some rows replaced. Not in place: XLA:GPU (jax 0.11) fuses such an update into the kernel before it."""
    before, _, after = jnp.split(x, (rows.start, rows.stop), axis=axis)
    return jnp.concatenate([y for y in (before, new, after) if y.shape[axis]], axis=axis)


def over_sequence(
    call: str,
    axes: MeshAxes,
    q: Any,
    k: Any,
    v: Any,
    window: Any,
    *,
    segment_ids: Any = None,
    kv_segment_ids: Any = None,
    sink_logits: Any = None,
    softcap: float | None = None,
    scale: float | None = None,
    q_offset: Any = None,
    implementation: str | None = None,
    config: TileSizes | None = None,
) -> tuple[Array, Array]:
    """Output and lse of `attention` with sequences split over a mesh axis."""
    _inputs.check_type(call, "window", window, Window, "Window.causal(size) sees the last `size` keys.")
    _inputs.check_qkv(call, q, k, v)
    _inputs.check_sink_logits(call, sink_logits, q)
    q_ids, kv_ids = _inputs.check_segments(call, segment_ids, kv_segment_ids, q, k)
    axes = _checked(call, axes, q, k, window)
    offset = 0 if q_offset is None else q_offset
    if not isinstance(offset, int) or isinstance(offset, bool):
        first = f"{call}: q_offset must be an int or None, got {_inputs.describe(q_offset)}."
        raise TypeError(_inputs.message(first, hint="which keys travel must be known before the program is compiled."))
    options = _Options(str(axes.sequence), axes.ways(axes.sequence), window, softcap, scale, implementation, config)

    def local(q: Array, k: Array, v: Array, q_ids: Any, kv_ids: Any, sink_logits: Any) -> tuple[Array, Array]:
        out, lse = _joined(_stretch(q, k, v, (q_ids, kv_ids), offset, None, options))
        if sink_logits is not None:
            out = apply_sinks(out, lse, sink_logits)
        return out.astype(q.dtype), lse

    tokens, rows = P(axes.batch, axes.sequence, axes.heads), P(axes.batch, axes.sequence)
    in_specs = (tokens, tokens, tokens, rows, rows, P(axes.heads))
    out_specs = (tokens, P(axes.batch, axes.heads, axes.sequence))
    return _mapped(axes, local, in_specs, out_specs, q, k, v, q_ids, kv_ids, sink_logits)


def attend_over_sequence(
    call: str,
    axes: MeshAxes,
    q: Any,
    k: Any,
    v: Any,
    buffer: Any,
    *,
    lengths: Any = None,
    sink_logits: Any = None,
    softcap: float | None = None,
    scale: float | None = None,
    implementation: str | None = None,
    config: TileSizes | None = None,
) -> tuple[Array, RingBuffer]:
    """`attend` with the chunk split over a mesh axis; every device along it gets the whole ring."""
    _inputs.check_type(call, "buffer", buffer, RingBuffer)
    _inputs.check_qkv(call, q, k, v)
    _inputs.check_sink_logits(call, sink_logits, q)
    axes = _checked(call, axes, q, k, buffer.window)
    lengths = _inputs.as_row_integers(call, "lengths", lengths, q.shape[0])
    _inputs.check_lengths(call, lengths, q.shape[1])
    ways = axes.ways(axes.sequence)
    options = _Options(str(axes.sequence), ways, buffer.window, softcap, scale, implementation, config)

    def local(
        q: Array, k: Array, v: Array, buffer: RingBuffer, lengths: Any, sink_logits: Any
    ) -> tuple[Array, RingBuffer]:
        size, ids = q.shape[1], None
        rank = lax.axis_index(options.axis)
        real_lengths = jnp.full_like(buffer.length, size * options.devices) if lengths is None else lengths
        if lengths is not None:
            at = rank * size + jnp.arange(size, dtype=jnp.int32)[None]
            ids = jnp.where(at < lengths[:, None], jnp.int32(0), jnp.int32(-1))
        seen_k, seen_v = _as_seen(buffer, k, v)
        pinned = jnp.clip(buffer.window.sinks - buffer.length, 0, None)
        parts = _stretch(q, seen_k, seen_v, (ids, ids), 0, pinned, options)
        here = None if lengths is None else jnp.clip(lengths - rank * size, 0, size)

        def past() -> tuple[Array, Array]:
            facts = _options(call, q, None, softcap, scale, config)
            problem = _ring_problem(q, buffer, facts, "float32", here)
            rows = _ring_rows(buffer, buffer.length + rank * size, here)
            queries = q if ids is None else zero_where_padding(q, ids >= 0)
            return _run(call, implementation, problem, rows, queries, buffer.k, buffer.v, None)

        def nothing() -> tuple[Array, Array]:
            return jax.tree.map(lambda x: jnp.full(x.shape, -jnp.inf if x.ndim == 3 else 0, x.dtype), shapes)

        # Only the first `left` tokens of the chunk still see what the ring holds, but all see its sinks.
        shapes = jax.eval_shape(past)
        assert buffer.window.left is not None
        reaches = True if buffer.window.sinks else rank * size < buffer.window.left
        parts.append((0, *lax.cond(reaches, past, nothing)))
        out, lse = _joined(parts)
        if sink_logits is not None:
            out = apply_sinks(out, lse, sink_logits)
        # A row rolled back too far reads as empty, its new tokens too.
        out = jnp.where(buffer.valid[:, None, None, None], out, jnp.zeros((), out.dtype))
        return out.astype(q.dtype), _appended(buffer, k, v, real_lengths, options)

    rings = jax.tree.map(lambda x: P(axes.batch) if x.ndim == 1 else P(axes.batch, axes.heads), buffer)
    tokens = P(axes.batch, axes.sequence, axes.heads)
    in_specs = (tokens, tokens, tokens, rings, P(axes.batch), P(axes.heads))
    return _mapped(axes, local, in_specs, (tokens, rings), q, k, v, buffer, lengths, sink_logits)


def _appended(ring: RingBuffer, k: Array, v: Array, lengths: Array, options: _Options) -> RingBuffer:
    """The ring after all tokens of the sequence. Only those that it keeps are brought here."""
    sinks, size = ring.window.sinks, k.shape[1]
    length = size * options.devices
    rank = lax.axis_index(options.axis)

    def bring(index: Array) -> list[Array]:
        mine = (index // size == rank)[:, :, None, None]
        index = jnp.clip(index - rank * size, 0, size - 1)[:, :, None, None]
        return [
            lax.psum(jnp.where(mine, jnp.take_along_axis(x, index, axis=1), jnp.zeros((), x.dtype)), options.axis)
            for x in (k, v)
        ]

    first = jnp.clip(jnp.minimum(sinks - ring.length, lengths), 0, None)  # tokens to pin
    last = min(ring.capacity - sinks, length)
    start = jnp.maximum(lengths - last, first)
    after = ring
    if sinks:
        index = jnp.arange(min(sinks, length), dtype=jnp.int32)[None]
        after = after.append(*bring(jnp.broadcast_to(index, (k.shape[0], index.shape[1]))), lengths=first)
    # Those in between would have been overwritten: they count, and are not written.
    skipped = ring.length + start
    after = dataclasses.replace(after, length=skipped, written=jnp.maximum(after.written, skipped))
    index = start[:, None] + jnp.arange(last, dtype=jnp.int32)[None]
    return after.append(*bring(index), lengths=lengths - start)


def _mapped(axes: MeshAxes, local: Any, in_specs: Any, out_specs: Any, *arguments: Any) -> Any:
    """`local` on every device of the mesh, with its part of the arguments."""
    # An argument that is None has no layout.
    in_specs = tuple(None if x is None else spec for x, spec in zip(arguments, in_specs, strict=True))
    arguments = tuple(_laid_out(axes.mesh, x, spec) for x, spec in zip(arguments, in_specs, strict=True))
    run = jax.shard_map(local, mesh=axes.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return run(*arguments)


def _laid_out(mesh: Any, tree: Any, specs: Any) -> Any:
    """Arrays as `Explicit` axes must have them before a `shard_map`; `Auto` axes need nothing."""
    explicit = {a for a, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit}
    if not explicit:
        return tree

    def lay(x: Any, spec: P) -> Array:
        dims = [tuple(axis for axis in names(entry) if axis in explicit) for entry in spec]
        return jax.sharding.reshard(x, NamedSharding(mesh, P(*(axes or None for axes in dims))))

    return jax.tree.map(lay, tree, jax.tree.map(lambda _: specs, tree) if isinstance(specs, P) else specs)
