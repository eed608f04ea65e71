"""The benchmark programs for GPUs, where there is none: what they count, check, refuse, and make of their figures."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ringjax as rj
from benchmarks import flash3, gpu_attention, gpu_chunks, gpu_rows, gpu_tables, ptxas, report, timing
from benchmarks.gpu_attention import Candidate
from benchmarks.gpu_rows import Row

pytestmark = pytest.mark.usefixtures("numpy_promotion")

SMALL = (2, 576, 2, 1, 16)
PLAIN, PACKED = Row("P", SMALL, 200), Row("P, packed", SMALL, 200, segment=50)
CAPPED = Row("P, capped", SMALL, 200, softcap=2.0, sink_logits=True)
UNBOUNDED = Row("no bound", SMALL, None)


@pytest.mark.parametrize("row", [PLAIN, PACKED, UNBOUNDED], ids=lambda row: row.name)
def test_visible_pairs_are_counted(row):
    b, t, n, _, h = row.shape
    distance = np.subtract.outer(np.arange(t), np.arange(t))[None]
    seen = (distance >= 0) & (distance < (row.size or t))
    if row.ids is not None:
        seen = seen & (row.ids[:, :, None] == row.ids[:, None])
        lengths = np.unique(row.ids[0], return_counts=True)[1]
        assert len(lengths) > 5 and 25 < lengths.mean() < 100
    assert row.pairs == np.broadcast_to(seen, (b, t, t)).sum() * n
    assert row.flops("forward") == 4 * h * row.pairs and row.flops("with backward") == 14 * h * row.pairs


def test_a_row_of_the_table_is_what_the_documentation_says():
    for row in gpu_rows.ROWS:
        b, t, n, k, _ = row.shape
        assert n % k == 0 and b * t >= 16384
        assert row.size is None or row.size < t
    assert [row.name for row in gpu_rows.chosen(["B", "features"])] == ["B", *(r.name for r in gpu_rows.FEATURES)]
    assert gpu_rows.chosen(None) == gpu_rows.ROWS and len({row.name for row in gpu_rows.ROWS}) == len(gpu_rows.ROWS)
    with pytest.raises(SystemExit, match="--only: a row or group must be one of A, B, "):
        gpu_rows.chosen(["Z"])


def by_xla(row):
    return gpu_attention.ours(row, "xla")


def results(row, of=None):
    arrays = row.arrays()
    return arrays, jax.jit(gpu_attention.with_gradients(by_xla(of or row)))(*arrays)


@pytest.mark.parametrize("row", [PACKED, CAPPED], ids=lambda row: row.name)
def test_what_is_right_passes_and_each_wrong_array_does_not(row):
    arrays, found = results(row)
    assert all(0.3 < float(jnp.std(x.astype(jnp.float32))) < 3 for x in arrays[:4])
    errors = jax.jit(partial(gpu_rows.errors, row))
    assert errors(arrays, *found[:1]).max() < 1e-2
    assert errors(arrays, *found).max() < 1e-2
    for i in range(4):
        wrong = [x * 1.05 if i == j else x for j, x in enumerate(found)]
        assert errors(arrays, *wrong).max() > 1e-2
        wrong[i] = found[i].at[-1, -1].set(jnp.nan)
        assert not errors(arrays, *wrong).max() < 1e-2


def test_a_window_off_by_one_is_wrong():
    """It changes one key in 200: by more than bfloat16 does."""
    arrays, found = results(PLAIN, of=Row("wider", SMALL, 201))
    assert gpu_rows.error(PLAIN, arrays, found) > 1e-2


def broken(row):
    raise RuntimeError("no such kernel\nand a long story")


def off_by_a_tenth(row):
    return lambda *arrays: by_xla(row)(*arrays) * 1.1


CANDIDATES = {
    "ringjax": Candidate(gpu_attention._always, by_xla),
    "deterministic": Candidate(gpu_attention._a_shape, by_xla),
    "FlashAttention-3": gpu_attention.CANDIDATES["FlashAttention-3"],
    "jax.nn cuDNN": Candidate(gpu_attention._plain, off_by_a_tenth),
    "tokamax": Candidate(gpu_attention._plain, broken),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One run of the program on small rows: its exit code, records, text and files."""
    folder = tmp_path_factory.mktemp("gpu")
    rows = [PLAIN, CAPPED]
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        pytest.MonkeyPatch.context() as patch,
    ):
        said = []
        patch.setattr("builtins.print", lambda *text, **_: said.append(" ".join(map(str, text))))
        patch.setattr(gpu_attention, "CANDIDATES", CANDIDATES)
        patch.setattr(gpu_attention, "SHAPES", [PLAIN])
        patch.delenv("FLASH_ATTENTION_3", raising=False)
        flash3.unsupported.cache_clear()
        for module in (gpu_rows, gpu_tables):
            patch.setattr(module, "ROWS", rows)
        patch.setattr(gpu_tables, "FEATURES", [CAPPED])
        for group, members in (("shapes", [PLAIN]), ("features", [CAPPED]), ("windows", [PLAIN])):
            patch.setitem(gpu_rows.GROUPS, group, members)
        file = folder / "figures.jsonl"
        code = gpu_attention.main(["--batches", "2", "--batch-ms", "0.01", "--json", str(file)])
        image = folder / "images" / "plot.png"
        page = folder / "page.md"
        page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
        assert gpu_tables.main([str(file), "--plot", str(image), "--markdown", str(page)]) == 0
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return code, records, "\n".join(said), image, page.read_text()


def test_right_results_are_timed_and_no_others(run):
    code, records, *_ = run
    assert code == 1, "something was refused"
    timed = {(r["row"], r["what"], r["candidate"]) for r in records if r["record"] == "timing"}
    rows = {row.name for row in (PLAIN, CAPPED)}
    both = {"forward", "with backward"}
    assert timed == {(row, what, "ringjax") for row in rows for what in both} | {
        ("P", "with backward", "deterministic")
    }
    for record in records:
        if record["record"] == "timing":
            assert 0 < record["low_s"] <= record["seconds"] <= record["high_s"] and record["error"] < 1e-2
            row = next(row for row in (PLAIN, CAPPED) if row.name == record["row"])
            rate = row.flops(record["what"]) / record["seconds"] / 1e12
            assert record["tflops"] == pytest.approx(rate)
    refused = {(r["row"], r["candidate"]) for r in records if r["record"] == "refused"}
    assert refused == {("P", "jax.nn cuDNN")}


def test_what_did_not_run_is_named_with_the_reason(run):
    _, records, said, *_ = run
    failed = {r["why"] for r in records if r["record"] == "failed"}
    assert failed == {"RuntimeError: no such kernel"}
    out = {(r["candidate"], r["why"]) for r in records if r["record"] == "left out"}
    assert ("FlashAttention-3", "not installed: FLASH_ATTENTION_3 names no library") in out
    assert ("jax.nn cuDNN", "called for plain attention only") in out
    for _, why in out:
        assert why in said
    assert "P, forward, tokamax: FAILED: RuntimeError: no such kernel" in said
    assert "P, forward, jax.nn cuDNN: REFUSED: error 1." in said


def test_the_figures_name_device_versions_and_date(run):
    _, records, said, image, page = run
    first = records[0]
    assert first["record"] == "environment" and first["versions"]["jax"] == jax.__version__ and first["batches"] == 2
    assert first["device"] in said and first["date"] in said
    assert image.stat().st_size > 10_000
    assert page.startswith("before\n") and page.endswith("after\n") and "\nold\n" not in page
    assert "| forward | ringjax |" in page and "(images/plot.png)" in page


def timing_of(row, what, candidate, tflops):
    more = {"low_s": 0.001, "high_s": 0.003, "error": 2e-3, "temporary_bytes": 2**21}
    return {
        "record": "timing",
        "row": row,
        "what": what,
        "candidate": candidate,
        "tflops": tflops,
        "seconds": 0.002,
    } | more


def test_tables_of_figures():
    records = [
        timing_of("A", "forward", "ringjax", 500.0),  # of an earlier run
        timing_of("A", "forward", "ringjax", 600.0),
        timing_of("A", "forward", "jax.nn cuDNN", 540.4),
        timing_of("C", "forward", "jax.nn cuDNN", 320.0),
        timing_of("A, softcap 50", "forward", "ringjax", 500.0),
        timing_of("W=128", "with backward", "ringjax", 150.0),
    ]
    text = gpu_tables.tables(records)
    assert "| forward | ringjax | jax.nn cuDNN |" in text
    assert "| A | **600** (2.000 ms) | 540 (2.000 ms) |" in text
    assert "| C | - | **320** (2.000 ms) |" in text
    assert "| with backward | ringjax |\n| --- | --- |\n| W=128 | **150** (2.000 ms) |" in text
    assert "| A, softcap 50 | 500 (2.000 ms) | +20.0% | - | - |" in text
    assert "| ringjax | forward | 2.0e-03 to 2.0e-03 | 2 to 2 |" in text
    assert gpu_tables.tables([]) == ""


def test_batches_are_timed_in_turn(monkeypatch):
    """And waited for at their ends only; the first of each is a warm-up."""
    clock, order = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def call(name, seconds):
        def run():
            order.append(name)
            clock[0] += seconds

        return run, lambda result: order.append(name.upper())

    times = timing.in_batches({"a": call("a", 1.0), "b": call("b", 3.0)}, batches=2, batch_s=6.0)
    assert "".join(order) == "aaAaaaA" + "bbBbbbB" + 3 * ("aaaaaaA" + "bbB")
    assert times["a"].seconds == (1.0, 1.0) and times["b"].median == 3.0


def test_flash_attention_that_does_not_load_says_why(monkeypatch, tmp_path):
    pytest.importorskip("torch")
    monkeypatch.setenv("FLASH_ATTENTION_3", str(tmp_path / "nothing.so"))
    flash3.unsupported.cache_clear()
    (reason,) = flash3.unsupported()
    assert reason.startswith("does not load: OSError: ")
    flash3.unsupported.cache_clear()


def report_of(spilled, *codes):
    """As ptxas 13.0 writes it."""
    notes = "".join(f"ptxas info    : ({code}) Potential Performance Loss: wgmma.mma_async ...\n" for code in codes)
    return f"""{notes}ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'kernel_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for kernel_mosaic_gpu_kernel
    {spilled} bytes stack frame, {spilled} bytes spill stores, {spilled} bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
"""


@pytest.mark.parametrize(
    ("reports", "kernels", "said"),
    [
        ([report_of(0)], 1, "1 kernel, bytes spilled [0], no warnings: ok"),
        ([report_of(64), report_of(0, "C7519")], 2, "2 kernels, bytes spilled [64, 0], no warnings: ok"),
        ([report_of(72)], 1, "1 kernel, bytes spilled [72], no warnings: FAILED, more than 64 bytes spilled"),
        ([report_of(0, "C7519", "C7510")], 1, "1 kernel, bytes spilled [0], C7510: FAILED, products run one by one"),
        ([report_of(0)], 2, "1 kernel, bytes spilled [0], no warnings: FAILED, expected 2 kernels"),
        ([], 1, "0 kernels, bytes spilled [], no warnings: FAILED, expected 1 kernels"),
        (["nothing"], 1, "1 kernel, bytes spilled [-1], no warnings: FAILED, a report says nothing of spills"),
    ],
    ids=["clean", "allowed", "spills", "warnings", "too few", "none", "no report"],
)
def test_a_kernel_that_spills_fails(reports, kernels, said):
    assert str(ptxas.judge(reports, kernels)) == said


def test_chunks_are_checked_before_they_are_timed(capsys):
    """Right ones have a figure, and a chunk that sees one key too many has none."""
    chunk = gpu_chunks.Chunk(t=40, b=2, n=2, k=1, h=16, w=100)

    def candidates(chunk, q, k, v):
        wider = jax.jit(partial(rj.attention, window=rj.Window.causal(chunk.w + 1)))
        return gpu_chunks.candidates(chunk, q, k, v) | {"wider": partial(wider, q, k, v)}

    assert not gpu_chunks.measure(chunk, batches=1, batch_s=0.01, candidates=candidates)
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert sorted(line[3] for line in lines if "REFUSED" not in line[4]) == sorted(
        ["attend", "attend by xla", "attention to the same pairs"]
    )
    assert [line[3] for line in lines if "REFUSED" in line[4]] == ["wider"]
