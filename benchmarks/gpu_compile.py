"""Compiles the Hopper kernels for an H200 without one, and fails on spills: `make aot`.

Or `python -m benchmarks.gpu_compile`, which needs `pip install "jax[cuda13]"` in an environment of its own (4.4 GB) and
no GPU. Names of variants, or the beginnings of such names, compile these alone. `cudnn` has no kernels of ours: it is
laid out over two devices, and its launches are counted.
"""
# ruff: noqa: E402 (jax reads the environment when it is imported)

import dataclasses
import os
import sys
import tempfile
from pathlib import Path

DUMP = Path(tempfile.mkdtemp(prefix="kernels-"))
os.environ |= {
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2",  # calls then expect to be spread over devices
    "MOSAIC_GPU_DUMP_TO": str(DUMP),
    "MOSAIC_GPU_DUMP_PTXAS": "1",
}

import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.ptxas import ALLOWED, judge
from ringjax import Window
from ringjax._kernels import cudnn, mosaic
from ringjax._kernels.problem import Memory, Problem, Rows
from ringjax._op import op

TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 151397597184
  shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  runtime_version: "13.0.0" driver_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 patch: 0 } device_description_str: "NVIDIA H200"
"""
DEVICE = {"platform": "gpu", "device_kind": "NVIDIA H200"}

# A variant: how many kernels it is, and its static facts where they differ from the first's. One kernel forward;
# backward two (zeros for dq, and the fused one; or dq, and dk with dv) or, at head size 256, three.
FUSED, SPLIT, DEEP = 3, 3, 4
LINEAR = {
    "64": (FUSED, {"head_dim": 64, "window": Window.causal(1024)}),
    "128": (FUSED, {}),
    "256": (DEEP, {"head_dim": 256, "window": Window.causal(1024)}),
    "128 causal": (FUSED, {"window": Window.causal()}),
    "128 full": (FUSED, {"window": Window.full()}),
    "128 both sides": (FUSED, {"window": Window(1000, 300)}),
    "128 softcap, sink logits": (FUSED, {"softcap": 50.0, "sink_logits": True}),
    "128 sinks": (FUSED, {"window": Window.causal(4096, sinks=4)}),
    "64 segments": (FUSED, {"head_dim": 64, "window": Window.causal(1024), "segments": True}),
    "128 segments": (FUSED, {"segments": True}),
    "128 offsets": (FUSED, {"q_offset": None}),
    "128 float16": (FUSED, {"dtype": "float16"}),
    "128 no groups": (FUSED, {"kv_heads": 8, "window": Window.causal(1024)}),
    "64 narrow": (SPLIT, {"head_dim": 64, "window": Window.causal(128)}),
    "128 narrow": (SPLIT, {"window": Window.causal(128)}),
    "64 deterministic": (SPLIT, {"head_dim": 64, "window": Window.causal(1024), "deterministic": True}),
    "128 deterministic": (SPLIT, {"deterministic": True}),
    "128 deterministic, all": (SPLIT, {"deterministic": True, "softcap": 50.0, "segments": True}),
    "256 all": (DEEP, {"head_dim": 256, "window": Window(500, 40), "softcap": 50.0, "segments": True}),
}
CHUNK = {
    "chunk 64": (1, {"head_dim": 64}),
    "chunk 128": (1, {}),
    "chunk 256": (1, {"head_dim": 256}),
    "chunk 256, slots by 8": (1, {"head_dim": 256, "window": Window.causal(4096)}),
    "chunk 128, all": (1, {"softcap": 30.0, "sink_logits": True, "ragged": True}),
    "chunk 128, slots by 8": (1, {"window": Window.causal(4096)}),
}
DECODE = {
    "decode 64": (1, {"head_dim": 64}),
    "decode 128, one row": (1, {"batch": 1}),
    "decode 128": (1, {}),
    "decode 256": (1, {"head_dim": 256}),
    "decode 80, softcap, sink logits": (1, {"head_dim": 80, "softcap": 30.0, "sink_logits": True}),
    "decode 128, 16 tokens": (1, {"queries": 16, "slack": 15, "ragged": True}),
    "decode 128, 16 tokens, one row": (1, {"batch": 1, "queries": 16, "slack": 15, "sink_logits": True}),
    "decode 128, memory": (1, {"out_dtype": "float32", "q_stride": 0, "window": Window(999, 999)}),
    "decode 128, int8": (1, {"kv_dtype": "int8"}),
    "decode 128, float8": (1, {"kv_dtype": "float8_e4m3fn"}),
    "decode 64, int8, 8 tokens": (1, {"head_dim": 64, "kv_dtype": "int8", "queries": 8, "slack": 7}),
    "decode 128, int8, 8 tokens, one row": (1, {"batch": 1, "kv_dtype": "int8", "queries": 8, "slack": 7}),
}
# A decoder's call: two encoder's rings, of windows that see both sides, beside its own.
BESIDE = {
    "beside 64": (1, {"head_dim": 64}),
    "beside 128, one row": (1, {"batch": 1}),
    "beside 128": (1, {"softcap": 30.0, "sink_logits": True}),
    "beside 256": (1, {"head_dim": 256}),
    "beside 128, 16 tokens": (1, {"queries": 16, "slack": 15, "ragged": True}),
    "beside 128, int8": (1, {"kv_dtype": "int8"}),
    "beside 64, float8, 8 tokens": (1, {"head_dim": 64, "kv_dtype": "float8_e4m3fn", "queries": 8, "slack": 7}),
}


def facts_of(options, **more):
    """All of a problem's facts: the defaults, then `more`, then the variant's options."""
    facts = {"batch": 1, "queries": 8192, "heads": 8, "kv_heads": 2, "head_dim": 128, "window": Window.causal(4096)}
    facts |= more | options
    dtype = facts.pop("dtype", "bfloat16")
    facts = dict.fromkeys(("q_dtype", "kv_dtype", "out_dtype"), dtype) | facts
    depth = facts["head_dim"]
    return Problem(**{"keys": facts["queries"], "value_dim": depth, "scale": depth**-0.5} | facts, **DEVICE)


def ring_facts(options, **more):
    window = options.get("window", more["window"])
    keys = window.sinks + window.size + options.get("slack", 0)
    return facts_of(options, **more, keys=keys, layout="ring", q_offset=None)


def spec(mesh, shape, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))


def compile_linear(mesh, options):
    """Forward and backward."""
    problem = facts_of(options)
    batch, size, heads, kv_heads = problem.batch, problem.queries, problem.heads, problem.kv_heads

    def both(q, k, v, g, lse, delta, sinks, ids, start):
        ids = ids if problem.segments else None
        rows = Rows(q_start=start if problem.q_offset is None else None, q_segments=ids, kv_segments=ids)
        out = mosaic.forward(problem, rows, q, k, v, sinks if problem.sink_logits else None)
        return out, mosaic.backward(problem, rows, q, k, v, g, lse, delta)

    q, k = (spec(mesh, (batch, size, n, problem.head_dim), problem.q_dtype) for n in (heads, kv_heads))
    statistics, sinks = spec(mesh, (batch, heads, size), "float32"), spec(mesh, (heads,), "float32")
    ids, start = spec(mesh, (batch, size), "int32"), spec(mesh, (batch,), "int32")
    return problem, jax.jit(both).lower(q, k, k, q, statistics, statistics, sinks, ids, start)


def _ring_arrays(mesh, problem):
    """q, the tokens' keys, the ring's, its scales, integers of each row, sink logits."""
    batch, chunk, kv_heads = problem.batch, problem.queries, problem.kv_heads
    q, new = (spec(mesh, (batch, chunk, n, problem.head_dim)) for n in (problem.heads, kv_heads))
    ring = spec(mesh, (batch, kv_heads, problem.keys, problem.head_dim), problem.kv_dtype)
    scale = spec(mesh, ring.shape[:3], "float32")
    return q, new, ring, scale, spec(mesh, (batch,), "int32"), spec(mesh, (problem.heads,), "float32")


def _ring_rows(problem, count, scale):
    scales = {"k_scale": scale, "v_scale": scale + 1} if problem.quantised else {}
    # Two arrays, for a kernel may write into each.
    return Rows(q_start=count, length=count, written=count + 1, q_length=count if problem.ragged else None, **scales)


def compile_chunk(mesh, options):
    """Attention of a long chunk to a ring and to itself."""
    more = {"queries": 2048, "batch": 2, "window": Window.causal(4096, sinks=3)}
    problem = ring_facts(options, **more)

    def call(q, new, ring, scale, count, sinks):
        rows = _ring_rows(problem, count, scale)
        return mosaic.extend(problem, rows, q, new, new, ring, ring, sinks if problem.sink_logits else None)

    assert mosaic.extends(problem)
    return problem, jax.jit(call).lower(*_ring_arrays(mesh, problem))


def compile_decode(mesh, options):
    """Attention to a ring, with the tokens written by the same launch where it can."""
    more = {"batch": 64, "queries": 1, "heads": 32, "kv_heads": 8, "window": Window.causal(1000, sinks=3)}
    problem = ring_facts(options, **more)

    def call(q, new, ring, scale, count, sinks):
        rows, sinks = _ring_rows(problem, count, scale), sinks if problem.sink_logits else None
        if mosaic.writes(problem):
            return mosaic.append_attend(problem, rows, q, new, new, ring, -ring, sinks)
        return mosaic.forward(problem, rows, q, ring, ring, sinks)

    return problem, jax.jit(call).lower(*_ring_arrays(mesh, problem))


def compile_beside(mesh, options):
    """A decoder's call: tokens into its ring, and attention to that and to two others, in one launch."""
    more = {"batch": 64, "queries": 1, "heads": 32, "kv_heads": 8, "window": Window.causal(1000, sinks=3)}
    problem, window = ring_facts(options, **more), Window(2000, 2000, sinks=3)
    ring = {"window": window, "keys": 2004, "slack": 0}
    memory = dataclasses.replace(problem, **ring, q_stride=0, out_dtype="float32", sink_logits=False)
    assert mosaic.writes(problem, memory, memory)

    def call(q, new, ring, scale, count, sinks, other, other_scale):
        rows, sinks = _ring_rows(problem, count, scale), sinks if problem.sink_logits else None
        memories = [Memory(memory, _ring_rows(memory, count + 7 * i, other_scale), other, other) for i in (1, 2)]
        return mosaic.append_attend(problem, rows, q, new, new, ring, -ring, sinks, memories)

    others = _ring_arrays(mesh, memory)[2:4]
    return problem, jax.jit(call).lower(*_ring_arrays(mesh, problem), *others)


# On two devices: how q is split, how k and v are, and what of (B, T, N, H) = (2, 512, 8, 64) one device computes.
CUDNN = {
    "cudnn, rows split": (PartitionSpec("x"), PartitionSpec("x"), "1,8,512,64"),
    "cudnn, heads split": (PartitionSpec(None, None, "x"), PartitionSpec(None, None, "x"), "2,4,512,64"),
    "cudnn, query heads split": (PartitionSpec(None, None, "x"), PartitionSpec(), "2,4,512,64"),
    "cudnn, tokens split": (PartitionSpec(None, "x"), PartitionSpec(None, "x"), "2,8,512,64"),
}


def count_cudnn(mesh, q_spec, kv_spec, part):
    """Forward and backward launches of cuDNN in a program of both that compute `part`: one of each is right."""
    problem = facts_of({"head_dim": 64, "window": Window.causal(100)}, batch=2, queries=512, lse=False)
    assert not cudnn.unsupported(problem)

    def both(q, k, v, g):
        out, vjp = jax.vjp(lambda *qkv: op(problem, "cudnn", Rows(), *qkv, None)[0], q, k, v)
        return out, vjp(g)

    def spread(heads, spec):
        return jax.ShapeDtypeStruct((2, 512, heads, 64), "bfloat16", sharding=NamedSharding(mesh, spec))

    q, k = spread(8, q_spec), spread(2, kv_spec)
    text = jax.jit(both).lower(q, k, k, q).compile().as_text()
    launches = [line for line in text.splitlines() if "custom-call(" in line and f"bf16[{part}]" in line]
    return [sum(f'"__cudnn$fmhaSoftmax{which}"' in line for line in launches) for which in ("", "Backward")]


# Where more bytes pass: the backward at head size 256 with a softcap, segments and both sides, all at once; chunks
# against rings whose slots are no multiple of 8, on tiles with a mask; and what the fused backward at head size 64
# keeps of a tile of packed keys.
MORE = {"256 all": 112, "chunk 256": 112, "64 segments": 80}

KINDS = ((compile_linear, LINEAR), (compile_chunk, CHUNK), (compile_decode, DECODE), (compile_beside, BESIDE))


def main(names):
    topology = topologies.get_topology_desc(platform="cuda", target_config=TARGET, topology="1x1x1")
    mesh = topologies.make_mesh(topo=topology, mesh_shape=(1,), axis_names=("x",))
    failed = []
    for lower, variants in KINDS:
        for name, (kernels, options) in variants.items():
            if names and not name.startswith(tuple(names)):
                continue
            problem, lowered = lower(mesh, options)
            reasons = mosaic.unsupported(problem)
            assert not reasons, f"{name}: {'; '.join(reasons)}"
            lowered.compile()
            reports = [path.read_text(errors="ignore") for path in sorted(DUMP.rglob("*ptxas*"))]
            verdict = judge(reports, kernels, MORE.get(name, ALLOWED))
            for path in DUMP.rglob("*"):
                path.unlink()
            failed += [name] if verdict.wrong else []
            print(f"{name:32} {verdict}", flush=True)
    two = topologies.get_topology_desc(platform="cuda", target_config=TARGET, topology="1x2x1")
    mesh = topologies.make_mesh(topo=two, mesh_shape=(2,), axis_names=("x",))
    for name, (q_spec, kv_spec, part) in CUDNN.items():
        if not names or name.startswith(tuple(names)):
            found = count_cudnn(mesh, q_spec, kv_spec, part)
            failed += [] if found == [1, 1] else [name]
            print(f"{name:32} {found[0]} forward, {found[1]} backward: {'ok' if found == [1, 1] else 'FAILED'}")
    print(f"FAILED: {', '.join(failed)}" if failed else "all as they should be")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
