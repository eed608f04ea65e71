"""Sliding-window attention for Flax NNX. Imported only when asked for: `import ringjax.nnx`."""

from collections.abc import Sequence
from functools import partial

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer, PrecisionLike
from jax import Array
from jaxtyping import Float, Int

from ringjax._buffer import RingBuffer
from ringjax._kernels.tiles import TileSizes
from ringjax._layer import Layer, attention_fn
from ringjax._sharding import MeshAxes
from ringjax._window import Window

__all__ = ["SlidingWindowAttention", "attention_fn"]

_LECUN_NORMAL = nnx.initializers.lecun_normal()
_ZEROS = nnx.initializers.zeros_init()
_ONES = nnx.initializers.ones_init()


class SlidingWindowAttention(nnx.Module):
    """Multi-head self-attention with a window; one call for training, prefill and decoding.

    `out, _ = layer(x)` attends within whole sequences. `out, buffer = layer(x, buffer)` attends to what a ring still
    holds and to x itself, and appends x to the ring: a chunk of a prompt or, with one token, a decoding step. Any
    partition of a stream into chunks gives what one call on the whole stream gives.

    >>> layer = SlidingWindowAttention(8, 512, Window.causal(1024), num_kv_heads=2, rngs=nnx.Rngs(0))
    >>> out, _ = layer(x)
    >>> buffer = layer.init_buffer(batch=2)
    >>> out, buffer = layer(x[:, :100], buffer)
    >>> out, buffer = layer(x[:, 100:101], buffer)

    Parameters: `query`, `key`, `value` [D, N or K, H] and `out` [N, H, D'], each a `nnx.LinearGeneral`, as in
    `nnx.MultiHeadAttention`; with `normalize_qk` also `query_norm`, `key_norm` [H]; with `use_sink_logits` also
    `sink_logits` [N]. The initializers take `nnx.with_partitioning`, on those shapes. In a stack of layers under
    `nnx.scan`, the layers' rings are stacked alike; unrolled layers with a list of rings decode without copies.

    Args:
      num_heads: N, query heads.
      in_features: D of the input.
      window: which tokens a token sees. Its sinks, the pinned first positions, are on top of its size.
      num_kv_heads: K, key and value heads, a divisor of N; None: N.
      head_dim: H; None: D / N.
      out_features: of the output; None: D.
      rotary_base: base of the rotary embedding of queries and keys; None: no rotary embedding.
      rotary_fraction, rotary_frequencies: see `ringjax.apply_rotary`.
      normalize_qk: whether queries and keys are RMS-normalised per head, with a learned scale, before the rotary
        embedding (Gemma 3, Qwen 3). In float32.
      norm_epsilon: of that.
      use_sink_logits: whether each query head has a learned logit in its softmax's denominator (gpt-oss).
      softcap: bound of the logits; None: none.
      scale: factor on the logits; None: `H ** -0.5`.
      use_bias: whether the projections have biases.
      out_use_bias: whether the output's has one; None: as `use_bias` says.
      dtype: of the computation; None: that of the input and the parameters.
      param_dtype: of the parameters.
      precision: of the projections' products.
      kernel_init, bias_init: of the projections.
      out_kernel_init, out_bias_init: of the output's; None: the same.
      norm_scale_init, sink_logits_init: of the other parameters.
      implementation, config: as for `ringjax.attention`.
      axes: a `ringjax.sharding.MeshAxes` with a sequence axis: whole sequences and chunks of more than one token then
        run with `sequence_parallel_attention` and `sequence_parallel_attend`. Rows and heads need none.
      rngs: makes the parameters (stream `params`).

    Raises:
      ValueError: heads that are not a multiple of the kv heads, and other numbers out of their range.
      TypeError: an argument of the wrong kind.
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        window: Window,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        out_features: int | None = None,
        rotary_base: float | None = 10_000.0,
        rotary_fraction: float = 1.0,
        rotary_frequencies: Sequence[float] | None = None,
        normalize_qk: bool = False,
        norm_epsilon: float = 1e-6,
        use_sink_logits: bool = False,
        softcap: float | None = None,
        scale: float | None = None,
        use_bias: bool = True,
        out_use_bias: bool | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = _LECUN_NORMAL,
        out_kernel_init: Initializer | None = None,
        bias_init: Initializer = _ZEROS,
        out_bias_init: Initializer | None = None,
        norm_scale_init: Initializer = _ONES,
        sink_logits_init: Initializer = _ZEROS,
        implementation: str | None = None,
        config: TileSizes | None = None,
        axes: MeshAxes | None = None,
        rngs: nnx.Rngs,
    ):
        self.num_heads, self.in_features, self.window = num_heads, in_features, window
        self.num_kv_heads, self.head_dim, self.out_features = num_kv_heads, head_dim, out_features
        self.rotary_base, self.rotary_fraction = rotary_base, rotary_fraction
        # A tuple is static, a list or an array would be state of the module.
        self.rotary_frequencies = None if rotary_frequencies is None else tuple(float(f) for f in rotary_frequencies)
        self.softcap, self.scale = softcap, scale
        self.implementation, self.config, self.axes = implementation, config, axes
        self.dtype, self.param_dtype = dtype, param_dtype
        layer = Layer.of(self)
        self.num_kv_heads, self.head_dim, self.out_features = layer.num_kv_heads, layer.head_dim, layer.out_features
        linear = partial(nnx.LinearGeneral, dtype=dtype, param_dtype=param_dtype, precision=precision, rngs=rngs)
        project = partial(linear, in_features, use_bias=use_bias, kernel_init=kernel_init, bias_init=bias_init)
        self.query = project((layer.num_heads, layer.head_dim))
        self.key = project((layer.num_kv_heads, layer.head_dim))
        self.value = project((layer.num_kv_heads, layer.head_dim))
        self.out = linear(
            (layer.num_heads, layer.head_dim),
            layer.out_features,
            axis=(-2, -1),
            use_bias=use_bias if out_use_bias is None else out_use_bias,
            kernel_init=out_kernel_init or kernel_init,
            bias_init=out_bias_init or bias_init,
        )
        norm = partial(nnx.RMSNorm, epsilon=norm_epsilon, dtype=jnp.float32, param_dtype=param_dtype, rngs=rngs)
        self.query_norm = norm(layer.head_dim, scale_init=norm_scale_init) if normalize_qk else nnx.data(None)
        self.key_norm = norm(layer.head_dim, scale_init=norm_scale_init) if normalize_qk else nnx.data(None)
        self.sink_logits = (
            nnx.Param(sink_logits_init(rngs.params(), (layer.num_heads,), param_dtype))
            if use_sink_logits
            else nnx.data(None)
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        buffer: RingBuffer | None = None,
        *,
        lengths: Int[Array, " B"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | Int[Array, " T"] | None = None,
    ) -> tuple[Array, RingBuffer | None]:
        """Attention of the tokens x to themselves and, with a ring, to what came before them.

        Args:
          x: the tokens.
          buffer: the ring (`init_buffer`) with the tokens before; the new ones stand at `buffer.length + t`.
          lengths: int32 [B], how many of the T tokens are real; the rest is padding, may hold NaN, and is not written
            into the ring. None: all.
          segment_ids: packed sequences, without a buffer only: a token sees tokens of its own segment only. A
            negative segment is padding. Pinned sinks are the first positions of the row, not of a segment.
          positions: for the rotary embedding and nothing else, instead of 0, 1, ... or `buffer.length + t`.

        Returns:
          Output [B, T, D'], 0 in padding, and the ring after the tokens; None if none was given.

        Raises:
          ValueError: shapes that do not fit the layer, a ring of another window or of other heads, segment ids
            together with a ring; outside jit, lengths not in 0..T.
          TypeError: an argument of the wrong kind.
          NotImplementedError: the named implementation cannot run this call.
        """
        layer = Layer.of(self)
        x, tokens = layer.canonical(x, buffer, lengths, segment_ids, positions)
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q).astype(q.dtype), self.key_norm(k).astype(k.dtype)
        sink_logits = None if self.sink_logits is None else self.sink_logits[...]
        out, buffer = layer.attend(q, k, v, sink_logits, tokens)
        return tokens.without_padding(self.out(out)), buffer

    def init_buffer(self, batch: int, *, slack: int = 0, dtype: Dtype | None = None) -> RingBuffer:
        """An empty ring for this layer, in memory that does not grow.

        Args:
          batch: B, rows.
          slack: spare slots: how many tokens can be rolled back.
          dtype: of the keys and values kept; None: that of the computation or, if not set, of the parameters.

        Raises:
          ValueError: a window without a left bound, a batch below 1, a negative slack.
        """
        return Layer.of(self).init_buffer(batch, slack, dtype or self.dtype or self.param_dtype)
