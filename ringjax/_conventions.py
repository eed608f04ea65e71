"""How other projects write a window, in one table, and the arithmetic between their numbers and (left, right).

Nobody agrees on whether a window counts the query's own key, on what stands for "no window", and on whether one number
means one side or both: at least seven projects have shipped a window that was off by one. The table is the only place
in ringjax that knows; `Window.from_convention`, `Window.to_convention` and the named converters read it.
"""

import dataclasses
import operator
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

Side = int | None  # a bound on one side of the query; None: unbounded
Sides = tuple[Side, Side]  # (left, right)

_LARGEST = 2**31 - 2  # positions are int32, and the window's size is left + 1


@dataclasses.dataclass(frozen=True)
class Convention:
    """What one project's argument means.

    Attributes:
        argument: The argument, as the project spells it.
        counts: What its number counts. `"size"`: the keys that a causal query sees, its own included (W). `"left"`:
            the keys before a causal query's own (W - 1). `"sides"`: a pair (left, right), neither of them counting
            the query's own key. `"radius"`: the keys on each side of the query's own.
        unbounded: The values that stand for no bound; the first is the one that ringjax writes. Empty: there is none.
        source: Where the project says so.
    """

    argument: str
    counts: Literal["size", "left", "sides", "radius"]
    unbounded: tuple[int | None, ...]
    source: str

    @property
    def smallest(self) -> int:
        """The smallest number that this argument can hold."""
        return 1 if self.counts == "size" else 0


_TABLE = {
    "axlearn": Convention("sliding_window_size", "left", (), "common/attention_bias.py: 8 is attending to 9 tokens"),
    "flash": Convention("window_size", "sides", (-1, None), "flash_attn_func: [i - left, i + right] inclusive"),
    "flashinfer": Convention("window_left", "left", (-1,), "variants.cuh: kv_idx + window_left >= qo_idx; causal=True"),
    "gemma": Convention("sliding_window_size", "size", (None,), "gm/nn/_modules.py: keys > positions - size"),
    "gpt-oss": Convention("sliding_window", "size", (0, None), "torch/model.py: tril(-inf, diagonal=-sliding_window)"),
    "huggingface": Convention("sliding_window", "size", (None,), "masking_utils.py: kv_idx > q_idx - sliding_window"),
    "huggingface-bidirectional": Convention("sliding_window", "radius", (None,), "masking_utils.py: abs(q - kv) <= w"),
    "jax": Convention("local_window_size", "sides", (), "jax.nn.dot_product_attention; an int w means (w, w)"),
    "llama.cpp": Convention("n_swa", "size", (0,), "llama-hparams.h, is_masked_swa: p1 - p0 >= n_swa"),
    "mistral": Convention("sliding_window", "size", (None,), "mistral_inference/cache.py: make_local_attention"),
    "mlx": Convention("window_size", "size", (None,), "mlx_lm/models/base.py: linds < rinds + window_size"),
    "onnx": Convention("(left_window_size, right_window_size)", "sides", (-1,), "Attention, since opset 25"),
    "onnxruntime": Convention("local_window_size", "size", (-1,), "GroupQueryAttention, since onnxruntime PR 25927"),
    "recurrentgemma": Convention("window_size", "left", (), "jax/modules.py: q_positions <= k_positions + window_size"),
    "splash": Convention("window_size", "sides", (None,), "jax: splash_attention_mask.LocalMask"),
    "tokamax": Convention("local_window_size", "sides", (), "tokamax.dot_product_attention; an int w means (w, w)"),
    "transformer-engine": Convention("window_size", "sides", (-1,), "jax/attention.py: [i - left, i + right]"),
    "vllm": Convention("sliding_window", "size", (None,), "backends/flash_attn.py: (sliding_window - 1, 0)"),
    "xformers": Convention("window_size", "size", (), "make_local_attention; _window_size of the causal local masks"),
    "xformers-legacy": Convention("window_size", "left", (), "components/attention/local.py, causal=True"),
    "xformers-sides": Convention("(window_left, window_right)", "sides", (), "LocalAttentionFromBottomRightMask"),
}
CONVENTIONS: Mapping[str, Convention] = MappingProxyType(_TABLE)

_INT_MEANS_BOTH_SIDES = ("jax", "tokamax")

# Masks of xformers.ops.fmha.attn_bias (and of its successor, mslk.attention.fmha) that hold no window of their own.
_XFORMERS_CAUSAL = (
    "LowerTriangularMask",
    "LowerTriangularFromBottomRightMask",
    "BlockDiagonalCausalMask",
    "BlockDiagonalCausalFromBottomRightMask",
    "BlockDiagonalCausalWithOffsetPaddedKeysMask",
    "BlockDiagonalCausalWithOffsetGappyKeysMask",
    "PagedBlockDiagonalCausalWithOffsetPaddedKeysMask",
    "PagedBlockDiagonalCausalWithOffsetGappyKeysMask",
)
_XFORMERS_FULL = (
    "BlockDiagonalMask",
    "BlockDiagonalPaddedKeysMask",
    "BlockDiagonalGappyKeysMask",
    "PagedBlockDiagonalPaddedKeysMask",
    "PagedBlockDiagonalGappyKeysMask",
)


def checked(call: str, name: str, value: Any, *, least: int = 0, unbounded: tuple[int | None, ...] = (None,)) -> Side:
    """`value` as an int of at least `least`, or None where it is one of `unbounded`; raises in the name of `call`."""
    others = "".join(f" or {other}" for other in unbounded)
    hint = f"\n  Hint: {unbounded[0]} stands for unbounded." if unbounded else ""
    rule = f"{call}: {name} must be an int >= {least}{others}, got {value!r}.{hint}"
    if value is None and None in unbounded:
        return None
    try:
        if isinstance(value, bool):  # an int to Python; as a number of keys, a mistake
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(rule) from None
    if number in unbounded:
        return None
    if number < least:
        raise ValueError(rule)
    if number > _LARGEST:
        raise ValueError(f"{call}: {name} must be at most {_LARGEST} (positions are int32), got {number}.{hint}")
    return number


def counted(call: str, name: str, value: Any, *, least: int = 0) -> int:
    """`value` as an int of at least `least`; raises in the name of `call`."""
    number = checked(call, name, value, least=least, unbounded=())
    assert number is not None
    return number


def looked_up(call: str, project: str) -> Convention:
    """The convention of `project`; raises in the name of `call`."""
    if project not in CONVENTIONS:
        known = ", ".join(CONVENTIONS)
        raise ValueError(f"{call}: project must be a known one, got {project!r}.\n  Known: {known}.")
    return CONVENTIONS[project]


def sides_of(call: str, project: str, value: Any) -> Sides:
    """What the project's `value` lets a query see, as (left, right)."""
    convention = looked_up(call, project)
    if convention.counts == "sides":
        return _sides_of_pair(call, project, value)
    number = checked(call, convention.argument, value, least=convention.smallest, unbounded=convention.unbounded)
    if convention.counts == "radius":
        return number, number
    return (None if number is None else number - convention.smallest), 0


def _sides_of_pair(call: str, project: str, value: Any) -> Sides:
    name, unbounded = CONVENTIONS[project].argument, CONVENTIONS[project].unbounded
    if value is None:
        return None, None
    if isinstance(value, tuple | list) and len(value) == 2:
        left = checked(call, f"left of {name}", value[0], unbounded=unbounded)
        return left, checked(call, f"right of {name}", value[1], unbounded=unbounded)
    if project in _INT_MEANS_BOTH_SIDES and not isinstance(value, tuple | list):
        radius = counted(call, name, value)
        return radius, radius
    raise TypeError(f"{call}: {name} must be a pair (left, right), got {value!r}.")


def value_of(call: str, project: str, window: Any) -> Any:
    """The project's value for `window`; raises, in the name of `call`, where that would see other keys."""
    convention = looked_up(call, project)
    name, left, right = convention.argument, window.left, window.right
    # Sinks beside an unbounded left side are visible anyway: dropping them loses nothing.
    if window.sinks and left is not None:
        raise ValueError(
            f"{call}: {name} cannot say sinks, got {window}."
            "\n  Hint: dataclasses.replace(window, sinks=0) drops them; queries past the window then see fewer keys."
        )
    if convention.counts == "radius" and left != right:
        raise ValueError(
            f"{call}: {name} holds one number for both sides, got {window}."
            "\n  Hint: Window.symmetric(radius) has equal sides."
        )
    if convention.counts in ("size", "left") and right != 0:
        raise ValueError(
            f"{call}: {name} cannot say what follows a query, got {window}."
            "\n  Hint: dataclasses.replace(window, right=0) is its causal part."
        )
    if convention.counts == "sides":
        if left is None and right is None and not convention.unbounded:
            return None
        return _written(call, convention, window, left), _written(call, convention, window, right)
    return _written(call, convention, window, None if left is None else left + convention.smallest)


def _written(call: str, convention: Convention, window: Any, number: Side) -> Side:
    if number is not None:
        return number
    if not convention.unbounded:
        raise ValueError(
            f"{call}: {convention.argument} cannot say unbounded, got {window}."
            "\n  Hint: a bound of at least the longest sequence sees the same keys."
        )
    return convention.unbounded[0]


def sides_of_xformers(call: str, mask: Any) -> Sides:
    """What an xFormers `attn_bias` lets a query see within its block, as (left, right). Imports nothing of xFormers."""
    kind = type(mask).__name__
    if mask is None or kind in _XFORMERS_FULL:
        return None, None
    if kind in _XFORMERS_CAUSAL:
        return None, 0
    if hasattr(mask, "_window_size"):
        return sides_of(call, "xformers", mask._window_size)
    if hasattr(mask, "window_left") and hasattr(mask, "window_right"):
        return sides_of(call, "xformers-sides", (mask.window_left, mask.window_right))
    if isinstance(mask, tuple | list):
        return sides_of(call, "xformers-sides", mask)
    if hasattr(mask, "__index__") and getattr(mask, "ndim", 0) == 0:
        return sides_of(call, "xformers", mask)
    raise TypeError(
        f"{call}: attn_bias must be a window size, (window_left, window_right) or a mask that is a window, got {kind}."
        "\n  Hint: a tensor, and a mask that holds one, says more than a window can."
    )
