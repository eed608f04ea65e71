"""The table of implementations, and the one that runs a problem.

Dispatch is pure: from the static facts of a call to a choice. An implementation is a module with a `name`,
`unsupported(problem) -> list[str]` (why it cannot run; empty: it can), `forward` and `backward`. It may say of problems
that their `backward` is another's (`differentiates(problem) -> bool`), may offer to write into a ring what it then
attends to (`writes`, `append_attend`; see `ringjax/_in_place.py`) or to attend to a ring and a longer chunk in one
launch (`extends`, `extend`; see `ringjax/_attend.py`), may leave alone what stands where segments say padding
(`ignores_padding = True`; others get zeros there), and may tell `explain` which pairs it computes (`walk(problem)
-> Walk | None`).
"""

from typing import Any

from ringjax._kernels import cudnn, mosaic, xla
from ringjax._kernels.problem import Problem

IMPLEMENTATIONS: dict[str, Any] = {module.name: module for module in (mosaic, cudnn, xla)}
"""By name, fastest first."""


def reasons_against(problem: Problem) -> dict[str, list[str]]:
    """For each implementation, why it cannot run the problem; no reasons: it can."""
    return {name: module.unsupported(problem) for name, module in IMPLEMENTATIONS.items()}


def resolve(problem: Problem, call: str, implementation: str | None) -> str:
    """The name of the implementation that runs a problem: the named one, or the first that can.

    Raises:
      ValueError: no implementation has that name.
      NotImplementedError: the named one, or all of them, cannot run the problem; the message says why.
    """
    if implementation is not None and implementation not in list(IMPLEMENTATIONS):
        known = ", ".join(repr(name) for name in IMPLEMENTATIONS)
        raise ValueError(f"{call}: implementation must be one of {known} or None, got {implementation!r}.")
    against = reasons_against(problem)
    for name, reasons in against.items():
        if not reasons and implementation in (None, name):
            return name
    if implementation is None:
        first = f"{call}: no implementation can run this call."
    else:
        first = f"{call}: implementation {implementation!r} cannot run this call."
        against = {implementation: against[implementation]}
    facts = "\n".join(f"  {name}: {'; '.join(reasons)}" for name, reasons in against.items())
    raise NotImplementedError(f"{first}\n{facts}")


def ignores_padding(implementation: str) -> bool:
    """Whether `forward` and `backward` take arrays that hold anything where segments say padding, NaN too."""
    return getattr(IMPLEMENTATIONS[implementation], "ignores_padding", False)


def backward_of(problem: Problem, implementation: str) -> str:
    """The name of the implementation whose `backward` goes with a forward pass: its own if it has one."""

    def has(name: str) -> bool:
        return getattr(IMPLEMENTATIONS[name], "differentiates", lambda problem: True)(problem)

    able = (name for name, reasons in reasons_against(problem).items() if not reasons and has(name))
    return implementation if has(implementation) else next(able)
