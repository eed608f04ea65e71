"""Attention without history: against dense peers, against the machine's matrix products, and as T grows."""

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks import peers, reference
from benchmarks.compiled import compile_for, temp_bytes
from benchmarks.timing import interleaved
from ringjax._kernels.tiles import AUTOMATIC, xla_tiles

FORWARD, BOTH = "forward", "forward + backward"


def attention(report, effort, note):
    """Speed and memory beside the peers, and the share of the machine's matrix-product rate."""
    group, shape = "attention", effort.attention
    others = peers.PEERS if effort.tokamax else (peers.JAX_NN,)
    square, square_flops = square_product(effort.square)
    tiles, tile_flops = tile_products(shape)
    products = {"square product": square, "tile products": tiles}
    rounds = {FORWARD: effort.rounds, BOTH: effort.backward_rounds}
    found, temps = {}, {}
    for what in (FORWARD, BOTH):
        found[what], temps[what] = measure(
            report, group, shape, (peers.ours(), *others), what, rounds[what], effort.turn_s, note, products
        )
    theirs = peers.JAX_NN.name
    for what, goal in ((FORWARD, 20), (BOTH, 15)):
        times, temp = found[what], temps[what]
        if not {"ringjax", theirs} <= times.keys():
            continue
        ratio = times[theirs].median / times["ringjax"].median
        report.figure(
            group, str(shape), f"{theirs} / ringjax, {what}, time", ratio, f"at least {goal}", ratio >= goal, "x"
        )
        ratio = temp[theirs] / max(1, temp["ringjax"])
        report.figure(
            group, str(shape), f"{theirs} / ringjax, {what}, temporary", ratio, "at least 50", ratio >= 50, "x"
        )
    for what, flops, count in ((FORWARD, shape.flops, 2), (BOTH, shape.flops + shape.backward_flops, 7)):
        times = found[what]
        rate = square_flops / times["square product"].median
        report.figure(group, str(shape), f"square product of {effort.square}, {what}", rate / 1e9, unit=" GFLOP/s")
        tile_rate = tile_flops / times["tile products"].median
        report.figure(group, str(shape), f"products of our tiles alone, {what}", tile_rate / 1e9, unit=" GFLOP/s")
        if "ringjax" not in times:
            continue
        useful = flops / times["ringjax"].median
        report.figure(group, str(shape), f"ringjax, useful FLOPs, {what}", useful / 1e9, unit=" GFLOP/s")
        goal = ("at least 40%", useful >= 0.4 * rate) if what == FORWARD else (None, None)
        report.figure(group, str(shape), f"of the square product's rate, {what}", 100 * useful / rate, *goal, unit="%")
        computed = tile_flops / 2 * count / times["ringjax"].median
        share = 100 * computed / tile_rate
        report.figure(group, str(shape), f"our tiles' FLOPs, of the tile products' rate, {what}", share, unit="%")


def linear(report, effort, note):
    """T and `times` T, in turn."""
    group, short = "linear", effort.attention
    long = short.replace(queries=effort.times * short.queries)
    for what in (FORWARD, BOTH):
        calls, details = {}, {}
        for shape in (short, long):
            try:
                call, error, temp = _checked(peers.ours(), shape, shape.arrays(), what, note)
            except reference.Wrong as wrong:
                report.refused(group, str(shape), wrong)
                continue
            calls[str(shape)], details[str(shape)] = call, (error, temp)
        times = interleaved(calls, rounds=effort.rounds, turn_s=effort.turn_s)
        for name, timing in times.items():
            report.timing(group, name, what, "ringjax", timing, *details[name])
        if len(times) == 2:
            first, second = (times[str(shape)].median for shape in (short, long))
            ratio = second / first / effort.times
            figure = f"T from {short.queries} to {long.queries}, time / {effort.times}, {what}"
            report.figure(group, str(long), figure, ratio, "0.9 .. 1.1", 0.9 <= ratio <= 1.1, "x")


def models(report, effort, note):
    """The layers of real models, forward."""
    for shape in effort.models:
        implementations = (peers.ours(), *peers.PEERS)
        measure(report, "models", shape, implementations, FORWARD, effort.rounds, effort.turn_s, note)


def measure(report, group, shape, implementations, what, rounds, turn_s, note, others=None):
    """Checks each implementation on the same inputs, then times in turn those that were right, and `others`.

    Returns:
      Timings by name, and bytes of temporary memory by name.
    """
    arrays, calls, details = shape.arrays(), {}, {}
    for implementation in implementations:
        if reasons := implementation.unsupported(shape):
            report.left_out(group, str(shape), implementation.name, ", ".join(reasons))
            continue
        try:
            call, *detail = _checked(implementation, shape, arrays, what, note)
        except reference.Wrong as wrong:
            report.refused(group, str(shape), wrong)
            continue
        calls[implementation.name], details[implementation.name] = call, detail
    for name, call in (others or {}).items():
        jax.block_until_ready(call())
        calls[name], details[name] = call, (None, None)
    note(f"{group}: timing {shape}, {what}")
    times = interleaved(calls, rounds=rounds, turn_s=turn_s)
    for name, timing in times.items():
        report.timing(group, str(shape), what, name, timing, *details[name])
    return times, {name: detail[1] for name, detail in details.items()}


def function(implementation, shape, what):
    """`f(arrays)`: the output, or the gradients of sum(g * out) for q, k and v."""
    attend = implementation.build(shape)

    def loss(q, k, v, arrays):
        return (attend(q, k, v, arrays.sink_logits) * arrays.g).sum()

    if what == FORWARD:
        return lambda arrays: attend(*arrays[:3], arrays.sink_logits)
    return lambda arrays: jax.grad(loss, argnums=(0, 1, 2))(*arrays[:3], arrays)


def _checked(implementation, shape, arrays, what, note):
    """The call, the error of its result as a share of what is allowed, and its temporary bytes; or raises Wrong."""
    note(f"checking {implementation.name}: {shape}, {what}")
    executable = compile_for(function(implementation, shape, what), arrays)
    hold = reference.hold_rows if what == FORWARD else reference.hold_gradients
    error = hold(f"{implementation.name}, {what}", shape, arrays, executable(arrays))
    return lambda: executable(arrays), error, temp_bytes(executable)


def square_product(side):
    """One float32 product of square matrices, and its FLOPs."""
    a, b = (jax.random.normal(jax.random.key(seed), (side, side), jnp.float32) for seed in (1, 2))
    executable = compile_for(jnp.matmul, a, b)
    return lambda: executable(a, b), 2 * side**3


def tile_products(shape):
    """The two products of each tile that our CPU implementation visits, and nothing else; and their FLOPs."""
    group = shape.heads // shape.kv_heads
    sizes = xla_tiles(
        AUTOMATIC,
        queries=shape.queries,
        keys=shape.queries,
        group=group,
        span=shape.left + shape.right + 1,
        ring=False,
    )
    count = -(-shape.queries // sizes.tile_size) * shape.batch * (shape.heads // sizes.head_tile_size)
    side = sizes.tile_size * sizes.head_tile_size
    reach = min(shape.queries, sizes.tile_size + shape.left + shape.right)
    blocks = -(-reach // sizes.block_size)
    keys = jax.random.split(jax.random.key(3), 3)
    q = jax.random.normal(keys[0], (count, side, shape.head_dim), jnp.float32)
    k, v = (jax.random.normal(key, (blocks, sizes.block_size, shape.head_dim), jnp.float32) for key in keys[1:])

    def products(q, k, v):
        def tile(q):
            def block(total, kv):
                return total + (q @ kv[0].T) @ kv[1], None

            return lax.scan(block, jnp.zeros_like(q), (k, v))[0]

        return lax.map(tile, q)

    executable = compile_for(products, q, k, v)
    return lambda: executable(q, k, v), 4 * count * side * blocks * sizes.block_size * shape.head_dim
