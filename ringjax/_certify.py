"""Whether a decoding step, as it was compiled, keeps its rings in place: told from the executable, before it runs."""

import dataclasses
import warnings
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.tree_util import Partial, keystr, tree_flatten_with_path

from ringjax import _hlo, _inputs
from ringjax._buffer import RingBuffer

_MORE = 64  # without rings, by how much an array may be smaller than the largest and still count as one


class Watched(NamedTuple):
    """One array of the state that must stay in place."""

    name: str
    shape: str
    bytes: int
    threshold: int | None  # elements from which on an array made of it is a copy; None: it is too small to matter
    leaf: int  # of the state


@dataclasses.dataclass(frozen=True)
class Certificate:
    """What `certify` found; `print` it.

    Attributes:
      platform: that it was compiled for.
      rings: name, shape and bytes of each array that stays in place.
      argument_bytes, aliased_bytes: of all arguments, and of results that lie in arguments given away.
      temp_bytes: the most that is held at one time beside arguments and results.
      largest: the largest temporary, as an instruction of XLA's; None: there is none.
      executable: what was compiled, `executable(*inputs, state)`; it overwrites the state.
    """

    platform: str
    rings: tuple[tuple[str, str, int], ...]
    argument_bytes: int
    aliased_bytes: int
    temp_bytes: int
    largest: str | None
    executable: Any = dataclasses.field(repr=False)

    def __str__(self) -> str:
        held = sum(size for _, _, size in self.rings)
        return "\n".join(
            [
                f"certified on {self.platform}: {len(self.rings)} arrays of rings, {held:,} bytes, all in place",
                *(f"  {name}: {shape}, {size:,} bytes" for name, shape, size in self.rings),
                f"  arguments {self.argument_bytes:,} bytes, of which results overwrite {self.aliased_bytes:,}",
                f"  temporaries {self.temp_bytes:,} bytes at most; the largest: {self.largest or 'none'}",
                "  one executable for every position: nothing of the state is static or changes its shape",
            ]
        )


def certify(step: Any, state: Any, *inputs: Any, least_bytes: int | None = None) -> Certificate:
    """Compiles a decoding step, or a loop of them, and checks that it runs in memory that does not grow or move.

    Called as `step(*inputs, state) -> (out, state)`, like the steps of `generate` and like `attend`; nothing is run.
    The checks: every ring of the state is donated, and the new ring lies where the old one was; no array as large as
    half a ring is made of one, in a loop or out of it (a copy, a cache that is shifted, rings that go through a scan as
    its `xs` and `ys`); and the state that comes out has the tree, shapes and dtypes of the one that went in, and no
    input is static, so that the one executable serves every position and every wrap.

    Args:
      step: jitted by you, with the state donated (`donate_argnums`), or any function, which is jitted here that way.
      state: a pytree with the rings; shapes (`jax.eval_shape`) do as well as arrays. A `RingBuffer` is its keys, values
        and scales; with further axes in front it is a stack of rings, and no one of them may be copied.
      inputs: what comes before the state; arrays or shapes.
      least_bytes: other arrays of the state, from this size on, count as rings too; None: if there is no `RingBuffer`,
        those of at least 1/64 of the largest's bytes, else none.

    Returns:
      A `Certificate`.

    Raises:
      ValueError: a check failed: the message names the ring, and the instruction of XLA's and the operation of JAX that
        made the copy; or there is nothing to check.
      TypeError: `step` is no function.
    """
    call = "certify"
    if not callable(step):
        raise TypeError(f"{call}: step must be a function (*inputs, state) -> (out, state), got {type(step).__name__}.")
    watched = _watched(call, state, least_bytes)
    # What a Partial carries are arguments: as constants they would be compiled in.
    before = (step, *inputs) if isinstance(step, Partial) else inputs
    lowered = _lowered(call, step, state, before)
    arguments = _check_statics(call, lowered, state, before)
    offset = len(jax.tree.leaves(before))
    for ring in watched:
        if not arguments[offset + ring.leaf].donated:
            first = f"{call}: every ring must be donated, got {ring.name} without."
            hint = f"jax.jit(step, donate_argnums={len(inputs)}): each call makes a second ring otherwise."
            raise ValueError(_inputs.message(first, _facts(ring), hint))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = lowered.compile()
    module, memory = _hlo.read(compiled.as_text()), compiled.memory_analysis()
    parameters = _parameters(compiled, module, arguments)
    for ring in watched:
        if parameters.get(offset + ring.leaf) not in module.aliased:
            first = f"{call}: every ring must be updated in place, got {ring.name} in a new array."
            hint = "the step must return it with the same shape and dtype, and nothing else may need the old one."
            raise ValueError(_inputs.message(first, _facts(ring), hint))
    by_parameter = {parameters[offset + ring.leaf]: ring for ring in watched if ring.threshold is not None}
    temp = int(memory.temp_size_in_bytes)
    _check_copies(call, module, by_parameter, temp)
    new = list(module.new_arrays())
    smallest = min(by_parameter.values(), key=lambda ring: ring.bytes)
    if temp - sum(array.bytes for _, array in new) >= smallest.bytes:
        first = f"{call}: no temporary may be as large as a ring, got {temp} bytes that no instruction accounts for."
        raise ValueError(_inputs.message(first, _facts(smallest)))
    largest = max(new, key=lambda pair: pair[1].bytes, default=None)
    return Certificate(
        platform=jax.default_backend(),
        rings=tuple((ring.name, ring.shape, ring.bytes) for ring in watched),
        argument_bytes=int(memory.argument_size_in_bytes),
        aliased_bytes=int(memory.alias_size_in_bytes),
        temp_bytes=temp,
        largest=None if largest is None else f"{largest[1]} of {largest[0].opcode} {largest[0].origin}".strip(),
        executable=compiled,
    )


def _facts(ring: Watched) -> dict[str, str]:
    return {"ring": f"{ring.name}, {ring.shape}, {ring.bytes} bytes"}


def _watched(call: str, state: Any, least_bytes: int | None) -> list[Watched]:
    """The arrays of the state that must stay in place."""
    leaves = tree_flatten_with_path(state)[0]
    bytes_of = [int(np.prod(x.shape)) * np.dtype(x.dtype).itemsize if hasattr(x, "shape") else 0 for _, x in leaves]
    nodes = tree_flatten_with_path(state, is_leaf=lambda x: isinstance(x, RingBuffer))[0]
    rings = {path for path, node in nodes if isinstance(node, RingBuffer)}
    parts = [getattr(path[-1], "name", "") if path[:-1] in rings and path else "" for path, _ in leaves]
    of_rings = {i: part for i, part in enumerate(parts) if part in ("k", "v", "k_scale", "v_scale")}
    if least_bytes is None:
        least_bytes = max(bytes_of, default=0) // _MORE if not of_rings else None
    else:
        least_bytes = _inputs.as_int(call, "least_bytes", least_bytes, least=1)
    watched = []
    for i, ((path, x), size) in enumerate(zip(leaves, bytes_of, strict=True)):
        if i not in of_rings and (least_bytes is None or not size or size < least_bytes):
            continue
        elements = int(np.prod(x.shape[-4:] if i in of_rings else x.shape))
        threshold = None if of_rings.get(i, "").endswith("scale") else max(1, elements // 2)
        watched.append(Watched(f"state{keystr(path)}", _inputs.describe(x), size, threshold, i))
    if not any(ring.threshold is not None for ring in watched):
        raise ValueError(
            f"{call}: state must hold a ring or another large array, got {len(leaves)} leaves without one."
        )
    return watched


def _lowered(call: str, step: Any, state: Any, inputs: Any) -> Any:
    if isinstance(step, Partial):
        step = jax.jit(lambda step, *args: step(*args), donate_argnums=len(inputs))
    elif not hasattr(step, "lower"):
        plain = step
        step = jax.jit(lambda *args: plain(*args), donate_argnums=len(inputs))
    try:
        with warnings.catch_warnings():  # of donated arrays that cannot be used, which is told below
            warnings.simplefilter("ignore")
            return step.lower(*inputs, state)
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerIntegerConversionError) as error:
        first = f"{call}: one executable must serve every position, got a step that reads one as a Python number."
        facts = {"error": str(error).partition("\n")[0]}
        raise ValueError(
            _inputs.message(first, facts, "keep positions as arrays: ring.length, not int(...)")
        ) from error


def _check_statics(call: str, lowered: Any, state: Any, inputs: Any) -> list[Any]:
    """What is known of each argument, in order; raises where another position needs another executable."""
    rule = f"{call}: one executable must serve every position, got"
    hint = "a Python number that is static, in the state or beside it, compiles anew for each value: make it an array."
    arguments = jax.tree.leaves(lowered.args_info, is_leaf=lambda x: hasattr(x, "donated"))
    if len(arguments) != len(jax.tree.leaves((inputs, state))):
        static = [f"{x!r}" for x in inputs if isinstance(x, int | float | str)]
        raise ValueError(_inputs.message(f"{rule} a static input: {', '.join(static) or 'one'}.", hint=hint))
    out = lowered.out_info
    after = out[-1] if isinstance(out, tuple | list) and len(out) else out
    trees = {"before": str(jax.tree.structure(state)), "after": str(jax.tree.structure(after))}
    if trees["before"] != trees["after"]:
        raise ValueError(_inputs.message(f"{rule} a state whose tree or static fields change.", trees, hint))
    given = tree_flatten_with_path(jax.eval_shape(lambda: state))[0]
    changed = [
        f"state{keystr(path)} from {before} to {now}"
        for (path, x), y in zip(given, jax.tree.leaves(after), strict=True)
        if (before := _inputs.describe(x)) != (now := _inputs.describe(y))
    ]
    if changed:
        raise ValueError(_inputs.message(f"{rule} a state that changes: {changed[0]}.", hint=hint))
    return arguments


_NAMES = {"bool": "pred", "float": "f", "bfloat": "bf", "int": "s", "uint": "u", "complex": "c"}


def _parameters(compiled: Any, module: _hlo.Module, arguments: list[Any]) -> dict[int, int]:
    """For each argument, its number in the executable, which leaves out those that nothing reads."""
    kept = getattr(getattr(compiled, "_executable", None), "_kept_var_idx", None)
    if kept is not None:
        return {argument: number for number, argument in enumerate(sorted(kept))}
    # No public name tells which were left out: the first that do not fit.
    avals = [(str(x.dtype), tuple(x.shape)) for x in arguments]
    numbered = dict(enumerate(x.arrays[0] for x in module.parameters()))
    found, at = {}, 0
    missing = len(avals) - len(numbered)
    for i, (dtype, shape) in enumerate(avals):
        if at in numbered and (not missing or (numbered[at].shape == shape and _same(dtype, numbered[at].dtype))):
            found[i], at = at, at + 1
        else:
            missing -= 1
    return found


def _same(dtype: str, of_hlo: str) -> bool:
    letters = dtype.rstrip("0123456789").partition("_")[0].rstrip("0123456789")
    return of_hlo.startswith(_NAMES.get(letters, of_hlo))


def _check_copies(call: str, module: _hlo.Module, by_parameter: dict[int, Watched], temp: int) -> None:
    thresholds = {number: ring.threshold for number, ring in by_parameter.items() if ring.threshold is not None}
    made = [
        m
        for m in _hlo.made_of(module, thresholds)
        # What does not fit into the temporaries is in place: an elementwise pass over a ring, say.
        if m.instruction.opcode.startswith("copy") or m.array.bytes <= temp
    ]
    if made:
        one = made[0]
        ring = by_parameter[one.source]
        first = f"{call}: no temporary may be as large as a ring, got an array made of {ring.name}."
        origins = dict.fromkeys(m.instruction.origin for m in made if m.instruction.origin)
        facts = _facts(ring) | {"op": str(one.instruction), "from": next(iter(origins), "not told by XLA")}
        facts |= {"in all": f"{len(made)} such arrays, {sum(m.array.bytes for m in made)} bytes"}
        hint = (
            "keep each layer's ring as a leaf of the loop's carry, write it once per step, and return the new one only."
        )
        raise ValueError(_inputs.message(first, facts, hint))
