"""Programs that torch launches itself: their kernels on its own stream, without JAX's runtime in between.

On Hopper a program of ringjax's is one or two Mosaic kernels with a little arithmetic around them. Through JAX's
runtime every tensor that crosses costs more than a small kernel does. So such a program is lowered once for its shapes,
and torch does what it says: it allocates, computes the arithmetic, and launches the kernels, the same to the bit, with
the launcher that JAX itself has for torch (`plgpu.as_torch_kernel`, for one kernel and nothing else). Whatever is not
known here is left to JAX's runtime.
"""

import ctypes
import logging
import struct
import threading
import types
from collections.abc import Sequence
from typing import Any

import jax
import torch
from torch import Tensor

from torch_bridge._dlpack import TO_JAX, count_copy, current_stream, describe, jax_device, on_device

_LOG = logging.getLogger("torch_bridge")

_LARGE = 1 << 22  # elements of the queries: beyond, the GPU's time hides the host's, and XLA fuses what torch does not
_HALF = (torch.bfloat16, torch.float16)
_ALIGNMENT = 16  # bytes: of what a Hopper GPU's copy engine reads


class Launched:
    """A program as torch does it.

    Called with what `given` made of the program's tensors, its rings' leaves before them; returns its flat results
    without the rings, which are updated in place.
    """

    def __init__(self, program: Any):
        self._program = program  # a `_stablehlo.Steps`
        self.next: dict[Any, Launched | None] = {}  # what was found for the backward passes of such a call

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        slots, steps, results, _ = self._program
        env: list[Any] = [*tensors, *[None] * (slots - len(tensors))]
        for step in steps:
            step(env)
        return [env[i] for i in results]

    def given(self, tensors: Sequence[Tensor | None]) -> list[Tensor] | None:
        """Tensors without None, as kernels read them, the first of them the queries; None: JAX is to do this."""
        found = [x for x in tensors if x is not None]
        if self._program.operations and found[0].numel() > _LARGE:
            return None
        for i, x in enumerate(found):
            if not x.is_contiguous() or x.data_ptr() % _ALIGNMENT or x.is_neg():
                count_copy("alignment" if x.is_contiguous() else "strides", x.nbytes, describe(x))
                found[i] = x.resolve_neg().clone(memory_format=torch.contiguous_format)
        return found


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


class _Thread(threading.local):
    """The GPUs whose contexts a thread has: a kernel's launcher asks for one, and ends the process without it.

    torch makes it the thread's with the first thing it asks CUDA for; a tensor from its cache of memory is no such
    thing.
    """

    def __init__(self) -> None:
        self.devices: set[int] = set()

    def get_context(self, index: int) -> None:
        torch.cuda.mem_get_info(index)
        self.devices.add(index)


_thread = _Thread()


def _compiled(module: bytes, device: torch.device) -> Any:
    """A kernel's launcher, JAX's own, on torch's current stream instead of its default one: of its pointers."""
    from jax.experimental.mosaic.gpu import core

    index = device.index
    _thread.get_context(index)
    launch, _ = core._compile_as_torch_gpu_kernel(module)
    names = launch.__code__.co_freevars
    cells = dict(zip(names, launch.__closure__, strict=True))
    if set(names) == {"function", "launch_c", "torch"}:  # jax 0.11: without its launcher's own Python, 3 us less
        function = cells["function"].cell_contents
        address: Any = ctypes.cast(cells["launch_c"].cell_contents, ctypes.c_void_p).value
        launch_c = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(address)

        def on_current_stream(pointers: Sequence[int]) -> None:
            if index not in _thread.devices:
                _thread.get_context(index)
            launch_c(function, current_stream(index), struct.pack(f"{len(pointers)}Q", *pointers))

        on_current_stream.kept = launch  # type: ignore[attr-defined]
        return on_current_stream

    class Cuda:
        current_device = staticmethod(torch.cuda.current_device)

        @staticmethod
        def default_stream(_: Any = None) -> Any:
            return types.SimpleNamespace(_as_parameter_=ctypes.c_void_p(current_stream(index)))

    if "torch" not in names:
        raise NotImplementedError("JAX's launcher is not the one known")
    cells["torch"] = types.CellType(types.SimpleNamespace(device=torch.device, cuda=Cuda))
    made: Any = types.FunctionType(launch.__code__, launch.__globals__, closure=tuple(cells[n] for n in names))

    def on_its_stream(pointers: Sequence[int]) -> None:
        if index not in _thread.devices:
            _thread.get_context(index)
        made((ctypes.c_void_p * len(pointers))(*pointers), device)

    return on_its_stream
