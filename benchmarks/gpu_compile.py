"""Compiles the Hopper kernels for an H200 without one, and fails on spills: `python -m benchmarks.gpu_compile`.

Needs `pip install "jax[cuda13]"` in an environment of its own (4.4 GB), no GPU. A spill of up to `ALLOWED` bytes
passes, and so does the note C7519 (an arrive was added), but no other C75xx: each of those says that products run one
by one.
"""
# ruff: noqa: E402 (jax reads the environment when it is imported)

import os
import re
import sys
import tempfile
from pathlib import Path

DUMP = Path(tempfile.mkdtemp(prefix="kernels-"))
os.environ |= {
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "JAX_PLATFORMS": "cpu",
    "MOSAIC_GPU_DUMP_TO": str(DUMP),
    "MOSAIC_GPU_DUMP_PTXAS": "1",
}

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from ringjax import Window
from ringjax._kernels import mosaic
from ringjax._kernels.problem import Problem, Rows

ALLOWED = 64  # bytes: in the epilogue or on edge tiles only
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
VARIANTS = {
    "64": {"head_dim": 64, "window": Window.causal(1024)},
    "128": {"head_dim": 128, "window": Window.causal(4096)},
    "256": {"head_dim": 256, "window": Window.causal(1024)},
    "128 causal": {"head_dim": 128, "window": Window.causal()},
    "128 both sides": {"head_dim": 128, "window": Window(1000, 300)},
    "128 softcap, sink logits": {"head_dim": 128, "window": Window.causal(4096), "softcap": 50.0, "sink_logits": True},
    "128 sinks": {"head_dim": 128, "window": Window.causal(4096, sinks=4)},
    "128 segments": {"head_dim": 128, "window": Window.causal(4096), "segments": True},
    "128 deterministic": {"head_dim": 128, "window": Window.causal(4096), "deterministic": True},
    "64 deterministic": {"head_dim": 64, "window": Window.causal(1024), "deterministic": True},
}

DECODE_VARIANTS = {
    "decode 64": {"head_dim": 64},
    "decode 128, one row": {"head_dim": 128, "batch": 1},
    "decode 128": {"head_dim": 128},
    "decode 256": {"head_dim": 256},
    "decode 80, softcap, sink logits": {"head_dim": 80, "softcap": 30.0, "sink_logits": True},
    "decode 128, 16 tokens": {"head_dim": 128, "queries": 16, "slack": 15, "ragged": True},
    "decode 128, memory": {"head_dim": 128, "out_dtype": "float32", "q_stride": 0, "window": Window(999, 999)},
}


def compile_decode_variant(mesh, options, heads=32, kv_heads=8):
    """Compiles attention to a ring, with the tokens written by the same launch where it can."""
    facts = {"batch": 64, "queries": 1, "slack": 0, "window": Window.causal(1000, sinks=3), "out_dtype": "bfloat16"}
    facts |= options
    batch, chunk, depth, window = (facts[name] for name in ("batch", "queries", "head_dim", "window"))
    facts |= {"value_dim": depth, "keys": window.sinks + window.size + facts["slack"], "scale": depth**-0.5}
    facts |= {"heads": heads, "kv_heads": kv_heads, "layout": "ring", "q_offset": None}
    facts |= {"platform": "gpu", "device_kind": "NVIDIA H200"}
    problem = Problem(**facts, q_dtype="bfloat16", kv_dtype="bfloat16")

    def spec(shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    def call(q, new, ring, count, sinks):
        rows = Rows(q_start=count, length=count, written=count, q_length=count if problem.ragged else None)
        sinks = sinks if problem.sink_logits else None
        if mosaic.writes(problem):
            return mosaic.append_attend(problem, rows, q, new, new, ring, ring + 1, sinks)
        return mosaic.forward(problem, rows, q, ring, ring, sinks)

    q, new = spec((batch, chunk, heads, depth)), spec((batch, chunk, kv_heads, depth))
    ring = spec((batch, kv_heads, problem.keys, depth))
    jax.jit(call).lower(q, new, ring, spec((batch,), jnp.int32), spec((heads,), jnp.float32)).compile()


def compile_variant(mesh, options, size=8192, heads=8, kv_heads=2):
    """Compiles forward and backward of one variant."""
    depth = options["head_dim"]
    dtypes = dict.fromkeys(("q_dtype", "kv_dtype", "out_dtype"), "bfloat16")
    shapes = {"batch": 1, "queries": size, "keys": size, "heads": heads, "kv_heads": kv_heads, "value_dim": depth}
    device = {"platform": "gpu", "device_kind": "NVIDIA H200"}
    problem = Problem(**shapes, **dtypes, **device, scale=depth**-0.5, **options)

    def spec(shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    def both(q, k, v, g, lse, delta, sinks, ids):
        rows = Rows(q_segments=ids, kv_segments=ids) if problem.segments else Rows()
        sinks = sinks if problem.sink_logits else None
        out = mosaic.forward(problem, rows, q, k, v, sinks)
        return out, mosaic.backward(problem, rows, q, k, v, g, lse, delta)

    q, k = spec((1, size, heads, depth)), spec((1, size, kv_heads, depth))
    statistics = spec((1, heads, size), jnp.float32)
    others = spec((heads,), jnp.float32), spec((1, size), jnp.int32)
    jax.jit(both).lower(q, k, k, q, statistics, statistics, *others).compile()


def main():
    topology = topologies.get_topology_desc(platform="cuda", target_config=TARGET, topology="1x1x1")
    mesh = topologies.make_mesh(topo=topology, mesh_shape=(1,), axis_names=("x",))
    failed = False
    for name, options in (VARIANTS | DECODE_VARIANTS).items():
        (compile_variant if name in VARIANTS else compile_decode_variant)(mesh, options)
        reports = [path.read_text(errors="ignore") for path in DUMP.rglob("*ptxas*")]
        for path in DUMP.rglob("*"):
            path.unlink()
        spills = [max(map(int, re.findall(r"(\d+) bytes spill stores", r)), default=0) for r in reports]
        codes = sorted({code for r in reports for code in re.findall(r"C75\d\d", r)} - {"C7519"})
        wrong = not reports or bool(codes) or max(spills) > ALLOWED
        failed |= wrong
        verdict = "FAILED" if wrong else "ok"
        print(
            f"{name:26} {len(reports)} kernels, bytes spilled {spills}, {' '.join(codes) or 'no warnings'}: {verdict}"
        )
    sys.exit(failed)


if __name__ == "__main__":
    main()
