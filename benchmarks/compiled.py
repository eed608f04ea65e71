"""What XLA made of a function: the memory it takes beside its inputs and outputs, and the copies in it."""

from collections.abc import Callable
from typing import Any

import jax

from ringjax import _hlo

_MOVES = {"copy", "copy-start", "transpose", "concatenate", "pad"}


def compile_for(f: Callable[..., Any], *args: Any, donate: tuple[int, ...] = ()) -> Any:
    """The executable of `f` for arguments like these."""
    return jax.jit(f, donate_argnums=donate).lower(*args).compile()


def temp_bytes(executable: Any) -> int:
    """The most memory that it holds at one time beside its arguments and results."""
    return int(executable.memory_analysis().temp_size_in_bytes)


def aliased_bytes(executable: Any) -> int:
    """Bytes of its results that lie in arguments given away to it."""
    return int(executable.memory_analysis().alias_size_in_bytes)


def large_copies(executable: Any, elements: int) -> list[str]:
    """Instructions, fused ones too, that write at least so many elements only to move them."""
    lines = (line for body in _hlo.read(executable.as_text()).computations.values() for line in body)
    moves = (line for line in lines if line.opcode in _MOVES)
    return [str(line)[:120] for line in moves if any(array.size >= elements for array in line.arrays)]
