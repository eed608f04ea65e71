"""`ringjax::attention` and its backward as torch custom operations: autograd, torch.compile, torch.func and fakes.

Each is one call of a jitted JAX function, compiled once for each set of static options and shapes. The backward one
starts from the output and its logsumexp, as the JAX derivative does, so nothing is computed twice.
"""

import functools
from typing import Any, NamedTuple

import jax
import torch
from torch import Tensor
from torch.autograd import forward_ad

import ringjax as rj
from torch_bridge._dlpack import give_back, jax_device, on_device, view_in_torch, views_in_jax
from torch_bridge._launch import find


class Tiles(NamedTuple):
    """Tile sizes, as ringjax takes them from a config; hashable."""

    block_size: int | None
    tile_size: int | None
    head_tile_size: int | None


class Static(NamedTuple):
    """The options of `ringjax.attention` that are compiled in."""

    left: int | None
    right: int | None
    sinks: int
    softcap: float | None
    scale: float | None
    q_offset: int | None
    implementation: str | None
    block_size: int | None
    tile_size: int | None
    head_tile_size: int | None

    def options(self) -> dict[str, Any]:
        return {
            "softcap": self.softcap,
            "scale": self.scale,
            "implementation": self.implementation,
            "config": Tiles(self.block_size, self.tile_size, self.head_tile_size),
        }

    @property
    def window(self) -> rj.Window:
        return rj.Window(self.left, self.right, self.sinks)


@functools.cache
def _forward(static: Static) -> Any:
    def attention(q: Any, k: Any, v: Any, sink_logits: Any, ids: Any, kv_ids: Any, offsets: Any) -> Any:
        return rj.attention(
            q,
            k,
            v,
            static.window,
            segment_ids=ids,
            kv_segment_ids=kv_ids,
            sink_logits=sink_logits,
            q_offset=static.q_offset if offsets is None else offsets,
            return_lse=True,
            **static.options(),
        )

    return jax.jit(attention)


@functools.cache
def _backward(static: Static) -> Any:
    def attention_gradients(
        q: Any, k: Any, v: Any, out: Any, lse: Any, g: Any, g_lse: Any, sinks: Any, ids: Any, kv_ids: Any, offsets: Any
    ) -> Any:
        return rj.attention_gradients(
            q,
            k,
            v,
            static.window,
            out,
            lse,
            g,
            g_lse,
            segment_ids=ids,
            kv_segment_ids=kv_ids,
            sink_logits=sinks,
            q_offset=static.q_offset if offsets is None else offsets,
            **static.options(),
        )

    return jax.jit(attention_gradients)


def compute(call: str, program: Any, tensors: Any, wanted: int | None = None) -> list[Tensor]:
    """The first `wanted` results of a jitted function of tensors: launched by torch itself where that can be."""
    return _compute(find(program, tensors), call, program, tensors, wanted)


def _compute(launched: Any, call: str, program: Any, tensors: Any, wanted: int | None = None) -> list[Tensor]:
    if launched is not None and (given := launched.given(tensors)) is not None:
        found: list[Tensor] = launched(given)
        return found
    return [view_in_torch(x) for x in jax.tree.leaves(run(call, program, tensors))[:wanted]]


def run(call: str, program: Any, tensors: Any) -> Any:
    """A jitted function of arrays, called with tensors: its results as arrays, on the first tensor's device."""
    first = next(x for x in tensors if x is not None)
    if first.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{call}: a CUDA graph cannot capture a call of JAX, which launches on streams of its own.\n"
            "  Hint: in 16 bits, on a Hopper GPU, torch launches most calls itself: make one of these shapes before "
            "the capture; leave others out of the graph."
        )
    freed: list[Any] = []  # kept until the program is launched
    device = jax_device(call, first.device)
    with on_device(device):
        try:
            return program(*views_in_jax(tensors, freed))
        except BaseException:
            give_back(device, freed)
            raise


# CUDA graphs cannot capture JAX's launches; the compiler then leaves these operations out of its graphs.
_TAGS = tuple(getattr(torch.Tag, name) for name in ("cudagraph_unsafe",) if hasattr(torch.Tag, name))


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink_logits: Tensor | None,
    segment_ids: Tensor | None,
    kv_segment_ids: Tensor | None,
    q_offsets: Tensor | None,
    left: int | None,
    right: int | None,
    sinks: int,
    softcap: float | None,
    scale: float | None,
    q_offset: int | None,
    implementation: str | None,
    block_size: int | None,
    tile_size: int | None,
    head_tile_size: int | None,
) -> tuple[Tensor, Tensor]:
    """Output [B, T, N, Hv] and lse [B, N, T]."""
    static = Static(left, right, sinks, softcap, scale, q_offset, implementation, block_size, tile_size, head_tile_size)
    tensors = (q, k, v, sink_logits, segment_ids, kv_segment_ids, q_offsets)
    out, lse = compute("attention", _forward(static), tensors)
    return out, lse


attention_op = torch.library.custom_op("ringjax::attention", _attention, mutates_args=(), tags=_TAGS)


@attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _h = q.shape
    return q.new_empty(batch, queries, heads, v.shape[3]), q.new_empty(batch, heads, queries, dtype=torch.float32)


def _gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    g: Tensor,
    g_lse: Tensor | None,
    sink_logits: Tensor | None,
    segment_ids: Tensor | None,
    kv_segment_ids: Tensor | None,
    q_offsets: Tensor | None,
    left: int | None,
    right: int | None,
    sinks: int,
    softcap: float | None,
    scale: float | None,
    q_offset: int | None,
    implementation: str | None,
    block_size: int | None,
    tile_size: int | None,
    head_tile_size: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients for q, k, v and the sink logits (empty without them)."""
    static = Static(left, right, sinks, softcap, scale, q_offset, implementation, block_size, tile_size, head_tile_size)
    tensors = (q, k, v, out, lse, g, g_lse, sink_logits, segment_ids, kv_segment_ids, q_offsets)
    dq, dk, dv, *d_sinks = compute("attention", _backward(static), tensors)
    return dq, dk, dv, d_sinks[0] if d_sinks else q.new_empty(0)


attention_backward_op = torch.library.custom_op("ringjax::attention_backward", _gradients, mutates_args=(), tags=_TAGS)


@attention_backward_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, _out: Any, _lse: Any, _g: Any, _g_lse: Any, sink_logits: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_sinks = q.new_empty(0) if sink_logits is None else sink_logits.new_empty(sink_logits.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), d_sinks


_TENSORS, _BACKWARD_TENSORS = 7, 11  # how many of the operations' arguments are tensors; the rest is static


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.static = inputs[_TENSORS:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:_TENSORS], *output)


def _attention_backward(
    ctx: Any, g: Tensor | None, g_lse: Tensor | None, call: Any = attention_backward_op
) -> tuple[Any, ...]:
    q, k, v, sink_logits, ids, kv_ids, offsets, out, lse = ctx.saved_tensors
    if g is None and g_lse is None:
        return (None,) * (_TENSORS + len(ctx.static))
    g = torch.zeros_like(out) if g is None else g
    dq, dk, dv, d_sinks = call(q, k, v, out, lse, g, g_lse, sink_logits, ids, kv_ids, offsets, *ctx.static)
    return (dq, dk, dv, None if sink_logits is None else d_sinks, *(None,) * (3 + len(ctx.static)))


attention_op.register_autograd(_attention_backward, setup_context=_setup_context)


def no_second_derivative(call: str) -> NotImplementedError:
    """What a derivative of a gradient raises."""
    return NotImplementedError(
        f"{call}: the second derivative does not exist: the kernels compute the first one only.\n"
        "  Hint: for gradients of gradients, write attention with torch's own operations."
    )


def _no_second_derivative(ctx: Any, *_: Any) -> Any:
    raise no_second_derivative("attention")


attention_backward_op.register_autograd(_no_second_derivative)


def _vmapped(op: Any, sink_logits: int, tensors: int, rows: Any) -> Any:
    """`torch.vmap` of an operation: the new axis becomes part of the batch, or, for sink logits, a loop."""

    def rule(info: Any, in_dims: Any, *arguments: Any) -> Any:
        n = info.batch_size
        moved = [
            x if dim is None or x is None else x.movedim(dim, 0)
            for x, dim in zip(arguments[:tensors], in_dims[:tensors], strict=True)
        ]
        mapped = [dim is not None for dim in in_dims[:tensors]]
        static = arguments[tensors:]
        if arguments[sink_logits] is None:
            folded = [
                None if x is None else (x if was else x.expand(n, *x.shape)).flatten(0, 1)
                for x, was in zip(moved, mapped, strict=True)
            ]
            outs = op(*folded, *static)
            return tuple(
                out.unflatten(0, (n, -1)) if is_row else out for out, is_row in zip(outs, rows, strict=True)
            ), tuple(0 if is_row else None for is_row in rows)
        # Sink logits have no batch axis, and each element of the new axis has a gradient of its own for them.
        each = [op(*[x[i] if was else x for x, was in zip(moved, mapped, strict=True)], *static) for i in range(n)]
        return tuple(torch.stack(outs) for outs in zip(*each, strict=True)), (0,) * len(rows)

    return rule


_attention_vmap = _vmapped(attention_op, 3, _TENSORS, (True, True))
_backward_vmap = _vmapped(attention_backward_op, 7, _BACKWARD_TENSORS, (True, True, True, False))
attention_op.register_vmap(_attention_vmap)
attention_backward_op.register_vmap(_backward_vmap)


def _no_forward_mode(call: str) -> NotImplementedError:
    return NotImplementedError(
        f"{call}: forward-mode derivatives (torch.func.jvp) do not exist: kernels compute backward ones.\n"
        "  Hint: torch.func.vjp, grad and jacrev work."
    )


def check_no_tangents(call: str, tensors: Any) -> None:
    """Raises if one of the tensors is dual, as forward-mode derivatives without torch.func make them."""
    if forward_ad._current_level >= 0:  # in `dual_level()`
        for x in tensors:
            if x is not None and forward_ad.unpack_dual(x).tangent is not None:
                raise _no_forward_mode(call)


class _Transformed(torch.autograd.Function):
    """The operation under `torch.func` transformations, which do not see what `register_autograd` registers."""

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return attention_call(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _setup_context(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        g, g_lse = gradients
        return _attention_backward(ctx, g, g_lse, _backward_call(g, g_lse))

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise _no_forward_mode("attention")

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return _attention_vmap(info, in_dims, *arguments)


class _Taped(torch.autograd.Function):
    """The operation on torch's tape where nothing watches: such a function costs torch a tenth of the time."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        *tensors, ctx.static = arguments
        program = _forward(ctx.static)
        ctx.launched = find(program, tensors)
        out, lse = _compute(ctx.launched, "attention", program, tensors)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        g, g_lse = gradients
        call = _backward_call(g, g_lse)
        if call is not _gradients or g is None:
            return (*_attention_backward(ctx, g, g_lse, call)[:_TENSORS], None)
        q, k, v, sink_logits, ids, kv_ids, offsets, out, lse = ctx.saved_tensors
        tensors = (q, k, v, out, lse, g, g_lse, sink_logits, ids, kv_ids, offsets)
        program, kind = _backward(ctx.static), g_lse is None
        if ctx.launched is None:
            launched = None
        elif (launched := ctx.launched.next.get(kind)) is None:
            launched = ctx.launched.next[kind] = find(program, tensors)
        dq, dk, dv, *d_sinks = _compute(launched, "attention", program, tensors)
        return dq, dk, dv, d_sinks[0] if d_sinks else None, None, None, None, None

    jvp = _Transformed.jvp


class _TransformedBackward(torch.autograd.Function):
    """The backward operation under transformations."""

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return _under_functorch(_TransformedBackward, attention_backward_op)(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        return

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _no_second_derivative(ctx, *gradients)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return _backward_vmap(info, in_dims, *arguments)


def _under_functorch(function: Any, op: Any) -> Any:
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return function.apply
    return op


def attention_call(*arguments: Any, lse: bool = True) -> tuple[Tensor, Tensor | None]:
    """The operation, by whatever way what is around it can follow; straight, if nothing is.

    torch's dispatcher takes longer than a small kernel, so it is left out where nobody would notice. Without `lse`,
    the second result may be None: each tensor that crosses takes time.
    """
    op = _under_functorch(_Transformed, attention_op)
    tensors = arguments[:_TENSORS]
    if op is attention_op and _is_plain(tensors):
        check_no_tangents("attention", tensors)
        static = Static(*arguments[_TENSORS:])
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
            taped: tuple[Tensor, Tensor] = _Taped.apply(*tensors, static)
            return taped
        results = compute("attention", _forward(static), tensors, wanted=2 if lse else 1)
        return results[0], results[1] if lse else None
    result: tuple[Tensor, Tensor] = op(*arguments)
    return result


def _backward_call(*gradients: Tensor | None) -> Any:
    """The backward operation, likewise; through the dispatcher where a derivative of it might be asked for.

    A gradient may be many at once too (`is_grads_batched`), which only the dispatcher takes apart.
    """
    op = _under_functorch(_TransformedBackward, attention_backward_op)
    if op is not attention_backward_op or torch.is_grad_enabled() or not _is_plain(gradients):
        return op
    return op if any(x is not None and _is_batched(x) for x in gradients) else _gradients


_is_batched: Any = torch._C._functorch.is_legacy_batchedtensor


def _is_plain(tensors: Any) -> bool:
    """Whether nobody watches: no compiler, no mode, no subclass of a tensor."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    return all(x is None or type(x) in (Tensor, torch.nn.Parameter) for x in tensors)
