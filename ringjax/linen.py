"""Sliding-window attention for Flax Linen. Imported only when asked for: `import ringjax.linen`."""

from collections.abc import Sequence
from functools import partial

import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype, Initializer, PrecisionLike
from jax import Array
from jaxtyping import Float, Int

from ringjax._buffer import RingBuffer
from ringjax._kernels.tiles import TileSizes
from ringjax._layer import Layer, attention_fn
from ringjax._sharding import MeshAxes
from ringjax._window import Window

__all__ = ["SlidingWindowAttention", "attention_fn"]


class SlidingWindowAttention(nn.Module):
    """Multi-head self-attention with a window; one call for training, prefill and decoding.

    The same layer as `ringjax.nnx.SlidingWindowAttention`, with the same arguments and parameters, for Linen:

    >>> layer = SlidingWindowAttention(8, 512, Window.causal(1024), num_kv_heads=2)
    >>> variables = layer.init(jax.random.key(0), x)
    >>> out, _ = layer.apply(variables, x)
    >>> out, buffer = layer.apply(variables, x[:, :100], layer.init_buffer(batch=2))
    >>> out, buffer = layer.apply(variables, x[:, 100:101], buffer)

    The ring is an argument and a result, not a variable of the module: no collection `cache` is needed. The
    initializers take `nn.with_partitioning`.

    Attributes:
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

    Raises:
      ValueError: heads that are not a multiple of the kv heads, and other numbers out of their range.
      TypeError: an argument of the wrong kind.
    """

    num_heads: int
    in_features: int
    window: Window
    num_kv_heads: int | None = None
    head_dim: int | None = None
    out_features: int | None = None
    rotary_base: float | None = 10_000.0
    rotary_fraction: float = 1.0
    rotary_frequencies: Sequence[float] | None = None
    normalize_qk: bool = False
    norm_epsilon: float = 1e-6
    use_sink_logits: bool = False
    softcap: float | None = None
    scale: float | None = None
    use_bias: bool = True
    out_use_bias: bool | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None
    kernel_init: Initializer = nn.initializers.lecun_normal()
    out_kernel_init: Initializer | None = None
    bias_init: Initializer = nn.initializers.zeros_init()
    out_bias_init: Initializer | None = None
    norm_scale_init: Initializer = nn.initializers.ones_init()
    sink_logits_init: Initializer = nn.initializers.zeros_init()
    implementation: str | None = None
    config: TileSizes | None = None
    axes: MeshAxes | None = None

    def __post_init__(self) -> None:
        """Refuses wrong arguments where they are written, not where the module is first called."""
        Layer.of(self)
        super().__post_init__()

    @nn.compact
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
        dense = partial(nn.DenseGeneral, dtype=self.dtype, param_dtype=self.param_dtype, precision=self.precision)
        project = partial(dense, use_bias=self.use_bias, kernel_init=self.kernel_init, bias_init=self.bias_init)
        q = project((layer.num_heads, layer.head_dim), name="query")(x)
        k = project((layer.num_kv_heads, layer.head_dim), name="key")(x)
        v = project((layer.num_kv_heads, layer.head_dim), name="value")(x)
        if self.normalize_qk:
            norm = partial(
                nn.RMSNorm, self.norm_epsilon, jnp.float32, self.param_dtype, scale_init=self.norm_scale_init
            )
            q, k = (
                norm(name=name)(heads.astype(jnp.float32)).astype(heads.dtype)
                for name, heads in (("query_norm", q), ("key_norm", k))
            )
        sink_logits = None
        if self.use_sink_logits:
            sink_logits = self.param("sink_logits", self.sink_logits_init, (layer.num_heads,), self.param_dtype)
        out, buffer = layer.attend(q, k, v, sink_logits, tokens)
        out = dense(
            layer.out_features,
            axis=(-2, -1),
            use_bias=self.use_bias if self.out_use_bias is None else self.out_use_bias,
            kernel_init=self.out_kernel_init or self.kernel_init,
            bias_init=self.out_bias_init or self.bias_init,
            name="out",
        )(out)
        return tokens.without_padding(out), buffer

    @nn.nowrap
    def init_buffer(self, batch: int, *, slack: int = 0, dtype: Dtype | None = None) -> RingBuffer:
        """An empty ring for this layer, in memory that does not grow; the module need not be bound.

        Args:
          batch: B, rows.
          slack: spare slots: how many tokens can be rolled back.
          dtype: of the keys and values kept; None: that of the computation or, if not set, of the parameters.

        Raises:
          ValueError: a window without a left bound, a batch below 1, a negative slack.
        """
        return Layer.of(self).init_buffer(batch, slack, dtype or self.dtype or self.param_dtype)
