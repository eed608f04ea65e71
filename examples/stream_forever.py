"""Train a small language model on this computer's own Python manual, then stream from it in memory that does not grow.

    make demo                                     about a minute of training, then 30,000 bytes of text
    python examples/stream_forever.py --help      longer, larger, elsewhere; checkpoints

The model reads and writes bytes. Each of its layers looks back through a window of its own size, and always at the
first four bytes of the stream (pinned sinks). What it has to remember of a stream, however long, is a ring per layer.
"""

import argparse
import json
import math
import pydoc_data.topics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.tree_util import Partial
from tqdm import tqdm

import ringjax as rj
from ringjax.nnx import SlidingWindowAttention

SINKS = 4
HELD_OUT = 16_384  # bytes that training never sees
FAR = 1_000_000  # how far from its sinks the model learns to be


# The model ------------------------------------------------------------------------------------------------------------


class Block(nnx.Module):
    """Attention through a window, then two dense layers."""

    def __init__(self, width: int, window: int, rngs: nnx.Rngs):
        self.attention = SlidingWindowAttention(
            num_heads=width // 32,
            num_kv_heads=max(1, width // 64),
            head_dim=32,
            in_features=width,
            window=rj.Window.causal(window, sinks=SINKS),
            normalize_qk=True,
            use_bias=False,
            rngs=rngs,
        )
        self.attention_norm = nnx.RMSNorm(width, rngs=rngs)
        self.dense_norm = nnx.RMSNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 3 * width, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(3 * width, width, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array, ring: rj.RingBuffer | None, positions: jax.Array | None):
        attended, ring = self.attention(self.attention_norm(x), ring, positions=positions)
        x = x + attended
        return x + self.down(jnp.square(nnx.relu(self.up(self.dense_norm(x))))), ring


class ByteModel(nnx.Module):
    """bytes int32 [B, T] -> logits of the byte after each, [B, T, 256]."""

    def __init__(self, width: int, windows: Sequence[int], rngs: nnx.Rngs):
        self.embed = nnx.Embed(256, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, window, rngs) for window in windows])
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        # The first guess is "any byte": a loss of log(256), 8 bits per byte.
        self.head = nnx.Linear(width, 256, use_bias=False, kernel_init=nnx.initializers.zeros_init(), rngs=rngs)

    def __call__(self, tokens: jax.Array, rings: Any = None, *, positions: jax.Array | None = None):
        x, after = self.embed(tokens), []
        for block, ring in zip(self.blocks, rings or [None] * len(self.blocks), strict=True):
            x, ring = block(x, ring, positions)
            after.append(ring)
        return self.head(self.norm(x)), after

    def empty_rings(self, batch: int = 1) -> list[rj.RingBuffer]:
        return [block.attention.init_buffer(batch) for block in self.blocks]


# The text -------------------------------------------------------------------------------------------------------------


def python_manual() -> tuple[np.ndarray, np.ndarray]:
    """The language reference that Python ships for `help()`: bytes to train on, and bytes held out."""
    topics = "\n\n".join(pydoc_data.topics.topics.values())
    # Topics quote each other: a paragraph counts once, or the held-out text would have been seen in training.
    paragraphs = dict.fromkeys(topics.split("\n\n"))
    tables = ("|", "+-")  # mostly blanks: easy to predict, and no pleasure to read
    text = "\n\n".join(paragraph for paragraph in paragraphs if not paragraph.lstrip().startswith(tables))
    data = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    return data[:-HELD_OUT], data[-HELD_OUT:]


# Training -------------------------------------------------------------------------------------------------------------


class Training(NamedTuple):
    """All that a checkpoint holds."""

    model: ByteModel
    optimizer: optax.OptState
    step: int  # steps done
    progress: float  # the part of the training that is done, 0 to 1


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


@jax.jit
def loss_of_stream(model: ByteModel, stream: jax.Array) -> jax.Array:
    """Nats per byte of one long stream, in one full forward."""
    return cross_entropy(model(stream[None, :-1])[0], stream[None, 1:])


def make_train_step(optimizer: optax.GradientTransformation, batch: int, length: int):
    def loss(model: ByteModel, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        return cross_entropy(model(tokens[:, :-1], positions=positions)[0], tokens[:, 1:])

    @partial(jax.jit, donate_argnums=(0, 1))
    def train_step(model, state, text, key, learning_rate):
        key_text, key_far = jax.random.split(key)
        starts = jax.random.randint(key_text, (batch, 1), 0, text.size - length)
        index = jnp.arange(length + 1)[None]
        # In a long stream the sinks are far away. Excerpts are short: so the rotary positions of what follows their
        # sinks leap ahead, by any number of digits, and the model learns to be that far from them.
        leap = jnp.exp(jax.random.uniform(key_far, (batch, 1)) * math.log(FAR)).astype(jnp.int32)
        positions = jnp.where(index < SINKS, index, index + leap)[:, :-1]
        value, gradients = jax.value_and_grad(loss)(model, text[starts + index], positions)
        state.hyperparams["learning_rate"] = learning_rate
        updates, state = optimizer.update(gradients, state, model)
        return optax.apply_updates(model, updates), state, value

    return train_step


def train(model: ByteModel, text: np.ndarray, options: argparse.Namespace) -> tuple[ByteModel, np.ndarray]:
    """The trained model, and the loss of each step, in nats per byte: float [steps, 2], after the step's number."""
    # No schedule of steps: how many fit into the time is not known before. The rate follows the progress instead.
    optimizer = optax.inject_hyperparams(optax.adamw)(learning_rate=0.0, b2=0.95, weight_decay=0.1)
    train_step = make_train_step(optimizer, options.batch, options.length)
    training = Training(model, optimizer.init(model), 0, 0.0)
    checkpoints = Checkpoints(options.checkpoint)
    if options.resume:
        training = checkpoints.restore(training)
        print(f"resumed after step {training.step}, {training.progress:.0%} of the training")
    model, state, step, progress = training
    first, saved, clock, losses = progress, progress, None, []
    text, key = jnp.asarray(text), jax.random.key(options.seed)
    bar = tqdm(total=1.0, initial=first, bar_format="training  {percentage:3.0f}%|{bar}| {elapsed}{postfix}")
    while progress < 1.0:
        rate = options.learning_rate * min(progress / 0.03 + 0.01, 1.0 - progress)
        model, state, loss = train_step(model, state, text, jax.random.fold_in(key, step), np.float32(rate))
        losses.append((step, float(loss)))
        step += 1
        clock = clock or time.perf_counter()  # starts after the first step, which compiles
        passed = first + (time.perf_counter() - clock) / options.seconds
        progress = min(1.0, step / options.steps if options.steps else passed)
        bar.set_postfix_str(f"step {step}, {losses[-1][1]:.2f} nats per byte", refresh=False)
        bar.update(progress - bar.n)
        if progress >= min(1.0, saved + 0.1):
            checkpoints.save(Training(model, state, step, progress))
            saved = progress
    bar.close()
    checkpoints.close()
    return model, np.array(losses).reshape(-1, 2)


class Checkpoints:
    """Orbax checkpoints of a training in a folder, the last two of them; without a folder, none."""

    def __init__(self, folder: Path | None):
        settings = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self.manager = ocp.CheckpointManager(folder.absolute(), options=settings) if folder else None

    def save(self, training: Training) -> None:
        if self.manager:
            self.manager.save(training.step, args=ocp.args.StandardSave(jax.tree.leaves(training)))

    def restore(self, like: Training) -> Training:
        if self.manager is None or self.manager.latest_step() is None:
            raise SystemExit("--resume: there is no checkpoint yet; name its folder with --checkpoint DIR")
        leaves, structure = jax.tree.flatten(like)
        leaves = self.manager.restore(self.manager.latest_step(), args=ocp.args.StandardRestore(leaves))
        return jax.tree.unflatten(structure, leaves)

    def close(self) -> None:
        if self.manager:
            self.manager.close()


# Streaming ------------------------------------------------------------------------------------------------------------


class Stream(NamedTuple):
    """All that is kept of a stream; its size does not depend on how long it has become."""

    rings: list[rj.RingBuffer]
    logits: jax.Array  # of the next byte, [1, 256]
    key: jax.Array


def forward(model: ByteModel, tokens: jax.Array, rings: Any) -> tuple[jax.Array, Any]:
    return model(tokens, rings)


def begin(model: ByteModel, prompt: np.ndarray, seed: int) -> Stream:
    """Reads the prompt, in chunks."""
    logits, rings = rj.prefill(Partial(forward, model), model.empty_rings(), jnp.asarray(prompt)[None], prefill_size=64)
    return Stream(rings, logits, jax.random.key(seed))


@partial(jax.jit, static_argnames="count", donate_argnames="stream")
def advance(model: ByteModel, stream: Stream, sampling: rj.Sampling, count: int):
    """The stream `count` bytes later, these bytes [count], and the logits they were drawn from [count, 256]."""

    def one_byte(stream: Stream, _: None):
        key, draw = jax.random.split(stream.key)
        byte = sampling(stream.logits, draw)
        logits, rings = model(byte[:, None], stream.rings)
        return Stream(rings, logits[:, 0], key), (byte[0], stream.logits[0])

    stream, (drawn, logits) = jax.lax.scan(one_byte, stream, length=count)
    return stream, drawn, logits


def bytes_held(rings: list[rj.RingBuffer]) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(rings))


def bytes_per_token(rings: list[rj.RingBuffer]) -> int:
    """What a cache that keeps every key and value would grow by."""
    return sum((ring.k.nbytes + ring.v.nbytes) // ring.capacity for ring in rings)


@contextmanager
def counting_compilations() -> Iterator[list[str]]:
    """The programs that XLA compiles meanwhile, whoever asks for them."""
    compiled, watching = [], True

    def listen(event: str, seconds: float, **facts: Any) -> None:
        if watching and event == "/jax/core/compile/backend_compile_duration":
            compiled.append(str(facts.get("fun_name", event)))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        watching = False


class Streamed(NamedTuple):
    """A finished stream."""

    tokens: np.ndarray  # int32 [T], the prompt and what followed
    logits: np.ndarray  # of the last bytes, [count, 256]
    memory: np.ndarray  # bytes held after each slice, [slices, 2]: tokens so far, bytes
    bytes_per_token: int
    bytes_per_second: float
    compiled: list[str]


def run(model: ByteModel, prompt: np.ndarray, options: argparse.Namespace) -> Streamed:
    """Streams `--stream` bytes, a slice at a time, all slices through one executable."""
    stream = begin(model, prompt, options.seed)
    sampling, per_token = rj.Sampling(temperature=options.temperature), bytes_per_token(stream.rings)
    parts, logits, memory, clock = [prompt], [], [(len(prompt), bytes_held(stream.rings))], 0.0
    whole = max(1, math.ceil(options.stream / options.slice))
    with counting_compilations() as compiled:
        bar = tqdm(total=whole * options.slice, unit="B", unit_scale=True, desc="streaming")
        for _ in range(whole):
            stream, drawn, new = advance(model, stream, sampling, options.slice)
            parts.append(np.asarray(drawn))
            logits = [*logits, np.asarray(new)][-math.ceil(options.compare / options.slice) :]
            clock = clock or time.perf_counter()  # starts after the first slice, which compiles
            memory.append((memory[-1][0] + options.slice, bytes_held(stream.rings)))
            bar.set_postfix_str(f"rings {memory[-1][1]:,} B", refresh=False)
            bar.update(options.slice)
        bar.close()
    rate = (whole - 1) * options.slice / (time.perf_counter() - clock) if whole > 1 else math.nan
    last = np.concatenate(logits)[-options.compare :]
    return Streamed(np.concatenate(parts), last, np.array(memory), per_token, rate, compiled)


@partial(jax.jit, static_argnames="count")
def full_forward(model: ByteModel, tokens: jax.Array, count: int) -> jax.Array:
    """The logits that the last `count` tokens should have been drawn from, [count, 256].

    No rings: one forward over all tokens from the first on. A start further on would do only if it lay before all that
    the last tokens depend on: through a stack of layers, the sum of their windows, and the sinks.
    """
    return model(tokens[None])[0][0, -count - 1 : -1]


# Pictures -------------------------------------------------------------------------------------------------------------

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#8A8A8A"  # Okabe and Ito's: told apart by the colour-blind too


@contextmanager
def picture(path: Path, title: str, x: str, y: str) -> Iterator[Any]:
    figure, axes = plt.subplots(figsize=(7.2, 4.2), dpi=150, layout="constrained")
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    yield axes
    figure.savefig(path)
    plt.close(figure)


def draw_loss(path: Path, losses: np.ndarray, before: float, after: float, bytes_per_step: int) -> None:
    read = (losses[:, 0] + 1) * bytes_per_step / 1e6
    width = max(1, len(losses) // 40)
    smooth = np.convolve(losses[:, 1], np.ones(width) / width, mode="valid")
    title = f"Held-out text: {before:.2f} to {after:.2f} nats per byte"
    with picture(path, title, "bytes trained on (millions)", "loss (nats per byte)") as axes:
        axes.plot(read, losses[:, 1], color=BLUE, alpha=0.25, linewidth=0.8, label="each step")
        axes.plot(read[width - 1 :], smooth, color=BLUE, linewidth=2, label=f"mean of {width} steps")
        axes.plot(read[[0, -1]], [before, after], "D", color=ORANGE, markersize=7, clip_on=False, label="held-out text")
        axes.set_ylim(0, None)
        bits = axes.secondary_yaxis("right", functions=(lambda y: y / math.log(2), lambda y: y * math.log(2)))
        bits.set_ylabel("bits per byte")
        axes.legend(frameon=False)


def draw_memory(path: Path, memory: np.ndarray, per_token: int) -> None:
    tokens, held = memory.T
    cache = tokens * per_token
    title = f"After {tokens[-1]:,} tokens: {held[-1] / 1e6:.2f} MB, not {cache[-1] / 1e6:.1f} MB"
    with picture(path, title, "tokens in the stream", "keys and values held (MB)") as axes:
        axes.plot(tokens, cache / 1e6, color=ORANGE, linewidth=2, linestyle="--")
        axes.plot(tokens, held / 1e6, color=BLUE, linewidth=3, clip_on=False)
        middle = len(tokens) // 2
        axes.annotate(
            "a cache that grows (computed)",
            (tokens[middle], cache[middle] / 1e6),
            (-8, 8),
            textcoords="offset points",
            ha="right",
            color=ORANGE,
        )
        axes.annotate(
            "the rings (measured)",
            (tokens[-1], held[-1] / 1e6),
            (0, 8),
            textcoords="offset points",
            ha="right",
            color=BLUE,
        )
        axes.set_xlim(0, None)
        axes.set_ylim(0, None)
        axes.xaxis.set_major_formatter("{x:,.0f}")


# Everything together --------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--seconds", type=float, default=60.0, help="how long to train (default: 60)")
    budget.add_argument("--steps", type=int, help="how many steps to train, instead")
    parser.add_argument("--stream", type=int, default=30_000, help="bytes to stream (default: 30,000)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for pictures and text (default: out)")
    parser.add_argument("--checkpoint", type=Path, help="folder for checkpoints of the training")
    parser.add_argument("--resume", action="store_true", help="go on from the last of them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int, default=128, help="features; a multiple of 64 (default: 128)")
    parser.add_argument("--windows", type=int, nargs="+", default=[16, 32, 64, 128], help="one per layer, in bytes")
    parser.add_argument("--batch", type=int, default=8, help="excerpts in a training step")
    parser.add_argument("--length", type=int, default=128, help="bytes in an excerpt")
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--temperature", type=float, default=0.7, help="of the sampling")
    parser.add_argument("--slice", type=int, default=500, help="bytes between two looks at the progress bar")
    parser.add_argument("--compare", type=int, default=2_000, help="last bytes to compare with a full forward")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    text, held_out = python_manual()
    model = ByteModel(options.width, options.windows, nnx.Rngs(options.seed))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model))
    print(f"{len(options.windows)} layers with windows of {options.windows} bytes and {SINKS} sinks: ", end="")
    print(f"{parameters:,} parameters; {len(text):,} bytes of text to train on")
    before = float(loss_of_stream(model, held_out))
    model, losses = train(model, text, options)
    after = float(loss_of_stream(model, held_out))

    streamed = run(model, held_out[:200], options)
    count = min(options.compare, len(streamed.logits))
    difference = np.abs(np.asarray(full_forward(model, streamed.tokens, count)) - streamed.logits[-count:])
    total, held = map(int, streamed.memory[-1])
    report = {
        "steps": len(losses),
        "loss_before": before,
        "loss_after": after,
        "streamed": total - 200,
        "bytes_per_second": streamed.bytes_per_second,
        "ring_bytes": sorted(set(streamed.memory[:, 1].tolist())),
        "growing_cache_bytes": total * streamed.bytes_per_token,
        "compilations": len(streamed.compiled),
        "compared": count,
        "largest_difference": float(difference.max()),
        "largest_logit": float(np.abs(streamed.logits[-count:]).max()),
    }
    (options.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    written = bytes(streamed.tokens.astype(np.uint8)).decode(errors="replace")
    (options.out / "stream.txt").write_text(written)
    if len(losses):
        draw_loss(options.out / "loss.png", losses, before, after, options.batch * options.length)
    draw_memory(options.out / "memory.png", streamed.memory, streamed.bytes_per_token)

    same = "the same" if len(report["ring_bytes"]) == 1 else "NOT the same"
    print(f"""
the end of the stream
{"-" * 80}
{written[-600:]}
{"-" * 80}
held-out text    {before:.3f} nats ({before / math.log(2):.2f} bits) per byte before training
                 {after:.3f} nats ({after / math.log(2):.2f} bits) per byte after {len(losses)} steps
streamed         {report["streamed"]:,} bytes, {streamed.bytes_per_second:,.0f} per second
memory           {held:,} bytes of rings, {same} after each of {len(streamed.memory) - 1} slices
                 {report["growing_cache_bytes"]:,} bytes in a cache that grows
compilations     {report["compilations"]} for the whole stream
stream = batch   the logits of the last {count:,} bytes, streamed, and those of one full forward over all {total:,}
                 differ by at most {report["largest_difference"]:.1e}; the largest is {report["largest_logit"]:.1f}
written          {", ".join(sorted(str(path) for path in options.out.iterdir()))}""")
    return report


if __name__ == "__main__":
    main()
