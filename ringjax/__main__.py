"""`python -m ringjax`: what works on this machine (`doctor`), and what one call would do (`explain`)."""

import argparse
import importlib.metadata
import platform
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

import ringjax as rj
from ringjax._kernels import reasons_against
from ringjax._kernels.problem import Problem

_PACKAGES = ("ringjax", "jax", "jaxlib", "numpy", "flax", "torch", "xformers", "matplotlib")
_WRONG = 1e-3
"""Rounding in float32 moves the check's outputs by 1e-6; a key too many or too few moves them by 1e-2 or more."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m ringjax", description=rj.__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    doctor = "what works on this machine; exit status 1 if something does not"
    commands.add_parser("doctor", help=doctor, description=doctor.capitalize() + ".")
    text = "what one call of attention would do and cost, computing nothing"
    explain = commands.add_parser(
        "explain",
        help=text,
        description=text.capitalize() + ".",
        epilog="For example: python -m ringjax explain --shape 1 8192 8 2 64 --window 512 --sinks 4",
    )
    explain.add_argument(
        "--shape",
        nargs=5,
        type=int,
        required=True,
        metavar=("B", "T", "N", "K", "H"),
        help="rows, tokens, query heads, kv heads, head dim",
    )
    explain.add_argument("--window", type=int, required=True, metavar="W", help="keys seen, a query's own included")
    explain.add_argument("--sinks", type=int, default=0, metavar="P", help="first keys, always seen (default: 0)")
    explain.add_argument("--keys", type=int, metavar="S", help="keys, if not T: the last query is at the last key")
    explain.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"), help="of all")
    explain.add_argument("--implementation", metavar="NAME", help="one by name (default: the first that can)")
    options = parser.parse_args(arguments)
    if options.command == "doctor":
        return _doctor()
    try:
        print(_explanation(options))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _explanation(options: argparse.Namespace) -> str:
    batch, queries, heads, kv_heads, head_dim = options.shape
    keys = queries if options.keys is None else options.keys
    for name, size in zip(("B", "T", "N", "K", "H", "S"), (*options.shape, keys), strict=True):
        if size < 1:
            raise ValueError(f"explain: {name} must be at least 1, got {size}.")
    dtype = jnp.dtype(options.dtype)
    q = jax.ShapeDtypeStruct((batch, queries, heads, head_dim), dtype)
    k = jax.ShapeDtypeStruct((batch, keys, kv_heads, head_dim), dtype)
    window = rj.Window.causal(options.window, options.sinks)
    return str(rj.explain(q, k, k, window, implementation=options.implementation))


def _doctor() -> int:
    print("versions")
    print(f"  {'python':<12} {platform.python_version()} ({platform.system()} {platform.machine()})")
    for package in _PACKAGES:
        print(f"  {package:<12} {_version(package)}")
    wrong = []
    print("devices")
    try:
        devices = jax.devices()
    except RuntimeError as error:
        print(f"  none: {error}")
        return 1
    kinds: dict[tuple[str, str], list[int]] = {}
    for device in devices:
        kinds.setdefault((device.platform, device.device_kind), []).append(device.id)
    for (name, kind), ids in kinds.items():
        print(f"  {name:<12} {kind} x {len(ids)}")
    for name, kind in kinds:
        for what, problem in _typical(name, kind).items():
            print(f"implementations for {what} on {kind}")
            against = reasons_against(problem)
            for implementation, reasons in against.items():
                print(f"  {implementation:<12} {'cannot: ' + '; '.join(reasons) if reasons else 'can run'}")
            if all(against.values()):
                wrong.append(f"no implementation for {what} on {kind}")
    print("check")
    try:
        difference = _largest_difference()
        if not difference <= _WRONG:
            wrong.append(f"a stream through a ring differs from dense attention by {difference:.2g}")
        else:
            print(f"  OK: a stream through a ring equals dense attention (largest difference {difference:.1g})")
    except Exception as error:  # whatever it is, the patient has it
        wrong.append(f"a stream through a ring fails: {type(error).__name__}: {error}")
    for line in wrong:
        print(f"  WRONG: {line}")
    return 1 if wrong else 0


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return f"{rj.__version__} (not installed: run from its sources)" if package == "ringjax" else "not installed"


def _typical(name: str, kind: str) -> dict[str, Problem]:
    """A layer of a small model: a whole sequence, and a token to a ring."""
    shape = {"batch": 1, "heads": 8, "kv_heads": 2, "head_dim": 128, "value_dim": 128, "scale": 128**-0.5}
    dtypes = {"q_dtype": "bfloat16", "kv_dtype": "bfloat16", "out_dtype": "bfloat16"}
    facts = shape | dtypes | {"platform": name, "device_kind": kind, "window": rj.Window.causal(1024)}
    return {
        "attention": Problem(**facts, queries=4096, keys=4096),
        "decoding": Problem(**facts, queries=1, keys=1024, layout="ring", q_offset=None),
    }


def _largest_difference() -> float:
    """Of 12 tokens attended in chunks of 5, 1, 1, 5, the ring wrapping, against dense attention in NumPy."""
    window, tokens = rj.Window.causal(4, sinks=2), 12
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, tokens, heads, 8), np.float32) for heads in (2, 1, 1))
    at = np.arange(tokens)
    logits = np.where(window.visible(at[:, None], at[None]), np.einsum("bqnh,bkh->bnqk", q, k[:, :, 0]) / 8**0.5, -1e30)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    wanted = np.einsum("bnqk,bkh->bqnh", weights / weights.sum(-1, keepdims=True), v[:, :, 0])

    ring = rj.RingBuffer.empty(1, 1, 8, window, dtype=jnp.float32)
    attend = jax.jit(rj.attend)
    got, start = [], 0
    for chunk in (5, 1, 1, 5):
        parts = [jnp.asarray(x[:, start : start + chunk]) for x in (q, k, v)]
        out, ring = attend(parts[0], parts[1], parts[2], ring)
        got.append(np.asarray(out))
        start += chunk
    return float(np.abs(np.concatenate(got, axis=1) - wanted).max())


if __name__ == "__main__":
    sys.exit(main())
