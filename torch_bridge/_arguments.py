"""What a torch user passed in: the checks that only torch's side can make; shapes and options are ringjax's."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import ringjax as rj
from torch_bridge._dlpack import check_tensor, describe

_INT32 = torch.iinfo(torch.int32)
_FLOATS = {torch.float32, torch.bfloat16, torch.float16}
_INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


def check_window(call: str, window: Any) -> None:
    """Raises unless `window` is a Window."""
    if not isinstance(window, rj.Window):
        raise TypeError(
            f"{call}: window must be a Window, got {type(window).__name__}.\n"
            "  Hint: Window.causal(size) sees the last `size` keys."
        )


def check_floats(call: str, tensors: dict[str, Any], others: dict[str, Any]) -> None:
    """Raises unless all are tensors of floats on one device; `others` may be None."""
    given = tensors | {name: x for name, x in others.items() if x is not None}
    if torch.compiler.is_compiling():  # the operation itself looks again
        return
    device = getattr(next(iter(given.values())), "device", None)
    if device in _SEEN and all(_is_right(x, device) for x in given.values()):
        return
    for name, x in given.items():
        if not isinstance(x, Tensor):
            check_tensor(call, name, x)
        if x.dtype not in _FLOATS:
            hint = "\n  Hint: x.float(): there are no kernels for float64." if x.dtype == torch.float64 else ""
            raise TypeError(f"{call}: {name} must be one of float32, bfloat16, float16, got {describe(x)}.{hint}")
    devices = [str(x.device) for x in given.values()]
    if any(device != devices[0] for device in devices):
        names = list(given)
        listed = ", ".join(names[:-1]) + " and " + names[-1]
        raise ValueError(
            f"{call}: {listed} must be on one device, got {', '.join(devices[:-1])} and {devices[-1]}.\n"
            "  Hint: move them first, for instance with x.to(q.device)."
        )
    for name, x in given.items():
        check_tensor(call, name, x)
    _SEEN.add(device)


_SEEN: set[Any] = set()  # devices that JAX has, too


def _is_right(x: Any, device: Any) -> bool:
    """All that is asked of a tensor, in the time that a small kernel leaves."""
    return isinstance(x, Tensor) and x.dtype in _FLOATS and x.device == device and x.layout is torch.strided


def row_integers(call: str, name: str, value: Any, like: Tensor) -> Tensor | None:
    """An int32 tensor on the device of `like`, from integers of any width; None stays None.

    64-bit values that do not fit are an error, never another number; looking at them waits for a GPU.
    """
    if value is None:
        return None
    if not isinstance(value, Tensor):
        try:
            value = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"{call}: {name} must be integers, got {describe(value)}.") from None
        value = value.to(like.device)
    if value.dtype not in _INTEGERS:
        raise TypeError(f"{call}: {name} must be integers, got {describe(value)}.")
    if value.device != like.device:
        raise ValueError(f"{call}: {name} must be on the device of q, {like.device}, got {value.device}.")
    if value.dtype == torch.int64 and not torch.compiler.is_compiling() and value.numel():
        least, most = (int(x) for x in torch.aminmax(value.detach()))
        if least < _INT32.min or most > _INT32.max:
            got = f"{least}" if least == most else f"{least} to {most}"
            raise ValueError(f"{call}: {name} must fit int32, got {got}.")
    return value.to(torch.int32)


def tiles_of(call: str, config: Any) -> tuple[int | None, int | None, int | None]:
    """The tile sizes of a config, for ringjax to check."""
    if config is None:
        return None, None, None
    if not hasattr(config, "block_size") or not hasattr(config, "tile_size") or not hasattr(config, "head_tile_size"):
        raise TypeError(f"{call}: config must be a RingBufferConfig, got {describe(config)}.")
    return config.block_size, config.tile_size, config.head_tile_size


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """Under autocast, the tensors in its dtype: float32 and 16-bit ones, as for torch's own attention."""
    kind = getattr(getattr(tensors[0], "device", None), "type", None)
    if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.dtype in _FLOATS else x for x in tensors)


def bucketed(call: str, bucket: int | Sequence[int], length: int) -> int:
    """The length that a call of this length is padded to."""
    if isinstance(bucket, int) and not isinstance(bucket, bool):
        if bucket < 1:
            raise ValueError(f"{call}: bucket must be at least 1, got {bucket}.")
        return -(-length // bucket) * bucket
    if not isinstance(bucket, Sequence) or not all(isinstance(n, int) and n > 0 for n in bucket):
        raise TypeError(f"{call}: bucket must be an int or a list of lengths, got {bucket!r}.")
    if not any(n >= length for n in bucket):
        raise ValueError(f"{call}: bucket must have a length of at least {length}, got {list(bucket)}.")
    return min(n for n in bucket if n >= length)
