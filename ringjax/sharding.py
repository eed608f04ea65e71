"""More than one device, with JAX's own meshes. Imported only when asked for: `import ringjax.sharding`.

Rows and kv heads need nothing from here but rings that are split: `attention`, `attend` and all that calls them keep
the layout of what they are given, on `Auto` and on `Explicit` meshes, under `jit`, without communication. A sequence
that is split over devices is for `sequence_parallel_attention` and, into a ring, `sequence_parallel_attend`.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int

from ringjax._buffer import RingBuffer
from ringjax._kernels.tiles import TileSizes
from ringjax._sharding import AxisName, MeshAxes, attend_over_sequence, over_sequence
from ringjax._window import Window

__all__ = [
    "MeshAxes",
    "ring_shardings",
    "sequence_parallel_attend",
    "sequence_parallel_attention",
    "shard_rings",
]


def sequence_parallel_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    window: Window,
    *,
    axis: str,
    mesh: Any = None,
    batch_axis: AxisName = None,
    heads_axis: AxisName = None,
    segment_ids: Int[Array, "B T"] | None = None,
    kv_segment_ids: Int[Array, "B T"] | None = None,
    sink_logits: Float[Array, " N"] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    q_offset: int | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    config: TileSizes | None = None,
) -> Any:
    """`ringjax.attention` of sequences that are split over devices: exact, forward and backward.

    Each device holds T / n tokens of a sequence. It receives the `left` keys and values before them (and the `right`
    ones after them), from as many neighbours as hold them, and the window's sinks; nothing else travels, however long
    the sequence, and back only the gradients of as many. What a device sees of its own tokens does not depend on what
    it receives, so XLA can do both at once.

    Args:
      q, k, v, window: as for `attention`, with as many keys as queries; the window is bounded on both sides and
        shorter than the sequence.
      axis: the mesh axis over which sequences are split. The length must be a multiple of its size.
      mesh: a `jax.sharding.Mesh`; None: that of `jax.set_mesh`.
      batch_axis: the axis, or axes, that split the rows; None: every device computes all of them.
      heads_axis: the axis, or axes, that split the kv heads, and the query heads with them; None: as above.
      segment_ids, kv_segment_ids, sink_logits, softcap, scale: as for `attention`.
      q_offset: position of query 0, key 0 being at 0: an int; None: 0.
      return_lse, implementation, config: as for `attention`; tiles are those of a stretch.

    Returns:
      Output [B, T, N, Hv], split as the queries, and with `return_lse` the logsumexp [B, N, T].

    Raises:
      ValueError, TypeError, NotImplementedError: as for `attention`; and a mesh without such an axis, sizes that an
        axis does not divide, a window as long as the sequence, a single token.
    """
    axes = MeshAxes(axis, batch_axis, heads_axis, mesh)
    out, lse = over_sequence(
        "sequence_parallel_attention",
        axes,
        q,
        k,
        v,
        window,
        segment_ids=segment_ids,
        kv_segment_ids=kv_segment_ids,
        sink_logits=sink_logits,
        softcap=softcap,
        scale=scale,
        q_offset=q_offset,
        implementation=implementation,
        config=config,
    )
    return (out, lse) if return_lse else out


def sequence_parallel_attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    buffer: RingBuffer,
    *,
    axis: str,
    mesh: Any = None,
    batch_axis: AxisName = None,
    heads_axis: AxisName = None,
    lengths: Int[Array, " B"] | None = None,
    sink_logits: Float[Array, " N"] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    implementation: str | None = None,
    config: TileSizes | None = None,
) -> tuple[Array, RingBuffer]:
    """`ringjax.attend` of a long chunk, such as a prompt, whose tokens are split over devices.

    The ring may hold what came before. Afterwards it is, on every device along the axis, what one device would have
    made of the whole chunk: as many tokens as it keeps are brought together, and no others. Decode with `attend`; to
    split the ring's heads over the same devices, `shard_rings` drops from each what is another's.

    Args:
      q, k, v, buffer, lengths, sink_logits, softcap, scale, implementation, config: as for `attend`. The ring's rows
        and kv heads are split as those of the tokens.
      axis, mesh, batch_axis, heads_axis: as for `sequence_parallel_attention`.

    Returns:
      Output [B, T, N, Hv], split as the queries, and the ring after the new tokens.

    Raises:
      ValueError, TypeError, NotImplementedError: as for `attend` and `sequence_parallel_attention`.
    """
    return attend_over_sequence(
        "sequence_parallel_attend",
        MeshAxes(axis, batch_axis, heads_axis, mesh),
        q,
        k,
        v,
        buffer,
        lengths=lengths,
        sink_logits=sink_logits,
        softcap=softcap,
        scale=scale,
        implementation=implementation,
        config=config,
    )


def ring_shardings(state: Any, mesh: Any = None, *, batch_axis: AxisName = None, heads_axis: AxisName = None) -> Any:
    """How a model's rings lie on a mesh: a `NamedSharding` for each array, in a pytree like that of the state.

    For `jax.jit(..., out_shardings=...)`, for orbax (restoring onto another mesh), and for `shard_rings`.

    Args:
      state: any pytree with rings, of arrays or of `jax.eval_shape`.
      mesh: a `jax.sharding.Mesh`; None: that of `jax.set_mesh`.
      batch_axis: the axis, or axes, that split the rows.
      heads_axis: the axis, or axes, that split the kv heads.

    Raises:
      ValueError: a mesh without such an axis, or rows or kv heads that it does not divide.
    """
    call = "ring_shardings"
    axes = MeshAxes(None, batch_axis, heads_axis, mesh).checked(call)

    def ring(node: RingBuffer) -> RingBuffer:
        axes.check_divides(call, "the batch", node.k.shape[0], axes.batch)
        hint = "leave heads_axis out, or build the model with repeated kv heads."
        axes.check_divides(call, "the kv heads", node.k.shape[1], axes.heads, hint)
        by_rank = {1: P(axes.batch)}
        return jax.tree.map(lambda x: NamedSharding(axes.mesh, by_rank.get(x.ndim, P(axes.batch, axes.heads))), node)

    def place(node: Any) -> Any:
        if isinstance(node, RingBuffer):
            return ring(node)
        # What is no ring and has rows, such as a `BufferState`'s positions, is split by them alone.
        return NamedSharding(axes.mesh, P(axes.batch) if node.ndim == 1 else P())

    return jax.tree.map(place, state, is_leaf=lambda x: isinstance(x, RingBuffer))


def shard_rings(state: Any, mesh: Any = None, *, batch_axis: AxisName = None, heads_axis: AxisName = None) -> Any:
    """A model's rings, split over a mesh; they stay so through `attend`, `generate` and their own methods.

    Args:
      state: any pytree with rings; or a function that makes one, which then never is whole on one device. Inside
        `jit` too.
      mesh, batch_axis, heads_axis: as for `ring_shardings`.

    Raises:
      ValueError: as for `ring_shardings`.
    """
    make: Callable[[], Any] = state if callable(state) else lambda: state
    shardings = ring_shardings(jax.eval_shape(make), mesh, batch_axis=batch_axis, heads_axis=heads_axis)
    if callable(state):
        return jax.jit(make, out_shardings=shardings)()
    return jax.device_put(state, shardings)
