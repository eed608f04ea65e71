"""XLA's own text of what it compiled, read as a graph: where large arrays flow, and which instructions make new ones.

Only what is materialised counts: the instructions of the entry, of loops' bodies and of branches. Those inside a fusion
are one pass over its results. Updates that XLA does in place (`dynamic-update-slice`, `scatter`, fusions that end in
one, custom calls with aliased results) hand the array on; where they could not, XLA has put a `copy` before them.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

_BITS = re.compile(r"[a-z]+(\d+)")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")

_MOVED_ON = {"bitcast", "optimization-barrier", "add-dependency", "domain", "copy-done", "async-done"}
_IN_PLACE = {"dynamic-update-slice", "scatter"}
_NOTHING_NEW = {"parameter", "constant", "tuple", "get-tuple-element", "while", "conditional", "call", *_MOVED_ON}


class Array(NamedTuple):
    """An array as HLO writes it: `f32[2,3]`."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        bits = _BITS.match(self.dtype)  # pred has none, and takes a byte
        return self.size * (int(bits[1]) if bits else 8) // 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


class Instruction(NamedTuple):
    """One line: `name = arrays opcode(operands), rest`; a tuple has many arrays."""

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    rest: str
    root: bool

    def number(self, pattern: str) -> int:
        found = re.search(pattern, self.rest)
        assert found is not None, self
        return int(found[1])

    @property
    def origin(self) -> str:
        """The operation of JAX that it came from, such as `jit(f)/while/body/concatenate`; empty if not known."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    def __str__(self) -> str:
        return f"{self.name} = {', '.join(map(str, self.arrays))} {self.opcode}({', '.join(self.operands)})"


class Module(NamedTuple):
    """A compiled program: its computations by name, the entry's name, and which arguments results lie in."""

    computations: Mapping[str, tuple[Instruction, ...]]
    entry: str
    aliased: frozenset[int]

    def parameters(self) -> list[Instruction]:
        """The arguments, in order."""
        lines = (x for x in self.computations[self.entry] if x.opcode == "parameter")
        return sorted(lines, key=lambda x: x.number(r"^(\d+)\)"))

    def new_arrays(self) -> Iterator[tuple[Instruction, Array]]:
        """All arrays that are made in memory, and by which instruction: neither in a fusion nor in place."""
        fused = {name for lines in self.computations.values() for x in lines for name in _fused(x)}
        for name, lines in self.computations.items():
            for x in lines if name not in fused else ():
                if x.opcode not in _NOTHING_NEW and x.opcode not in _IN_PLACE:
                    in_place = _updated_operands(self, x)
                    yield from ((x, array) for i, array in enumerate(x.arrays) if i not in in_place)


def _fused(x: Instruction) -> list[str]:
    return _CALLED.findall(x.rest) if x.opcode not in ("while", "conditional", "call", "async-start") else []


def _closing(text: str, start: int) -> int:
    """The end of the bracket that opens at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] in "({") - (text[i] in ")}")
        if depth == 0:
            return i
    return len(text) - 1


def read(text: str) -> Module:
    """The program that `compiled.as_text()` tells of."""
    computations: dict[str, tuple[Instruction, ...]] = {}
    entry, name = "", ""
    lines: list[Instruction] = []
    for line in text.splitlines():
        if head := _HEAD.match(line):
            name, lines = head[2], []
            entry = name if head[1] else entry
        elif line.startswith("}"):
            computations[name] = tuple(lines)
        elif found := _LINE.match(line):
            lines.append(_instruction(*found.groups()))
    header = text.partition("\n")[0]
    start = header.find("input_output_alias=")
    aliases = header[start : _closing(header, header.index("{", start)) + 1] if start >= 0 else ""
    return Module(computations, entry, frozenset(map(int, re.findall(r"\}: \((\d+), ", aliases))))


def _instruction(root: str | None, name: str, text: str) -> Instruction:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    arrays = tuple(
        Array(dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in _ARRAY.findall(text[:end])
    )
    opcode, _, rest = text[end:].strip().partition("(")
    close = _closing("(" + rest, 0) - 1
    operands = tuple(re.findall(r"%([\w.-]+)", rest[:close]))
    return Instruction(name, arrays, opcode, operands, rest, root is not None)


class Made(NamedTuple):
    """A new array made of a watched one: by which instruction, and of which."""

    instruction: Instruction
    array: Array
    source: int


Flow = dict[tuple[int, ...], frozenset[int]]  # of a value: at each place of a tuple, which sources are in it


def made_of(module: Module, sources: Mapping[int, int]) -> list[Made]:
    """The new arrays that are made of arguments; not matrix products with them, such as attention's logits.

    Args:
      module: the program.
      sources: for arguments of the program, by number, from how many elements on an array made of them counts.
    """
    found: dict[tuple[str, int], Made] = {}

    def carried(x: Instruction, array: Array, flows: Flow) -> frozenset[int]:
        leaves = frozenset().union(*flows.values()) if flows else frozenset()
        return frozenset(leaf for leaf in leaves if array.size >= sources[leaf])

    def run(name: str, arguments: list[Flow]) -> Flow:
        values: dict[str, Flow] = {}
        result: Flow = {}
        for x in module.computations[name]:
            operands = [values.get(operand, {}) for operand in x.operands]
            values[x.name] = step(x, operands, arguments)
            if x.root:
                result = values[x.name]
        return result

    def step(x: Instruction, operands: list[Flow], arguments: list[Flow]) -> Flow:
        called = _CALLED.findall(x.rest)
        if x.opcode == "parameter":
            return arguments[x.number(r"^(\d+)\)")]
        if x.opcode == "tuple":
            return _tuple(operands)
        if x.opcode == "get-tuple-element":
            return _element(operands[0], x.number(r"index=(\d+)"))
        if x.opcode in _MOVED_ON and operands:
            return operands[0]
        if x.opcode == "while":
            state: Flow = operands[0]
            while (after := _join(state, run(called[0], [state]))) != state:
                state = after
            return state
        if x.opcode == "conditional":
            branches = _BRANCHES.search(x.rest)
            names = re.findall(r"[\w.-]+", branches[1]) if branches else called
            joined: Flow = {}
            for branch, operand in zip(names, operands[1:], strict=True):
                joined = _join(joined, run(branch, [operand]))
            return joined
        if x.opcode == "call":
            return run(called[0], operands)
        if x.opcode in _IN_PLACE and len(x.arrays) == 1:
            return operands[0]
        return make(x, operands)

    def make(x: Instruction, operands: list[Flow]) -> Flow:
        if _multiplies(module, x):
            return {}
        in_place = _updated_operands(module, x)
        everything: Flow = {}
        for operand in operands:
            everything = _join(everything, {(): frozenset().union(*operand.values())} if operand else {})
        flow: Flow = {}
        for i, array in enumerate(x.arrays):
            place = (i,) if len(x.arrays) > 1 else ()
            if i in in_place:
                flow[place] = operands[in_place[i]].get((), frozenset())
                continue
            flow[place] = carried(x, array, everything)
            for leaf in flow[place]:
                found[x.name, leaf] = Made(x, array, leaf)
        return {place: leaves for place, leaves in flow.items() if leaves}

    count = len(module.parameters())
    run(module.entry, [{(): frozenset([number])} if number in sources else {} for number in range(count)])
    return list(found.values())


def _multiplies(module: Module, x: Instruction) -> bool:
    """Whether an instruction is a matrix product: what it makes of an array is something else, however large."""
    if x.opcode == "custom-call":
        target = re.search(r'custom_call_target="([^"]*)"', x.rest)
        return target is not None and ("gemm" in target[1] or "matmul" in target[1])
    if x.opcode == "fusion":
        return any(_multiplies(module, line) for line in module.computations[_CALLED.findall(x.rest)[0]])
    return x.opcode in ("dot", "convolution")


def _tuple(parts: list[Flow]) -> Flow:
    return {(i, *place): leaves for i, part in enumerate(parts) for place, leaves in part.items()}


def _element(flow: Flow, index: int) -> Flow:
    return {place[1:]: leaves for place, leaves in flow.items() if place[:1] == (index,)}


def _join(a: Flow, b: Flow) -> Flow:
    return {place: a.get(place, frozenset()) | b.get(place, frozenset()) for place in a.keys() | b.keys()}


def _updated_operands(module: Module, x: Instruction) -> dict[int, int]:
    """For results that are operands updated in place, which operand."""
    if x.opcode == "custom-call":
        start = x.rest.find("output_to_operand_aliasing=")
        aliases = x.rest[start : _closing(x.rest, x.rest.index("{", start)) + 1] if start >= 0 else ""
        return {int(out or 0): int(of) for out, of in re.findall(r"\{(\d*)\}: \((\d+), ", aliases)}
    if x.opcode != "fusion":
        return {}
    lines = {line.name: line for line in module.computations[_CALLED.findall(x.rest)[0]]}
    (root,) = (line for line in lines.values() if line.root)
    outs = [lines[name] for name in root.operands] if root.opcode == "tuple" else [root]
    found = {}
    for i, out in enumerate(outs):
        out = _behind_bitcasts(out, lines)
        if out.opcode in _IN_PLACE:
            of = _behind_bitcasts(lines[out.operands[0]], lines)
            if of.opcode == "parameter":
                found[i] = of.number(r"^(\d+)\)")
    return found


def _behind_bitcasts(x: Instruction, lines: Mapping[str, Instruction]) -> Instruction:
    while x.opcode == "bitcast":
        x = lines[x.operands[0]]
    return x
