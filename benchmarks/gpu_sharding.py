"""Times a mesh of all GPUs against one of them: `python -m benchmarks.gpu_sharding`, as Markdown.

First a long sequence split over the GPUs (`sequence_parallel_attention`, forward and backward), then decoding with the
heads split. Every result is checked before it is timed: the mesh's against one GPU's in all elements, one GPU's against
attention in float32 at sampled rows. One GPU and the mesh are timed in turn, in batches of calls back to back.
"""

import argparse
import datetime
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ringjax as rj
from benchmarks.gpu_rows import Row, error, exact
from benchmarks.timing import in_batches
from ringjax.sharding import sequence_parallel_attention, shard_rings

SENT = re.compile(r"(%\S+) = (.*?) collective-permute(-start)?\(")
BYTES = {"bf16": 2, "f32": 4, "s32": 4, "f16": 2}


def mesh_over(devices):
    return jax.make_mesh((len(devices),), ("x",), axis_types=(AxisType.Auto,), devices=devices)


def timed(programs):
    """Median seconds of each call, in turn."""
    calls = {name: (partial(run, *arguments), jax.block_until_ready) for name, (run, arguments) in programs.items()}
    return {name: timing.median for name, timing in in_batches(calls, batches=9, batch_s=0.05).items()}


def difference(x, y):
    """Relative, of two arrays on different devices, a slice of the first axis but one at a time."""
    above = below = 0.0
    for start in range(0, x.shape[1], 8192):
        a, b = (np.asarray(z[:, start : start + 8192], np.float32) for z in (x, y))
        above, below = above + float(((a - b) ** 2).sum()), below + float((b**2).sum())
    return (above / below) ** 0.5


def permuted(text):
    """Bytes that one device receives in a compiled program, and kernels between each transfer's start and its end."""
    total, behind = 0, []
    lines = text[text.index("ENTRY ") :].splitlines()
    for i, line in enumerate(lines):
        if match := SENT.search(line):
            shapes = re.findall(r"(\w+)\[([\d,]+)\]", match[2])
            size = sum(BYTES[kind] * int(np.prod([int(n) for n in dims.split(",")])) for kind, dims in shapes)
            total += size // 2 if match[3] else size  # a start lists what it sends, then what it receives
            done = f"collective-permute-done({match[1]})"
            end = next((j for j, other in enumerate(lines[i:], i) if done in other), i)
            behind.append(sum(" custom-call(" in other for other in lines[i:end]))
    return total, behind


def held(program):
    """MiB of one device: arguments and results, and what the program needs beside them."""
    memory = program.memory_analysis()
    sizes = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return sizes / 2**20, memory.temp_size_in_bytes / 2**20


def sequence(length, size, heads, kv_heads, head_dim, hlo):
    devices = jax.devices()
    row = Row("sequence", (1, length, heads, kv_heads, head_dim), size)
    mesh = mesh_over(devices)
    split = NamedSharding(mesh, P(None, "x"))

    def with_gradients(call):
        def both(q, k, v, g):
            out, vjp = jax.vjp(call, q, k, v)
            return out, *vjp(g)

        return jax.jit(both)

    on_mesh = with_gradients(partial(sequence_parallel_attention, window=row.window, mesh=mesh, axis="x"))
    alone = with_gradients(partial(rj.attention, window=row.window))
    arrays = row.arrays()[:4]
    parts = tuple(jax.device_put(x, split) for x in arrays)
    programs = {"one": (alone.lower(*arrays).compile(), arrays), "mesh": (on_mesh.lower(*parts).compile(), parts)}
    if hlo:
        with open(hlo, "w") as file:
            file.write(programs["mesh"][0].as_text())
    found = {name: run(*arguments) for name, (run, arguments) in programs.items()}
    errors = [error(row, (*arrays, None, None), found["one"])]
    group, middle = heads // kv_heads, length // len(devices)  # rows on both sides of the cut
    wanted = exact(row, (*arrays, None, None), 0, 0, middle - 256, middle + 256)[:2]
    for x, y in zip(found["mesh"], wanted, strict=False):
        x = jnp.asarray(np.asarray(x[0, middle - 256 : middle + 256, :group]), jnp.float32)
        errors.append(float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y)))
    errors += [difference(x, y) for x, y in zip(found["mesh"], found["one"], strict=True)]
    del found
    print(f"{length} tokens, window {size}, N={heads}, K={kv_heads}, H={head_dim}, bfloat16, forward and backward.")
    print(f"Errors: one GPU {errors[0]:.1e}, mesh at the cut {max(errors[1:3]):.1e}, mesh to one GPU ", end="")
    print(", ".join(f"{x:.1e}" for x in errors[3:]) + ".\n")
    if not max(errors) < 1e-2:
        raise SystemExit("REFUSED: wrong")
    seconds = timed(programs)
    sent, behind = permuted(programs["mesh"][0].as_text())
    # Keys and values of all others forward, their gradients backward.
    whole = 4 * (length - length // len(devices)) * kv_heads * head_dim * 2
    rate = 14 * head_dim * row.pairs / 1e12
    print("| GPUs | ms | speed-up | TFLOP/s a GPU | received MiB a GPU | all-gather's | arrays MiB | temporary MiB |")
    print("|---|---|---|---|---|---|---|---|")
    for name, count in (("one", 1), ("mesh", len(devices))):
        s, (arguments, temporary) = seconds[name], held(programs[name][0])
        moved = (0, 0) if name == "one" else (sent / 2**20, whole / 2**20)
        print(
            f"| {count} | {s * 1e3:.2f} | {seconds['one'] / s:.2f} | {rate / s / count:.0f} | {moved[0]:.1f} "
            f"| {moved[1]:.0f} | {arguments:.0f} | {temporary:.0f} |"
        )
    print(f"\nKernels between the start and the end of each transfer: {behind}.\n", flush=True)


def decoding(batch, size, heads, kv_heads, head_dim, steps):
    """An attention layer with its projections, heads split: one sum over the GPUs a token."""
    window, width = rj.Window.causal(size), heads * head_dim
    devices = jax.devices()

    def make():
        return rj.RingBuffer.empty(batch, kv_heads, head_dim, window)

    def weights():
        keys = jax.random.split(jax.random.key(0), 4)
        shapes = [(width, n, head_dim) for n in (heads, kv_heads, kv_heads)] + [(heads, head_dim, width)]
        return [jax.random.normal(key, s, jnp.bfloat16) * width**-0.5 for key, s in zip(keys, shapes, strict=True)]

    @partial(jax.jit, donate_argnums=1)
    def run(weights, ring, x):
        def step(_, carry):
            ring, x = carry
            q, k, v = (jnp.einsum("btd,dnh->btnh", x, w) for w in weights[:3])
            out, ring = rj.attend(q, k, v, ring)
            x = x + jnp.einsum("btnh,nhd->btd", out, weights[3])
            x = x * lax.rsqrt(jnp.square(x.astype(jnp.float32)).mean(-1, keepdims=True) + 1e-6).astype(x.dtype)
            return ring, x

        return lax.fori_loop(0, steps, step, (ring, x))

    @partial(jax.jit, donate_argnums=0)
    def fill(ring):
        tokens = jax.random.normal(jax.random.key(1), (batch, size, kv_heads, head_dim), jnp.bfloat16)
        return ring.append(tokens, tokens)

    first = jax.random.normal(jax.random.key(2), (batch, 1, width), jnp.bfloat16)
    state, last, calls = {}, {}, {}
    for name, group in (("one", devices[:1]), ("mesh", devices)):
        mesh = mesh_over(group)
        w = [jax.device_put(x, NamedSharding(mesh, P(None, "x"))) for x in weights()[:3]]
        w.append(jax.device_put(weights()[3], NamedSharding(mesh, P("x"))))
        ring = fill(shard_rings(make, mesh, heads_axis="x"))
        x = jax.device_put(first, NamedSharding(mesh, P()))
        state[name], last[name] = run(w, ring, x)

        def call(name=name, w=w, x=x):
            state[name], out = run(w, state[name], x)
            return out

        calls[name] = call, ()
    apart = difference(last["mesh"].reshape(1, batch, width), last["one"].reshape(1, batch, width))
    print(
        f"Decoding, {batch} rows, window {size}, N={heads}, K={kv_heads}, H={head_dim}: after {steps} steps the outputs"
    )
    print(f"differ by {apart:.1e}.\n")
    if not apart < 5e-2:  # bfloat16, fed back `steps` times
        raise SystemExit("REFUSED: wrong")
    seconds = timed(calls)
    print("| GPUs | us a step | tokens/s | speed-up |\n|---|---|---|---|")
    for name, count in (("one", 1), ("mesh", len(devices))):
        s = seconds[name] / steps
        print(f"| {count} | {s * 1e6:.1f} | {batch / s:,.0f} | {seconds['one'] / seconds[name]:.2f} |", flush=True)
    print()


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_sharding", description=__doc__)
    parser.add_argument("--small", action="store_true", help="shapes that a CPU manages: a rehearsal")
    parser.add_argument("--only", choices=["sequence", "decoding"], help="one of the two tables")
    parser.add_argument("--hlo", metavar="FILE", help="where to put the compiled program of the sequence")
    options = parser.parse_args()
    small = options.small
    device, today = jax.devices()[0], datetime.datetime.now(datetime.UTC).date()
    print(f"{jax.device_count()} x {device.device_kind}, jax {jax.__version__}, {today}; medians.\n")
    if options.only != "decoding":
        sequence(*((4096, 64, 4, 2, 64) if small else (262_144, 4096, 32, 8, 128)), hlo=options.hlo)
    batches = () if options.only == "sequence" else (2,) if small else (8, 128)
    for batch in batches:
        decoding(batch, *((64, 4, 2, 64) if small else (4096, 32, 8, 128)), steps=4 if small else 64)


if __name__ == "__main__":
    main()
