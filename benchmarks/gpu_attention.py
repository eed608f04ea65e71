"""Times attention on a GPU against its peers: `python -m benchmarks.gpu_attention`, as Markdown.

Every result is checked against attention in float32 at sampled rows and keys before it is timed. All candidates of one
row of the table are timed in turn, in batches of calls back to back: a chip that is limited by its power runs a cold
first batch faster than any later one. TFLOP/s count visible pairs only: 4 H per pair forward, 14 H with the backward.
"""

import argparse
import dataclasses
import datetime
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

import ringjax as rj

BATCHES, BATCH_S = 9, 0.05


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table: a shape (B, T, N, K, H), a window of `size` keys (None: causal without bound)."""

    name: str
    shape: tuple[int, int, int, int, int]
    size: int | None
    softcap: float | None = None
    sink_logits: bool = False
    segment: int | None = None  # mean length of the packed sequences

    @property
    def window(self):
        return rj.Window.causal(self.size)

    def arrays(self):
        b, t, n, k, h = self.shape
        keys = jax.random.split(jax.random.key(0), 5)
        shapes = ((b, t, n, h), (b, t, k, h), (b, t, k, h), (b, t, n, h))
        q, k, v, g = (jax.random.normal(key, s, jnp.bfloat16) for key, s in zip(keys, shapes, strict=False))
        sinks = jax.random.normal(keys[4], (n,)) if self.sink_logits else None
        ids = None
        if self.segment:
            starts = np.random.default_rng(0).random((b, t)) < 1 / self.segment
            ids = jnp.asarray(np.cumsum(starts, axis=1), jnp.int32)
        return q, k, v, g, sinks, ids

    def pairs(self, ids):
        """Visible pairs of a query and a key, in all rows and heads."""
        b, t, n = self.shape[:3]
        at = np.broadcast_to(np.arange(t), (b, t))
        first = np.zeros_like(at) if self.size is None else np.maximum(at - self.size + 1, 0)
        if ids is not None:
            ids = np.asarray(ids)
            start = np.maximum.accumulate(np.where(np.diff(ids, axis=1, prepend=-1) != 0, at, 0), axis=1)
            first = np.maximum(first, start)
        return int((at - first + 1).sum()) * n


ROWS = [
    Row("A", (1, 32768, 32, 8, 128), 4096),
    Row("B", (4, 8192, 16, 16, 128), 1024),
    Row("C", (8, 4096, 32, 8, 64), 1024),
    Row("D", (1, 32768, 16, 8, 256), 1024),
    Row("E", (2, 8192, 32, 8, 128), None),
    Row("F", (1, 131072, 8, 2, 128), 4096),
    Row("W=128", (1, 16384, 32, 8, 128), 128),
    Row("W=256", (1, 16384, 32, 8, 128), 256),
    Row("A, softcap 50", (1, 32768, 32, 8, 128), 4096, softcap=50.0),
    Row("A, sink logits", (1, 32768, 32, 8, 128), 4096, sink_logits=True),
    Row("A, packed 4096", (1, 32768, 32, 8, 128), 4096, segment=4096),
]


def ours(row):
    """`attention` as anybody calls it; `ids` and `sinks` may be None."""

    def call(q, k, v, sinks, ids):
        return rj.attention(
            q, k, v, row.window, softcap=row.softcap, sink_logits=sinks, segment_ids=ids, implementation="mosaic"
        )

    return call


def deterministic(row):
    """The same with the backward that agrees bit for bit from run to run."""
    from ringjax import _attention
    from ringjax._op import op

    def call(q, k, v, sinks, ids):
        problem, rows, _ = _attention._canonical("attention", q, k, v, row.window, ids, None, sinks, *[None] * 4)
        problem = dataclasses.replace(problem, deterministic=True, softcap=row.softcap)
        return op(problem, "mosaic", rows, q, k, v, sinks)[0]

    return call


def cudnn(row):
    """`jax.nn.dot_product_attention`; its window counts the keys before the query's own."""
    if row.softcap or row.sink_logits or row.segment:
        return None
    size = None if row.size is None else (row.size - 1, 0)

    def call(q, k, v, sinks, ids):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=size, implementation="cudnn")

    return call


def tokamax(row):
    """tokamax's Mosaic kernels, where they can be imported; forward only: backward they do not skip tiles."""
    if row.softcap or row.sink_logits or row.segment:
        return None
    try:
        from tokamax import dot_product_attention
    except Exception:
        return None
    size = None if row.size is None else (row.size - 1, 0)

    def call(q, k, v, sinks, ids):
        return dot_product_attention(q, k, v, is_causal=True, local_window_size=size, implementation="mosaic")

    return call


def with_gradients(call):
    def both(q, k, v, g, sinks, ids):
        out, vjp = jax.vjp(lambda q, k, v, sinks: call(q, k, v, sinks, ids), q, k, v, sinks)
        return out, *vjp(g)[:3]

    return both


def exact(row, arrays, b, kv_head, first, last):
    """Float32 out and dq of queries [first, last) of a group's heads, and dk and dv of keys [first, last) from them."""
    q, k, v, g, sinks, ids = arrays
    group = row.shape[2] // row.shape[3]
    head = kv_head * group
    with jax.default_matmul_precision("highest"):
        low = 0 if row.size is None else max(0, first - row.size + 1)
        q, g = (x[b, first:last, head : head + group].astype(jnp.float32) for x in (q, g))
        k, v = (x[b, low:last, kv_head].astype(jnp.float32) for x in (k, v))
        logits = jnp.einsum("tnh,sh->nts", q, k) * row.shape[4] ** -0.5
        slope = 1.0
        if row.softcap:
            capped = jnp.tanh(logits / row.softcap)
            logits, slope = row.softcap * capped, 1 - capped * capped
        at, key = jnp.arange(first, last)[:, None], jnp.arange(low, last)[None]
        seen = row.window.visible(at, key)
        if ids is not None:
            seen = seen & (ids[b, first:last, None] == ids[b, None, low:last])
        logits = jnp.where(seen, logits, -jnp.inf)
        lse = jax.nn.logsumexp(logits, axis=-1)
        if sinks is not None:
            lse = jnp.logaddexp(lse, sinks[head : head + group, None])
        weights = jnp.exp(logits - lse[..., None])
        out = jnp.einsum("nts,sh->tnh", weights, v)
        d = weights * (jnp.einsum("tnh,sh->nts", g, v) - (g * out).sum(-1).T[..., None]) * slope
        dq = jnp.einsum("nts,sh->tnh", d, k) * row.shape[4] ** -0.5
        dk = jnp.einsum("nts,tnh->sh", d, q)[first - low :] * row.shape[4] ** -0.5
        dv = jnp.einsum("nts,tnh->sh", weights, g)[first - low :]
        return out, dq, dk, dv


def error(row, arrays, found):
    """The largest relative error at the start and at the end; keys of the last rows are seen by these rows alone."""
    group, (b, t, _, kv_heads, _) = row.shape[2] // row.shape[3], row.shape
    worst = 0.0
    for at, head, first in ((0, 0, 0), (b - 1, kv_heads - 1, t - 512)):
        rows, heads = slice(first, first + 512), slice(head * group, (head + 1) * group)
        wanted = exact(row, arrays, at, head, first, first + 512)
        got = [found[0][at, rows, heads]]
        if len(found) > 1:
            got.append(found[1][at, rows, heads])
            if first:
                got += [x[at, rows, head] for x in found[2:]]
        for x, y in zip(got, wanted, strict=False):
            worst = max(worst, float(jnp.linalg.norm(x.astype(jnp.float32) - y) / jnp.linalg.norm(y)))
    return worst


def timed(calls):
    """Median seconds of each call: batches of calls back to back, the candidates in turn."""
    counts = {}
    for name, (run, arguments) in calls.items():
        start = time.perf_counter()
        jax.block_until_ready([run(*arguments) for _ in range(3)])
        counts[name] = max(2, int(BATCH_S * 3 / (time.perf_counter() - start)))
    seconds = {name: [] for name in calls}
    for _ in range(BATCHES):
        for name, (run, arguments) in calls.items():
            start = time.perf_counter()
            for _ in range(counts[name]):
                result = run(*arguments)
            jax.block_until_ready(result)
            seconds[name].append((time.perf_counter() - start) / counts[name])
    return {name: statistics.median(found) for name, found in seconds.items()}


CANDIDATES = {"ringjax": ours, "deterministic": deterministic, "jax.nn cuDNN": cudnn, "tokamax": tokamax}


def compiled(row):
    """Futures of everything that a row times: (name, what) -> (executable, arguments)."""
    arrays = row.arrays()
    q, k, v, g, sinks, ids = arrays
    found = {}
    for name, make in CANDIDATES.items():
        call = make(row)
        if call is None:
            continue
        if name != "deterministic":
            found[name, "forward"] = jax.jit(call), (q, k, v, sinks, ids)
        if name != "tokamax":
            found[name, "with backward"] = jax.jit(with_gradients(call)), (q, k, v, g, sinks, ids)
    return arrays, {key: (f.lower(*arguments), arguments) for key, (f, arguments) in found.items()}


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_attention", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="ROW", help="names of rows, such as A 'A, softcap 50'")
    rows = [row for row in ROWS if row.name in (parser.parse_args().only or [row.name])]
    device = jax.devices()[0]
    today = datetime.datetime.now(datetime.UTC).date()
    print(
        f"{device.device_kind}, jax {jax.__version__}, {today}; {BATCHES} batches of {BATCH_S * 1e3:.0f} ms, medians.\n"
    )
    print("| row | what | candidate | ms | TFLOP/s | temporary MiB | error |\n|---|---|---|---|---|---|---|")
    for row in rows:
        arrays, lowered = compiled(row)
        with ThreadPoolExecutor(8) as pool:
            futures = {key: (pool.submit(x.compile), arguments) for key, (x, arguments) in lowered.items()}
        ready, errors = {}, {}
        for key, (future, arguments) in futures.items():
            try:
                run = future.result()
                result = run(*arguments)
            except Exception as problem:
                print(f"| {row.name} | {key[1]} | {key[0]} | failed: {type(problem).__name__} | | | |")
                continue
            errors[key] = error(row, arrays, result if isinstance(result, tuple) else (result,))
            if errors[key] < 1e-2:  # a NaN is not
                ready[key] = run, arguments
            else:
                print(f"| {row.name} | {key[1]} | {key[0]} | REFUSED: wrong | | | {errors[key]:.1e} |")
        for what, flops in (("forward", 4), ("with backward", 14)):
            seconds = timed({key: call for key, call in ready.items() if key[1] == what})
            for (name, _), s in seconds.items():
                rate = flops * row.shape[4] * row.pairs(arrays[-1]) / s / 1e12
                held = ready[name, what][0].memory_analysis().temp_size_in_bytes / 2**20
                print(
                    f"| {row.name} | {what} | {name} | {s * 1e3:.3f} | {rate:.0f} | {held:.0f} "
                    f"| {errors[name, what]:.1e} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
