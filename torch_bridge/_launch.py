"""Programs that torch launches itself: their kernels on its own stream, without JAX's runtime in between.

On Hopper a program of ringjax's is one or two Mosaic kernels with a little arithmetic around them. Through JAX's
runtime every tensor that crosses costs more than a small kernel does. So such a program is lowered once for its shapes,
and torch does what it says: it allocates, computes the arithmetic, and launches the kernels, the same to the bit, with
the launcher that JAX itself has for torch (`plgpu.as_torch_kernel`, for one kernel and nothing else). Whatever is not
known here is left to JAX's runtime.
"""

import ctypes
import logging
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
import torch
from torch import Tensor

from torch_bridge._dlpack import TO_JAX, current_stream, jax_device, on_device

_LOG = logging.getLogger("torch_bridge")

_LARGE = 1 << 22  # elements of the queries: beyond, the GPU's time hides the host's, and XLA fuses what torch does not
_HALF = (torch.bfloat16, torch.float16)
_ALIGNMENT = 16  # bytes: of what a Hopper GPU's copy engine reads


class Launched:
    """A program as torch does it.

    Called with the program's tensors, its rings' leaves before them, all without None; returns its flat results without
    the rings, which are updated in place.
    """

    def __init__(self, program: Any):
        self._program = program  # a `_stablehlo.Steps`

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        slots, steps, results, _ = self._program
        env: list[Any] = [*tensors, *[None] * (slots - len(tensors))]
        for step in steps:
            step(env)
        return [env[i].contiguous() for i in results]  # as JAX's are, and as torch's compiler expects them

    def takes(self, tensors: Sequence[Tensor]) -> bool:
        """Whether it is to be done for these tensors, as they lie; the first are the queries."""
        if self._program.operations and tensors[0].numel() > _LARGE:
            return False
        return all(x.is_contiguous() and x.data_ptr() % _ALIGNMENT == 0 and not x.is_neg() for x in tensors)


_found: dict[Any, Launched | None] = {}


def find(program: Any, tensors: Sequence[Tensor | None], rings: Any = None, signature: Any = None) -> Launched | None:
    """How torch can launch a jitted program of such tensors, on their GPU; None: JAX must.

    Args:
      program: of `(*tensors)`, or of `(rings, *tensors)`.
      tensors: None stays None.
      rings: a pytree of arrays; their memory is what the program is to update in place.
      signature: what tells such rings from others.
    """
    first = next(x for x in tensors if x is not None)
    if first.device.type != "cuda" or first.dtype not in _HALF:
        return None
    if torch.cuda.current_device() != first.device.index:  # where kernels are loaded and launched
        return None
    key = program, first.device, signature, *[None if x is None else (x.dtype, x.shape) for x in tensors]
    try:
        return _found[key]
    except KeyError:
        if torch.cuda.is_current_stream_capturing():  # a kernel cannot be loaded now
            return None
    _found[key] = _build(program, tensors, rings, first.device)
    return _found[key]


def _build(program: Any, tensors: Sequence[Tensor | None], rings: Any, device: torch.device) -> Launched | None:
    specs = [None if x is None else jax.ShapeDtypeStruct(x.shape, TO_JAX[x.dtype]) for x in tensors]
    before = [] if rings is None else [jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), rings)]
    try:
        with on_device(jax_device("launch", device)):
            module = program.trace(*before, *specs).lower(lowering_platforms=("cuda",)).compiler_ir()
        from torch_bridge import _stablehlo  # imports parts of JAX that another version may have elsewhere

        return Launched(_stablehlo.read(module, device, _compiled, in_place=len(jax.tree.leaves(before))))
    except Exception as problem:  # whatever an experimental part of JAX, or a wrong call, raises: JAX's way says it
        _LOG.debug("left to JAX's runtime: %s: %s", type(problem).__name__, problem)
        return None


def _compiled(module: bytes, device: torch.device) -> Callable[[Any, torch.device], None]:
    """A kernel's launcher, JAX's own, on torch's current stream instead of its default one."""
    from jax.experimental.mosaic.gpu import core

    launch, _ = core._compile_as_torch_gpu_kernel(module)
    index = device.index

    class Cuda:
        current_device = staticmethod(torch.cuda.current_device)

        @staticmethod
        def default_stream(_: Any = None) -> Any:
            return types.SimpleNamespace(_as_parameter_=ctypes.c_void_p(current_stream(index)))

    here = types.SimpleNamespace(device=torch.device, cuda=Cuda)
    names = launch.__code__.co_freevars
    if "torch" not in names:
        raise NotImplementedError("JAX's launcher is not the one known")
    cells = [types.CellType(here) if n == "torch" else c for n, c in zip(names, launch.__closure__, strict=True)]
    made: Any = types.FunctionType(launch.__code__, launch.__globals__, closure=tuple(cells))
    return made
