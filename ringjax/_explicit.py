"""Meshes with `Explicit` axes: the code runs as on `Auto` axes, and the types of its results say what it was given.

On an `Explicit` axis (the default of `jax.make_mesh`) the type of an array says how it is laid out, and an operation
whose result could be laid out in two ways is an error. What is split here is known, rows and heads, so a call turns
the axes into `Auto` ones for itself (`jax.sharding.auto_axes`) and states the layout of its results. Elsewhere nothing
happens.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ringjax import _inputs


def split(x: Any) -> tuple[Any, tuple[Any, ...]]:
    """The mesh whose `Explicit` axes the type of x tells of (or None), and the axes that split each dimension."""
    if not isinstance(x, jax.Array):
        return None, ()
    sharding = jax.typeof(x).sharding
    mesh = getattr(sharding, "mesh", None)
    if mesh is None or AxisType.Explicit not in mesh.axis_types:
        return None, ()
    return mesh, (*sharding.spec, *[None] * (x.ndim - len(sharding.spec)))


def mesh_of(*trees: Any) -> Any:
    """The mesh with `Explicit` axes that any of the arrays is on, or None."""
    return next((mesh for x in jax.tree.leaves(trees) if (mesh := split(x)[0]) is not None), None)


def rows_and_heads(call: str, arrays: dict[str, tuple[Any, str]]) -> tuple[Any, Any]:
    """The axes that split rows ("B") and kv heads ("K", or "N" for query heads) of arrays; the first that does counts.

    Args:
      call: for messages.
      arrays: for each name the array and a letter for each of its dimensions.

    Raises:
      ValueError: any other dimension is split.
    """
    found: dict[str, Any] = {"B": None, "K": None, "N": None}
    for name, (x, letters) in arrays.items():
        for letter, axes in zip(letters, split(x)[1], strict=False):
            if axes is None:
                continue
            if letter not in found:
                what = {"T": "length", "S": "length", "C": "slots"}.get(letter, "head_dim")
                first = f"{call}: {name} must not be split over its {what}, got mesh axis {axes!r}."
                hint = "split rows or heads; with the length split, ringjax.sharding.sequence_parallel_attention"
                hint += " runs whole sequences and sequence_parallel_attend prompts." if what == "length" else "."
                if what != "length":
                    hint = "split rows or heads: jax.sharding.reshard(x, PartitionSpec(rows, None, heads))."
                raise ValueError(_inputs.message(first, {name: jax.typeof(x)}, hint))
            found[letter] = found[letter] or axes
    return found["B"], found["K"] or found["N"]


def run(mesh: Any, results: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)` with the `Explicit` axes of the mesh turned into `Auto` ones.

    Args:
      mesh: with the axes.
      results: `PartitionSpec`s, a tree like that of the results.
      function: of arrays.
      arguments: pytrees of arrays.
    """
    axes = tuple(a for a, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), results, is_leaf=lambda x: isinstance(x, P))
    return jax.sharding.auto_axes(function, axes=axes, out_sharding=shardings)(*arguments)


def specs(tree: Any) -> Any:
    """For each array, by which axes it is split."""
    return jax.tree.map(lambda x: P(*split(x)[1]), tree)


def run_like(tree: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, whose results are like the arrays of a tree, and are split as they are."""
    mesh = mesh_of(tree, arguments)
    return function(*arguments) if mesh is None else run(mesh, specs(tree), function, *arguments)


def placed_like(tree: Any, results: Any) -> Any:
    """Results outside jit on the devices, and split as, the arrays of a tree that has the same structure.

    For what XLA leaves whole on every device. Inside jit nothing is known of `Auto` axes, and nothing is done.
    """

    def place(x: Any, y: Any) -> Any:
        sharding = x.sharding if _inputs.is_concrete(x, y) and isinstance(x, jax.Array) else None
        if not isinstance(sharding, NamedSharding) or sharding.num_devices == 1 or mesh_of(x) is not None:
            return y
        rows = sharding.spec[0] if sharding.spec else None
        ways = math.prod(sharding.mesh.shape[axis] for axis in ((rows,) if isinstance(rows, str) else rows or ()))
        return jax.device_put(y, sharding) if y.shape[0] % ways == 0 else y

    return jax.tree.map(place, tree, results)


def zeros(shape: jax.ShapeDtypeStruct) -> jax.Array:
    """Zeros of a shape, dtype and, on `Explicit` axes, layout, such as `jax.eval_shape` tells."""
    x = jnp.zeros(shape.shape, shape.dtype)
    mesh = getattr(shape.sharding, "mesh", None)
    if mesh is None or AxisType.Explicit not in mesh.axis_types:
        return x
    return jax.sharding.reshard(x, shape.sharding)
