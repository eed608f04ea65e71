"""What a query sees: a window in positions, as a static value."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from ringjax._conventions import CONVENTIONS, Convention, checked, counted, sides_of, sides_of_xformers, value_of


@dataclasses.dataclass(frozen=True, repr=False)
class Window:
    """Which keys a query sees, decided by positions alone.

    The query at position p sees the key at position j if and only if `-right <= p - j <= left`,
    or `0 <= j < sinks` and `j <= p + right`. Positions count tokens, within a row of the batch, from 0.

    A window is a value: hashable, equal to any window with the same fields, and static under `jax.jit`.

    Attributes:
        left: How many keys before its own a query sees; None: all of them.
        right: How many keys after its own a query sees; 0 is causal, None: all of them.
        sinks: How many of the first keys are seen however far back they are (StreamingLLM), on top of `left`. With
            `left=None` they change nothing that is seen; they are kept as given, so that such a window does not equal
            the one without them.

    Raises:
        TypeError: A field is not an int (a bool is not one).
        ValueError: A field is negative, or beyond int32.
    """

    left: int | None
    right: int | None = 0
    sinks: int = 0

    def __post_init__(self) -> None:
        # Whatever counts as an int is stored as one, so that equal windows hash alike and nothing here is an array.
        object.__setattr__(self, "left", checked("Window", "left", self.left))
        object.__setattr__(self, "right", checked("Window", "right", self.right))
        object.__setattr__(self, "sinks", counted("Window", "sinks", self.sinks))

    def __repr__(self) -> str:
        right = "" if self.right == 0 else f", right={self.right}"
        sinks = "" if self.sinks == 0 else f", sinks={self.sinks}"
        return f"Window(left={self.left}{right}{sinks})"

    @classmethod
    def causal(cls, size: int | None = None, sinks: int = 0) -> Self:
        """The last `size` keys, the query's own included, and the first `sinks`. None: every key so far.

        Raises `ValueError` if `size` is less than 1.
        """
        size = checked("Window.causal", "size", size, least=1)
        return cls(None if size is None else size - 1, 0, sinks)

    @classmethod
    def symmetric(cls, radius: int) -> Self:
        """`radius` keys before the query's own and as many after it: `2 * radius + 1` in all."""
        radius = counted("Window.symmetric", "radius", radius)
        return cls(radius, radius)

    @classmethod
    def full(cls) -> Self:
        """Every key, before and after."""
        return cls(None, None)

    @property
    def size(self) -> int | None:
        """W = left + 1: how many keys a causal query sees, its own included and sinks apart; None: unbounded."""
        return None if self.left is None else self.left + 1

    @property
    def is_causal(self) -> bool:
        """Whether no query sees a key that comes after its own."""
        return self.right == 0

    def visible(self, query_positions: Any, key_positions: Any) -> Any:
        """Whether each query sees each key.

        The two are signed integers of one dtype: NumPy arrays, JAX arrays, tracers or Python ints. They broadcast, and
        so does the answer: `visible(p[:, None], j[None, :])` is a mask. A key at a negative position is never seen,
        which is how to say that there is no token there. Positions may be anything from 0 to 2**31 - 1 in int32.
        """
        seen = key_positions >= 0
        if self.left is None and self.right is None:
            # No bound mentions the queries, yet the answer has their shape.
            return seen & (query_positions == query_positions)
        # Bounds are compared with the difference: added to a position, they could overflow int32.
        behind = query_positions - key_positions
        if self.left is not None:
            near = behind <= self.left
            seen = seen & (near | (key_positions < self.sinks) if self.sinks else near)
        if self.right is not None:
            seen = seen & (behind >= -self.right)
        return seen

    @staticmethod
    def conventions() -> Mapping[str, Convention]:
        """The projects whose windows `from_convention` and `to_convention` know, each with what its number means."""
        return CONVENTIONS

    @classmethod
    def from_convention(cls, project: str, value: Any) -> Self:
        """The window that `project` calls `value`: `Window.from_convention("vllm", 4096)` sees 4096 keys.

        `value` is a number, or a pair where the project takes two, or what the project writes for "no window"; see
        `Window.conventions()`. Causal, unless the project's value speaks of both sides.

        Raises `ValueError` for an unknown project and for a number that the project would refuse, `TypeError` for
        anything but a number.
        """
        return cls(*sides_of("Window.from_convention", project, value))

    def to_convention(self, project: str) -> Any:
        """What `project` calls this window: `Window.causal(4096).to_convention("flash")` is `(4095, 0)`.

        Raises `ValueError` for an unknown project, and where the project cannot say all of this window: it never
        returns a value with which a query would see other keys.
        """
        return value_of("Window.to_convention", project, self)

    @classmethod
    def from_flash(cls, left: int | None = -1, right: int | None = -1, *, causal: bool = False) -> Self:
        """From FlashAttention's `window_size=(left, right)`, with its defaults; -1 or None is unbounded.

        Neither number counts the query's own key: a window of W keys is `from_flash(W - 1, 0)`. With `causal=True`
        FlashAttention ignores `right`, and so does this.
        """
        left, right = sides_of("Window.from_flash", "flash", (left, right))
        return cls(left, 0 if causal else right)

    def to_flash(self) -> tuple[int, int]:
        """FlashAttention's `window_size=(left, right)`; -1 is unbounded. Raises `ValueError` if there are sinks."""
        return value_of("Window.to_flash", "flash", self)

    @classmethod
    def from_jax(cls, local_window_size: int | tuple[int, int] | None = None, *, is_causal: bool = False) -> Self:
        """From the arguments of `jax.nn.dot_product_attention` or `tokamax.dot_product_attention`.

        A pair is (left, right), neither counting the query's own key. One int w is (w, w), both sides: 2 w + 1 keys.
        """
        left, right = sides_of("Window.from_jax", "jax", local_window_size)
        return cls(left, 0 if is_causal else right)

    def to_jax(self, *, is_causal: bool = False) -> tuple[int, int] | None:
        """The `local_window_size` of `jax.nn.dot_product_attention` called with this `is_causal`.

        A causal window is best passed with `is_causal=True`: without it jax.nn's cuDNN implementation takes the right
        side (0) for unbounded and lets queries see the future (jax pull request 39576).

        Raises `ValueError` if there are sinks, if `is_causal=True` and the window is not causal, and if one side only
        is unbounded (a causal window without bound needs `is_causal=True`).
        """
        if is_causal and self.right != 0:
            raise ValueError(f"Window.to_jax: is_causal=True needs a causal window, got {self}.")
        if is_causal and self.left is None:
            return None
        return value_of("Window.to_jax", "jax", self)

    @classmethod
    def from_huggingface(cls, sliding_window: int | None, *, causal: bool = True) -> Self:
        """From the `sliding_window` of a Hugging Face transformers config; None is unbounded.

        In a causal layer it is the number of keys seen, the query's own included. In a bidirectional one
        (`causal=False`) the same number is a radius: 2 sliding_window + 1 keys.
        """
        project = "huggingface" if causal else "huggingface-bidirectional"
        return cls(*sides_of("Window.from_huggingface", project, sliding_window))

    def to_huggingface(self, *, causal: bool = True) -> int | None:
        """The `sliding_window` of a Hugging Face layer that is causal, or not.

        Raises `ValueError` if there are sinks, or if the window is not causal, or with `causal=False` not symmetric.
        """
        return value_of("Window.to_huggingface", "huggingface" if causal else "huggingface-bidirectional", self)

    @classmethod
    def from_xformers(cls, attn_bias: Any) -> Self:
        """From an xFormers `attn_bias`: a mask, or the numbers that one is made of.

        An int is the `window_size` of `make_local_attention` and of the causal local masks (W keys, the query's own
        included); a pair is `(window_left, window_right)` of `LocalAttentionFromBottomRightMask`; None is no mask.
        A mask is read by name and fields, and xFormers is not imported. Only its window is taken: how it lays out
        blocks, and how it aligns queries with keys, are arguments of the call (`segment_ids`, `q_offset`).

        Raises `TypeError` for a tensor, or for a mask that says more than a window can.
        """
        return cls(*sides_of_xformers("Window.from_xformers", attn_bias))

    def to_xformers(self) -> int:
        """The `window_size` of xFormers' `make_local_attention` and causal local masks.

        Raises `ValueError` if the window has sinks, a right side or no bound. Its two-sided mask is
        `LocalAttentionFromBottomRightMask(*window.to_convention("xformers-sides"))`.
        """
        return value_of("Window.to_xformers", "xformers", self)

    @classmethod
    def from_mlx(cls, max_size: int, keep: int = 0) -> Self:
        """From MLX's `RotatingKVCache(max_size, keep)`, decoding a token at a time.

        The `keep` first keys stay for ever, and `max_size` counts them: the window is `max_size - keep` keys.
        """
        keep = counted("Window.from_mlx", "keep", keep)
        size = counted("Window.from_mlx", "max_size", max_size, least=1)
        if size <= keep:
            raise ValueError(f"Window.from_mlx: max_size must exceed keep, got {size} and {keep}.")
        return cls.causal(size - keep, sinks=keep)

    def to_mlx(self) -> tuple[int, int]:
        """`(max_size, keep)` of MLX's `RotatingKVCache`.

        Raises `ValueError` if the window has a right side or no bound (MLX's `KVCache` is a causal cache without one).
        """
        if self.right != 0 or self.left is None:
            raise ValueError(
                f"Window.to_mlx: RotatingKVCache needs a causal window with a size, got {self}."
                "\n  Hint: MLX's KVCache keeps every key."
            )
        return self.left + 1 + self.sinks, self.sinks
