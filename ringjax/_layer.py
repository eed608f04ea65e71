"""What the attention layers for nnx and for linen have in common: their checks, and all between their projections."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array

from ringjax import _inputs
from ringjax._attend import attend
from ringjax._attention import attention
from ringjax._buffer import RingBuffer
from ringjax._kernels.tiles import TileSizes
from ringjax._rotary import apply_rotary, check_positions, rotary_frequencies
from ringjax._sharding import MeshAxes, attend_over_sequence, over_sequence
from ringjax._window import Window

CALL = "SlidingWindowAttention"


@dataclasses.dataclass(frozen=True)
class Layer:
    """The static facts of a `SlidingWindowAttention`, checked; None where a default follows from another field."""

    num_heads: int
    in_features: int
    window: Window
    num_kv_heads: int
    head_dim: int
    out_features: int
    rotary_base: float | None
    rotary_fraction: float
    rotary_frequencies: tuple[float, ...] | None
    softcap: float | None
    scale: float | None
    implementation: str | None
    config: TileSizes | None
    axes: MeshAxes | None

    @classmethod
    def of(cls, module: Any) -> "Layer":
        """The facts of a module, which has them as attributes."""
        facts: dict[str, Any] = {field.name: getattr(module, field.name) for field in dataclasses.fields(cls)}
        _inputs.check_type(CALL, "window", facts["window"], Window, "Window.causal(size) sees the last `size` keys.")
        heads, inputs = (_inputs.as_int(CALL, name, facts[name], least=1) for name in ("num_heads", "in_features"))
        if facts["head_dim"] is None and inputs % heads:
            first = f"{CALL}: in_features must be a multiple of num_heads, got {inputs} and {heads}."
            raise ValueError(_inputs.message(first, hint="give head_dim for heads of any other size."))
        for name, default in (("num_kv_heads", heads), ("head_dim", inputs // heads), ("out_features", inputs)):
            facts[name] = default if facts[name] is None else _inputs.as_int(CALL, name, facts[name], least=1)
        if heads % facts["num_kv_heads"]:
            kv_heads = facts["num_kv_heads"]
            raise ValueError(f"{CALL}: num_heads must be a multiple of num_kv_heads, got {heads} and {kv_heads}.")
        if facts["rotary_frequencies"] is not None:
            facts["rotary_frequencies"] = tuple(float(f) for f in facts["rotary_frequencies"])
        if facts["rotary_base"] is not None or facts["rotary_frequencies"] is not None:
            rotary = (facts[name] for name in ("rotary_base", "rotary_fraction", "rotary_frequencies"))
            rotary_frequencies(CALL, facts["head_dim"], *rotary)
        for name in ("softcap", "scale"):
            facts[name] = None if facts[name] is None else _inputs.as_positive(CALL, name, facts[name])
        if facts["axes"] is not None:
            hint = "ringjax.sharding.MeshAxes(sequence='sequence') splits sequences over a mesh axis."
            _inputs.check_type(CALL, "axes", facts["axes"], MeshAxes, hint)
        return cls(**facts | {"num_heads": heads, "in_features": inputs})

    def init_buffer(self, batch: int, slack: int, dtype: Any) -> RingBuffer:
        """An empty ring for this layer."""
        return RingBuffer.empty(batch, self.num_kv_heads, self.head_dim, self.window, slack=slack, dtype=dtype)

    def canonical(self, x: Any, buffer: Any, lengths: Any, segment_ids: Any, positions: Any) -> tuple[Array, "Tokens"]:
        """The input, zero in padding, and what is known of its tokens; raises whatever is wrong with a call."""
        _inputs.check_array(CALL, "x", x, "B T D")
        if x.shape[2] != self.in_features:
            first = f"{CALL}: x must have {self.in_features} features (in_features), got {x.shape[2]}."
            raise ValueError(_inputs.message(first, {"x": _inputs.describe(x)}))
        batch, length = x.shape[:2]
        lengths = _inputs.as_row_integers(CALL, "lengths", lengths, batch)
        _inputs.check_lengths(CALL, lengths, length)
        segment_ids, _ = _inputs.check_segments(CALL, segment_ids, None, x, x)
        if buffer is not None:
            self._check_buffer(buffer, x, segment_ids)
        index = jnp.arange(length, dtype=jnp.int32)
        if positions is not None:
            positions = check_positions(CALL, positions, x)
        else:
            positions = index if buffer is None else buffer.length[:, None] + index[None]
        real = None
        if lengths is not None:
            real = index[None] < lengths[:, None]
        if segment_ids is not None:
            real = segment_ids >= 0 if real is None else real & (segment_ids >= 0)
        if real is not None and buffer is None:
            segment_ids = jnp.where(real, jnp.int32(0) if segment_ids is None else segment_ids, jnp.int32(-1))
        tokens = Tokens(buffer, lengths, segment_ids, positions, real)
        return tokens.without_padding(jnp.asarray(x)), tokens

    def _check_buffer(self, buffer: Any, x: Any, segment_ids: Any) -> None:
        hint = f"{CALL}(...).init_buffer(batch) makes one."
        _inputs.check_type(CALL, "buffer", buffer, RingBuffer, hint)
        if segment_ids is not None:
            first = f"{CALL}: segment_ids must be None where a buffer is given, got {_inputs.describe(segment_ids)}."
            hint = "a ring holds one stream per row; padding at the end of a chunk is said with lengths."
            raise ValueError(_inputs.message(first, hint=hint))
        ring = f"{_inputs.describe(buffer.k)}, {buffer.window}"
        mine = f"{self.num_kv_heads} kv heads of {self.head_dim}, {self.window}"
        for what, of_layer, of_buffer in (
            ("window", self.window, buffer.window),
            ("kv heads", self.num_kv_heads, buffer.k.shape[1]),
            ("head_dim", self.head_dim, buffer.k.shape[3]),
        ):
            _inputs.check_agree(CALL, what, {"layer": (of_layer, mine), "buffer": (of_buffer, ring)}, hint)
        rows = {"x": (x.shape[0], _inputs.describe(x)), "buffer": (buffer.k.shape[0], ring)}
        _inputs.check_agree(CALL, "batch", rows)

    def attend(
        self, q: Array, k: Array, v: Array, sink_logits: Array | None, tokens: "Tokens"
    ) -> tuple[Array, RingBuffer | None]:
        """What stands between the projections: rotary embedding and attention. Output [B, T, N, H], and the ring."""
        if self.rotary_base is not None or self.rotary_frequencies is not None:
            q, k = (
                apply_rotary(
                    x,
                    tokens.positions,
                    base=self.rotary_base or 1.0,  # not read where frequencies are given
                    fraction=self.rotary_fraction,
                    frequencies=self.rotary_frequencies,
                )
                for x in (q, k)
            )
        options: dict[str, Any] = {
            "sink_logits": sink_logits,
            "softcap": self.softcap,
            "scale": self.scale,
            "implementation": self.implementation,
            "config": self.config,
        }
        if self.axes is not None and self.axes.sequence is not None and q.shape[1] > 1:
            if tokens.buffer is not None:
                return attend_over_sequence(CALL, self.axes, q, k, v, tokens.buffer, lengths=tokens.lengths, **options)
            ids = tokens.segment_ids
            return over_sequence(CALL, self.axes, q, k, v, self.window, segment_ids=ids, **options)[0], None
        if tokens.buffer is None:
            return attention(q, k, v, self.window, segment_ids=tokens.segment_ids, **options), None
        return attend(q, k, v, tokens.buffer, lengths=tokens.lengths, **options)


@dataclasses.dataclass(frozen=True)
class Tokens:
    """What a call tells of its tokens: `segment_ids` [B, T], `positions` [T] or [B, T], `real` (no padding) [B, T]."""

    buffer: RingBuffer | None
    lengths: Array | None
    segment_ids: Array | None
    positions: Array
    real: Array | None

    def without_padding(self, x: Array) -> Array:
        """x [B, T, D], zero in padding: a NaN there would reach the gradients of the projections' kernels."""
        return x if self.real is None else jnp.where(self.real[:, :, None], x, jnp.zeros((), x.dtype))


def attention_fn(
    window: Window,
    *,
    softcap: float | None = None,
    sink_logits: Array | None = None,
    scale: float | None = None,
    implementation: str | None = None,
    config: TileSizes | None = None,
) -> Callable[..., Array]:
    """Sliding-window attention as Flax's own multi-head attention calls it.

    `nnx.MultiHeadAttention(..., attention_fn=attention_fn(Window.causal(1024)))`, or the same with
    `linen.MultiHeadDotProductAttention`, is that module with a window: in time and memory proportional to its length.
    It is for whole sequences. `SlidingWindowAttention` also has rotary embeddings, segments and a ring to decode with.

    The function takes query [..., T, N, H], key and value [..., S, K, H], and what else Flax passes. The last query is
    at the last key. Products of float32 are exact to float32 and softmax is always in float32, whatever `precision`
    and `force_fp32_for_softmax` say. `is_causal=True` cuts off what the window sees to the right.

    Args:
      window: which keys a query sees, instead of a mask.
      softcap, sink_logits, scale, implementation, config: as for `ringjax.attention`. The sink logits are constants;
        for learned ones take `SlidingWindowAttention(use_sink_logits=True)`.

    Raises:
      TypeError: the window is not a `Window`.
      NotImplementedError: when called, for a mask (a module with `decode=True` makes one), a bias, dropout while
        training, attention weights (`sow_weights`), einsums of the caller's or `input_positions`.
      ValueError: when called, as `ringjax.attention` does.
    """
    call = "attention_fn"
    _inputs.check_type(call, "window", window, Window, "Window.causal(size) sees the last `size` keys.")
    options: dict[str, Any] = {
        "softcap": softcap,
        "sink_logits": sink_logits,
        "scale": scale,
        "implementation": implementation,
        "config": config,
    }

    # linen passes on only what it finds in the signature: an argument that is not named here would be lost in silence.
    def sliding_window_attention(
        query: Array,
        key: Array,
        value: Array,
        bias: Any = None,
        mask: Any = None,
        broadcast_dropout: bool = True,
        dropout_rng: Any = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        module: Any = None,
        force_fp32_for_softmax: bool = False,
        einsum_dot_general: Any = None,
        qk_attn_weights_einsum: Any = None,
        attn_weights_value_einsum: Any = None,
        is_causal: bool = False,
        input_positions: Any = None,
    ) -> Array:
        del broadcast_dropout, dropout_rng, precision, force_fp32_for_softmax
        refused: tuple[tuple[str, Any, str], ...] = (
            ("mask", mask, _INSTEAD_OF_MASK),
            (
                "bias",
                bias,
                "a window takes the place of a mask in it; of position biases there are rotary ones, in " + CALL,
            ),
            ("module", module, "attention weights are never whole in memory: call the module with sow_weights=False"),
            ("einsum_dot_general", einsum_dot_general, _NO_EINSUM),
            ("qk_attn_weights_einsum", qk_attn_weights_einsum, _NO_EINSUM),
            ("attn_weights_value_einsum", attn_weights_value_einsum, _NO_EINSUM),
            ("input_positions", input_positions, f"rotary embeddings are in {CALL}(...)(x, positions=...)"),
        )
        for name, got, instead in refused:
            if got is not None:
                first = f"{call}: {name} must be None, got {_inputs.describe(got)}."
                raise NotImplementedError(_inputs.message(first, hint=instead + "."))
        if dropout_rate > 0.0 and not deterministic:
            first = f"{call}: dropout_rate must be 0 unless deterministic, got {dropout_rate}."
            hint = "attention weights are never whole in memory; drop the layer's output instead."
            raise NotImplementedError(_inputs.message(first, hint=hint))
        dtype = jnp.result_type(query, key, value) if dtype is None else dtype
        for name, x in (("query", query), ("key", key), ("value", value)):
            if x.ndim < 3:
                raise ValueError(
                    f"{call}: {name} must have axes [..., length, heads, head_dim], got {_inputs.describe(x)}."
                )
        *rows, queries, heads, _ = query.shape
        seen = window
        if is_causal:
            if queries != key.shape[-3]:
                first = f"{call}: is_causal needs as many queries as keys, got {queries} and {key.shape[-3]}."
                raise ValueError(_inputs.message(first, hint="say with the window alone what a query sees."))
            seen = dataclasses.replace(window, right=0)
        query, key, value = (x.astype(dtype).reshape(-1, *x.shape[-3:]) for x in (query, key, value))
        out = attention(query, key, value, seen, **options)
        return jnp.asarray(out.reshape(*rows, queries, heads, -1))

    return sliding_window_attention


_INSTEAD_OF_MASK = (
    f"the window says which keys a query sees. Sequences packed into a row: {CALL}(...)(x, segment_ids=...); padding: "
    "lengths=... (or segment -1); decoding: buffer=..., instead of decode=True"
)
_NO_EINSUM = "the products are the implementation's own; leave the argument out"
