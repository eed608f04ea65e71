"""What XLA made of a function: the memory it takes beside its inputs and outputs, and the copies in it."""

import re
from collections.abc import Callable
from typing import Any

import jax

_RESULT = re.compile(r"^\s*(?:ROOT )?%?[\w.-]+ = \w+\[([\d,]*)\][^ ]* (copy|copy-start|transpose|concatenate|pad)\(")


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
    found = []
    for line in executable.as_text().splitlines():
        result = _RESULT.match(line)
        if result is None:
            continue
        count = 1
        for size in filter(None, result[1].split(",")):
            count *= int(size)
        if count >= elements:
            found.append(line.strip()[:120])
    return found
