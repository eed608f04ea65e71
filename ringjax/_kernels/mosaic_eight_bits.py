"""Products with 8-bit keys and values on Hopper, of which none is widened.

The other operand, queries or weights, is cut into two 8-bit parts: the second holds what the first leaves over, so
that together they have 15 bits (int8) or 8 (float8_e4m3), and both are columns of one product. WGMMA wants 8-bit
operands along the contracted axis: keys are stored so (by head size), values are not (they are contracted by key). So
values go through registers, four keys of four columns at a time, and become the product's left operand there. Which
number of that operand is which key and which column is free, as long as the weights have the same order of keys and
the output is put back in order; that order is chosen so that no two threads of a warp meet in a bank of shared memory.

In a WGMMA operand or result, thread (warp w, g, t) of a warpgroup has rows 16 w + g and 16 w + g + 8; of the left
operand columns 4 t .. 4 t + 3 of each 16, of a result columns 2 t and 2 t + 1 of each 8. Here it has

- of the values, columns 32 w + 4 g + 2 m + e of 128 as row 16 w + g + 8 e of 64-row tile m: one word of each key;
- keys 2 t, 2 t + 1, 8 + 2 t and 8 + 2 t + 1 of each 16 as columns 4 t .. 4 t + 3.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, math, memref, vector

from ringjax._kernels.mosaic_tile import plgpu
from ringjax._quantised import LARGEST

WHOLE = {"int8": 127.0, "float8_e4m3fn": 128.0}
"""The largest magnitude of a first part."""
FINER = {"int8": 254.0, "float8_e4m3fn": 16.0}
"""Steps of the second part in one of the first."""
LEAST = 1e-30
"""The least scale of a value that is told from 0."""
BLOCK = 128  # keys in a tile, and columns of 8 bits in 128 bytes

_MAGIC = 12582912.0  # 1.5 * 2^23: a float32 added to it is rounded to an integer, in the lowest bits


def split(x: Array, dtype: Any) -> tuple[Array, Array]:
    """Numbers of magnitude up to `WHOLE` as two parts in `dtype`, worth `first + second / FINER`."""
    whole = jnp.dtype(dtype) == jnp.int8
    # In so many words, because XLA takes a conversion there and back for none. What becomes 0 is left to the second.
    first = jnp.round(x) if whole else lax.reduce_precision(x, exponent_bits=4, mantissa_bits=3)
    rest = (x - first) * FINER[jnp.dtype(dtype).name]
    return first.astype(dtype), (jnp.round(rest) if whole else rest).astype(dtype)


def split_queries(q: Array, dtype: Any) -> tuple[Array, Array]:
    """Queries [..., rows, H] as [..., 2 * rows, H] in `dtype`, first parts first, and scales, float32 [..., rows].

    In float8 the scale is a power of 2, which leaves the bits of a bfloat16 as they are.
    """
    name, q = jnp.dtype(dtype).name, q.astype(jnp.float32)
    largest = jnp.abs(q).max(-1)
    scale = largest / WHOLE[name]
    if name != "int8":
        exponent = lax.bitcast_convert_type(largest, jnp.int32) & 0x7F800000
        scale = lax.bitcast_convert_type(exponent, jnp.float32) * (2.0 / WHOLE[name])
    scale = jnp.where(largest < np.finfo(np.float32).tiny * 1e3, 1.0, scale)
    return jnp.concatenate(split(q / scale[..., None], dtype), axis=-2), scale


def store_queries(q: Any, into: Any, scales: Any, first: Any, rows: int, dtype: Any) -> None:
    """What `split_queries` does, by one warpgroup: 16 threads have a row.

    Args:
      q: [all rows, H] in device memory.
      into: shared memory [H / 128, 2 * queries, 128] in `dtype`, 128-byte swizzle: first parts, then second ones.
      scales: shared memory, float32 [queries].
      first: the first of the program's rows.
      rows: how many it has; the rest of `into` becomes 0.
      dtype: of the keys.
    """
    head_dim, (pieces, queries, _) = q.shape[1], into.shape
    queries //= 2
    packed = _packed_int8 if jnp.dtype(dtype) == jnp.int8 else _packed_float8
    whole = WHOLE[jnp.dtype(dtype).name]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _TILED, plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def store(_: Any, q: Any, into: Any, scales: Any, first: Any) -> None:
        f32, index, i32 = ir.F32Type.get(), ir.IndexType.get(), _i32()
        zero, start = utils.c(0.0, f32), utils.memref_ptr(into)
        thread = arith.remui(utils.thread_idx(), _number(128))
        chunk = arith.remui(thread, _number(16))
        for eight in range(queries // 8):
            row = arith.addi(arith.divui(thread, _number(16)), _number(8 * eight))
            is_real = arith.cmpi(arith.CmpIPredicate.slt, row, _number(rows))
            # Always an address of the array, whose value is dropped where it is not the program's.
            at = arith.addi(first.registers.item(), arith.select(is_real, row, _number(0)))
            at, found, largest = arith.index_cast(index, at), [], zero
            for i in range(pieces * 8):
                column = arith.addi(arith.muli(chunk, _number(8)), _number(i // 8 * BLOCK + i % 8))
                within = arith.andi(is_real, arith.cmpi(arith.CmpIPredicate.slt, column, _number(head_dim)))
                place = arith.index_cast(index, arith.minsi(column, _number(head_dim - 1)))
                x = arith.select(within, arith.extf(f32, memref.load(q, [at, place])), zero)
                found.append(x)
                largest = arith.maximumf(largest, math.absf(x))
            for distance in (1, 2, 4, 8):
                largest = arith.maximumf(largest, utils.shfl_bfly(largest, distance))
            if jnp.dtype(dtype) != jnp.int8:
                exponent = arith.andi(arith.bitcast(i32, largest), _number(0x7F800000))
                largest = arith.mulf(arith.bitcast(f32, exponent), utils.c(2.0, f32))
            is_nothing = arith.cmpf(arith.CmpFPredicate.OLT, largest, utils.c(LEAST, f32))
            factor = arith.select(is_nothing, zero, arith.divf(utils.c(1.0, f32), largest))
            memref.store(arith.mulf(largest, utils.c(1.0 / whole, f32)), scales, [arith.index_cast(index, row)])
            found = [arith.mulf(x, factor) for x in found]
            near = arith.remui(row, _number(8))
            half = arith.muli(arith.remui(chunk, _number(2)), _number(8))
            place = arith.xori(arith.divui(chunk, _number(2)), near)
            offset = _plus((near, 128), (place, 16), (half, 1))
            for word in range(pieces * 2):
                a, b = (packed(*found[4 * word + i : 4 * word + i + 2]) for i in (0, 2))
                for part, order in enumerate((0x5410, 0x7632)):
                    tile = word // 2 * (queries // 4) + eight + part * (queries // 8)
                    llvm.store(_permute(a, b, order), _at(start, offset, tile * 1024 + word % 2 * 4))

    store(q, into, scales, first)


def store_tokens(new: Any, into: Any, scales: Any, row: Any, head: Any, dtype: Any) -> None:
    """Quantises tokens by one warpgroup, each by a warp: the same bits as `ringjax._quantised.quantise` jitted by XLA.

    Which divides with `div.full.f32`, and by a constant by multiplying.

    Args:
      new: keys or values [B, T, K, H] in device memory.
      into: shared memory [T, H or more] in `dtype`.
      scales: shared memory, float32 [T].
      row, head: which of B and K.
      dtype: of the ring.
    """
    (_, tokens, _, size), largest_step = new.shape, LARGEST[jnp.dtype(dtype).name]
    columns, whole = 128, jnp.dtype(dtype) == jnp.int8  # of a warp: four of each lane

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.RefType(), plgpu.RefType(), plgpu.Layout.WG_SPLAT, plgpu.Layout.WG_SPLAT)
    )
    def store(_: Any, new: Any, into: Any, scales: Any, row: Any, head: Any) -> None:
        f32, i32, index = ir.F32Type.get(), _i32(), ir.IndexType.get()
        (warp, _, _), start, zero = _thread(), utils.memref_ptr(into), utils.c(0.0, ir.F32Type.get())
        at_row, at_head = (arith.index_cast(index, x.registers.item()) for x in (row, head))
        column = arith.muli(arith.remui(utils.thread_idx(), _number(32)), _number(4))
        for first in range(0, tokens, 4):
            # Past the last token there is that one again, and the same is stored twice.
            token = arith.minsi(arith.addi(warp, _number(first)), _number(tokens - 1))
            at_token, found, largest = arith.index_cast(index, token), [], zero
            for i in range(-(-size // columns) * 4):
                at = arith.addi(column, _number(i // 4 * columns + i % 4))
                within = arith.cmpi(arith.CmpIPredicate.slt, at, _number(size))
                at = arith.index_cast(index, arith.minsi(at, _number(size - 1)))
                x = arith.extf(f32, memref.load(new, [at_row, at_token, at_head, at]))
                found.append(arith.select(within, x, zero))
                largest = arith.maximumf(largest, math.absf(found[-1]))
            for distance in (1, 2, 4, 8, 16):
                largest = arith.maximumf(largest, utils.shfl_bfly(largest, distance))
            scale = _asm(f32, _SCALE.format(share=_hex(1.0 / largest_step)), largest)
            below, above = (utils.c(x, f32) for x in (0.0, float("inf")))
            real = arith.andi(
                arith.cmpf(arith.CmpFPredicate.OGT, scale, below), arith.cmpf(arith.CmpFPredicate.OLT, scale, above)
            )
            divisor = arith.select(real, scale, utils.c(1.0, f32))
            step = _STEP.format(least=_hex(-largest_step), most=_hex(largest_step))
            steps = [_asm(f32, step, arith.select(real, x, zero), divisor) for x in found]
            for i in range(0, len(steps), 4):
                if whole:
                    a, b, c, d = (_asm(i32, "cvt.rni.s32.f32 $0, $1;", x) for x in steps[i : i + 4])
                    word = _permute(_permute(a, b, 0x0040), _permute(c, d, 0x0040), 0x5410)
                else:
                    word = _asm(i32, _FOUR_FLOAT8, *steps[i : i + 4])
                at = arith.addi(column, _number(i // 4 * columns))
                within = arith.cmpi(arith.CmpIPredicate.slt, at, _number(size))
                offset = arith.addi(arith.muli(token, _number(into.type.shape[1])), at)
                with utils.when(within):
                    llvm.store(word, _at(start, offset))
            memref.store(scale, scales, [at_token])

    store(new, into, scales, row, head)


_SCALE = """{{
    .reg .f32 x;
    .reg .b32 bits, odd;
    .reg .pred p;
    mul.rn.f32 x, $1, {share};
    mov.b32 bits, x;
    bfe.u32 odd, bits, 8, 1;
    add.s32 bits, bits, odd;
    add.s32 bits, bits, 127;
    and.b32 bits, bits, -256;
    setp.nan.f32 p, x, x;
    @!p mov.b32 x, bits;
    setp.lt.f32 p, x, 0f00800000;
    selp.f32 $0, 0f00000000, x, p;
    }}"""
"""A token's scale, to 16 significant bits, from its largest magnitude; NaN stays, and too little becomes 0."""
_STEP = """{{
    .reg .f32 x;
    div.full.f32 x, $1, $2;
    max.f32 x, x, {least};
    min.f32 $0, x, {most};
    }}"""
_FOUR_FLOAT8 = """{
    .reg .b16 low, high;
    cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
    cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
    mov.b32 $0, {low, high};
    }"""


def _i32() -> Any:
    return ir.IntegerType.get_signless(32)


def _number(x: int) -> Any:
    return utils.c(x, _i32())


def _asm(result: Any, text: str, *operands: Any) -> Any:
    """One PTX instruction without side effects; $0 is its result."""
    letters = {"i16": "h", "i32": "r", "f32": "f"}
    constraints = ",".join([f"={letters[str(result)]}", *(letters[str(x.type)] for x in operands)])
    return llvm.inline_asm(result, list(operands), text, constraints)


def _permute(a: Any, b: Any, selector: Any) -> Any:
    """Bytes of a (0 to 3) and b (4 to 7), the result's lowest first in the selector's lowest nibble."""
    selector = _number(selector) if isinstance(selector, int) else selector
    return _asm(_i32(), "prmt.b32 $0, $1, $2, $3;", a, b, selector)


def _thread() -> tuple[Any, Any, Any]:
    """(w, g, t) of the running thread."""
    index = arith.remui(utils.thread_idx(), _number(128))
    lane = arith.remui(index, _number(32))
    return arith.divui(index, _number(32)), arith.divui(lane, _number(4)), arith.remui(lane, _number(4))


def _at(start: Any, offset: Any, constant: int = 0) -> Any:
    """A pointer to shared memory, `offset` and a constant number of bytes farther."""
    i8 = ir.IntegerType.get_signless(8)
    return utils.getelementptr(utils.getelementptr(start, [offset], i8), [constant], i8)


def _plus(*terms: tuple[Any, int]) -> Any:
    """The sum of values times constants."""
    total = _number(0)
    for x, factor in terms:
        total = arith.addi(total, arith.muli(x, _number(factor)))
    return total


def transposed_values(tile: Any, dtype: Any) -> Any:
    """Values [128, 128] in shared memory as a left operand [128 columns, 128 keys], both in the order above."""

    @plgpu.inline_mgpu(
        arg_types=(_TILED,),
        return_type=plgpu.ShapeDtypeStruct((BLOCK, BLOCK), dtype, layout=plgpu.Layout.WGMMA_8BIT),
    )
    def load(_: Any, tile: Any) -> Any:
        (w, g, t), start = _thread(), utils.memref_ptr(tile)
        chunk = arith.addi(arith.muli(w, _number(2)), arith.divui(g, _number(4)))
        within = arith.muli(arith.remui(g, _number(4)), _number(4))
        offsets = []
        for odd in range(2):  # of a key's row of 128 bytes, 16-byte chunks are where TMA's swizzle has them
            key = arith.addi(arith.muli(t, _number(2)), _number(odd))
            offsets.append(_plus((key, 128), (arith.xori(chunk, key), 16), (within, 1)))
        layout = fragmented_array.WGMMA_LAYOUT_8BIT
        element = tile.type.element_type
        registers = np.empty(layout.registers_shape((BLOCK, BLOCK)), dtype=object)
        for group in range(BLOCK // 16):
            words = [llvm.load(_i32(), _at(start, offsets[i % 2], (16 * group + 8 * (i // 2)) * 128)) for i in range(4)]
            low, high = ([_permute(words[i], words[i + 1], order) for i in (0, 2)] for order in (0x5140, 0x7362))
            columns = [_permute(a, b, order) for a, b in (low, high) for order in (0x5410, 0x7632)]
            for column, word in enumerate(columns):
                word = vector.bitcast(
                    ir.VectorType.get((4,), element), vector.broadcast(ir.VectorType.get((1,), _i32()), word)
                )
                registers[column // 2, group, 0, 0, column % 2, 0, 0, 0, 0] = word
        signed = True if jnp.dtype(dtype) == jnp.int8 else None
        return fragmented_array.FragmentedArray(_registers=registers, _layout=layout, _is_signed=signed)

    return load(tile)


def _nearest(x: Any, whole: float, finer: float) -> tuple[Any, Any]:
    """First and second part of a weight in [0, 1], in int8, each in the lowest byte of an i32."""
    f32 = ir.F32Type.get()

    def constant(x: float) -> Any:
        return utils.c(x, f32)

    x = arith.mulf(x, constant(whole))
    first = arith.addf(x, constant(_MAGIC))
    rest = arith.mulf(arith.subf(x, arith.subf(first, constant(_MAGIC))), constant(finer))
    second = arith.addf(rest, constant(_MAGIC))
    return arith.bitcast(_i32(), first), arith.bitcast(_i32(), second)


def _packed_int8(a: Any, b: Any) -> Any:
    """Bytes: first part of a and of b, second part of a and of b."""
    (a0, a1), (b0, b1) = (_nearest(x, WHOLE["int8"], FINER["int8"]) for x in (a, b))
    return _permute(_permute(a0, b0, 0x5140), _permute(a1, b1, 0x5140), 0x5410)


def _packed_float8(a: Any, b: Any) -> Any:
    """The same in float8_e4m3."""
    whole, finer = WHOLE["float8_e4m3fn"], FINER["float8_e4m3fn"]
    return _asm(
        _i32(),
        f"""{{
        .reg .f32 a, b, c, d;
        .reg .b16 first, second, low, high;
        .reg .b32 back;
        mul.f32 a, $1, {_hex(whole)};
        mul.f32 b, $2, {_hex(whole)};
        cvt.rn.satfinite.e4m3x2.f32 first, b, a;
        cvt.rn.f16x2.e4m3x2 back, first;
        mov.b32 {{low, high}}, back;
        cvt.f32.f16 c, low;
        cvt.f32.f16 d, high;
        sub.f32 a, a, c;
        sub.f32 b, b, d;
        mul.f32 a, a, {_hex(finer)};
        mul.f32 b, b, {_hex(finer)};
        cvt.rn.satfinite.e4m3x2.f32 second, b, a;
        mov.b32 $0, {{first, second}};
        }}""",
        a,
        b,
    )


def _hex(x: float) -> str:
    return f"0f{int(np.float32(x).view(np.uint32)):08X}"


def store_weights(weights: Any, into: Any, first_key: int, dtype: Any) -> None:
    """Weights [64 keys, queries] in [0, 1], from key `first_key` of the tile on, as columns of the second product.

    Args:
      weights: float32, as the first product leaves them.
      into: shared memory [2 * queries, 128 keys] in `dtype`, 128-byte swizzle: first parts, then second ones.
      first_key: 0 or 64.
      dtype: of the values.
    """
    queries = weights.shape[1]
    packed = _packed_int8 if jnp.dtype(dtype) == jnp.int8 else _packed_float8

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, _TILED))
    def store(_: Any, weights: Any, into: Any) -> None:
        (w, g, t), start = _thread(), utils.memref_ptr(into)
        odd = arith.remui(g, _number(2))
        is_odd = arith.cmpi(arith.CmpIPredicate.ne, odd, _number(0))
        row = arith.addi(arith.muli(t, _number(2)), odd)
        chunk = arith.xori(arith.addi(w, _number(first_key // 16)), row)
        offset = _plus((row, 128), (chunk, 16), (arith.divui(g, _number(2)), 4))
        orders = [arith.select(is_odd, _number(b), _number(a)) for a, b in ((0x5140, 0x1504), (0x7362, 0x3726))]
        for eight in range(queries // 8):
            near, far = (weights.registers[0, eight, 0, 0, e, 0, 0, 0, 0] for e in range(2))
            columns = [
                packed(*(vector.extract(x, dynamic_position=[], static_position=[i]) for x in (near, far)))
                for i in range(2)
            ]
            # A word has four keys, two of them in the neighbour at g ^ 1: each of the two takes one column.
            mine = arith.select(is_odd, columns[1], columns[0])
            given = arith.select(is_odd, columns[0], columns[1])
            theirs = utils.shfl_bfly(given, 4)
            for part, order in enumerate(orders):
                at = _at(start, offset, (eight + part * (queries // 8)) * 1024)
                llvm.store(_permute(mine, theirs, order), at)

    store(weights, into)


def load_scales(k_scale: Any, v_scale: Any, into: Any, first: Any, capacity: int) -> None:
    """Scales of the keys, and the binary logarithm and the reciprocal of those of the values, into [3, 128].

    Args:
      k_scale, v_scale: float32 [C] in device memory.
      into: shared memory, float32 [3, 128].
      first: the tile's first slot.
      capacity: C; slots past it get those of the last.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def load(_: Any, k_scale: Any, v_scale: Any, into: Any, first: Any) -> None:
        f32, index = ir.F32Type.get(), ir.IndexType.get()
        thread = arith.remui(utils.thread_idx(), _number(128))
        slot = arith.minsi(arith.addi(first.registers.item(), thread), _number(capacity - 1))
        slot, thread = arith.index_cast(index, slot), arith.index_cast(index, thread)
        of_key, of_value = (memref.load(x, [slot]) for x in (k_scale, v_scale))
        of_value = arith.maximumf(of_value, utils.c(LEAST, f32))
        rows = [
            of_key,
            _asm(f32, "lg2.approx.f32 $0, $1;", of_value),
            _asm(f32, "rcp.approx.f32 $0, $1;", of_value),
        ]
        for i, x in enumerate(rows):
            memref.store(x, into, [utils.c(i, index), thread])

    load(k_scale, v_scale, into, first)


def without_nan(tile: Any) -> None:
    """Makes the NaN among values [128, 128] in float8_e4m3 finite: no token has one, so these are seen by nobody."""

    @plgpu.inline_mgpu(arg_types=(_TILED,))
    def rewrite(_: Any, tile: Any) -> None:
        start = utils.memref_ptr(tile)
        offset = arith.muli(arith.remui(utils.thread_idx(), _number(128)), _number(4))
        for row in range(0, BLOCK * BLOCK, 512):
            at = _at(start, offset, row)
            word = llvm.load(_i32(), at)
            # A byte is NaN if all bits but the sign are set: one more carries into the highest.
            carry = arith.addi(arith.andi(word, _number(0x7F7F7F7F)), _number(0x01010101))
            found = arith.shrui(arith.andi(carry, _number(0x80808080 - 2**32)), _number(7))
            llvm.store(arith.xori(word, found), at)

    rewrite(tile)


def store_output(parts: list[Any], into: Any, first: int) -> None:
    """Two 64-row tiles of the output [columns, queries], in the order above, into columns [first, first + 128).

    Args:
      parts: float32 [64, queries] each.
      into: shared memory [queries, columns], untiled.
      first: column of `into`.
    """
    queries = parts[0].shape[1]

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.Layout.WGMMA, plgpu.RefType()))
    def store(_: Any, a: Any, b: Any, into: Any) -> None:
        index, element = ir.IndexType.get(), into.type.element_type
        w, g, t = _thread()
        for eight in range(queries // 8):
            for i in range(2):
                row = arith.index_cast(index, arith.addi(arith.muli(t, _number(2)), _number(8 * eight + i)))
                for m, part in enumerate((a, b)):
                    for e in range(2):
                        x = part.registers[0, eight, 0, 0, e, 0, 0, 0, 0]
                        x = vector.extract(x, dynamic_position=[], static_position=[i])
                        x = x if element == ir.F32Type.get() else arith.truncf(element, x)
                        column = arith.addi(_plus((w, 32), (g, 4)), _number(first + 2 * m + e))
                        memref.store(x, into, [row, arith.index_cast(index, column)])

    store(*parts, into)


_TILED = plgpu.RefType((plgpu.TilingTransform((8, BLOCK)), plgpu.SwizzleTransform(128)))
"""Shared memory of 8-bit numbers in 128-byte rows, as WGMMA reads it."""
