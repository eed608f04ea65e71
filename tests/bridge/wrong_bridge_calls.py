"""Wrong calls of torch_bridge: rows of the table of test_bridge_messages.py. `x` is what its `fixtures` returns."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from wrong_calls import Wrong, config

import ringjax as rj
import torch_bridge as tb

HUGE = 2**40
F = "float32, bfloat16, float16"

CROSSING = [
    Wrong(lambda x: tb.to_jax(np.ones(3)), TypeError, "to_jax: tensor must be a torch tensor, got ndarray."),
    Wrong(lambda x: tb.to_jax(jnp.ones(3)), TypeError, "to_jax: tensor must be a torch tensor, got ArrayImpl."),
    Wrong(
        lambda x: tb.to_jax(torch.ones(3, requires_grad=True)),
        ValueError,
        "to_jax: tensor must not require grad, got float32[3] that does.",
    ),
    Wrong(
        lambda x: tb.to_jax(torch.ones(3, dtype=torch.float64)),
        TypeError,
        "to_jax: tensor must have a dtype that JAX has, got float64[3].",
    ),
    Wrong(
        lambda x: tb.to_jax(torch.arange(3)),
        TypeError,
        "to_jax: tensor must have a dtype that JAX has, got int64[3].",
    ),
    Wrong(
        lambda x: tb.to_jax(torch.ones(3, device="meta")),
        ValueError,
        "to_jax: tensor must be on a cpu or cuda device, got meta.",
    ),
    Wrong(
        lambda x: tb.to_jax(torch.eye(3).to_sparse()),
        TypeError,
        "to_jax: tensor must be a dense tensor, got one of layout torch.sparse_coo.",
    ),
    Wrong(lambda x: tb.to_torch(torch.ones(3)), TypeError, "to_torch: array must be a jax array, got Tensor."),
    Wrong(lambda x: tb.to_torch(np.ones(3)), TypeError, "to_torch: array must be a jax array, got ndarray."),
    Wrong(
        lambda x: jax.eval_shape(tb.to_torch, jnp.ones(3)),
        TypeError,
        "to_torch: array must be a jax array, got DynamicJaxprTracer.",
    ),
    Wrong(
        lambda x: tb.to_torch(jnp.ones(3, jnp.float8_e4m3b11fnuz)),
        TypeError,
        "to_torch: array must have a dtype of torch's, got float8_e4m3b11fnuz.",
    ),
]

ATTENTION = [
    Wrong(
        lambda x: tb.attention(x.q.numpy(), x.k, x.v, x.window),
        TypeError,
        "attention: q must be a torch tensor, got ndarray.",
    ),
    Wrong(
        lambda x: tb.attention(x.q, jnp.ones((2, 3, 2, 8)), x.v, x.window),
        TypeError,
        "attention: k must be a torch tensor, got ArrayImpl.",
    ),
    # There are no kernels for float64, on any device.
    Wrong(
        lambda x: tb.attention(x.q.double(), x.k.double(), x.v.double(), x.window),
        TypeError,
        f"attention: q must be one of {F}, got float64[2, 3, 4, 8].",
    ),
    Wrong(
        lambda x: tb.attention(x.q, x.k.long(), x.v, x.window),
        TypeError,
        f"attention: k must be one of {F}, got int64[2, 3, 2, 8].",
    ),
    Wrong(
        lambda x: tb.attention(x.q, x.k.to("meta"), x.v, x.window),
        ValueError,
        "attention: q, k and v must be on one device, got cpu, meta and cpu.",
    ),
    Wrong(
        lambda x: tb.attention(x.q, x.k, x.v, x.window, sink_logits=torch.zeros(4, device="meta")),
        ValueError,
        "attention: q, k, v and sink_logits must be on one device, got cpu, cpu, cpu and meta.",
    ),
    Wrong(
        lambda x: tb.attention(*(y.to("meta") for y in (x.q, x.k, x.v)), x.window),
        ValueError,
        "attention: q must be on a cpu or cuda device, got meta.",
    ),
    Wrong(lambda x: tb.attention(x.q, x.k, x.v, 4), TypeError, "attention: window must be a Window, got int."),
    Wrong(
        lambda x: tb.attention(x.q[0], x.k, x.v, x.window),
        ValueError,
        "attention: q must have 4 axes [B, T, N, H], got float32[3, 4, 8].",
    ),
    Wrong(
        lambda x: tb.attention(x.q, x.k, x.v.half(), x.window),
        ValueError,
        "attention: q, k and v must agree on dtype, got float32, float32 and float16.",
    ),
    Wrong(
        lambda x: tb.attention(x.q, x.k, x.v, x.window, segment_ids=torch.zeros(2, 3)),
        TypeError,
        "attention: segment_ids must be integers, got float32[2, 3].",
    ),
    Wrong(
        lambda x: tb.attention(x.q, x.k, x.v, x.window, segment_ids=torch.full((2, 3), HUGE)),
        ValueError,
        f"attention: segment_ids must fit int32, got {HUGE}.",
    ),
    Wrong(
        lambda x: tb.attention(x.q, x.k, x.v, x.window, segment_ids=torch.zeros(2, 3, device="meta").int()),
        ValueError,
        "attention: segment_ids must be on the device of q, cpu, got meta.",
    ),
    Wrong(
        lambda x: tb.attention(x.q, x.k, x.v, x.window, q_offset="3"),
        TypeError,
        "attention: q_offset must be integers, got str.",
    ),
    Wrong(
        lambda x: tb.attention(x.q, x.k, x.v, x.window, sink_logits=torch.zeros(3)),
        ValueError,
        "attention: sink_logits must have one entry per query head, got 3 for 4.",
    ),
    Wrong(
        lambda x: tb.attention(x.q, x.k, x.v, x.window, softcap=-1.0),
        ValueError,
        "attention: softcap must be finite and above 0, got -1.0.",
    ),
    Wrong(
        lambda x: tb.attention(x.q, x.k, x.v, x.window, implementation="flash"),
        ValueError,
        "attention: implementation must be one of 'mosaic', 'cudnn', 'xla' or None, got 'flash'.",
    ),
    Wrong(
        lambda x: tb.attention(x.q, x.k, x.v, x.window, config="small"),
        TypeError,
        "attention: config must be a RingBufferConfig, got str.",
    ),
    Wrong(
        lambda x: tb.attention(x.q, x.k, x.v, x.window, config=config(block_size=0)),
        ValueError,
        "attention: config.block_size must be at least 1, got 0.",
    ),
    Wrong(
        lambda x: tb.attention(x.q, x.k, x.v, x.window, bucket=0),
        ValueError,
        "attention: bucket must be at least 1, got 0.",
    ),
    Wrong(
        lambda x: tb.attention(x.q, x.k, x.v, x.window, bucket="power"),
        TypeError,
        "attention: bucket must be an int or a list of lengths, got 'power'.",
    ),
    Wrong(
        lambda x: tb.attention(x.q, x.k, x.v, x.window, bucket=[1, 2]),
        ValueError,
        "attention: bucket must have a length of at least 3, got [1, 2].",
    ),
]

RINGS = [
    Wrong(
        lambda x: tb.attend(x.q, x.k, x.v, x.window),
        TypeError,
        "attend: buffer must be a torch_bridge.RingBuffer, got Window.",
    ),
    Wrong(
        lambda x: tb.attend(x.q, x.k, x.v, rj.RingBuffer.empty(2, 2, 8, x.window)),
        TypeError,
        "attend: buffer must be a torch_bridge.RingBuffer, got RingBuffer.",
    ),
    Wrong(
        lambda x: tb.attend(x.q, x.k[:, :2], x.v[:, :2], x.ring),
        ValueError,
        "attend: q and k must agree on length, got 3 and 2.",
    ),
    Wrong(
        lambda x: tb.attend(x.q[..., :4], x.k[..., :4], x.v, x.ring),
        ValueError,
        "attend: k and buffer must agree on head_dim, got 4 and 8.",
    ),
    Wrong(
        lambda x: tb.attend(x.q[:1], x.k[:1], x.v[:1], x.ring),
        ValueError,
        "attend: k and buffer must agree on batch, got 1 and 2.",
    ),
    Wrong(
        lambda x: tb.attend(*(y.to("meta") for y in (x.q, x.k, x.v)), x.ring),
        ValueError,
        "attend: q must be on a cpu or cuda device, got meta.",
    ),
    Wrong(
        lambda x: tb.attend(x.q, x.k, x.v, x.ring, lengths=[4, 1]),
        ValueError,
        "attend: lengths must be between 0 and 3, the length of the chunk, got [4, 1].",
    ),
    Wrong(
        lambda x: tb.attend(x.q, x.k, x.v, x.ring, lengths=torch.tensor([-1, 3])),
        ValueError,
        "attend: lengths must be between 0 and 3, the length of the chunk, got [-1, 3].",
    ),
    Wrong(
        lambda x: tb.attend(x.q, x.k, x.v, x.ring, lengths=torch.ones(2)),
        TypeError,
        "attend: lengths must be integers, got float32[2].",
    ),
    Wrong(
        lambda x: tb.attend(x.q, x.k, x.v, x.ring, lengths=[1, 2, 3]),
        ValueError,
        "attend: lengths must be int32[2], one per row, got int32[3].",
    ),
    Wrong(
        lambda x: tb.RingBuffer.empty(2, 2, 8, rj.Window.full()),
        ValueError,
        "RingBuffer.empty: window must be bounded on the left, got Window(left=None, right=None).",
    ),
    Wrong(
        lambda x: tb.RingBuffer.empty(2, 2, 8, 5),
        TypeError,
        "RingBuffer.empty: window must be a Window, got int.",
    ),
    Wrong(
        lambda x: tb.RingBuffer.empty(2, 2, 8, x.window, dtype=torch.float64),
        TypeError,
        "RingBuffer.empty: dtype must be a torch dtype that JAX has, got float64.",
    ),
    Wrong(
        lambda x: tb.RingBuffer.empty(2, 2, 8, x.window, device="meta"),
        ValueError,
        "RingBuffer.empty: JAX must see the torch device, got meta, and JAX sees [CpuDevice(id=0)].",
    ),
    Wrong(
        lambda x: tb.RingBuffer.from_jax(x.window),
        TypeError,
        "RingBuffer.from_jax: ring must be a ringjax.RingBuffer, got Window.",
    ),
    Wrong(
        lambda x: x.ring.adopt(x.ring),
        TypeError,
        "RingBuffer.adopt: ring must be a ringjax.RingBuffer, got RingBuffer.",
    ),
    Wrong(
        lambda x: x.ring.rollback(3),
        ValueError,
        "RingBuffer.rollback: n must be between 0 and the slack, 2, and the length, got [3, 3].",
    ),
    Wrong(
        lambda x: x.ring.select([0, 2]),
        ValueError,
        "RingBuffer.select: rows must be between 0 and 1, got [0, 2].",
    ),
    Wrong(
        lambda x: x.ring.insert(0, x.q),
        TypeError,
        "RingBuffer.insert: other must be a RingBuffer, got Tensor.",
    ),
    Wrong(
        lambda x: x.ring.reset(torch.tensor([0, 1])),
        ValueError,
        "RingBuffer.reset: rows must be bool[2], one per row, got int64[2].",
    ),
    Wrong(lambda x: x.ring.to(None), TypeError, "RingBuffer.to: takes a device and a dtype, got NoneType."),
    Wrong(
        lambda x: x.ring.load_state_dict(x.state.state_dict()),
        ValueError,
        "RingBuffer.load_state_dict: the names must be the handle's, got those of another state.",
    ),
    Wrong(
        lambda x: x.ring.load_state_dict(x.ring.clone().to(torch.bfloat16).state_dict()),
        ValueError,
        "RingBuffer.load_state_dict: k must be float32[2, 2, 7, 8], got bfloat16[2, 2, 7, 8].",
    ),
    Wrong(
        lambda x: x.learning.to_jax(),
        ValueError,
        "RingBuffer.to_jax: the rings must not require grad, got rings that torch's tape knows.",
    ),
    Wrong(
        lambda x: x.learning.release(),
        ValueError,
        "RingBuffer.release: the rings must not require grad, got rings that torch's tape knows.",
    ),
]

PHASES = [
    Wrong(
        lambda x: tb.encode(x.q, x.k, x.v, x.ring),
        TypeError,
        "encode: state must be a torch_bridge.BufferState, got RingBuffer.",
    ),
    Wrong(
        lambda x: torch.no_grad()(tb.encode)(x.q, x.k, x.v, x.state, requires_grad=True),
        ValueError,
        "encode: requires_grad=True needs torch to record gradients, got a call under no_grad or inference_mode.",
    ),
    Wrong(
        lambda x: tb.encode(x.q, x.k, x.v, x.state, requires_grad=1),
        TypeError,
        "encode: requires_grad must be a bool, got int.",
    ),
    Wrong(
        lambda x: tb.decode(*x.token, x.state, position=5),
        ValueError,
        "decode: position must be at most last_calculated + 1 = 2, got 5.",
    ),
    Wrong(
        lambda x: tb.decode(*x.token, x.state, position=[2, -1]),
        ValueError,
        "decode: position must be at least 0, got -1.",
    ),
    Wrong(
        lambda x: tb.decode(*x.token, x.state, position=torch.tensor([2, 0])),
        ValueError,
        "decode: position may go back by at most slack = 1 tokens, got 2.",
    ),
    Wrong(
        lambda x: tb.decode(*x.token, x.state, position=1.5),
        TypeError,
        "decode: position must be integers, got float32[].",
    ),
    Wrong(
        lambda x: tb.decode(*x.token, x.state, position=[1, 2, 3]),
        ValueError,
        "decode: position must be an int or int32[2], one per row, got int32[3].",
    ),
    Wrong(
        lambda x: tb.decode(*x.token, x.state, position=HUGE),
        ValueError,
        f"decode: position must fit int32, got {HUGE}.",
    ),
    Wrong(
        lambda x: tb.BufferState.from_jax(x.ring),
        TypeError,
        "BufferState.from_jax: state must be a ringjax.BufferState, got RingBuffer.",
    ),
    Wrong(
        lambda x: x.state.rollback(2),
        ValueError,
        "RingBuffer.rollback: n must be between 0 and the slack, 1, and the length, got [2, 2].",
    ),
    Wrong(
        lambda x: tb.init_state(None, 2, kv_heads=2, head_dim=8),
        TypeError,
        "init_state: config must be a RingBufferConfig, got NoneType.",
    ),
]

MODULES = [
    Wrong(
        lambda x: tb.RingBufferAttention({"buffer_size": 8}),
        TypeError,
        "RingBufferAttention: config must be a RingBufferConfig, got dict.",
    ),
    Wrong(
        lambda x: tb.RingBufferAttention(num_heads=0),
        ValueError,
        "RingBufferAttention: num_heads must be an int of at least 1, got 0.",
    ),
    Wrong(
        lambda x: tb.RingBufferAttention(use_sink_logits=True),
        ValueError,
        "RingBufferAttention: use_sink_logits needs num_heads, got None.",
    ),
    Wrong(
        lambda x: x.model.init_state(2),
        ValueError,
        "RingBufferAttention.init_state: kv_heads and head_dim must be given, here or to the module, "
        "got kv_heads=None and head_dim=None.",
    ),
    Wrong(
        lambda x: x.model(x.q.numpy(), x.k, x.v),
        TypeError,
        "RingBufferAttention: q must be a torch tensor, got ndarray.",
    ),
    Wrong(
        lambda x: x.model(x.q.flatten(2), x.k, x.v),
        ValueError,
        "RingBufferAttention: q must have 4 axes [batch, length, heads, head_dim], got [2, 3, 32].",
    ),
    # [B, N, T, H], as torch's own attention has it.
    Wrong(
        lambda x: tb.RingBufferAttention(num_heads=4)(*(y.transpose(1, 2) for y in (x.q, x.k, x.v))),
        ValueError,
        "RingBufferAttention: the query heads must be the 4 configured, got 3.",
    ),
    Wrong(
        lambda x: x.model(*x.token, position=0, is_decoder=True),
        ValueError,
        "RingBufferAttention: a decoder needs buffer_state, got None.",
    ),
    Wrong(
        lambda x: x.model(*x.token, is_decoder=True, requires_grad=True, buffer_state=x.state),
        ValueError,
        "RingBufferAttention: requires_grad is the encoder's, got True with is_decoder=True.",
    ),
    Wrong(
        lambda x: x.model(x.q, x.k, x.v, position=3),
        ValueError,
        "RingBufferAttention: position is the decoder's, got 3 with is_decoder=False.",
    ),
    Wrong(
        lambda x: x.model(x.q, x.k, x.v, buffer_state=x.ring),
        TypeError,
        "RingBufferAttention: buffer_state must be a BufferState, got RingBuffer.",
    ),
    Wrong(
        lambda x: tb.RingBufferAttention(tb.RingBufferConfig(buffer_size=9))(x.q, x.k, x.v, buffer_state=x.state),
        ValueError,
        "RingBufferAttention: buffer_state must have the module's config, got one with another buffer_size, slack.",
    ),
    Wrong(
        lambda x: x.model(*x.token, position=5, is_decoder=True, buffer_state=x.state),
        ValueError,
        "decode: position must be at most last_calculated + 1 = 2, got 5.",
    ),
]

WRONG = [*CROSSING, *ATTENTION, *RINGS, *PHASES, *MODULES]
