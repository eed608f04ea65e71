"""`RingBufferAttention`: the encoder's and the decoder's phase as a torch module."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import ringjax as rj
from torch_bridge._state import BufferState, decode, encode, init_state

_CALL = "RingBufferAttention"


class RingBufferAttention(nn.Module):
    """Attention with three rings: an encoder that remembers its last tokens, a decoder that sees them and its own past.

    >>> model = RingBufferAttention(RingBufferConfig(buffer_size=2048))
    >>> out, state = model(q, k, v)  # an encoder's chunk; give the state back with the next one
    >>> out = model(q, k, v, position=0, is_decoder=True, buffer_state=state)  # a decoder's step: updates the state

    Heads and head_dim are those of the tensors, unless configured: then the tensors must have them. The module holds no
    stream: a `BufferState` does, and one module serves many.

    Args:
      config: sizes and options; None: the defaults.
      num_heads, kv_heads, head_dim: what q [B, T, N, H] and k [B, T, K, H] must have; None: anything.
      use_sink_logits: whether each query head has a learned logit in the softmax's denominator (needs `num_heads`).
      state_dtype: of the keys and values in the rings; None: that of the first tensors.
      bucket: as for `torch_bridge.attend`, for the encoder's tokens.
    """

    def __init__(
        self,
        config: rj.RingBufferConfig | None = None,
        *,
        num_heads: int | None = None,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        use_sink_logits: bool = False,
        state_dtype: torch.dtype | None = None,
        bucket: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        config = rj.RingBufferConfig() if config is None else config
        if not isinstance(config, rj.RingBufferConfig):
            raise TypeError(f"{_CALL}: config must be a RingBufferConfig, got {type(config).__name__}.")
        for name, given in (("num_heads", num_heads), ("kv_heads", kv_heads), ("head_dim", head_dim)):
            if given is not None and (not isinstance(given, int) or isinstance(given, bool) or given < 1):
                raise ValueError(f"{_CALL}: {name} must be an int of at least 1, got {given!r}.")
        if use_sink_logits and num_heads is None:
            raise ValueError(f"{_CALL}: use_sink_logits needs num_heads, got None.")
        self.config = config
        self.num_heads, self.kv_heads, self.head_dim = num_heads, kv_heads, head_dim
        self.state_dtype, self.bucket = state_dtype, bucket
        self.sink_logits = nn.Parameter(torch.zeros(num_heads)) if use_sink_logits and num_heads else None

    def init_state(
        self,
        batch: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> BufferState:
        """Three empty rings for this module; what the module is not configured with must be given.

        Raises:
          ValueError: heads or a head_dim that nobody gave.
        """
        kv_heads, head_dim = kv_heads or self.kv_heads, head_dim or self.head_dim
        if kv_heads is None or head_dim is None:
            got = f"kv_heads={kv_heads} and head_dim={head_dim}"
            raise ValueError(
                f"{_CALL}.init_state: kv_heads and head_dim must be given, here or to the module, got {got}."
            )
        dtype = dtype or self.state_dtype or torch.bfloat16
        return init_state(
            self.config, batch, kv_heads=kv_heads, head_dim=head_dim, value_dim=value_dim, dtype=dtype, device=device
        )

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        requires_grad: bool | None = None,
        position: int | Tensor | Sequence[int] | None = None,
        is_decoder: bool = False,
        buffer_state: BufferState | None = None,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> Any:
        """One chunk of the encoder, or one step (or chunk) of the decoder.

        Args:
          q, k, v: [B, T, N, H], [B, T, K, H], [B, T, K, Hv].
          requires_grad: encoder: whether gradients are to flow back through the ring. None: in `train()` mode, where
            torch records gradients.
          position: decoder: of the first token; None: the next one.
          is_decoder: which phase this is.
          buffer_state: the stream so far; None: a new one, encoder only. It is updated.
          lengths: integers [B], how many of the T tokens are real; None: all.

        Returns:
          Encoder: output [B, T, N, Hv] and the state. Decoder: the output.

        Raises:
          ValueError, TypeError: tensors that do not fit the configuration or the state, a state of another config, a
            decoder without a state, an encoder with a position; and what `encode` and `decode` raise.
        """
        self._check(q, k, v, buffer_state, is_decoder, position, requires_grad)
        if is_decoder:
            out, _ = decode(q, k, v, buffer_state, position=position, lengths=lengths, sink_logits=self.sink_logits)
            return out
        if buffer_state is None:
            buffer_state = self.init_state(
                q.shape[0],
                kv_heads=k.shape[2],
                head_dim=k.shape[3],
                value_dim=v.shape[3],
                dtype=self.state_dtype or k.dtype,
                device=q.device,
            )
        if requires_grad is None:
            requires_grad = self.training and torch.is_grad_enabled()
        return encode(
            q,
            k,
            v,
            buffer_state,
            requires_grad=requires_grad,
            lengths=lengths,
            sink_logits=self.sink_logits,
            bucket=self.bucket,
        )

    def _check(
        self, q: Any, k: Any, v: Any, state: Any, is_decoder: bool, position: Any, requires_grad: bool | None
    ) -> None:
        for name, x in (("q", q), ("k", k), ("v", v)):
            if not isinstance(x, Tensor):
                raise TypeError(f"{_CALL}: {name} must be a torch tensor, got {type(x).__name__}.")
            if x.ndim != 4:
                got = list(x.shape)
                raise ValueError(
                    f"{_CALL}: {name} must have 4 axes [batch, length, heads, head_dim], got {got}.\n"
                    "  Hint: the head axis is the third: x.transpose(1, 2) makes it so from [B, N, T, H]."
                )
        for what, configured, got in (
            ("query heads", self.num_heads, q.shape[2]),
            ("kv heads", self.kv_heads, k.shape[2]),
            ("head_dim", self.head_dim, q.shape[3]),
        ):
            if configured is not None and configured != got:
                raise ValueError(
                    f"{_CALL}: the {what} must be the {configured} configured, got {got}.\n"
                    "  Hint: tensors are [batch, length, heads, head_dim]: x.transpose(1, 2) from [B, N, T, H]."
                )
        if is_decoder and state is None:
            raise ValueError(
                f"{_CALL}: a decoder needs buffer_state, got None.\n  Hint: the encoder's call returns one."
            )
        if is_decoder and requires_grad is not None:
            raise ValueError(f"{_CALL}: requires_grad is the encoder's, got {requires_grad} with is_decoder=True.")
        if not is_decoder and position is not None:
            raise ValueError(f"{_CALL}: position is the decoder's, got {position!r} with is_decoder=False.")
        if state is not None:
            if not isinstance(state, BufferState):
                hint = "\n  Hint: BufferState.from_jax makes a handle." if isinstance(state, rj.BufferState) else ""
                raise TypeError(f"{_CALL}: buffer_state must be a BufferState, got {type(state).__name__}.{hint}")
            if state.config != self.config:
                names = [f.name for f in dataclasses.fields(self.config)]
                differ = [n for n in names if getattr(state.config, n) != getattr(self.config, n)]
                raise ValueError(
                    f"{_CALL}: buffer_state must have the module's config, got one with another {', '.join(differ)}.\n"
                    f"  module:       {self.config}\n  buffer_state: {state.config}"
                )

    def extra_repr(self) -> str:
        """The configuration, in `print(model)`."""
        sizes = {"num_heads": self.num_heads, "kv_heads": self.kv_heads, "head_dim": self.head_dim}
        given = [f"{name}={size}" for name, size in sizes.items() if size is not None]
        return ", ".join([str(self.config), *given])


CompleteRingBufferAttention = RingBufferAttention
"""Another name of `RingBufferAttention`."""
