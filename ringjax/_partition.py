"""The one operation on a mesh: each device runs the implementation on its own rows and kv heads.

XLA cannot look into a kernel: left alone, it gathers all of the batch on every device, runs the same call on each, and
says nothing. So whatever runs an implementation goes through here. On a mesh whose axes are `Auto`, XLA's partitioner
decides how arrays are laid out, and asks the `partition` below what one device does (`jax.custom_partitioning`, as
Transformer Engine does). `Explicit` axes are `Auto` here: see `_explicit.py`. In a `shard_map` nothing is to be done.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ringjax._kernels import IMPLEMENTATIONS
from ringjax._kernels.problem import Problem, Rows

Axes = tuple[str, ...]


def forward(
    problem: Problem, implementation: str, rows: Rows, q: Array, k: Array, v: Array, sink_logits: Array | None
) -> tuple[Array, Array]:
    """Output and lse of an implementation, wherever the arrays are."""
    return _run(problem, implementation, "forward", rows, q, k, v, sink_logits)


def backward(
    problem: Problem, implementation: str, rows: Rows, q: Array, k: Array, v: Array, g: Array, lse: Array, delta: Array
) -> tuple[Array, Array, Array]:
    """Cotangents of q, k and v by an implementation, wherever the arrays are."""
    return _run(problem, implementation, "backward", rows, q, k, v, g, lse, delta)


def _run(problem: Problem, implementation: str, direction: str, *arrays: Any) -> Any:
    plain = partial(getattr(IMPLEMENTATIONS[implementation], direction), problem)
    leaves = jax.tree.leaves(arrays)
    if not may_be_partitioned(leaves):
        return plain(*arrays)
    run = partial(_partitioned, problem, implementation, direction)
    if any(isinstance(x, jax.core.Tracer) for x in leaves):
        return run(*arrays)
    return _jitted(problem, implementation, direction, *arrays)


def may_be_partitioned(leaves: list[Any]) -> bool:
    """Whether XLA may lay these arrays out over several devices on its own; in a `shard_map` it may not."""
    meshes = [jax.sharding.get_abstract_mesh(), *(jax.typeof(x).sharding.mesh for x in leaves)]
    if any(AxisType.Manual in mesh.axis_types for mesh in meshes if mesh is not None):
        return False
    if any(isinstance(x, jax.core.Tracer) for x in leaves):
        # No type tells of the `in_shardings` of a `jit`. On one device the call is what it would have been.
        return jax.device_count() > 1
    return any(len(x.devices()) > 1 for x in leaves if isinstance(x, jax.Array))


def _partitioned(problem: Problem, implementation: str, direction: str, *arrays: Any) -> Any:
    leaves, tree = jax.tree.flatten(arrays)
    plain = getattr(IMPLEMENTATIONS[implementation], direction)

    @jax.jit  # which keeps constants to itself: `custom_partitioning` takes no function that has any
    def whole(*leaves: Array) -> tuple[Array, ...]:
        return tuple(plain(problem, *jax.tree.unflatten(tree, leaves)))

    dims = jax.tree.leaves(_dims(problem, direction, arrays), is_leaf=lambda x: isinstance(x, str))
    results = {
        "forward": ("btnv", "bnt"),
        "backward": ("btnh", "bmsh", "bmsv") if problem.is_ring else ("btnh", "bsmh", "bsmv"),
    }[direction]
    local = partial(_local, plain, problem, tree, direction, dims)
    call = custom_partitioning(whole)
    letters = dict.fromkeys("".join((*dims, *results)))  # in the order in which Shardy numbers them
    call.def_partition(
        partition=partial(_partition, problem, direction, dims, results, local),
        sharding_rule=f"{', '.join(map(' '.join, dims))} -> {', '.join(map(' '.join, results))}",
        need_replication_factors=tuple(letter for letter in letters if letter not in "bnm"),
    )

    # The partitioner knows no batch of calls; the implementations do.
    return batched_as(whole, call)(*leaves)


def batched_as(plain: Callable[..., Any], call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, of which a batch under `vmap` is one of `plain`, the same function of the same arrays."""
    run = custom_vmap(call)

    @run.def_vmap
    def over(size: int, batched: Any, *arrays: Any) -> Any:
        axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, batched)
        results = jax.vmap(plain, in_axes=tuple(axes), axis_size=size)(*arrays)
        return results, jax.tree.map(lambda _: True, results)

    found: Callable[..., Any] = run
    return found


_jitted = jax.jit(_partitioned, static_argnums=(0, 1, 2))


def _dims(problem: Problem, direction: str, arrays: tuple[Any, ...]) -> Any:
    """A letter for each dimension of each array: b rows, n query heads, m kv heads; the others are never split."""
    rows, *others = arrays
    kv = ("bmsh", "bmsv") if problem.is_ring else ("bsmh", "bsmv")
    names = {
        "forward": ("btnh", *kv, "n"),
        "backward": ("btnh", *kv, "btnv", "bnt", "bnt"),
    }[direction]
    kinds = {"q_segments": "bt", "kv_segments": "bs", "k_scale": "bms", "v_scale": "bms"}
    of_rows: dict[str, Any] = {f: None if x is None else kinds.get(f, "b") for f, x in rows._asdict().items()}
    return Rows(**of_rows), *(None if x is None else name for name, x in zip(names, others, strict=True))


def _partition(
    problem: Problem, direction: str, dims: Any, results: Any, local: Callable, mesh: Mesh, shapes: Any, _: Any
) -> Any:
    """What `custom_partitioning` asks: how arguments and results are laid out, and what a device does with its part."""
    found: dict[str, Axes] = {"b": (), "n": (), "m": ()}
    for names, shape in zip(dims, shapes, strict=True):
        spec = getattr(shape.sharding, "spec", P())
        for letter, axes in zip(names, (*spec, *[None] * len(names)), strict=False):
            if letter in found and not found[letter]:
                found[letter] = _as_axes(axes)
    rows = _dividing(problem.batch, found["b"], mesh)
    heads = found["m"] if _heads_split(problem, _ways(found["m"], mesh)) else ()
    heads = heads or (found["n"] if _heads_split(problem, _ways(found["n"], mesh)) else ())
    heads = tuple(axis for axis in heads if axis not in rows)
    heads = heads if _heads_split(problem, _ways(heads, mesh)) else ()
    shared = bool(problem.kv_heads % _ways(heads, mesh))  # some devices have query heads of one kv head
    axes = {"b": rows, "n": heads, "m": () if shared else heads}

    def sharding(names: str) -> NamedSharding:
        return NamedSharding(mesh, P(*(axes.get(letter) or None for letter in names)))

    parts = _ways(rows, mesh), _ways(heads, mesh)

    def run(*leaves: Array) -> Any:
        # Without the caller's mesh: a device's part is not to be laid out again (jax 0.12 cannot compile that).
        with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
            return local(parts, heads if shared else (), *leaves)

    return mesh, run, tuple(map(sharding, results)), tuple(map(sharding, dims))


def _local(
    plain: Any, problem: Problem, tree: Any, direction: str, dims: Any, parts: Any, shared: Axes, *leaves: Array
) -> Any:
    """What one device does with its rows and heads; `shared`: axes that split query heads but not their kv heads."""
    row_parts, head_parts = parts
    kv_parts = math.gcd(head_parts, problem.kv_heads)
    here = dataclasses.replace(
        problem,
        batch=problem.batch // row_parts,
        heads=problem.heads // head_parts,
        kv_heads=problem.kv_heads // kv_parts if not shared else 1,
    )
    if not shared:
        return tuple(plain(here, *jax.tree.unflatten(tree, leaves)))
    mine = lax.axis_index(shared) * problem.kv_heads // head_parts
    leaves = tuple(
        lax.dynamic_slice_in_dim(x, mine, 1, names.index("m")) if "m" in names else x
        for names, x in zip(dims, leaves, strict=True)
    )
    out = tuple(plain(here, *jax.tree.unflatten(tree, leaves)))
    if direction == "forward":
        return out
    axis = 1 if problem.is_ring else 2

    def total(part: Array) -> Array:
        shape = [problem.kv_heads if i == axis else n for i, n in enumerate(part.shape)]
        whole = lax.dynamic_update_slice_in_dim(jnp.zeros(shape, jnp.float32), part.astype(jnp.float32), mine, axis)
        return lax.psum(whole, shared).astype(part.dtype)

    return out[0], *map(total, out[1:])


def _as_axes(entry: Any) -> Axes:
    return () if entry is None or entry is P.UNCONSTRAINED else (entry,) if isinstance(entry, str) else tuple(entry)


def _ways(axes: Axes, mesh: Any) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def _dividing(size: int, axes: Axes, mesh: Any) -> Axes:
    return axes if size % _ways(axes, mesh) == 0 else ()


def _heads_split(problem: Problem, ways: int) -> bool:
    """Whether heads can be split so many ways that no device has parts of the groups of two kv heads."""
    if problem.kv_heads % ways == 0:
        return True
    return ways % problem.kv_heads == 0 and problem.heads % ways == 0
