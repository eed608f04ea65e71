"""Arithmetic on rows of queries as one Mosaic kernel: what stands before the kernels of a backward pass.

torch would need an operation, and a launch, for each product, sum and choice in it.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

ROWS = 64  # of queries, in a program of one warpgroup
COLUMNS = 64  # summed at once: two arrays of a wider tile would not fit into registers


class Wide(NamedTuple):
    """The sum over D of the products of two arrays [B, T, N, D], by their numbers: for each row, in float32."""

    left: int
    right: int


class Narrow(NamedTuple):
    """A float32 array [B, N, T], by its number."""

    number: int


class Apply(NamedTuple):
    """An operation on each row's numbers: a function of `FUNCTIONS`, and `Wide`, `Narrow`, `Apply` or numbers."""

    function: str
    operands: tuple[Any, ...]


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "multiply": operator.mul,
    "subtract": operator.sub,
    "select": jnp.where,
    "EQ": operator.eq,
    "NE": operator.ne,
    "GE": operator.ge,
    "GT": operator.gt,
    "LE": operator.le,
    "LT": operator.lt,
}


def takes(wide: Sequence[Any], narrow: Sequence[Any]) -> bool:
    """Whether the kernel takes arrays of such shapes and dtypes: whole tiles, and 16-bit numbers to multiply."""
    if not wide or not narrow:
        return False
    batch, queries, heads, depth = wide[0].shape
    return (
        all(x.shape == wide[0].shape and x.dtype == wide[0].dtype for x in wide)
        and all(x.shape == (batch, heads, queries) and x.dtype == jnp.float32 for x in narrow)
        and jnp.dtype(wide[0].dtype).itemsize == 2
        and queries % ROWS == 0
        and depth % COLUMNS == 0
        and depth <= 4 * COLUMNS
    )


def by_row(results: Sequence[Any], wide: Sequence[Array], narrow: Sequence[Array], **options: Any) -> Array:
    """float32 [B, N, R, T]: R results, each an expression, of every row; `options` are the interpreter's (tests)."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu  # heavy

    plgpu: Any = mosaic_gpu
    by_row_of = plgpu.Layout.WGMMA.reduce(1)
    batch, queries, heads, depth = wide[0].shape
    form = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))

    def kernel(*refs: Any, tiles: Any, made: Any, full: Any) -> None:
        *given, out = refs
        row, head = lax.axis_index("row"), lax.axis_index("head")
        here = pl.ds(lax.axis_index("tile") * ROWS, ROWS)
        for i in range(len(wide)):
            plgpu.copy_gmem_to_smem(given[i].at[row, here, head], tiles.at[i], full)
        values = [plgpu.load(ref.at[row, head, here], layout=by_row_of, optimized=False) for ref in given[len(wide) :]]
        plgpu.barrier_wait(full)

        def products(left: int, right: int) -> Any:
            total: Any = None
            for start in range(0, depth, COLUMNS):
                part = pl.ds(start, COLUMNS)
                x, y = (plgpu.load(tiles.at[i, :, part], layout=plgpu.Layout.WGMMA) for i in (left, right))
                added = (x.astype(jnp.float32) * y.astype(jnp.float32)).sum(1)
                total = added if total is None else total + added
            return total

        def value(x: Any) -> Any:
            if isinstance(x, Wide):
                return products(*x)
            if isinstance(x, Narrow):
                return values[x.number]
            if isinstance(x, Apply):
                return FUNCTIONS[x.function](*map(value, x.operands))
            return x

        for i, x in enumerate(results):
            found = value(x)
            if isinstance(found, int | float):
                found = plgpu.layout_cast(jnp.full((ROWS,), found, jnp.float32), by_row_of)
            made.at[i][...] = found
        plgpu.commit_smem()
        for i in range(len(results)):
            plgpu.copy_smem_to_gmem(made.at[i], out.at[row, head, i, here])
        plgpu.wait_smem_to_gmem(0)

    made: Array = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((batch, heads, len(results), queries), jnp.float32),
        grid=(heads, batch, queries // ROWS),
        grid_names=("head", "row", "tile"),
        scratch_types={
            "tiles": plgpu.SMEM((len(wide), ROWS, depth), wide[0].dtype, transforms=form),
            "made": plgpu.SMEM((len(results), ROWS), jnp.float32),
            "full": plgpu.Barrier(num_arrivals=len(wide)),
        },
        **options,
    )(*wide, *narrow)
    return made
