"""ringjax for PyTorch: the same attention and the same rings, on torch tensors, over DLPack.

    torch_bridge.attention(q, k, v, window, *, segment_ids=None, kv_segment_ids=None, sink_logits=None, softcap=None,
                           scale=None, q_offset=None, return_lse=False, implementation=None, config=None, bucket=None)
    torch_bridge.attend(q, k, v, buffer, *, lengths=None, sink_logits=None, softcap=None, scale=None,
                        implementation=None, config=None, bucket=None) -> (out, buffer)
    torch_bridge.RingBuffer.empty(batch, kv_heads, head_dim, window, *, slack=0, value_dim=None,
                                  dtype=torch.bfloat16, device=None)
        .rollback(n)  .select(rows)  .insert(row, other)  .reset(rows=None)  .to(...)  .detach()   in place, return self
        .clone()  .length  .positions()  .export()  .state_dict()  .load_state_dict(...)
        .to_jax()  .release()  .from_jax(ring)  .adopt(ring)
    torch_bridge.RingBufferAttention(config)(q, k, v, ...)    a torch module over
    torch_bridge.init_state(config, batch, ...)  .encode(q, k, v, state, ...)  .decode(q, k, v, state, position=...)
    torch_bridge.to_jax(tensor)  .to_torch(array)  .stats()  .reset_stats()

Words, layouts and semantics are ringjax's: queries [B, T, N, H], keys and values [B, S, K, H].
"""

try:
    import torch  # noqa: F401
except ImportError as error:
    raise ImportError("torch_bridge needs PyTorch: pip install 'ringjax[torch]'") from error

from ringjax import RingBufferConfig, Window
from torch_bridge._buffer import RingBuffer, attend
from torch_bridge._dlpack import Stats, reset_stats, stats, to_jax, to_torch
from torch_bridge._functional import attention
from torch_bridge._module import CompleteRingBufferAttention, RingBufferAttention
from torch_bridge._state import BufferState, decode, encode, init_state

__all__ = [
    "BufferState",
    "CompleteRingBufferAttention",
    "RingBuffer",
    "RingBufferAttention",
    "RingBufferConfig",
    "Stats",
    "Window",
    "attend",
    "attention",
    "decode",
    "encode",
    "init_state",
    "reset_stats",
    "stats",
    "to_jax",
    "to_torch",
]
