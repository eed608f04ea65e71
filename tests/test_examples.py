"""The examples do what they say, at a small size. Each one checks its own claim and returns the numbers it prints."""

import importlib.util
import json
import math
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
PNG = b"\x89PNG\r\n\x1a\n"


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rounding(length, largest=1.0):
    """How far two float32 computations of sums of `length` terms may lie apart, a few layers deep."""
    return 8 * math.sqrt(length) * float(np.finfo(np.float32).eps) * largest


def test_local_attention(capsys):
    found = load("local_attention").main(length=200, window=24, chunk=50, steps=20)
    assert found["difference"] < rounding(64)
    assert found["ring"] * 200 == found["cache"] * (24 + 4)
    assert "differ by at most" in capsys.readouterr().out


def test_mistral_style():
    found = load("mistral_style").main(layers=2, width=64, window=8, prompts=(37, 9, 20), new=16)
    assert found["spread"] > 0.1
    assert found["behind"] < rounding(64, found["spread"])
    # Per row: 2 layers of keys and values in 8 slots, 2 heads of 8; and two counters in each ring.
    assert found["bytes"] == 3 * 2 * (2 * 8 * 2 * 8 * 4 + 2 * 4)


def test_gemma_style():
    found = load("gemma_style").main(layers=4, every=2, width=32, window=6, length=50)
    assert found["difference"] < rounding(32, found["largest"])
    assert found["local"] * 50 == found["global"] * 6


def test_encoder_decoder():
    found = load("encoder_decoder").main(source_length=90, chunk=30, new=24, window=16, slack=5)
    # Logits are products of 64 random features, sums of a few: up to about 50.
    assert found["difference"] < rounding(64, 50.0)
    assert found["again"] == 0.0
    assert found["gradient_difference"] < rounding(64)


def test_continuous_batching():
    found = load("continuous_batching").main(slots=3, count=12, windows=(8, 5), longest=23, most=20)
    assert found["same"] == 12
    assert found["executables"] == 3
    assert found["decoded"] < found["in batches"]


def test_chunked_training(numpy_promotion):
    found = load("chunked_training").main(length=512, chunk=32, width=32, window=12, steps=12)
    assert found["difference"] < rounding(512)
    assert found["by chunks"] < found["at once"]
    # Where the compiler places its buffers varies by some bytes; anything held per token would be 4 bytes at the least.
    assert found["truncated, 10 x longer"] - found["truncated"] < 9 * 512
    assert found["last"] < found["first"] - 0.5


def test_torch_module():
    pytest.importorskip("torch")
    found = load("torch_module").main(length=48, chunk=24, steps=40)
    assert found["last"] < found["first"] / 2
    assert found["difference"] < rounding(32)
    assert found["copies"] == 0


def test_torch_shares_ring(capsys):
    pytest.importorskip("torch")
    found = load("torch_shares_ring").main(prompt=40, new=40)
    assert found == {"agree": 1.0, "copies": 0, "moved": 0.0}
    assert "100% as by torch alone" in capsys.readouterr().out


def test_finetune_huggingface():
    pytest.importorskip("transformers")
    found = load("finetune_huggingface").main(length=48, batch=2, steps=12, new=24)
    assert found["last"] < found["first"] - 1.0
    assert found["difference"] < 100 * rounding(64)  # each step's rounding changes the next one's weights
    assert found["same"] == 1.0
    assert (found["sliding"], found["full"]) == (16, 64)


SMALL = "--width 64 --windows 5 9 --batch 4 --length 32 --slice 100 --stream 400 --compare 250 --steps 20"


@pytest.fixture(scope="module")
def demo():
    return load("stream_forever")


def test_stream_forever(demo, tmp_path, capsys, numpy_promotion):
    out, checkpoints = tmp_path / "out", tmp_path / "checkpoints"
    report = demo.main([*SMALL.split(), "--out", str(out), "--checkpoint", str(checkpoints)])
    assert report["loss_before"] == pytest.approx(math.log(256), abs=1e-5)
    assert report["loss_after"] < report["loss_before"] - 1.0
    assert report["streamed"] == 400
    assert report["compilations"] == 1
    assert report["compared"] == 250
    assert report["largest_difference"] < rounding(64, report["largest_logit"])
    # 2 layers of keys and values for 5 + 4 and 9 + 4 slots, one head of 32, and two counters in each ring.
    assert report["ring_bytes"] == [(9 + 13) * 2 * 32 * 4 + 2 * 2 * 4]
    assert report["growing_cache_bytes"] == 600 * 2 * 2 * 32 * 4
    assert json.loads((out / "report.json").read_text())["streamed"] == 400
    for name in ("loss.png", "memory.png"):
        assert (out / name).read_bytes().startswith(PNG)
        assert len((out / name).read_bytes()) > 10_000
    printed = capsys.readouterr().out
    for claim in ("compilations     1 for", "nats", "the same after each of 4 slices", "differ by at most"):
        assert claim in printed

    # An interrupted training, resumed from its last checkpoint, ends where the uninterrupted one did.
    last, before = sorted(map(int, (entry.name for entry in checkpoints.iterdir())), reverse=True)
    assert last == 20
    shutil.rmtree(checkpoints / "20")
    again = demo.main([*SMALL.split(), "--out", str(out), "--checkpoint", str(checkpoints), "--resume"])
    assert again["steps"] == 20 - before
    assert again["loss_after"] == report["loss_after"]
    assert f"resumed after step {before}" in capsys.readouterr().out


def test_stream_forever_counts_compilations(demo):
    """The count is a count: a new program adds to it, one that exists does not."""
    with demo.counting_compilations() as compiled:
        double = jax.jit(lambda x: x + x)
        double(np.ones(3, np.float32))
        double(np.zeros(3, np.float32))
        assert len(compiled) == 1
        double(np.ones(4, np.float32))
        assert len(compiled) == 2
    double(np.ones(5, np.float32))
    assert len(compiled) == 2


def test_stream_forever_needs_a_checkpoint_to_resume(demo, tmp_path, numpy_promotion):
    with pytest.raises(SystemExit, match="--resume: there is no checkpoint yet"):
        demo.main([*SMALL.split(), "--out", str(tmp_path), "--checkpoint", str(tmp_path / "none"), "--resume"])


def test_demo_text_is_held_out(demo):
    """No paragraph of the held-out text occurs in the training text."""
    train, held_out = (bytes(part.astype(np.uint8)).decode(errors="replace") for part in demo.python_manual())
    seen = set(train.split("\n\n"))
    assert len(held_out) > 10_000
    assert not [paragraph for paragraph in held_out.split("\n\n")[1:] if paragraph in seen]
