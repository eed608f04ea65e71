"""Times decoding with a ring on a GPU against its peers: `python -m benchmarks.gpu_decode`, as Markdown.

One token a row, rings full and wrapped, bfloat16. Several rings are taken in turn where one would stay in the GPU's
cache, so that every call reads memory. Calls are chained in one executable (an output is the next query), candidates
are timed in turn in batches of such chains, and the figures are medians. Our calls write the token into the ring too
(in place, in the same launch); the peers only read. Each result is checked against float32 first.
"""

import argparse
import dataclasses
import datetime
import functools
import warnings
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp

import ringjax as rj
from benchmarks.gpu_calls import (
    COLD,
    SHAPES,
    WORST,
    Caller,
    Shape,
    chained,
    compiling,
    error,
    exact,
    normal,
    off,
    ring,
    timed,
)
from ringjax import _attend


def ours(shape, implementation="mosaic"):
    """`attend`, as anybody calls it: appends a token, attends to the window."""

    def step(q, new, state):
        return rj.attend(q, *new, state, implementation=implementation)

    return step


def cudnn(shape):
    """`jax.nn.dot_product_attention` by cuDNN, keys and values [B, S, K, H]."""

    def step(q, new, state):
        k, v, length = state
        options = {"implementation": "cudnn", "key_value_seq_lengths": length}
        return jax.nn.dot_product_attention(q, k, v, **options), state

    return step


def einsum(shape):
    """Plain XLA, keys and values [B, K, S, H]."""

    def step(q, new, state):
        k, v, _ = state
        q_heads = q.reshape(shape.b, shape.k, -1, shape.h)
        logits = jnp.einsum("bkgh,bksh->bkgs", q_heads, k, preferred_element_type=jnp.float32) * shape.h**-0.5
        weights = jax.nn.softmax(logits, axis=-1).astype(q.dtype)
        out = jnp.einsum("bkgs,bksh->bkgh", weights, v, preferred_element_type=jnp.float32)
        return out.astype(q.dtype).reshape(q.shape), state

    return step


def gqa(shape, splits):
    """`decode_attention.gqa` of Pallas (Triton), keys and values [B, K, S, H] so that its transpose is undone."""

    def step(q, new, state):
        from jax.experimental.pallas.ops.gpu import decode_attention

        k, v, length = (x if x.ndim < 2 else jnp.swapaxes(x, 1, 2) for x in state)
        out = decode_attention.gqa(q[:, 0], k, v, kv_seq_len=length, k_splits=splits)
        return out.astype(q.dtype)[:, None], state

    return step


def peers(shape):
    """Name to (step, whether its keys and values are [B, K, S, H])."""
    found = {"jax.nn cuDNN": (cudnn(shape), False), "XLA einsum": (einsum(shape), True)}
    for splits in (4,) if shape.b * shape.k > 132 else (32,):
        found[f"Pallas gqa, {splits} splits"] = (gqa(shape, splits), True)
    return found


def states_of(shape, head_major):
    """Rings (`head_major` None) or caches in their layout, as many as it takes to find them cold."""
    states = [ring(shape, 10 * i) for i in range(shape.sets)]
    if head_major is None:
        return states
    states = [(x.k, x.v, jnp.full(shape.b, shape.w, jnp.int32)) for x in states]
    if head_major:
        return states
    return [(*(jnp.swapaxes(x, 1, 2) for x in state[:2]), state[2]) for state in states]


def shapes(chosen, candidates=lambda shape: {"ringjax": ours(shape)}, with_peers=True):
    """Microseconds of one call, ours and the peers'."""
    lowered, pool = {}, ThreadPoolExecutor(8)
    for shape in chosen:
        found = {name: (step, None) for name, step in candidates(shape).items()}
        found |= peers(shape) if with_peers else {}
        q = jax.ShapeDtypeStruct((shape.b, 1, shape.n, shape.h), jnp.bfloat16)
        new = (jax.ShapeDtypeStruct((shape.b, 1, shape.k, shape.h), jnp.bfloat16),) * 2
        for name, (step, head_major) in found.items():
            states = jax.eval_shape(functools.partial(states_of, shape, head_major))
            lowered[shape, name] = head_major, *compiling(pool, step, shape.rounds, q, new, states)
    print("| (B, N, K, H, W) | candidate | us | GB/s of K and V | error |\n|---|---|---|---|---|")
    for shape in chosen:
        q = normal(0, shape.b, 1, shape.n, shape.h)
        new = tuple(normal(1 + i, shape.b, 1, shape.k, shape.h) for i in range(2))
        calls, errors = {}, {}
        for (of, name), (head_major, one, chain) in lowered.items():
            if of != shape:
                continue
            try:
                states = states_of(shape, head_major)
                out, after = one.result()(q, new, states[0])
                k, v = (after.k, after.v) if head_major is None else after[:2]
                if head_major is False:
                    k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
                errors[name] = error(shape, q, out, k, v)
                if not errors[name] < WORST["bfloat16"]:
                    print(f"| {shape} | {name} | REFUSED: wrong | | {errors[name]:.1e} |")
                    continue
                del out, after, k, v
                call = Caller(chain.result(), q, new, states)
                jax.block_until_ready(call())
                calls[name] = call
            except Exception as problem:
                print(f"| {shape} | {name} | failed: {type(problem).__name__}: {str(problem)[:80]} | | |")
        for name, s in timed(calls).items():
            s = s / (shape.rounds * shape.sets)
            print(
                f"| {shape} | {name} | {s * 1e6:.2f} | {shape.bytes / s / 1e9:.0f} | {errors[name]:.1e} |", flush=True
            )


def eight_bits(chosen):
    """Rings of 8 bits against rings of 16; errors against float32 attention to what was there before quantising."""
    print("| (B, N, K, H, W) | bfloat16 us | int8 us | gain | error | float8_e4m3 us | gain | error |")
    print("|---|---|---|---|---|---|---|---|")
    dtypes = ("bfloat16", "int8", "float8_e4m3fn")
    prepared, pool = {}, ThreadPoolExecutor(8)
    for shape in chosen:
        q = normal(0, shape.b, 1, shape.n, shape.h)
        new = tuple(normal(1 + i, shape.b, 1, shape.k, shape.h) for i in range(2))
        for dtype in dtypes:
            states = [ring(shape, 10 * i, dtype=dtype) for i in range(shape.sets)]
            prepared[shape, dtype] = q, new, states, *compiling(pool, ours(shape), shape.rounds, q, new, states)
    for shape in chosen:
        calls, errors, kept = {}, {}, None
        for dtype in dtypes:
            q, new, states, one, chain = prepared.pop((shape, dtype))
            out, after = one.result()(q, new, states[0])
            kept = kept or (after.k, after.v)
            errors[dtype] = error(shape, q, out, *kept)
            if not errors[dtype] < WORST[dtype]:
                break
            calls[dtype] = Caller(chain.result(), q, new, states)
        if len(calls) < len(dtypes):
            print(f"| {shape} | REFUSED: wrong, {errors} |", flush=True)
            continue
        found = {dtype: s / (shape.rounds * shape.sets) * 1e6 for dtype, s in timed(calls).items()}
        rest = "".join(
            f" | {found[dtype]:.1f} | {found['bfloat16'] / found[dtype]:.2f} | {errors[dtype]:.1e}"
            for dtype in dtypes[1:]
        )
        print(f"| {shape} | {found['bfloat16']:.1f}{rest} |", flush=True)


def loop(batch, layers=16, tokens=64, step=None):
    """Microseconds per layer and token of a `lax.scan` over tokens, every layer with its own ring in the carry."""
    shape = Shape(batch, 32, 8, 128, 4096)
    step = step or ours(shape)
    new = tuple(normal(1 + i, shape.b, 1, shape.k, shape.h) for i in range(2))

    @functools.partial(jax.jit, donate_argnums=1, static_argnums=2)
    def run(q, rings, tokens):
        def token(carry, _):
            q, rings = carry
            rings = list(rings)
            for i in range(layers):
                q, rings[i] = step(q, new, rings[i])
            return (q, rings), q[:, 0, 0, 0]

        (q, rings), trace = jax.lax.scan(token, (q, rings), None, length=tokens)
        return (q, trace), rings

    states = [[ring(shape, 10 * i) for i in range(layers)]]
    q = normal(0, shape.b, 1, shape.n, shape.h)
    before = states[0][0].length + 0
    (out, _), states[0] = run(q, states[0], 1)
    wrong = 0.0
    for b in (0, shape.b - 1):
        wanted = q[b, 0]
        for layer in states[0]:  # full rings that have the token: whatever they hold is seen
            wanted = exact(wanted, layer.k[b], layer.v[b])
        wrong = max(wrong, off(out[b, 0], wanted))
    compiled = run.lower(q, states[0], tokens).compile()
    (_, trace), states[0] = compiled(q, states[0])
    counted = all((x.length == before + tokens + 1).all() and (x.length == x.written).all() for x in states[0])
    if not (wrong < WORST["bfloat16"] and counted and jnp.isfinite(trace).all()):
        print(f"| B={batch}, {layers} layers, {tokens} tokens | REFUSED: wrong ({wrong:.1e}) | |", flush=True)
        return

    def call():
        out, states[0] = compiled(q, states[0])
        return out

    temporary = compiled.memory_analysis().temp_size_in_bytes / 2**20
    s = timed({"loop": call}, batches=5, batch_s=0.1)["loop"] / (layers * tokens)
    print(f"| B={batch}, {layers} layers, {tokens} tokens | {s * 1e6:.2f} | {temporary:.2f} |", flush=True)


def decoder(shape, seed):
    """A state whose decoder's ring and one of its encoder's are full; the other, of gradients, is empty."""
    config = rj.RingBufferConfig(buffer_size=shape.w, block_size=None, implementation="mosaic")
    own = ring(shape, seed)
    rings = {"forward": ring(shape, seed + 5), "feedback": own, "last_calculated": own.length - 1}
    return dataclasses.replace(rj.init_state(config, shape.b, kv_heads=shape.k, head_dim=shape.h), **rings)


def beside(chosen):
    """A decoder's call with an encoder's ring as large as its own: in one launch, and in three and a merge."""
    print("| (B, N, K, H, W), twice | decode us | GB/s of K and V | three launches and a merge us | error |")
    print("|---|---|---|---|---|")
    options = (None, None, "mosaic", None)  # softcap, scale, implementation, tiles

    def together(q, new, state):
        return rj.decode(q, *new, state, position=state.last_calculated + 1)

    def apart(q, new, state):
        out, lse, own = _attend.attend_with_lse("decode", q, *new, state.feedback, None, None, *options, "float32")
        memories = (_attend.attend_to_memory("decode", q, x, None, *options) for x in (state.forward, state.backward))
        out = rj.merge(*zip((out, lse), *memories, strict=True)).astype(q.dtype)
        return out, dataclasses.replace(state, feedback=own, last_calculated=own.length - 1)

    pool, prepared, steps = ThreadPoolExecutor(8), {}, {"together": jax.jit(together), "apart": jax.jit(apart)}
    for shape in chosen:
        q = normal(0, shape.b, 1, shape.n, shape.h)
        new = tuple(normal(1 + i, shape.b, 1, shape.k, shape.h) for i in range(2))
        sets = max(1, round(COLD / (2 * shape.bytes)))
        rounds = max(1, shape.rounds * shape.sets // (2 * sets))
        states = [jax.eval_shape(functools.partial(decoder, shape, 0))] * sets
        found = {name: compiling(pool, step, rounds, q, new, states) for name, step in steps.items()}
        prepared[shape] = q, new, sets, rounds, found
    for shape, (q, new, sets, rounds, found) in prepared.items():
        calls, errors = {}, {}
        for name, (one, chain) in found.items():
            states = [decoder(shape, 20 * i) for i in range(sets)]
            out, after = one.result()(q, new, states[0])
            k, v = (
                jnp.concatenate([getattr(x, of) for x in (after.forward, after.feedback)], axis=2) for of in ("k", "v")
            )
            errors[name] = error(shape, q, out, k, v)
            del out, after, k, v
            calls[name] = Caller(chain.result(), q, new, states)
        if not max(errors.values()) < WORST["bfloat16"]:
            print(f"| {shape} | REFUSED: wrong, {errors} | | | |", flush=True)
            continue
        one, three = (s / (rounds * sets) for s in timed(calls).values())
        rate = f"{one * 1e6:.2f} | {2 * shape.bytes / one / 1e9:.0f}"
        print(f"| {shape} | {rate} | {three * 1e6:.2f} | {max(errors.values()):.1e} |", flush=True)


def tokens_at_once():
    """A call of several tokens a row, as it verifies drafts; a ring with slack for 16."""
    print("| (B, N, K, H, W) | tokens | us | error |\n|---|---|---|---|")
    pool, prepared = ThreadPoolExecutor(8), {}
    for shape in SHAPES[:2]:
        rounds = max(1, shape.rounds // 2)
        for count in (1, 4, 8, 16):
            states = [ring(shape, 10 * i, slack=15) for i in range(shape.sets)]
            q = normal(0, shape.b, count, shape.n, shape.h)
            new = tuple(normal(1 + i, shape.b, count, shape.k, shape.h) for i in range(2))
            prepared[shape, count] = q, new, states, *compiling(pool, jax.jit(ours(shape)), rounds, q, new, states)
    for shape in SHAPES[:2]:
        calls, errors, rounds = {}, {}, max(1, shape.rounds // 2)
        for count in (1, 4, 8, 16):
            q, new, states, one, chain = prepared[shape, count]
            out, after = one.result()(q, new, states[0])
            errors[count] = 0.0
            for b in (0, shape.b - 1):  # what the last token sees
                seen = after.positions()[b] >= after.length[b] - shape.w
                errors[count] = max(
                    errors[count], off(out[b, -1], exact(q[b, -1], after.k[b][:, seen], after.v[b][:, seen]))
                )
            if errors[count] < WORST["bfloat16"]:
                calls[count] = Caller(chain.result(), q, new, states)
            else:
                print(f"| {shape} | {count} | REFUSED: wrong | {errors[count]:.1e} |")
        for count, s in timed(calls).items():
            print(f"| {shape} | {count} | {s / (rounds * shape.sets) * 1e6:.2f} | {errors[count]:.1e} |", flush=True)


def of_length(shape, length):
    """Our step on a ring that has `length` tokens at every call, whatever the calls before it appended."""

    def step(q, new, state):
        at = jnp.full_like(state.length, length)
        return ours(shape)(q, new, dataclasses.replace(state, length=at, written=at + 0))

    return step


def empty_ring():
    """A ring that holds little costs little, whatever its capacity."""
    print("| rows | window | tokens in the ring | us |\n|---|---|---|---|")
    for rows in (1, 8):
        for size, length in ((128, 1000), (32768, 100), (32768, 99_999)):
            shape = Shape(rows, 32, 8, 128, size)
            q = normal(0, shape.b, 1, shape.n, shape.h)
            new = tuple(normal(1 + i, shape.b, 1, shape.k, shape.h) for i in range(2))
            caller = Caller(chained(of_length(shape, length), 96), q, new, [ring(shape, 0, length)])
            s = timed({"": caller}, batches=5)[""] / 96
            print(f"| {rows} | {size} | {min(length, size)} | {s * 1e6:.2f} |", flush=True)


def streams(rows=16, path=None):
    """Microseconds per token against the length of the stream: a ring of 4096 slots, and a cache that keeps all."""
    measured = []
    print("| stream | ringjax, W = 4096 | jax.nn cuDNN, all keys |\n|---|---|---|")
    for length in (1024, 4096, 16384, 65536, 131072):
        shape, cache = Shape(rows, 32, 8, 128, 4096), Shape(rows, 32, 8, 128, length)
        q = normal(0, rows, 1, 32, 128)
        new = tuple(normal(1 + i, rows, 1, 8, 128) for i in range(2))
        state = (*(normal(3 + i, rows, length, 8, 128) for i in range(2)), jnp.full(rows, length, jnp.int32))
        calls = {
            "ring": Caller(chained(of_length(shape, length - 1), 12), q, new, [ring(shape, 10 * i) for i in range(2)]),
            "cache": Caller(
                chained(cudnn(cache), max(1, 24 // cache.sets)),
                q,
                new,
                [state] + [jax.tree.map(jnp.copy, state) for _ in range(cache.sets - 1)],
            ),
        }
        counts = {"ring": 24, "cache": max(1, 24 // cache.sets) * cache.sets}
        found = {name: s / counts[name] * 1e6 for name, s in timed(calls, batches=5).items()}
        print(f"| {length} | {found['ring']:.1f} | {found['cache']:.1f} |", flush=True)
        measured.append((length, found["ring"], found["cache"]))
    if path is not None:
        plot(measured, rows, path)


def plot(measured, rows, path):
    """Draws what `streams` found: (length, us with a ring, us with a cache)."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    lengths, with_ring, with_cache = zip(*measured, strict=True)
    axes.plot(lengths, with_cache, "o-", color="tab:gray", label="a cache of all keys (jax.nn, cuDNN)")
    axes.plot(lengths, with_ring, "o-", color="tab:blue", label="a ring of 4096 slots (ringjax)")
    axes.set(xscale="log", yscale="log", xlabel="tokens in the stream", ylabel="us per token and layer")
    axes.set_xscale("log", base=2)
    axes.set_title(f"one layer, {rows} rows, 32 query and 8 kv heads of 128, bfloat16, H200", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_decode", description=__doc__)
    parts = ("shapes", "eight", "loop", "beside", "tokens", "empty", "streams")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(parts)}; all by default")
    parser.add_argument("--plot", metavar="FILE", help="draw the streams into FILE")
    options = parser.parse_args()
    asked = options.parts or parts
    warnings.simplefilter("ignore")  # a peer is deprecated
    today = datetime.datetime.now(datetime.UTC).date()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {today}; medians.\n")
    if "shapes" in asked:
        shapes(SHAPES)
    if "eight" in asked:
        print()
        eight_bits(SHAPES)
    if "loop" in asked:
        print("\n| loop | us per layer and token | temporary MiB |\n|---|---|---|")
        loop(1)
        loop(16)
    if "beside" in asked:
        print()
        beside(SHAPES[:3])
    if "tokens" in asked:
        print()
        tokens_at_once()
    if "empty" in asked:
        print()
        empty_ring()
    if "streams" in asked:
        print()
        streams(path=options.plot)


if __name__ == "__main__":
    main()
