"""Times attention on a GPU against its peers: `python -m benchmarks.gpu_attention`, as Markdown.

Every result is checked against attention in float32 at sampled rows and keys before it is timed. All candidates of one
row of the table are timed in turn, in batches of calls back to back: a chip that is limited by its power runs a cold
first batch faster than any later one. TFLOP/s count visible pairs only: 4 H per pair forward, 14 H with the backward.

`--json FILE` adds each figure to a file as soon as it is there; `python -m benchmarks.gpu_tables FILE...` makes tables
and a plot of such files, without a GPU. Peers take part where they are installed: jax.nn's cuDNN, tokamax, and
FlashAttention-3, for torch, in the same process (see `benchmarks/flash3.py`).
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs some of the memory

import jax
import jax.numpy as jnp

import ringjax as rj
from benchmarks import flash3, gpu_tables
from benchmarks.gpu_rows import SHAPES, chosen, errors
from benchmarks.timing import in_batches

PASSES = ("forward", "with backward")
TOGETHER = 6  # rows that are compiled at once: the more, the faster; the fewer, the sooner the first figure


def ours(row, implementation="mosaic"):
    """`attention` as anybody calls it; `ids` and `sinks` may be None."""

    def call(q, k, v, sinks, ids):
        options = {"softcap": row.softcap, "sink_logits": sinks, "segment_ids": ids}
        return rj.attention(q, k, v, row.window, implementation=implementation, **options)

    return call


def deterministic(row):
    """The same with the backward that agrees bit for bit from run to run."""
    import dataclasses

    from ringjax._attention import _canonical
    from ringjax._op import op

    def call(q, k, v, sinks, ids):
        problem, rows, _ = _canonical("attention", q, k, v, row.window, ids, None, sinks, row.softcap, *[None] * 3)
        return op(dataclasses.replace(problem, deterministic=True), "mosaic", rows, q, k, v, sinks)[0]

    return call


def cudnn(row):
    """`jax.nn.dot_product_attention`; its window counts the keys before the query's own."""
    size = None if row.size is None else (row.size - 1, 0)

    def call(q, k, v, sinks, ids):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=size, implementation="cudnn")

    return call


def tokamax(row):
    """tokamax's Mosaic kernels."""
    import tokamax

    size = None if row.size is None else (row.size - 1, 0)

    def call(q, k, v, sinks, ids):
        options = {"is_causal": True, "local_window_size": size, "implementation": "mosaic"}
        return tokamax.dot_product_attention(q, k, v, **options)

    return call


def _always(row, what):
    return []


def _a_shape(row, what):
    return [] if what == "with backward" and row in SHAPES else ["timed with backward only, and for A to F"]


def _plain(row, what):
    return [] if row.is_plain else ["called for plain attention only"]


def _tokamax_unsupported(row, what):
    if what == "with backward":
        return ["backward it does not skip tiles: 4 to 88 times cuDNN's time"]
    if not row.is_plain:
        return _plain(row, what)
    try:
        import tokamax  # noqa: F401
        from absl import flags
    except ImportError as problem:
        return [f"not installed: {problem}"]
    flags.FLAGS.mark_as_parsed()  # it keeps settings there, and would read our command line for them
    return []


def _flash3_unsupported(row, what):
    return _plain(row, what) or flash3.unsupported()


class Candidate(NamedTuple):
    """One way to compute attention.

    Attributes:
      unsupported: from a row and a pass to the reasons why it is not timed; none: it is.
      build: from a row to `f(q, k, v, sink_logits, segment_ids) -> out` in JAX; None: it is FlashAttention-3.
    """

    unsupported: object
    build: object


CANDIDATES = {
    "ringjax": Candidate(_always, ours),
    "deterministic": Candidate(_a_shape, deterministic),
    "FlashAttention-3": Candidate(_flash3_unsupported, None),
    "jax.nn cuDNN": Candidate(_plain, cudnn),
    "ringjax cudnn": Candidate(_plain, partial(ours, implementation="cudnn")),
    "tokamax": Candidate(_tokamax_unsupported, tokamax),
}


def with_gradients(call):
    def both(q, k, v, g, sinks, ids):
        out, vjp = jax.vjp(lambda q, k, v, sinks: call(q, k, v, sinks, ids), q, k, v, sinks)
        return out, *vjp(g)[:3]

    return both


def forward_only(call):
    def forward(q, k, v, g, sinks, ids):
        return (call(q, k, v, sinks, ids),)

    return forward


class Compiled(NamedTuple):
    """What a row runs, each a future of an executable or of what kept it from being one."""

    make: object  # its inputs
    check: dict  # pass -> the errors of a result
    calls: dict  # (candidate, pass) -> the call


def compile_rows(rows, names, report, pool):
    """`Compiled` of each row. Tracing takes turns, compiling does not: all these rows at once, before any is timed."""
    found = {}
    for row in rows:
        calls = {}
        for name in names:
            candidate = CANDIDATES[name]
            for what in PASSES:
                if reasons := candidate.unsupported(row, what):
                    report({"record": "left out", "row": row.name, "what": what, "candidate": name, "why": reasons[0]})
                elif candidate.build is None:
                    calls[name, what] = None
                else:
                    calls[name, what] = _compile(pool, partial(_run, candidate.build, row, what), *row.specs)
        results = {"forward": row.specs[:1], "with backward": (row.specs[0], *row.specs[:3])}
        # The check runs once: looking for the fastest way to compute it would take longer than all the rest.
        fast = {"xla_gpu_autotune_level": "0"}
        check = {what: _compile(pool, partial(errors, row), row.specs, *results[what], **fast) for what in PASSES}
        found[row] = Compiled(_compile(pool, row.normal, jax.random.key(0)), check, calls)
        report({"record": "traced", "row": row.name})
    return found


def _run(build, row, what, *arrays):
    return {"forward": forward_only, "with backward": with_gradients}[what](build(row))(*arrays)


def _compile(pool, f, *args, **compiler_options):
    """A future of f's executable for such arguments."""
    try:
        lowered = jax.jit(f).lower(*args)
    except Exception as problem:
        return pool.submit(_raise, problem)
    return pool.submit(lowered.compile, compiler_options)


def _raise(problem):
    raise problem


def measure(row, compiled, report, *, batches, batch_s):
    """Checks and times all candidates of one row, and reports each figure."""
    arrays = row.arrays(compiled.make.result())
    for what in PASSES:
        ready, about = {}, {}
        for name in dict.fromkeys(name for name, w in compiled.calls if w == what):
            fields = {"row": row.name, "what": what, "candidate": name}
            try:
                if compiled.calls[name, what] is None:
                    run, wait = flash3.call(row, what, arrays)
                    result, temporary = run(), None
                    wait(result)
                    result = flash3.as_jax(result)
                else:
                    executable = compiled.calls[name, what].result()
                    run, wait = partial(executable, *arrays), jax.block_until_ready
                    result, temporary = run(), executable.memory_analysis().temp_size_in_bytes
                error = float(jnp.max(compiled.check[what].result()(arrays, *result)))
            except Exception as problem:  # of whoever's library: the others are timed all the same
                first = f"{type(problem).__name__}: {str(problem).splitlines()[0] if str(problem) else ''}"
                report({"record": "failed", **fields, "why": first[:200]})
                continue
            if error < 1e-2:  # a NaN is not
                ready[name] = run, wait
                about[name] = fields | {"error": error, "temporary_bytes": temporary}
            else:
                report({"record": "refused", **fields, "error": error})
            del result
        for name, timing in in_batches(ready, batches=batches, batch_s=batch_s).items():
            about[name] |= {"seconds": timing.median, "low_s": timing.low, "high_s": timing.high}
            rate = row.flops(what) / timing.median / 1e12
            report({"record": "timing", **about[name], "tflops": rate, "shape": row.shape, "size": row.size})


def environment():
    """What the figures depend on."""
    device = jax.devices()[0]
    versions = {}
    for name in ("jax", "jaxlib", "tokamax", "torch"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    versions["python"] = sys.version.split()[0]
    today = str(datetime.datetime.now(datetime.UTC).date())
    version = str(getattr(device.client, "platform_version", "")).strip().replace("\n", ", ")
    return {"record": "environment", "device": device.device_kind, "driver": version, "date": today} | {
        "versions": versions
    }


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_attention", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="ROW", help="rows, such as A 'A, softcap 50', or shapes, features")
    usual = [name for name in CANDIDATES if name != "ringjax cudnn"]  # the same kernels as jax.nn's
    parser.add_argument("--candidates", nargs="+", metavar="NAME", choices=CANDIDATES, default=usual)
    parser.add_argument("--batches", type=int, default=9, help="of each candidate and pass; their median is the figure")
    parser.add_argument("--batch-ms", type=float, default=50.0)
    parser.add_argument("--quick", action="store_true", help="3 batches of 20 ms: the tables' form, not their figures")
    parser.add_argument(
        "--json", metavar="FILE", help="add each figure to this file, as a line of JSON, once it is there"
    )
    options = parser.parse_args(argv)
    batches, batch_s = (3, 0.02) if options.quick else (options.batches, options.batch_ms / 1e3)
    start, records = time.perf_counter(), []

    def report(record):
        records.append(record)
        if record["record"] != "left out":
            print(f"{time.perf_counter() - start:6.1f} s  {gpu_tables.line(record)}", flush=True)
        if options.json:
            with open(options.json, "a") as file:
                file.write(json.dumps(record) + "\n")

    report(environment() | {"batches": batches, "batch_s": batch_s})
    rows = chosen(options.only)
    with ThreadPoolExecutor(max(2, (os.cpu_count() or 2) - 1)) as pool:
        for some in (rows[i : i + TOGETHER] for i in range(0, len(rows), TOGETHER)):
            compiled = compile_rows(some, options.candidates, report, pool)
            for row in some:
                measure(row, compiled.pop(row), report, batches=batches, batch_s=batch_s)
    print(f"\n{gpu_tables.tables(records)}")
    return int(any(record["record"] == "refused" for record in records))


if __name__ == "__main__":
    sys.exit(main())
