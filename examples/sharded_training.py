"""Trains a small language model with rows, heads and sequences split over a mesh, then lets it write.

On whatever devices jax finds; where there is only a CPU, on 8 pretended ones. The same script runs in several
processes, each with its part of the devices, as on several machines:

    python examples/sharded_training.py
    python examples/sharded_training.py --processes 2

The axis `data` splits the rows of a batch, `model` the heads and the hidden features, `sequence` the tokens of each
row. The model says so in the way of Flax (`nnx.with_partitioning`), and its attention in one argument.
"""

import argparse
import json
import math
import pydoc_data.topics
import socket
import subprocess
import sys
from functools import partial

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ringjax as rj
from ringjax.nnx import SlidingWindowAttention
from ringjax.sharding import MeshAxes, shard_rings

INIT = nnx.initializers.lecun_normal()


class Layer(nnx.Module):
    def __init__(self, width: int, window: int, axes: MeshAxes, rngs: nnx.Rngs):
        split = partial(nnx.with_partitioning, INIT)
        self.attention = SlidingWindowAttention(
            num_heads=4,
            num_kv_heads=2,
            in_features=width,
            window=rj.Window.causal(window, sinks=1),
            normalize_qk=True,
            use_bias=False,
            kernel_init=split((None, "model", None)),  # [width, heads, head_dim]
            out_kernel_init=split(("model", None, None)),
            axes=axes,
            rngs=rngs,
        )
        self.up = nnx.Linear(width, 4 * width, use_bias=False, kernel_init=split((None, "model")), rngs=rngs)
        self.down = nnx.Linear(4 * width, width, use_bias=False, kernel_init=split(("model", None)), rngs=rngs)

    def __call__(self, x: jax.Array, ring: rj.RingBuffer | None):
        attended, ring = self.attention(x, ring)
        x = x + attended
        return x + self.down(nnx.relu(self.up(x))), ring


class Model(nnx.Module):
    def __init__(self, layers: int, width: int, window: int, axes: MeshAxes):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(256, width, rngs=rngs)
        self.layers = nnx.List([Layer(width, window, axes, rngs) for _ in range(layers)])
        self.head = nnx.Linear(width, 256, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array, rings=None):
        """Tokens int32 [B, T] -> logits [B, T, 256] and the rings after them; without rings, whole sequences."""
        x, after = self.embed(tokens), []
        for layer, ring in zip(self.layers, rings or [None] * len(self.layers), strict=True):
            x, ring = layer(x, ring)
            after.append(ring)
        return self.head(x), after

    def init_rings(self, batch: int) -> list[rj.RingBuffer]:
        return [layer.attention.init_buffer(batch) for layer in self.layers]


def create(layers: int, width: int, window: int, mesh: jax.sharding.Mesh):
    """The model's graph and its parameters, each made where it stays."""
    axes = MeshAxes(sequence="sequence", batch="data", heads="model", mesh=mesh)

    def make() -> Model:
        return Model(layers, width, window, axes)

    with jax.set_mesh(mesh):
        graph, shapes = nnx.split(nnx.eval_shape(make))
        specs = nnx.get_partition_spec(shapes)
        layout = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, P))
        return graph, jax.jit(lambda: nnx.state(make()), out_shardings=layout)()


def text(steps: int, batch: int, length: int) -> np.ndarray:
    """Bytes of the manual that Python ships, int32 [steps, batch, length + 1]."""
    data = np.frombuffer("\n".join(pydoc_data.topics.topics.values()).encode(), np.uint8)
    return data[: steps * batch * (length + 1)].reshape(steps, batch, length + 1).astype(np.int32)


def placed(x: np.ndarray, mesh: jax.sharding.Mesh, *axes: str | None) -> jax.Array:
    """An array that every process has, of which every device takes its part."""
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, P(*axes)), lambda index: x[index])


def train(
    mesh: jax.sharding.Mesh, *, layers: int, width: int, window: int, batch: int, length: int, steps: int, new: int
):
    """Losses of each step, and what greedy decoding writes after a prompt of the last batch."""
    graph, params = create(layers, width, window, mesh)
    optimizer = optax.adam(3e-3)

    def loss(params, read, following):
        logits, _ = nnx.merge(graph, params)(read)
        return optax.softmax_cross_entropy_with_integer_labels(logits, following).mean()

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, read, following):
        value, gradients = jax.value_and_grad(loss)(params, read, following)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    @jax.jit  # one program: in it, a process may hold a part of an array only
    def write(params, rings, prompt):
        def model_step(tokens, rings):
            return nnx.merge(graph, params)(tokens, rings)

        return rj.generate(model_step, rings, prompt, max_new_tokens=new, prefill_size=length)

    state, losses = jax.jit(optimizer.init)(params), []
    parts = text(steps, batch, length)
    for part in parts:
        read, following = (placed(x, mesh, "data", "sequence") for x in (part[:, :-1], part[:, 1:]))
        params, state, value = step(params, state, read, following)
        losses.append(float(value))
    # The prompt is read by all devices of the axis `sequence`; the rings that it leaves are split by rows and heads.
    rings = partial(nnx.merge(graph, params).init_rings, batch)
    rings = shard_rings(rings, mesh, batch_axis="data", heads_axis="model")
    written = write(params, rings, placed(parts[-1][:, :-1], mesh, "data"))
    tokens = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))(written.tokens)
    return losses, np.asarray(tokens.addressable_data(0)), written.state[0].k.sharding.spec


def axes_of(devices: int) -> tuple[int, int, int]:
    """How many ways to split rows, heads and sequences: the sequences first, then heads (two at most), then rows."""
    sequence = math.gcd(devices, 2)
    model = math.gcd(devices // sequence, 2)
    return devices // sequence // model, model, sequence


def main(layers=2, width=32, window=10, batch=4, length=64, steps=8, new=12) -> dict:
    """Trains on all devices and on one, and says how far apart they end."""
    shape, names = axes_of(jax.device_count()), ("data", "model", "sequence")
    mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * 3)
    alone = jax.make_mesh((1, 1, 1), names, axis_types=(AxisType.Auto,) * 3, devices=jax.local_devices()[:1])
    sizes = {
        "layers": layers,
        "width": width,
        "window": window,
        "batch": batch,
        "length": length,
        "steps": steps,
        "new": new,
    }
    losses, written, layout = train(mesh, **sizes)
    found = {"losses": losses, "written": written.tolist(), "layout": str(layout)}
    found |= {"devices": jax.device_count(), "processes": jax.process_count()}
    if jax.process_index() == 0:
        same_losses, same_written, _ = train(alone, **sizes)
        found["difference"] = max(abs(a - b) for a, b in zip(losses, same_losses, strict=True))
        found["same"] = bool((written == same_written).all())
        split = ", ".join(f"{name} {count}" for name, count in zip(names, shape, strict=True))
        print(f"{jax.device_count()} devices in {jax.process_count()} processes: {split}")
        print(f"{steps} steps: {losses[0]:.3f} to {losses[-1]:.3f} nats per byte")
        print(f"on one device the losses are the same to {found['difference']:.1e}")
        print(f"decoding, its rings split as {layout}, {'also' if found['same'] else 'NOT'} the same")
    return found


def start(processes: int, arguments: list[str]) -> int:
    """This script in several processes of one machine; the exit status of the first that fails."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, __file__, *arguments, "--coordinator", address]
    children = [subprocess.Popen([*command, "--process", str(i)]) for i in range(processes)]
    return next((child.returncode for child in children if child.wait()), 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=1, help="start so many processes")
    parser.add_argument("--process", type=int, help="be this one of them; on several machines, start each by hand")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    parser.add_argument(
        "--devices", type=int, default=8, help="CPU devices to pretend, in all, where there is no other"
    )
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--report", help="a JSON file for what was found")
    options = parser.parse_args()
    if options.processes > 1 and options.process is None:
        sys.exit(start(options.processes, sys.argv[1:]))
    jax.config.update("jax_num_cpu_devices", options.devices // options.processes)
    if options.processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(options.coordinator, options.processes, options.process)
    found = main(layers=options.layers, steps=options.steps)
    if options.report and jax.process_index() == 0:
        with open(options.report, "w") as file:
            json.dump(found, file)
