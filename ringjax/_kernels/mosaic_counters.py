"""A row's counters, written in place by the launch that reads them, though no program of it waits for another."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from ringjax._kernels.mosaic_tile import plgpu
from ringjax._slots import INVALID


def undisturbed(length: Any, written: Any, *, slack: int, readers: int) -> Any:
    """`written` as it was before the launch, of a row that some of its `readers` programs have counted themselves in.

    A launch writes the row's counters in place, and no program of it waits for another. So none may write before all
    have read; each adds slack + 1 to `written` when it has, and the one that finds itself the last writes both
    counters (`count_in`). Until then `length` stays, and `written`, which was `length` and up to the slack, or
    `INVALID`, can be told: an array of arrivals would be one to be cleared before each launch. The sum may overflow.
    """
    ahead = written - length
    behind = (ahead >= 0) & (ahead < (slack + 1) * readers)
    return jnp.where(behind, length + lax.rem(ahead, jnp.int32(slack + 1)), INVALID)


def count_in(length: Any, written: Any, step: Any, last: Any, new_length: Any, new_written: Any) -> None:
    """Adds `step` to `written`; who finds `last` there writes the new counters."""
    scalar = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), scalar, scalar, scalar, scalar))
    def count(_: Any, length: Any, written: Any, *numbers: Any) -> None:
        i32 = ir.IntegerType.get_signless(32)
        one_thread = arith.extui(i32, utils.single_thread_predicate(utils.ThreadSubset.WARPGROUP))
        pointers = [utils.memref_ptr(x) for x in (length, written)]
        llvm.inline_asm(
            None,
            [*pointers, *(x.registers.item() for x in numbers), one_thread],
            """{
            .reg .pred mine, last;
            .reg .b32 found;
            setp.ne.b32 mine, $6, 0;
            mov.b32 found, 0;
            @mine atom.acq_rel.gpu.global.add.u32 found, [$1], $2;
            setp.eq.and.b32 last, found, $3, mine;
            @last st.global.b32 [$0], $4;
            @last st.global.b32 [$1], $5;
            }""",
            "l,l,r,r,r,r,r",
            has_side_effects=True,
        )

    count(length, written, step, last, new_length, new_written)
