"""More than one device: the tests on 8 of them, and the example in two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Compiled in a hurry: the code that LLVM makes runs for milliseconds, and its optimisation for a minute.
HURRY = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
EIGHT = "--xla_force_host_platform_device_count=8 " + HURRY


def run(*command, **variables):
    """A process of its own: how many devices jax finds is settled when it first looks."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | variables
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("claim", ["rows_and_heads", "sequence"])
def test_on_eight_devices(claim):
    path = f"tests/multi/test_{claim}.py"
    said = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", path, XLA_FLAGS=EIGHT)
    assert " passed" in said and "skipped" not in said.splitlines()[-1]


def test_two_processes_train_as_one_device_does(tmp_path):
    """The example on a mesh of 2 x 2 x 2, half of it in each process: losses, and what decoding writes."""
    report = tmp_path / "report.json"
    command = "examples/sharded_training.py --processes 2 --layers 1 --steps 3 --report"
    run("-W", "error", *command.split(), str(report), XLA_FLAGS=HURRY)
    found = json.loads(report.read_text())
    assert (found["devices"], found["processes"]) == (8, 2)
    assert found["layout"].endswith("('data', 'model')")
    assert found["difference"] < 1e-5
    assert found["losses"][-1] < found["losses"][0]
    assert found["same"]
