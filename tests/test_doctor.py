"""`python -m ringjax`, as a user runs it, and what the doctor says of a patient that is ill."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import ringjax as rj
from ringjax import __main__ as command
from ringjax._kernels import IMPLEMENTATIONS

ROOT = Path(__file__).parents[1]


def test_doctor_of_a_sound_machine():
    """In a process of its own, with every warning an error, and with neither torch nor flax imported."""
    code = """
import runpy, sys
sys.argv = ["ringjax", "doctor"]
try:
    runpy.run_module("ringjax", run_name="__main__")
finally:
    assert not {"torch", "flax", "matplotlib"} & set(sys.modules)
"""
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert f"  jax          {jax.__version__}" in lines
    for name in IMPLEMENTATIONS:
        assert sum(line.split()[:1] == [name] for line in lines) >= 2, name  # for attention, for decoding
    assert sum(line == "  xla          can run" for line in lines) >= 2
    assert lines[-1].startswith("  OK: a stream through a ring equals dense attention")


def test_doctor_finds_a_wrong_key(monkeypatch, capsys):
    attend = rj.attend

    def wrong(q, k, v, buffer):
        return attend(q, k.at[:, -1].set(0.0), v, buffer)

    monkeypatch.setattr(rj, "attend", wrong)
    assert command.main(["doctor"]) == 1
    assert "WRONG: a stream through a ring differs from dense attention by" in capsys.readouterr().out


def test_doctor_finds_what_raises_and_what_cannot_run(monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(rj, "attend", broken)
    for module in IMPLEMENTATIONS.values():
        monkeypatch.setattr(module, "unsupported", lambda problem: ["it is a Monday"])
    assert command.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "WRONG: a stream through a ring fails: RuntimeError: no kernel image" in out
    assert "  xla          cannot: it is a Monday" in out
    assert "WRONG: no implementation for decoding on" in out


def test_explain_prints_an_explanation(capsys):
    options = "--shape 2 100 8 2 64 --window 16 --sinks 4 --dtype float32 --keys 120 --implementation xla"
    assert command.main(["explain", *options.split()]) == 0
    q, k = (jax.ShapeDtypeStruct((2, n, h, 64), jnp.float32) for n, h in ((100, 8), (120, 2)))
    wanted = rj.explain(q, k, k, rj.Window.causal(16, sinks=4), implementation="xla")
    assert capsys.readouterr().out == f"{wanted}\n"


@pytest.mark.parametrize(
    ("options", "first"),
    [
        ("--shape 1 8 3 2 64 --window 4", "explain: the query heads must be a multiple of the kv heads, got 3 and 2."),
        ("--shape 1 0 2 2 64 --window 4", "explain: T must be at least 1, got 0."),
        ("--shape 1 8 2 2 64 --window 0", "Window.causal: size must be an int >= 1 or None, got 0."),
        ("--shape 1 8 2 2 64 --window 4 --implementation no", "explain: implementation must be one of"),
    ],
)
def test_explain_says_what_is_wrong(options, first, capsys):
    assert command.main(["explain", *options.split()]) == 2
    assert capsys.readouterr().err.startswith(first)


def test_help(capsys):
    for arguments in (["--help"], ["doctor", "--help"], ["explain", "--help"]):
        with pytest.raises(SystemExit) as end:
            command.main(arguments)
        assert end.value.code == 0
        assert capsys.readouterr().out.startswith("usage: python -m ringjax")
    with pytest.raises(SystemExit) as end:
        command.main([])
    assert end.value.code == 2
