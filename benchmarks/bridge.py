"""What a call through torch_bridge costs beside ringjax's own, and where the time goes: `python -m benchmarks.bridge`.

The problem is small, so that Python and the two runtimes are what is timed, not a kernel. A call of either library
returns before the GPU is done: times are of many calls in a row, then one wait. On a CPU every call is waited for.
"""

import argparse
import datetime
import os
import statistics
import time
from itertools import pairwise

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # two libraries share the memory

import jax
import jax.numpy as jnp
import torch

import ringjax as rj
import torch_bridge as tb
from torch_bridge import _arguments, _dlpack, _held, _launch, _ops

WINDOW = rj.Window.causal(128)
SHAPE = {"batch": 1, "length": 256, "heads": 8, "kv_heads": 2, "head_dim": 64}


def wait(result=None):
    """Until both libraries are done."""
    if result is not None:
        jax.block_until_ready([x for x in jax.tree.leaves(result) if isinstance(x, jax.Array)])
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def per_call(calls, rounds, repeats):
    """Median microseconds per call, the calls taken in turn."""
    found = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(5):
            wait(call())
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(repeats):
                result = call()
            wait(result)
            found[name].append((time.perf_counter() - start) / repeats * 1e6)
    return {name: statistics.median(us) for name, us in found.items()}


def tensors(length, dtype, device, seed=0):
    generator = torch.Generator(device).manual_seed(seed)
    heads = (SHAPE["heads"], SHAPE["kv_heads"], SHAPE["kv_heads"])
    shapes = [(SHAPE["batch"], length, n, SHAPE["head_dim"]) for n in heads]
    return [torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype) for shape in shapes]


def check(what, got, expected):
    """No figure of a wrong call: the first result is ringjax's to the bit; of gradients, torch may sum a part."""
    for i, (a, b) in enumerate(zip(got, map(tb.to_torch, expected), strict=True)):
        near = float((a.double() - b.double()).norm()) < 3e-3 * float(b.double().norm())
        if not torch.equal(a, b) and not (i and near):
            raise SystemExit(f"{what}: the bridge's numbers are not ringjax's")


def by_jax(call):
    """The call with every program run by JAX's runtime, none launched by torch."""

    def called():
        kept = _ops.find, _held.find
        _ops.find = _held.find = lambda *_: None
        try:
            return call()
        finally:
            _ops.find, _held.find = kept

    return called


def calls_of(dtype, device):
    """Name -> (bridged call, the same by JAX's runtime, native call), each checked."""
    made = tensors(SHAPE["length"], dtype, device)
    arrays = [tb.to_jax(x, copy=True) for x in made]
    g = torch.ones_like(made[0])
    g_array = tb.to_jax(g, copy=True)
    with_grad = [x.clone().requires_grad_() for x in made]

    def forward_and_backward():
        out = tb.attention(*with_grad, WINDOW)
        return (out.detach(), *torch.autograd.grad(out, with_grad, g))

    native_forward = jax.jit(lambda q, k, v: rj.attention(q, k, v, WINDOW, return_lse=True))

    @jax.jit
    def native_both(q, k, v, g):
        out, vjp = jax.vjp(lambda *qkv: rj.attention(*qkv, WINDOW), q, k, v)
        return out, *vjp(g)

    def forward():
        return tb.attention(*made, WINDOW)

    check("forward", tb.attention(*made, WINDOW, return_lse=True), native_forward(*arrays))
    for call in (forward_and_backward, by_jax(forward_and_backward)):
        check("forward + backward", call(), native_both(*arrays, g_array))

    token = tensors(1, dtype, device, seed=1)
    token_arrays = [tb.to_jax(x, copy=True) for x in token]
    ring = tb.RingBuffer.empty(1, SHAPE["kv_heads"], SHAPE["head_dim"], WINDOW, dtype=dtype, device=device)
    tb.attend(*made, ring)
    held = [ring.clone().release()]
    step = jax.jit(lambda ring, q, k, v: rj.attend(q, k, v, ring), donate_argnums=0)

    def native_decode():
        out, held[0] = step(held[0], *token_arrays)
        return out

    by_jax_ring = ring.clone()

    def decode():
        return tb.attend(*token, ring)[0]

    decode_by_jax = by_jax(lambda: tb.attend(*token, by_jax_ring)[0])
    expected = native_decode()
    for call in (decode, decode_by_jax):
        check("decode", [call()], [expected])
    return {
        "forward": (forward, by_jax(forward), lambda: native_forward(*arrays)),
        "forward + backward": (
            forward_and_backward,
            by_jax(forward_and_backward),
            lambda: native_both(*arrays, g_array),
        ),
        "decode, one step": (decode, decode_by_jax, native_decode),
    }


class Nothing(torch.autograd.Function):
    """What torch's tape costs by itself: as many tensors in, kept, out and back as in a call of `attention`."""

    @staticmethod
    def forward(ctx, made, *tensors):
        ctx.made = made
        ctx.set_materialize_grads(False)
        out, lse, *_ = (x.detach() for x in made)
        ctx.save_for_backward(*tensors, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx, g, g_lse):
        ctx.saved_tensors  # noqa: B018 (unpacked, which takes time)
        return None, *ctx.made[2:]


def on_one_thread(call):
    """The call with torch's backward pass on the caller's thread, not on the one that torch has for the device."""

    def called():
        with torch.autograd.set_multithreading_enabled(False):
            return call()

    return called


def pieces(dtype, device):
    """Where the time of a call goes."""
    made = tensors(SHAPE["length"], dtype, device)
    arrays = [tb.to_jax(x, copy=True) for x in made]
    static = _ops.Static(WINDOW.left, WINDOW.right, WINDOW.sinks, *(None,) * 7)
    program = _ops._forward(static)
    out, lse = program(*arrays, *(None,) * 4)
    options = (*made, *(None,) * 4, *static)
    leaves = [x.clone().requires_grad_() for x in made]
    with_grad = (leaves[0], *options[1:])
    g = torch.ones_like(made[0])
    results = [torch.empty_like(made[0]), tb.to_torch(lse), *(torch.empty_like(x) for x in made)]
    launched = {}
    if (found := _launch.find(program, options[:7])) is not None:
        launched = {"looking up what torch launches": lambda: _launch.find(program, options[:7]).given(made)}
        launched["launching it"] = lambda: found(made)
        residuals = [*made, *found(made), g]
        backward = _launch.find(_ops._backward(static), (*residuals, *(None,) * 5))
        launched["launching the backward one"] = lambda: backward(residuals)

    def tape():
        return torch.autograd.grad(Nothing.apply(results, *leaves)[0], leaves, g)

    def both():
        return torch.autograd.grad(tb.attention(*leaves, WINDOW), leaves, g)

    return launched | {
        "torch's tape around nothing, forward + backward": tape,
        "the same on one thread": on_one_thread(tape),
        "attention, forward + backward, on one thread": on_one_thread(both),
        "checks of the arguments": lambda: _arguments.check_floats("bench", dict(zip("qkv", made, strict=True)), {}),
        "three tensors to JAX": lambda: _dlpack.views_in_jax(made),
        "the same by jax.dlpack.from_dlpack": lambda: [jax.dlpack.from_dlpack(x) for x in made],
        "JAX's call of the program": lambda: program(*arrays, *(None,) * 4),
        "two arrays to torch": lambda: (_dlpack.view_in_torch(out), _dlpack.view_in_torch(lse)),
        "all of these": by_jax(lambda: _ops._attention(*options)),
        "through torch's dispatcher": by_jax(lambda: _ops.attention_op(*options)),
        "through its autograd too": by_jax(lambda: _ops.attention_op(*with_grad)),
    }


def in_a_row(dtype, device, repeats):
    """Mean microseconds of each step of calls in a row, none of them waited for."""
    made = tensors(SHAPE["length"], dtype, device)
    program = _ops._forward(_ops.Static(WINDOW.left, WINDOW.right, WINDOW.sinks, *(None,) * 7))
    steps = ["tensors to JAX", "JAX's call", "first array to torch", "second array to torch", "dropping JAX's views"]
    steps += ["dropping the tensors"]
    spent = dict.fromkeys(steps, 0.0)
    wait()
    for i in range(repeats + 20):
        if i == 20:
            spent = dict.fromkeys(steps, 0.0)
        times = [time.perf_counter()]
        views = _dlpack.views_in_jax(made)
        times.append(time.perf_counter())
        out, lse = program(*views, *(None,) * 4)
        times.append(time.perf_counter())
        out = _dlpack.view_in_torch(out)
        times.append(time.perf_counter())
        lse = _dlpack.view_in_torch(lse)
        times.append(time.perf_counter())
        del views
        times.append(time.perf_counter())
        del out, lse
        times.append(time.perf_counter())
        for name, (start, stop) in zip(steps, pairwise(times), strict=True):
            spent[name] += (stop - start) / repeats * 1e6
    wait()
    return spent


def without_jaxs_runtime():
    """A trivial Mosaic kernel, called through JAX and launched on torch's own stream."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    @jax.jit
    def through_jax(x, y):
        return kernel(x, y)

    def body(x_ref, y_ref, o_ref):
        o_ref[...] = x_ref[...] + y_ref[...]

    kind = jax.ShapeDtypeStruct((128,), jnp.float32)
    try:
        kernel = plgpu.kernel(body, out_type=kind)
    except TypeError:
        kernel = plgpu.kernel(body, out_shape=kind)
    x = torch.randn(128, device="cuda")
    array = tb.to_jax(x)
    direct = plgpu.as_torch_kernel(kernel)
    check("as_torch_kernel", [direct(x, x)], [through_jax(array, array)])

    def bridged():
        views = _dlpack.views_in_jax([x, x])
        return _dlpack.view_in_torch(through_jax(*views))

    return {
        "a trivial kernel, by JAX": lambda: through_jax(array, array),
        "bridged": bridged,
        "by as_torch_kernel": lambda: direct(x, x),
        "torch's own x + x": lambda: x + x,
    }


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bridge", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    chosen = parser.parse_args(arguments)
    dtype = torch.bfloat16 if chosen.device == "cuda" else torch.float32
    today = datetime.datetime.now(datetime.UTC).date()
    name = torch.cuda.get_device_name() if chosen.device == "cuda" else "cpu"
    print(f"{name}, jax {jax.__version__}, torch {torch.__version__}, {today}; {SHAPE}, {WINDOW}, {dtype}")
    print(f"median of {chosen.rounds} rounds of {chosen.repeats} calls\n")
    found = {}
    print("| call | bridged, us | by JAX's runtime, us | native JAX, us | overhead, us |\n|---|---|---|---|---|")
    for what, calls in calls_of(dtype, chosen.device).items():
        names = ("bridged", "by JAX", "native")
        us = per_call(dict(zip(names, calls, strict=True)), chosen.rounds, chosen.repeats)
        found[what] = us["bridged"] - us["native"]
        print(f"| {what} | {' | '.join(f'{us[name]:.1f}' for name in names)} | {found[what]:.1f} |", flush=True)
    print("\n| of a call | us |\n|---|---|")
    for what, us in per_call(pieces(dtype, chosen.device), chosen.rounds, chosen.repeats).items():
        print(f"| {what} | {us:.1f} |", flush=True)
    print("\n| of forward calls in a row | us |\n|---|---|")
    for what, us in in_a_row(dtype, chosen.device, chosen.repeats).items():
        print(f"| {what} | {us:.1f} |", flush=True)
    if chosen.device == "cuda":
        try:
            figures = per_call(without_jaxs_runtime(), chosen.rounds, chosen.repeats)
        except Exception as problem:  # an experimental part of JAX
            print(f"\nas_torch_kernel: failed: {type(problem).__name__}: {str(problem)[:300]}")
        else:
            print("\n| one kernel | us |\n|---|---|")
            for what, us in figures.items():
                print(f"| {what} | {us:.1f} |")
    return found


if __name__ == "__main__":
    main()
