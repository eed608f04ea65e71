"""A lowered program, in StableHLO, as steps of torch's: what `_launch` runs.

Only what ringjax's programs on Hopper are made of is read: kernels, and the arithmetic, padding and views around them.
"""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import torch
from jax._src.lib.mlir import ir, passmanager  # type: ignore[attr-defined]
from jax._src.lib.mlir.dialects import hlo  # type: ignore[attr-defined]

from torch_bridge._by_row import Apply, Narrow, Wide, by_row, takes
from torch_bridge._dlpack import TO_JAX, TO_TORCH

_LOG = logging.getLogger("torch_bridge")

KERNEL = "mosaic_gpu_v2"  # XLA's name of a Mosaic GPU kernel
_MOST = 16  # of torch's operations: each costs about 8 us, and JAX's runtime some 100 in all


Launch = Callable[[Sequence[int]], None]
"""Launches a kernel, given pointers to its operands and results."""


class Steps(NamedTuple):
    """A program as steps that torch takes.

    Attributes:
      slots: how many values there are in all; the first are the program's arguments.
      steps: each reads some of a list of values and fills others in.
      results: which values the program returns, without its rings.
      operations: how many of torch's own operations there are, beside the kernels.
    """

    slots: int
    steps: list[Callable[[list[Any]], None]]
    results: list[int]
    operations: int


class Unknown(Exception):
    """Something in a program that is left to JAX."""


class _Splat(NamedTuple):
    """A constant that is one number all over."""

    number: Any
    shape: tuple[int, ...]
    dtype: torch.dtype


def read(module: Any, device: torch.device, compiled: Callable[[bytes, torch.device], Launch], in_place: int) -> Steps:
    """A lowered program as torch's steps.

    Args:
      module: StableHLO, with one public function.
      device: that the tensors are on.
      compiled: makes a launcher of a kernel's module.
      in_place: how many of the first arguments are returned, after the first result, written in place or as they were.

    Raises:
      Unknown: it has something else.
    """
    arguments, operations = _body(module)
    with module.context:
        return _Reader(arguments, device, compiled, in_place).read(operations)


def _body(module: Any) -> tuple[list[Any], list[Any]]:
    """Arguments and operations of a module's public function, which calls no other any more."""
    from jax.experimental.mosaic import gpu  # heavy

    with module.context:
        gpu.dialect.register_inliner_extensions(module.context)  # type: ignore[attr-defined]
        passmanager.PassManager.parse("builtin.module(inline{default-pipeline=},canonicalize,cse)").run(
            module.operation
        )
        (main,) = (op for op in module.body.operations if op.name.value == "main")
        (block,) = main.regions[0].blocks
        return list(block.arguments), list(block.operations)


class _Reader:
    """Reads the operations of one function."""

    def __init__(self, arguments: list[Any], device: torch.device, compiled: Any, in_place: int):
        self.device, self.compiled, self.in_place = device, compiled, in_place
        self.slots = len(arguments)
        kinds = [_kind(ir.RankedTensorType(x.type)) for x in arguments]
        self.arguments = {kind: i for i, kind in reversed(list(enumerate(kinds)))}  # the first of each shape and dtype
        self.known: dict[Any, Any] = {x: i for i, x in enumerate(arguments)}  # value -> slot or splat
        self.given = self.slots
        # Slot -> the argument, or the first slot of a kernel's result, whose memory it is in.
        self.memory = {i: i for i in range(self.slots)}
        self.stale: set[int] = set()  # slots whose memory has been written to since
        self.loose: set[int] = set()  # slots whose tensors may not be contiguous
        self.steps: list[Any] = []
        self.operations = 0
        self.kernels = 0

    def read(self, operations: list[Any]) -> Steps:
        *operations, last = operations
        wanted = set(last.operands)
        needed = []
        for op in reversed(operations):
            if any(result in wanted for result in op.results):
                by_row = _rows_of(op)
                needed.append((op, by_row))
                wanted.update(op.operands if by_row is None else by_row.operands)
        for op, by_row in reversed(needed):
            if by_row is None:
                self.operation(op)
            else:
                self.one_kernel(op, by_row)
        if not self.kernels or self.operations > _MOST:
            raise Unknown(f"{self.kernels} kernels and {self.operations} operations of torch's")
        results = self.operands(last)
        if any(isinstance(x, _Splat) for x in results):  # one tensor, which a caller may write to, for all calls
            raise Unknown("results that are constants")
        count = self.in_place
        if count:
            results, rings = results[:-count], results[-count:]
            if [self.memory.get(i) for i in rings] != list(range(count)):
                raise Unknown("rings that are not updated in place")
        memory = [self.memory.get(i, i) for i in results]
        if any(i < self.given for i in memory) or len(set(memory)) < len(memory):
            raise Unknown("results that are arguments, or one another")
        loose = [i for i in results if i in self.loose]
        if loose:  # contiguous, as JAX's are, and as torch's compiler expects them
            self.steps.append(lambda env: _lay_out(env, loose))
        return Steps(self.slots, self.steps, results, self.operations)

    def operation(self, op: Any) -> None:
        read = getattr(self, "_" + op.name.removeprefix("stablehlo."), None)
        if read is None:
            raise Unknown(op.name)
        read(op, *self.operands(op))

    def one_kernel(self, op: Any, rows: "_Rows") -> None:
        """Arithmetic of rows, as the operations of the program that has one kernel for all of it."""
        arguments, (*operations, last) = _body(rows.module)  # which lives until this has been read
        for argument, x in zip(arguments, self.operands(rows), strict=True):
            self.known[argument] = self.slot(x)
        for inner in operations:
            self.operation(inner)
        self.operations += 1  # as one of torch's: among large arrays XLA's way is the one that was measured
        self.known[op.results[0]] = self.known[last.operands[0]]

    def operands(self, op: Any) -> list[Any]:
        found = [self.known[x] for x in op.operands]
        if any(x in self.stale for x in found if isinstance(x, int)):
            raise Unknown("what is read after it was written to")
        return found

    def new(self, value: Any) -> int:
        self.known[value] = self.slots
        self.slots += 1
        return self.slots - 1

    def slot(self, x: Any) -> int:
        """A constant as a tensor, if it is one."""
        if not isinstance(x, _Splat):
            return int(x)
        tensor = torch.full(x.shape, x.number, dtype=x.dtype, device=self.device)
        self.slots, at = self.slots + 1, self.slots
        self.steps.append(lambda env: env.__setitem__(at, tensor))
        return at

    def do(self, op: Any, f: Callable[..., Any], *operands: Any, view: bool = False) -> None:
        """A step of torch's, or a view, which costs no launch; constants are part of it."""
        places = [None if isinstance(x, _Splat) else x for x in operands]
        constants = [x.number if isinstance(x, _Splat) else None for x in operands]
        at = self.new(op.results[0])
        self.operations += not view
        self.loose.add(at)
        if view and operands[0] in self.memory:
            self.memory[at] = self.memory[operands[0]]

        def step(env: list[Any]) -> None:
            env[at] = f(*[c if i is None else env[i] for i, c in zip(places, constants, strict=True)])

        self.steps.append(step)

    def _custom_call(self, op: Any, *given: Any) -> None:
        if op.attributes["call_target_name"].value != KERNEL:
            raise Unknown(str(op.attributes["call_target_name"]))
        operands = [self.slot(x) for x in given]
        aliases: list[int | None] = [None] * len(op.results)
        for entry in op.attributes.get("output_operand_aliases", ()):
            alias = hlo.OutputOperandAlias(entry)
            (result,) = alias.output_tuple_indices or (0,)
            aliases[result] = alias.operand_index
        copied = []
        for written in (x for x in aliases if x is not None):
            place = self.memory.get(operands[written])
            if place is None or self.in_place <= place < self.given:
                raise Unknown("a kernel that writes to what is neither a ring nor a kernel's")
            copied += [i for i, x in enumerate(operands) if self.memory.get(x) == place and i != written]
            self.stale |= {slot for slot, memory in self.memory.items() if memory == place}
        launch = self.compiled(op.attributes["mhlo.backend_config"]["module"].value_bytes, self.device)
        made = []
        for value, written_at in zip(op.results, aliases, strict=True):
            at = self.new(value)
            self.memory[at] = at if written_at is None else self.memory[operands[written_at]]
            shape, dtype = _kind(ir.RankedTensorType(value.type))
            made.append((at, shape, dtype, self.arguments.get((shape, dtype)), written_at))
        loose = [i for i in operands if i in self.loose]
        self.steps.append(_kernel_step(launch, operands, loose, copied, made, self.device))
        self.kernels += 1
        self.operations += len(copied)

    def _constant(self, op: Any) -> None:
        shape, dtype = self.kind(op)
        value = op.attributes["value"]
        if not value.is_splat:
            raise Unknown("a constant of several numbers")
        number = value.get_splat_value().value
        self.known[op.results[0]] = _Splat(bool(number) if dtype == torch.bool else number, shape, dtype)

    def kind(self, op: Any) -> tuple[tuple[int, ...], torch.dtype]:
        return _kind(ir.RankedTensorType(op.results[0].type))

    def _convert(self, op: Any, x: Any) -> None:
        shape, dtype = self.kind(op)
        if isinstance(x, _Splat):
            number = torch.tensor(x.number, dtype=x.dtype).to(dtype).item()
            self.known[op.results[0]] = _Splat(number, shape, dtype)
        elif op.operands[0].type == op.results[0].type:  # torch would return the tensor itself
            self.known[op.results[0]] = x
        else:
            self.do(op, lambda y: y.to(dtype), x)

    def _broadcast_in_dim(self, op: Any, x: Any) -> None:
        shape, dtype = self.kind(op)
        if isinstance(x, _Splat):
            self.known[op.results[0]] = _Splat(x.number, shape, dtype)
            return
        axes = _integers(op, "broadcast_dimensions")
        order = [axes.index(i) if i in axes else None for i in range(len(shape))]
        if [i for i in order if i is not None] != list(range(len(axes))):
            raise Unknown("a broadcast that transposes")
        index = tuple(None if i is None else slice(None) for i in order)
        self.do(op, lambda y: y[index].expand(shape), x, view=True)

    def _reshape(self, op: Any, x: Any) -> None:
        shape, dtype = self.kind(op)
        if isinstance(x, _Splat):
            self.known[op.results[0]] = _Splat(x.number, shape, dtype)
        else:
            self.do(op, lambda y: y.reshape(shape), x, view=True)

    def _transpose(self, op: Any, x: Any) -> None:
        axes = _integers(op, "permutation")
        self.do(op, lambda y: y.permute(axes), x, view=True)

    def _slice(self, op: Any, x: Any) -> None:
        ends = zip(*(_integers(op, f) for f in ("start_indices", "limit_indices", "strides")), strict=True)
        index = tuple(slice(*three) for three in ends)
        self.do(op, lambda y: y[index], x, view=True)

    def _pad(self, op: Any, x: Any, number: Any) -> None:
        low, high = _integers(op, "edge_padding_low"), _integers(op, "edge_padding_high")
        if any(low) or any(_integers(op, "interior_padding")) or min(high) < 0 or not isinstance(number, _Splat):
            raise Unknown("padding in front or in between")
        if not any(high):
            self.known[op.results[0]] = x
            return
        ends = [n for size in reversed(high) for n in (0, size)]
        self.do(op, lambda y: torch.nn.functional.pad(y, ends, value=number.number), x)

    def _concatenate(self, op: Any, *parts: Any) -> None:
        axis = op.attributes["dimension"].value
        self.do(op, lambda *each: torch.cat(each, dim=axis), *[self.slot(x) for x in parts])

    def _optimization_barrier(self, op: Any, *given: Any) -> None:
        self.known.update(zip(op.results, given, strict=True))

    def _dot_general(self, op: Any, x: Any, y: Any) -> None:
        """A sum over the last axis of products, for each of the other axes: in float32, as XLA does."""
        numbers = hlo.DotDimensionNumbers(op.attributes["dot_dimension_numbers"])
        left, right = list(numbers.lhs_batching_dimensions), list(numbers.rhs_batching_dimensions)
        last = len(left)
        ends = list(numbers.lhs_contracting_dimensions), list(numbers.rhs_contracting_dimensions)
        _, dtype = self.kind(op)
        if left != right or sorted(left) != list(range(last)) or ends != ([last], [last]) or dtype != torch.float32:
            raise Unknown("a product of matrices")
        if len(self.kind(op)[0]) != last:
            raise Unknown("a product of matrices")
        self.operations += 2
        self.do(op, lambda a, b: (a.float() * b).sum(-1).permute(left), x, y)

    def _compare(self, op: Any, x: Any, y: Any) -> None:
        kind = hlo.ComparisonDirectionAttr(op.attributes["comparison_direction"]).value
        f = {"EQ": torch.eq, "NE": torch.ne, "GE": torch.ge, "GT": torch.gt, "LE": torch.le, "LT": torch.lt}[kind]
        self.do(op, f, self.slot(x), y)

    def _select(self, op: Any, where: Any, x: Any, y: Any) -> None:
        if isinstance(x, _Splat) and x == y:
            self.known[op.results[0]] = x
        else:
            self.do(op, torch.where, self.slot(where), x if isinstance(y, int) else self.slot(x), y)

    def _multiply(self, op: Any, x: Any, y: Any) -> None:
        self.binary(op, torch.mul, x, y, 1)

    def _subtract(self, op: Any, x: Any, y: Any) -> None:
        self.binary(op, torch.sub, x, y, 0)

    def binary(self, op: Any, f: Any, x: Any, y: Any, neutral: Any) -> None:
        """`f(x, y)`, which is x where y is `neutral`."""
        if isinstance(y, _Splat) and y.number == neutral and math.copysign(1, y.number) > 0:
            self.known[op.results[0]] = x
        elif isinstance(x, _Splat) and isinstance(y, _Splat):
            number = f(*(torch.tensor(z.number, dtype=z.dtype) for z in (x, y))).item()
            self.known[op.results[0]] = _Splat(number, x.shape, x.dtype)
        else:
            self.do(op, f, self.slot(x), y)


def _lay_out(env: list[Any], slots: list[int]) -> None:
    for i in slots:
        env[i] = env[i].contiguous()


def _kernel_step(
    launch: Launch, operands: list[int], loose: list[int], copied: list[int], made: Any, device: torch.device
) -> Any:
    def step(env: list[Any]) -> None:
        if loose:
            _lay_out(env, loose)
        given = [env[i] for i in operands]
        for i in copied:  # the kernel writes to the same memory, for another of its operands
            given[i] = given[i].clone()
        pointers = [x.data_ptr() for x in given]
        for at, shape, dtype, like, written in made:
            if written is not None:
                x = given[written]
            elif like is not None:  # in half the time
                x = torch.empty_like(env[like])
            else:
                x = torch.empty(shape, dtype=dtype, device=device)
            env[at] = x
            pointers.append(x.data_ptr())
        launch(pointers)

    return step


class _Rows(NamedTuple):
    """Arithmetic on rows that one kernel does: its operands, and the program of that kernel."""

    operands: list[Any]
    module: Any


def _rows_of(op: Any) -> _Rows | None:
    """What stands before a backward pass, if that is what the operation ends: results of rows, one beside the other."""
    if op.name != "stablehlo.concatenate" or op.attributes["dimension"].value != 2:
        return None
    wide: list[Any] = []
    narrow: list[Any] = []
    try:
        results = [_each_row(x, wide, narrow) for x in op.operands]
    except Unknown:
        return None
    specs = [
        [
            jax.ShapeDtypeStruct(shape, TO_JAX[dtype])
            for shape, dtype in (_kind(ir.RankedTensorType(x.type)) for x in xs)
        ]
        for xs in (wide, narrow)
    ]
    if list(ir.RankedTensorType(op.results[0].type).shape)[2] != len(results) or not takes(*specs):
        return None
    count = len(wide)
    try:
        program = jax.jit(lambda *arrays: by_row(results, arrays[:count], arrays[count:]))
        lowered = program.trace(*specs[0], *specs[1]).lower(lowering_platforms=("cuda",))
        return _Rows([*wide, *narrow], lowered.compiler_ir())
    except Exception as problem:  # whatever another version of JAX raises: torch does the arithmetic
        _LOG.debug("no kernel for rows: %s: %s", type(problem).__name__, problem)
        return None


def _each_row(value: Any, wide: list[Any], narrow: list[Any]) -> Any:
    """A value [B, N, T], or [B, N, 1, T], as an expression of rows; fills in the arrays that it reads."""

    def number(xs: list[Any], x: Any) -> int:
        if x not in xs:
            xs.append(x)
        return xs.index(x)

    def of(x: Any) -> Any:
        return _each_row(x, wide, narrow)

    op = value.owner
    name = op.name.removeprefix("stablehlo.") if hasattr(op, "attributes") else "an argument"
    if name == "constant":
        if not op.attributes["value"].is_splat:
            raise Unknown("a constant of several numbers")
        return float(op.attributes["value"].get_splat_value().value)
    if name == "broadcast_in_dim":
        given = ir.RankedTensorType(op.operands[0].type)
        if given.rank == 0 or (given.rank, _integers(op, "broadcast_dimensions")) == (3, [0, 1, 3]):
            return of(op.operands[0])
    elif name == "convert" and op.operands[0].type == value.type:
        return of(op.operands[0])
    elif name == "pad":
        sides = (_integers(op, f"{x}_padding{y}") for x, y in (("edge", "_low"), ("edge", "_high"), ("interior", "")))
        if not any(map(any, sides)):
            return of(op.operands[0])
    elif name == "optimization_barrier":
        return of(op.operands[value.result_number])
    elif name == "compare":
        direction = hlo.ComparisonDirectionAttr(op.attributes["comparison_direction"]).value
        return Apply(direction, tuple(of(x) for x in op.operands))
    elif name == "select":
        where, x, y = (of(x) for x in op.operands)
        return x if x == y else Apply(name, (where, x, y))
    elif name in ("multiply", "subtract"):
        x, y = (of(x) for x in op.operands)
        if y == (1.0 if name == "multiply" else 0.0):
            return x
        return Apply(name, (x, y))
    elif name == "dot_general":
        numbers = hlo.DotDimensionNumbers(op.attributes["dot_dimension_numbers"])
        batching = [list(x) for x in (numbers.lhs_batching_dimensions, numbers.rhs_batching_dimensions)]
        contracting = [list(x) for x in (numbers.lhs_contracting_dimensions, numbers.rhs_contracting_dimensions)]
        if batching == [[0, 2, 1]] * 2 and contracting == [[3], [3]]:
            return Wide(*(number(wide, x) for x in op.operands))
    kind = ir.RankedTensorType(value.type)
    if (kind.rank, str(kind.element_type)) != (3, "f32"):
        raise Unknown(name)
    return Narrow(number(narrow, value))


def _kind(value: Any) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and torch's dtype of a tensor in MLIR."""
    names = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "i1": "bool", "i8": "int8", "i32": "int32"}
    name = names.get(str(value.element_type))
    if name is None:
        raise Unknown(str(value))
    return tuple(value.shape), TO_TORCH[name]


def _integers(op: Any, name: str) -> list[int]:
    return [int(n) for n in ir.DenseI64ArrayAttr(op.attributes[name])]
