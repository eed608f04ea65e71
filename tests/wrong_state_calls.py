"""Wrong calls of `RingBufferConfig`, `init_state`, `encode` and `decode`: rows of the table of test_messages.py."""

import jax.numpy as jnp
import numpy as np
from wrong_calls import Wrong

import ringjax as rj
from ringjax._kernels import IMPLEMENTATIONS

CONFIG = [
    Wrong(
        lambda x: rj.RingBufferConfig(buffer_size=0),
        ValueError,
        "RingBufferConfig: buffer_size must be at least 1, got 0.",
    ),
    Wrong(
        lambda x: rj.RingBufferConfig(buffer_size=4.0),
        TypeError,
        "RingBufferConfig: buffer_size must be an int, got float.",
    ),
    Wrong(
        lambda x: rj.RingBufferConfig(buffer_size=True),
        TypeError,
        "RingBufferConfig: buffer_size must be an int, got True.",
    ),
    Wrong(
        lambda x: rj.RingBufferConfig(prefill_size=0),
        ValueError,
        "RingBufferConfig: prefill_size must be at least 1, got 0.",
    ),
    Wrong(
        lambda x: rj.RingBufferConfig(prefill_size=None),
        TypeError,
        "RingBufferConfig: prefill_size must be an int, got NoneType.",
    ),
    Wrong(
        lambda x: rj.RingBufferConfig(sinks=-1),
        ValueError,
        "RingBufferConfig: sinks must be at least 0, got -1.",
    ),
    Wrong(
        lambda x: rj.RingBufferConfig(slack=-2),
        ValueError,
        "RingBufferConfig: slack must be at least 0, got -2.",
    ),
    Wrong(
        lambda x: rj.RingBufferConfig(block_size=0),
        ValueError,
        "RingBufferConfig: block_size must be at least 1, got 0.",
    ),
    Wrong(
        lambda x: rj.RingBufferConfig(tile_size="32"),
        TypeError,
        "RingBufferConfig: tile_size must be an int, got str.",
    ),
    Wrong(
        lambda x: rj.RingBufferConfig(head_tile_size=-4),
        ValueError,
        "RingBufferConfig: head_tile_size must be at least 1, got -4.",
    ),
    Wrong(
        lambda x: rj.RingBufferConfig(softcap=0.0),
        ValueError,
        "RingBufferConfig: softcap must be finite and above 0, got 0.0.",
    ),
    Wrong(
        lambda x: rj.RingBufferConfig(softcap="50"),
        TypeError,
        "RingBufferConfig: softcap must be a Python number, got str.",
    ),
    Wrong(
        lambda x: rj.RingBufferConfig(scale=float("inf")),
        ValueError,
        "RingBufferConfig: scale must be finite and above 0, got inf.",
    ),
    Wrong(lambda x: rj.RingBufferConfig(causal=1), TypeError, "RingBufferConfig: causal must be a bool, got 1."),
]

STATE = rj.init_state(rj.RingBufferConfig(buffer_size=4, slack=1), 3, kv_heads=2, head_dim=8, dtype=jnp.float32)
Q, K, V = (np.ones((3, 2, heads, 8), np.float32) for heads in (4, 2, 2))

STATES = [
    Wrong(
        lambda x: rj.encode(Q, K, V, STATE.forward),
        TypeError,
        "encode: state must be a BufferState, got RingBuffer.",
    ),
    Wrong(
        lambda x: rj.encode(Q, K, V, STATE, requires_grad=1),
        TypeError,
        "encode: requires_grad must be a bool, got int.",
    ),
    Wrong(
        lambda x: rj.encode(Q, K[:, :, :1], V[:, :, :1], STATE),
        ValueError,
        "encode: k and buffer must agree on kv heads, got 1 and 2.",
    ),
    Wrong(
        lambda x: rj.encode(Q, K, V, STATE, lengths=jnp.array([2, 3, 0])),
        ValueError,
        "encode: lengths must be between 0 and 2, the length of the chunk, got [2, 3, 0].",
    ),
    Wrong(
        lambda x: rj.encode(
            Q, K, V, rj.init_state(rj.RingBufferConfig(4, implementation="?"), 3, kv_heads=2, head_dim=8)
        ),
        ValueError,
        f"encode: implementation must be one of {', '.join(map(repr, IMPLEMENTATIONS))} or None, got '?'.",
    ),
    Wrong(
        lambda x: rj.decode(Q, K, V, None, position=0),
        TypeError,
        "decode: state must be a BufferState, got NoneType.",
    ),
    Wrong(
        lambda x: rj.decode(Q, K, V, STATE, position=None),
        TypeError,
        "decode: position must be integers, got None.",
    ),
    Wrong(
        lambda x: rj.decode(Q, K, V, STATE, position=0.0),
        TypeError,
        "decode: position must be integers, got float.",
    ),
    Wrong(
        lambda x: rj.decode(Q, K, V, STATE, position=[0, 0]),
        ValueError,
        "decode: position must be an int or int32[3], one per row, got int64[2].",
    ),
    Wrong(
        lambda x: rj.decode(Q, K[:, :1], V[:, :1], STATE, position=0),
        ValueError,
        "decode: q and k must agree on length, got 2 and 1.",
    ),
    Wrong(
        lambda x: rj.decode(Q, K, V, STATE, position=0, sink_logits=jnp.zeros(2)),
        ValueError,
        "decode: sink_logits must have one entry per query head, got 2 for 4.",
    ),
    Wrong(
        lambda x: rj.init_state(4096, 1, kv_heads=1, head_dim=8),
        TypeError,
        "init_state: config must be a RingBufferConfig, got int.",
    ),
]
