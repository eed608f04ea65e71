"""Wrong calls of `attention`, `attend` and `merge`: rows of the table of test_messages.py."""

import types
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

import ringjax as rj

HUGE = 2**40
F = "float32, bfloat16, float16"
Q = "int8, float8_e4m3fn"


class Wrong(NamedTuple):
    call: Callable[[types.SimpleNamespace], object]
    error: type[Exception]
    first_line: str


def config(**changes):
    return types.SimpleNamespace(**{"block_size": 8, "tile_size": 8, "head_tile_size": 1} | changes)


ATTENTION = [
    Wrong(
        lambda x: rj.attention([1.0], x.k, x.v, x.window),
        TypeError,
        "attention: q must be a jax or NumPy array, got list.",
    ),
    Wrong(
        lambda x: rj.attention(x.q.astype(jnp.int32), x.k, x.v, x.window),
        TypeError,
        f"attention: q must be one of {F}, got int32[2, 3, 4, 8].",
    ),
    Wrong(
        lambda x: rj.attention(np.ones((2, 3, 4, 8)), x.k, x.v, x.window),
        TypeError,
        f"attention: q must be one of {F}, got float64[2, 3, 4, 8].",
    ),
    Wrong(
        lambda x: rj.attention(x.q[0], x.k, x.v, x.window),
        ValueError,
        "attention: q must have 4 axes [B, T, N, H], got float32[3, 4, 8].",
    ),
    Wrong(
        lambda x: rj.attention(x.q, x.k[0], x.v, x.window),
        ValueError,
        "attention: k must have 4 axes [B, S, K, H], got float32[3, 2, 8].",
    ),
    Wrong(
        lambda x: rj.attention(x.q, x.k, None, x.window),
        TypeError,
        "attention: v must be a jax or NumPy array, got NoneType.",
    ),
    Wrong(
        lambda x: rj.attention(x.q[:1], x.k, x.v, x.window),
        ValueError,
        "attention: q, k and v must agree on batch, got 1, 2 and 2.",
    ),
    Wrong(
        lambda x: rj.attention(x.q, x.k[:, :2], x.v, x.window),
        ValueError,
        "attention: k and v must agree on length, got 2 and 3.",
    ),
    Wrong(
        lambda x: rj.attention(x.q, x.k[:, :, :1], x.v, x.window),
        ValueError,
        "attention: k and v must agree on kv heads, got 1 and 2.",
    ),
    Wrong(
        lambda x: rj.attention(x.q[..., :4], x.k, x.v, x.window),
        ValueError,
        "attention: q and k must agree on head_dim, got 4 and 8.",
    ),
    Wrong(
        lambda x: rj.attention(x.q.astype(jnp.bfloat16), x.k, x.v, x.window),
        ValueError,
        "attention: q, k and v must agree on dtype, got bfloat16, float32 and float32.",
    ),
    Wrong(
        lambda x: rj.attention(x.q[:, :, :3], x.k, x.v, x.window),
        ValueError,
        "attention: the query heads must be a multiple of the kv heads, got 3 and 2.",
    ),
    Wrong(
        lambda x: rj.attention(x.q, x.k[:, :, :0], x.v[:, :, :0], x.window),
        ValueError,
        "attention: the query heads must be a multiple of the kv heads, got 4 and 0.",
    ),
    Wrong(
        lambda x: rj.attention(x.q[:, :0], x.k, x.v, x.window),
        ValueError,
        "attention: q must not be empty, got float32[2, 0, 4, 8].",
    ),
    Wrong(
        lambda x: rj.attention(x.q, x.k[:, :0], x.v[:, :0], x.window),
        ValueError,
        "attention: k must not be empty, got float32[2, 0, 2, 8].",
    ),
    Wrong(lambda x: rj.attention(x.q, x.k, x.v, 4), TypeError, "attention: window must be a Window, got int."),
    Wrong(lambda x: rj.attention(x.q, x.k, x.v, None), TypeError, "attention: window must be a Window, got NoneType."),
    Wrong(
        lambda x: rj.attention(x.q, x.k, x.v, x.window, kv_segment_ids=jnp.zeros((2, 3), jnp.int32)),
        ValueError,
        "attention: kv_segment_ids needs segment_ids, got None.",
    ),
    Wrong(
        lambda x: rj.attention(x.q[:, :2], x.k, x.v, x.window, segment_ids=jnp.zeros((2, 2), jnp.int32)),
        ValueError,
        "attention: segment_ids needs kv_segment_ids when T != S, got T=2 and S=3.",
    ),
    Wrong(
        lambda x: rj.attention(x.q, x.k, x.v, x.window, segment_ids=jnp.zeros((2, 3))),
        TypeError,
        "attention: segment_ids must be integers, got float32[2, 3].",
    ),
    Wrong(
        lambda x: rj.attention(x.q, x.k, x.v, x.window, segment_ids=jnp.zeros((2, 4), jnp.int32)),
        ValueError,
        "attention: segment_ids must have shape [2, 3], got int32[2, 4].",
    ),
    # A 64-bit id must not wrap around into another segment.
    Wrong(
        lambda x: rj.attention(x.q, x.k, x.v, x.window, segment_ids=np.full((2, 3), HUGE, np.int64)),
        ValueError,
        f"attention: segment_ids must fit int32, got {HUGE}.",
    ),
    Wrong(
        lambda x: rj.attention(x.q, x.k, x.v, x.window, sink_logits=jnp.zeros(3)),
        ValueError,
        "attention: sink_logits must have one entry per query head, got 3 for 4.",
    ),
    Wrong(
        lambda x: rj.attention(x.q, x.k, x.v, x.window, sink_logits=0.5),
        TypeError,
        "attention: sink_logits must be a jax or NumPy array, got float.",
    ),
    Wrong(
        lambda x: rj.attention(x.q, x.k, x.v, x.window, sink_logits=jnp.zeros((1, 4))),
        ValueError,
        "attention: sink_logits must have 1 axes [N], got float32[1, 4].",
    ),
    Wrong(
        lambda x: rj.attention(x.q, x.k, x.v, x.window, softcap=0.0),
        ValueError,
        "attention: softcap must be finite and above 0, got 0.0.",
    ),
    Wrong(
        lambda x: rj.attention(x.q, x.k, x.v, x.window, softcap=float("nan")),
        ValueError,
        "attention: softcap must be finite and above 0, got nan.",
    ),
    Wrong(
        lambda x: rj.attention(x.q, x.k, x.v, x.window, softcap=jnp.float32(3)),
        TypeError,
        "attention: softcap must be a Python number, got float32[].",
    ),
    Wrong(
        lambda x: rj.attention(x.q, x.k, x.v, x.window, scale=-1),
        ValueError,
        "attention: scale must be finite and above 0, got -1.",
    ),
    Wrong(
        lambda x: rj.attention(x.q, x.k, x.v, x.window, scale=True),
        TypeError,
        "attention: scale must be a Python number, got bool.",
    ),
    Wrong(
        lambda x: rj.attention(x.q, x.k, x.v, x.window, q_offset=1.5),
        TypeError,
        "attention: q_offset must be integers, got float.",
    ),
    Wrong(
        lambda x: rj.attention(x.q, x.k, x.v, x.window, q_offset=True),
        TypeError,
        "attention: q_offset must be integers, got bool.",
    ),
    Wrong(
        lambda x: rj.attention(x.q, x.k, x.v, x.window, q_offset=jnp.zeros(3, jnp.int32)),
        ValueError,
        "attention: q_offset must be an int or int32[2], one per row, got int32[3].",
    ),
    Wrong(
        lambda x: rj.attention(x.q, x.k, x.v, x.window, q_offset=HUGE),
        ValueError,
        f"attention: q_offset must fit int32, got {HUGE}.",
    ),
    Wrong(
        lambda x: rj.attention(x.q, x.k, x.v, x.window, q_offset=np.array([1, HUGE])),
        ValueError,
        f"attention: q_offset must fit int32, got 1 to {HUGE}.",
    ),
    Wrong(
        lambda x: rj.attention(x.q, x.k, x.v, x.window, config=3),
        TypeError,
        "attention: config must be a RingBufferConfig, got int.",
    ),
    Wrong(
        lambda x: rj.attention(x.q, x.k, x.v, x.window, config=config(block_size=0)),
        ValueError,
        "attention: config.block_size must be at least 1, got 0.",
    ),
    Wrong(
        lambda x: rj.attention(x.q, x.k, x.v, x.window, config=config(tile_size=1.5)),
        TypeError,
        "attention: config.tile_size must be an int, got float.",
    ),
    Wrong(
        lambda x: rj.attention(x.q, x.k, x.v, x.window, config=config(head_tile_size=True)),
        TypeError,
        "attention: config.head_tile_size must be an int, got True.",
    ),
]

ATTEND = [
    Wrong(lambda x: rj.attend(x.q, x.k, x.v, None), TypeError, "attend: buffer must be a RingBuffer, got NoneType."),
    Wrong(lambda x: rj.attend(x.q, x.k, x.v, x.window), TypeError, "attend: buffer must be a RingBuffer, got Window."),
    Wrong(
        lambda x: rj.attend(None, x.k, x.v, x.ring),
        TypeError,
        "attend: q must be a jax or NumPy array, got NoneType.",
    ),
    Wrong(
        lambda x: rj.attend(x.q[:, :2], x.k, x.v, x.ring),
        ValueError,
        "attend: q and k must agree on length, got 2 and 3.",
    ),
    Wrong(
        lambda x: rj.attend(x.q[:1], x.k[:1], x.v[:1], x.ring),
        ValueError,
        "attend: k and buffer must agree on batch, got 1 and 2.",
    ),
    Wrong(
        lambda x: rj.attend(x.q, x.k[:, :, :1], x.v[:, :, :1], x.ring),
        ValueError,
        "attend: k and buffer must agree on kv heads, got 1 and 2.",
    ),
    Wrong(
        lambda x: rj.attend(x.q[..., :4], x.k[..., :4], x.v, x.ring),
        ValueError,
        "attend: k and buffer must agree on head_dim, got 4 and 8.",
    ),
    Wrong(
        lambda x: rj.attend(x.q, x.k, x.v[..., :2], x.ring),
        ValueError,
        "attend: v and buffer must agree on value_dim, got 2 and 4.",
    ),
    Wrong(
        lambda x: rj.attend(x.q.astype(jnp.bfloat16), x.k, x.v, x.ring),
        ValueError,
        "attend: q, k and v must agree on dtype, got bfloat16, float32 and float32.",
    ),
    Wrong(
        lambda x: rj.attend(x.q[:, :0], x.k[:, :0], x.v[:, :0], x.ring),
        ValueError,
        "attend: q must not be empty, got float32[2, 0, 4, 8].",
    ),
    Wrong(
        lambda x: rj.attend(x.q, x.k, x.v, x.ring, lengths=2),
        ValueError,
        "attend: lengths must be int32[2], one per row, got int.",
    ),
    Wrong(
        lambda x: rj.attend(x.q, x.k, x.v, x.ring, lengths=jnp.array([1, 2, 3])),
        ValueError,
        "attend: lengths must be int32[2], one per row, got int32[3].",
    ),
    Wrong(
        lambda x: rj.attend(x.q, x.k, x.v, x.ring, lengths=jnp.ones(2)),
        TypeError,
        "attend: lengths must be integers, got float32[2].",
    ),
    Wrong(
        lambda x: rj.attend(x.q, x.k, x.v, x.ring, lengths=jnp.array([1, 4])),
        ValueError,
        "attend: lengths must be between 0 and 3, the length of the chunk, got [1, 4].",
    ),
    Wrong(
        lambda x: rj.attend(x.q, x.k, x.v, x.ring, lengths=jnp.array([-1, 3])),
        ValueError,
        "attend: lengths must be between 0 and 3, the length of the chunk, got [-1, 3].",
    ),
    Wrong(
        lambda x: rj.attend(x.q, x.k, x.v, x.ring, sink_logits=jnp.zeros(2)),
        ValueError,
        "attend: sink_logits must have one entry per query head, got 2 for 4.",
    ),
    Wrong(
        lambda x: rj.attend(x.q, x.k, x.v, x.ring, softcap=0),
        ValueError,
        "attend: softcap must be finite and above 0, got 0.",
    ),
    Wrong(
        lambda x: rj.attend(x.q, x.k, x.v, x.ring, config="tiny"),
        TypeError,
        "attend: config must be a RingBufferConfig, got str.",
    ),
]

MERGE = [
    Wrong(lambda x: rj.merge(None, None), TypeError, "merge: outs must be a list of arrays, got NoneType."),
    Wrong(
        lambda x: rj.merge([], []),
        ValueError,
        "merge: outs and lses must be as many, at least one, got 0 and 0.",
    ),
    Wrong(
        lambda x: rj.merge([x.out, x.out], [x.lse]),
        ValueError,
        "merge: outs and lses must be as many, at least one, got 2 and 1.",
    ),
    Wrong(
        lambda x: rj.merge([x.out[0]], [x.lse]),
        ValueError,
        "merge: outs[0] must have 4 axes [B, T, N, Hv], got float32[3, 4, 8].",
    ),
    Wrong(
        lambda x: rj.merge([x.out], [x.lse]),  # the lse has its head axis second
        ValueError,
        "merge: all outputs must be [B, T, N, Hv] and all lses [B, N, T], of the same B, T, N and Hv.",
    ),
    Wrong(lambda x: rj.merge([1.0], [2.0]), TypeError, "merge: outs[0] must be a jax or NumPy array, got float."),
]
