"""torch tensor <-> jax array over DLPack: one memory, two owners, in order on every stream.

Who waits. On a GPU, JAX computes on streams of its own. A tensor that goes to JAX carries an event of torch's current
stream, on which JAX waits before it reads; an array that comes to torch makes torch's current stream wait for JAX, and
so everything that torch does on that stream afterwards, reusing the memory of JAX's inputs included. Nobody waits on
the host. On a CPU torch is synchronous, and so is every array that comes from JAX.

Who frees. Either side holds a reference as long as it has an array on the other's memory. On a GPU a reference is not
enough: torch drops a tensor while its kernels still read it, because its own allocator reuses memory in stream order,
which JAX's allocator knows nothing of. So a `Lease` hangs on every tensor made here: when the last view goes, the
array stays until JAX has been given a program that waits for the streams which may still read it.
"""

import collections
import contextlib
import dataclasses
import functools
import logging
import threading
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import torch
from torch.utils import dlpack as torch_dlpack

_LOG = logging.getLogger("torch_bridge")

TO_JAX = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.int8: "int8",
    torch.int16: "int16",
    torch.int32: "int32",
    torch.uint8: "uint8",
    torch.uint16: "uint16",
    torch.uint32: "uint32",
    torch.bool: "bool",
    torch.complex64: "complex64",
    torch.float8_e4m3fn: "float8_e4m3fn",
    torch.float8_e5m2: "float8_e5m2",
}
"""The dtypes that both sides have, whatever jax's `jax_enable_x64`."""
TO_TORCH = {name: dtype for dtype, name in TO_JAX.items()}
_WIDE = (torch.float64, torch.int64, torch.uint64, torch.complex128)

_capsule: Any = torch_dlpack.to_dlpack  # type: ignore[attr-defined]  # unlike `__dlpack__`, it waits for nothing

_ALIGNMENT = 64  # bytes: on a CPU, XLA copies what begins elsewhere


@dataclasses.dataclass(frozen=True)
class Stats:
    """What crossing between torch and JAX has cost since the last `reset_stats`.

    Attributes:
      copies: how many tensors and rings had to be copied, of any kind.
      copied_bytes: their bytes.
      strides: of the copies, those of a tensor whose strides no compact layout has (a slice of packed QKV).
      alignment: those of a CPU tensor that does not begin at a multiple of 64 bytes.
      shared: those of a ring that somebody else still held when a new token was to be written into it.
      wanted: those that were asked for (`copy=True`).
    """

    copies: int = 0
    copied_bytes: int = 0
    strides: int = 0
    alignment: int = 0
    shared: int = 0
    wanted: int = 0


_stats = Stats()
_lock = threading.Lock()


def stats() -> Stats:
    """What crossing has cost so far: every copy is counted, and logged by the logger `torch_bridge` at level DEBUG."""
    return _stats


def reset_stats() -> None:
    """Counts from zero again."""
    global _stats
    with _lock:
        _stats = Stats()


def count_copy(reason: str, size: int, what: Any) -> None:
    """Counts one copy of `size` bytes."""
    global _stats
    with _lock:
        changes = {"copies": _stats.copies + 1, "copied_bytes": _stats.copied_bytes + size}
        _stats = dataclasses.replace(_stats, **changes, **{reason: getattr(_stats, reason) + 1})
    _LOG.debug("copied %s (%d bytes): %s", what, size, reason)


def describe(x: Any) -> str:
    """A tensor as `bfloat16[2, 4, 8, 64]`, as ringjax writes arrays; anything else by its type."""
    if isinstance(x, torch.Tensor):
        return f"{str(x.dtype).removeprefix('torch.')}[{', '.join(map(str, x.shape))}]"
    return type(x).__name__


def is_compact(tensor: torch.Tensor) -> bool:
    """Whether the tensor is its memory's own array with its axes in some order: what JAX takes as it is."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def to_jax(tensor: torch.Tensor, *, copy: bool = False) -> jax.Array:
    """The tensor as a jax array on the same memory.

    JAX arrays are immutable: while the array is in use, do not write to the tensor. It is copied, and counted in
    `stats()`, where JAX cannot take it as it is: strides with gaps, and on a CPU memory that is not aligned.

    Args:
      tensor: on a CPU or a CUDA device; transposed is fine.
      copy: whether the array is to have memory of its own.

    Raises:
      TypeError: not a tensor, or a dtype that JAX has not, or has only with `jax_enable_x64`.
      ValueError: the tensor requires grad, or is on a device that JAX does not have.
    """
    check_tensor("to_jax", "tensor", tensor)
    if tensor.requires_grad:
        raise ValueError(
            f"to_jax: tensor must not require grad, got {describe(tensor)} that does.\n"
            "  Hint: gradients do not cross to JAX this way: use tensor.detach(), or torch_bridge.attention."
        )
    if copy:
        count_copy("wanted", tensor.nbytes, describe(tensor))
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return view_in_jax(tensor)


def view_in_jax(tensor: torch.Tensor) -> jax.Array:
    """`to_jax` without its checks."""
    (array,) = views_in_jax([tensor])
    assert array is not None
    return array


def views_in_jax(tensors: Sequence[torch.Tensor | None], freed: list[Any] | None = None) -> list[jax.Array | None]:
    """Views of the tensors of one call, all on one device; None stays None.

    `freed` is for a caller that runs a program on the views: it is filled with what may be freed after that.
    """
    found: list[torch.Tensor | None] = []
    first = next(x for x in tensors if x is not None)
    on_cpu = first.device.type == "cpu"
    for tensor in tensors:
        if tensor is None:
            found.append(None)
            continue
        if tensor.requires_grad or tensor.is_conj() or tensor.is_neg():
            tensor = tensor.detach().resolve_conj().resolve_neg()
        if not is_compact(tensor):
            count_copy("strides", tensor.nbytes, describe(tensor))
            tensor = tensor.contiguous()
        elif on_cpu and tensor.data_ptr() % _ALIGNMENT:
            # Here rather than in XLA, which may still be reading when it returns.
            count_copy("alignment", tensor.nbytes, describe(tensor))
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        found.append(tensor)
    if _managed_tensor_to_buffer is None:
        return [None if x is None else jax.dlpack.from_dlpack(x) for x in found]
    device = jax_device("to_jax", first.device)
    stream = None if on_cpu else _tell_jax(device, freed)
    arrays: list[jax.Array | None] = []
    for x in found:
        arrays.append(None if x is None else _managed_tensor_to_buffer(_capsule(x), device, stream, None))
        # One event for all: a program waits for each of its inputs, so it is enough that one of them carries it.
        stream = stream if x is None else None
    return arrays


def current_stream(index: int) -> int:
    """torch's current stream on a GPU, as a number. `torch.cuda.current_stream` takes ten times as long."""
    return int(torch._C._cuda_getCurrentRawStream(index))


@functools.cache
def _stream(index: int, raw: int) -> Any:
    return torch.cuda.ExternalStream(raw, index) if raw else torch.cuda.default_stream(index)


def torch_stream(device: torch.device, raw: int) -> Any:
    """A stream of a GPU's, by its number."""
    return _stream(device.index, raw)


class _Events(threading.local):
    """One event per thread and device: recorded and waited for at once, it can be used again at once."""

    def __init__(self) -> None:
        self.of: dict[Any, tuple[int, Any, Any]] = {}


_events = _Events()


def _tell_jax(device: Any, freed: list[Any] | None) -> int:
    """The stream on which JAX is told that tensors are ready, after it has been made to wait for torch's."""
    index = device.local_hardware_id
    if device not in _events.of:
        stream = device.get_stream_for_external_ready_events()
        _events.of[device] = stream, torch.cuda.ExternalStream(stream, index), torch.cuda.Event()
    stream, external, event = _events.of[device]
    wait_for = {current_stream(index)}
    if freed is not None:
        freed += Lease.take(index)
        wait_for = wait_for.union(*(streams for streams, _ in freed))
    for raw in wait_for:
        event.record(_stream(index, raw))
        external.wait_event(event)
    return int(stream)


try:  # `jax.dlpack.from_dlpack` without its questions about other libraries, which take longer than a small kernel
    from jax._src.lib import _jax  # type: ignore[attr-defined]

    _managed_tensor_to_buffer: Any = _jax.dlpack_managed_tensor_to_buffer
except (ImportError, AttributeError):
    _managed_tensor_to_buffer = None


def to_torch(array: jax.Array, *, copy: bool = False) -> torch.Tensor:
    """The array as a torch tensor on the same memory.

    JAX arrays are immutable, and torch cannot know: do not write to the tensor (ask for a copy if you must) as long
    as anything in JAX holds the array.

    Args:
      array: on one device.
      copy: whether the tensor is to have memory of its own.

    Raises:
      TypeError: not a jax array (a traced one is none), or a dtype that torch has not.
      ValueError: the array is spread over several devices.
    """
    if not isinstance(array, jax.Array) or isinstance(array, jax.core.Tracer):
        hint = "\n  Hint: inside jit, grad or vmap there is no array yet." if isinstance(array, jax.Array) else ""
        raise TypeError(f"to_torch: array must be a jax array, got {type(array).__name__}.{hint}")
    if len(array.sharding.device_set) != 1:
        raise ValueError(f"to_torch: array must be on one device, got one on {len(array.sharding.device_set)}.")
    if str(array.dtype) not in TO_TORCH and str(array.dtype) not in ("float64", "int64"):
        raise TypeError(f"to_torch: array must have a dtype of torch's, got {array.dtype}.")
    if array.platform() != "cpu":
        Lease.settle(next(iter(array.devices())).local_hardware_id)
    tensor = view_in_torch(array)
    if copy:
        count_copy("wanted", tensor.nbytes, describe(tensor))
        tensor = tensor.clone()
    return tensor


def view_in_torch(array: jax.Array) -> torch.Tensor:
    """`to_torch` without its checks."""
    # One program's outputs are ready together, so this waits for the program, and so for all its reading of inputs.
    if array.platform() == "cpu":
        return torch_dlpack.from_dlpack(array.block_until_ready())
    (device,) = array.devices()
    index = device.local_hardware_id
    raw = current_stream(index)
    # torch's current stream waits for JAX; 1 is DLPack's name of the default stream.
    tensor = torch_dlpack.from_dlpack(array.__dlpack__(stream=raw or 1))  # type: ignore[call-arg]
    Lease.on(tensor, array, index, raw)
    return tensor


def make_room(device: Any) -> None:
    """Lets go of all arrays of a device that torch has dropped, waiting for what reads them: before new ones."""
    if device.platform != "cpu":
        Lease.settle(device.local_hardware_id, wait=True)


def give_back(device: Any, freed: list[Any]) -> None:
    """What `views_in_jax` put into `freed`, if the program was not launched after all."""
    if freed:
        Lease.give_back(device.local_hardware_id, freed)


class Lease:
    """Keeps an array after the tensor's last view has gone, for kernels that torch has launched before.

    The array goes to `_returned`, with the streams that may still read it. The next call of the bridge on that device
    takes it from there, makes its program wait for those streams, and lets it go once the program is launched: JAX
    computes in order, so whatever JAX puts into that memory next comes later still. No event of its own is needed.
    Where torch launches all programs itself none comes by: `settle` lets go of what torch has read to the end.
    """

    _returned: ClassVar[dict[int, collections.deque[Any]]] = collections.defaultdict(collections.deque)
    _read: ClassVar[dict[int, collections.deque[Any]]] = collections.defaultdict(collections.deque)

    __slots__ = ("array", "index", "raw")

    def __init__(self, array: jax.Array, index: int, raw: int) -> None:
        self.array, self.index, self.raw = array, index, raw

    @classmethod
    def on(cls, tensor: torch.Tensor, array: jax.Array, index: int, raw: int) -> None:
        """Hangs a lease on the tensor's storage, which all its views share."""
        tensor.untyped_storage()._torch_bridge_lease = cls(array, index, raw)  # type: ignore[attr-defined]

    @staticmethod
    def move(tensor: torch.Tensor, raw: int) -> None:
        """Says that the tensor is used on another stream from now on, which waits for the last one."""
        tensor.untyped_storage()._torch_bridge_lease.raw = raw  # type: ignore[attr-defined]

    @classmethod
    def take(cls, index: int) -> list[Any]:
        """What has been returned on a device: the streams to wait for, and the array."""
        returned, taken = cls._returned[index], []
        while returned:
            try:
                taken.append(returned.popleft())
            except IndexError:  # another thread took it
                break
        return taken

    @classmethod
    def settle(cls, index: int, *, wait: bool = False) -> None:
        """Lets go of what torch's streams are done with, or, to `wait`, of all that was returned."""
        if not cls._returned[index] and not cls._read[index]:
            return
        if torch.cuda.is_current_stream_capturing():
            return
        if taken := cls.take(index):
            streams = set().union(*(streams for streams, _ in taken))
            cls._read[index].append(([_stream(index, raw).record_event() for raw in streams], taken))
        pending = cls._read[index]
        while pending:
            try:
                events, arrays = pending.popleft()
            except IndexError:  # another thread took it
                return
            for event in events if wait else ():
                event.synchronize()
            if not all(event.query() for event in events):
                pending.appendleft((events, arrays))
                return

    @classmethod
    def give_back(cls, index: int, taken: list[Any]) -> None:
        """For a program that was not launched after all."""
        cls._returned[index].extend(taken)

    def __del__(self) -> None:
        try:
            streams = {self.raw, current_stream(self.index)}
            self._returned[self.index].append((streams, self.array))
        except Exception:  # the interpreter is going away, and the memory with it
            return


def check_tensor(call: str, name: str, tensor: Any) -> None:
    """Raises unless `tensor` is one that JAX can take."""
    if not isinstance(tensor, torch.Tensor):
        hint = ""
        if isinstance(tensor, jax.Array):
            hint = "\n  Hint: jax arrays go to ringjax itself, or through torch_bridge.to_torch."
        raise TypeError(f"{call}: {name} must be a torch tensor, got {type(tensor).__name__}.{hint}")
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise TypeError(f"{call}: {name} must be a dense tensor, got one of layout {tensor.layout}.")
    if tensor.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{call}: {name} must be on a cpu or cuda device, got {tensor.device}.")
    if tensor.dtype not in TO_JAX and not (tensor.dtype in _WIDE and getattr(jax.config, "jax_enable_x64", False)):
        rule = "a dtype that JAX has"
        hint = "\n  Hint: jax has 64 bits only with jax_enable_x64." if tensor.dtype in _WIDE else ""
        raise TypeError(f"{call}: {name} must have {rule}, got {describe(tensor)}.{hint}")
    jax_device(call, tensor.device)


def jax_device(call: str, device: torch.device) -> Any:
    """JAX's name for a torch device."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    found = _jax_device(device)
    if found is None:
        raise ValueError(
            f"{call}: JAX must see the torch device, got {device}, and JAX sees {jax.devices()}.\n"
            "  Hint: pip install 'ringjax[cuda]', and do not hide the device from JAX (JAX_PLATFORMS)."
        )
    return found


@functools.cache
def _jax_device(device: torch.device) -> Any:
    if device.type == "cpu":
        return jax.local_devices(backend="cpu")[0]
    try:
        devices = jax.local_devices(backend="cuda")
    except RuntimeError:
        return None
    return next((found for found in devices if found.local_hardware_id == device.index), None)


def on_device(device: Any) -> Any:
    """While tracing, ringjax asks for the default device: this makes it the one that the tensors are on."""
    if getattr(jax.config, "jax_default_device", None) is None and device is _first_device():
        return contextlib.nullcontext()
    return jax.default_device(device)


@functools.cache
def _first_device() -> Any:
    return jax.local_devices()[0]


def torch_device(array: jax.Array) -> torch.device:
    """Torch's name for the device of an array."""
    (device,) = array.devices()
    return torch.device("cpu") if device.platform == "cpu" else torch.device("cuda", device.local_hardware_id)


def as_jax_dtype(call: str, dtype: Any) -> Any:
    """The jax dtype of a torch one."""
    if dtype not in TO_JAX:
        got = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else repr(dtype)
        raise TypeError(f"{call}: dtype must be a torch dtype that JAX has, got {got}.")
    return jnp.dtype(TO_JAX[dtype])
