"""The benchmark programs, at sizes whose figures mean nothing: they check, then time, and refuse what is wrong."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from benchmarks import compiled, decode, forward, peers, reference, report, rings, shapes, timing
from benchmarks.__main__ import GROUPS, main
from benchmarks.effort import TINY
from benchmarks.shapes import Shape

SHAPES = (
    Shape("causal", queries=40, heads=4, kv_heads=2, head_dim=8, left=6, batch=2),
    Shape("both sides, capped", queries=33, heads=2, kv_heads=1, head_dim=8, left=5, right=3, softcap=2.0),
    Shape("sink logits", queries=24, heads=4, kv_heads=2, head_dim=8, left=9, sink_logits=True),
)

pytestmark = pytest.mark.usefixtures("numpy_promotion")


def silent(text):
    pass


def by_oracle(shape, arrays):
    at = np.arange(shape.queries)
    seen = {"left": shape.left, "right": shape.right, "sinks": 0, "q_positions": at, "k_positions": at}
    return oracle.attention(*arrays[:3], sink_logits=arrays.sink_logits, softcap=shape.softcap, **seen)[0]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_reference_is_attention(shape):
    arrays = shape.arrays()
    at = reference.edge_rows(shape)
    assert {0, shape.left, shape.left + 1, shape.queries - 1} <= set(at)
    np.testing.assert_allclose(reference.rows(shape, arrays, at), by_oracle(shape, arrays)[:, at], rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_reference_gradients_are_those_of_the_oracle(shape):
    """Central differences of the float64 oracle, one direction an array and block of tokens."""
    rng = np.random.default_rng(1)
    arrays, count, h = shape.arrays(), 8, 1e-5
    for start in reference.edge_blocks(shape, count):
        found = reference.gradients(shape, arrays, start, count)
        for name, gradient in zip("qkv", found, strict=True):
            x = np.asarray(getattr(arrays, name)).astype(np.float64)
            step = np.zeros_like(x)
            step[:, start : start + count] = rng.standard_normal(gradient.shape)
            above, below = (
                (by_oracle(shape, arrays._replace(**{name: x + sign * h * step})) * np.asarray(arrays.g)).sum()
                for sign in (1, -1)
            )
            slope = (gradient * step[:, start : start + count]).sum()
            np.testing.assert_allclose(slope, (above - below) / (2 * h), rtol=1e-6, atol=1e-6)


def test_pairs_and_flops_are_counted():
    for shape in SHAPES:
        distance = np.subtract.outer(np.arange(shape.queries), np.arange(shape.queries))
        pairs = ((distance <= shape.left) & (distance >= -shape.right)).sum()
        assert shape.pairs == pairs
        assert shape.flops == 4 * shape.batch * shape.heads * shape.head_dim * pairs
        assert shape.backward_flops == 2.5 * shape.flops


def test_inputs_are_never_zero():
    for shape in (*SHAPES, *TINY.models):
        for x in jax.tree.leaves(shape.arrays()):
            assert 0.3 < float(jnp.std(x)) < 3


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One run of everything: exit code, records, what it printed, the page it wrote."""
    folder = tmp_path_factory.mktemp("benchmarks")
    page = folder / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        pytest.MonkeyPatch.context() as patch,
    ):
        said = []
        patch.setattr("builtins.print", lambda *text, **_: said.append(" ".join(map(str, text))))
        code = main(["--tiny", "--json", str(folder / "out.json"), "--markdown", str(page)])
    records = [json.loads(line) for line in (folder / "out.json").read_text().splitlines()]
    return code, records, "\n".join(said), page.read_text()


def test_everything_that_runs_here_is_right_and_timed(run):
    code, records, _, _ = run
    assert code == 0
    assert not [record for record in records if record["record"] == "refused"]
    timings = [record for record in records if record["record"] == "timing"]
    assert {record["group"] for record in timings} == set(GROUPS)
    for record in timings:
        assert 0 < record["low_s"] <= record["median_s"] <= record["high_s"]
        products = record["implementation"].endswith("products") or record["implementation"] == "square product"
        assert record["error_of_bound"] is None if products else 0 <= record["error_of_bound"] <= 1


def test_what_cannot_run_is_named_with_the_reason(run):
    _, records, _, _ = run
    timed = {(r["group"], r["case"], r["implementation"]) for r in records if r["record"] == "timing"}
    out = {(r["group"], r["case"], r["implementation"]): r["why"] for r in records if r["record"] == "left out"}
    assert not timed & set(out)
    for name in ("jax.nn xla", "tokamax xla_chunked"):
        for shape in TINY.models:
            assert (("models", str(shape), name) in out) == (("models", str(shape), name) not in timed)
    assert out["models", str(TINY.models[0]), "jax.nn xla"] == "sink logits"


def test_goals_are_compared_with_this_runs_own_figures(run):
    _, records, _, _ = run
    times = {
        r["implementation"]: r["median_s"]
        for r in records
        if r["record"] == "timing" and r["group"] == "attention" and r["pass"] == "forward"
    }
    figures = {r["figure"]: r for r in records if r["record"] == "figure" and r["group"] == "attention"}
    ratio = figures["jax.nn xla / ringjax, forward, time"]
    assert ratio["value"] == pytest.approx(times["jax.nn xla"] / times["ringjax"])
    assert ratio["met"] == (ratio["value"] >= 20)


def test_tables_name_the_command_and_every_implementation(run):
    _, records, said, page = run
    assert records[0]["record"] == "environment" and records[0]["versions"]["jax"] == jax.__version__
    for text in (said, page):
        assert records[0]["command"] in text and records[0]["cpu"] in text
        for record in records:
            assert record.get("implementation", "") in text and record.get("case", "") in text
    assert page.startswith("before\n") and page.endswith("after\n") and "\nold\n" not in page


def test_a_page_without_marks_is_not_touched(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"{report.END}\n{report.BEGIN}\n")
    with pytest.raises(ValueError, match="must have one line"):
        report.write_results(page, "new")
    assert page.read_text() == f"{report.END}\n{report.BEGIN}\n"


def off_by_one(implementation):
    """The same, with a window one key too long."""
    return implementation._replace(build=lambda shape: implementation.build(shape.replace(left=shape.left + 1)))


@pytest.mark.parametrize("what", [forward.FORWARD, forward.BOTH])
@pytest.mark.parametrize("wrong", [0, 1], ids=["ours", "a peer"])
def test_a_wrong_result_has_no_speed(what, wrong):
    shape = SHAPES[0]
    found = report.Report("a test")
    implementations = [peers.ours(), peers.JAX_NN]
    implementations[wrong] = off_by_one(implementations[wrong])
    times, _ = forward.measure(found, "attention", shape, implementations, what, 1, 0.0, silent)
    assert set(times) == {implementations[1 - wrong].name}
    assert found.is_refused
    timed = [record["implementation"] for record in found.records if record["record"] == "timing"]
    assert timed == [implementations[1 - wrong].name]
    assert f"REFUSED: {implementations[wrong].name}, {what}" in found.text()


def test_a_wrong_ring_has_no_speed(monkeypatch):
    right = rings.plain

    def one_short(shape, chunks, tokens, layout):
        return right(shape.replace(left=shape.left - 1), chunks, tokens, layout)

    monkeypatch.setattr(rings, "plain", one_short)
    monkeypatch.setattr(rings, "huggingface_unsupported", lambda shape: ["left out of this test"])
    found = report.Report("a test")
    effort = dataclasses.replace(TINY, positions=(1,), decode_models=())
    decode.decode(found, effort, silent)
    assert {r["implementation"] for r in found.records if r["record"] == "timing"} == {"ringjax"}
    refused = [r["why"] for r in found.records if r["record"] == "refused"]
    names = [f"plain ring {layout}" for layout in rings.PLAIN]
    assert [why.split(", token")[0] for why in refused] == names


def test_the_program_fails_if_a_result_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.peers.PEERS", (off_by_one(peers.JAX_NN),))
    monkeypatch.setattr("benchmarks.__main__.TINY", dataclasses.replace(TINY, models=SHAPES[:1]))
    assert main(["--tiny", "--only", "models"]) == 1
    assert "REFUSED: jax.nn xla" in capsys.readouterr().out


def test_hold_allows_twice_the_error_of_plain_attention():
    exact = np.array([1.0, 2.0])
    plain, floor = exact + 1e-3, 2.0 * 4 * 2.0**-23
    assert reference.hold("x", np.float32(exact + 1.9e-3), exact, plain) == pytest.approx(1.9 / 2, rel=1e-2)
    assert reference.hold("x", np.float32(exact), exact, exact) == 0
    for got, beside in ((exact + 2.1e-3, plain), (exact + 2 * floor, exact), (np.array([1.0, np.nan]), plain)):
        with pytest.raises(reference.Wrong, match="no speed of it is printed"):
            reference.hold("x", np.float32(got), exact, beside)


def test_a_copy_in_the_loop_is_found():
    """A loop that keeps its ring in order copies it at every token; one that overwrites a slot does not."""
    shape = Shape("ring", queries=4, heads=2, kv_heads=2, head_dim=8, left=1023)
    new = rings.tokens(shape, 4, seed=0)
    elements = shape.size * shape.kv_heads * shape.head_dim

    def rolled(q, k, v, ring):
        ring = jnp.concatenate([ring[:, 1:], k], axis=1)
        return jnp.einsum("btnh,bsnh->btns", q, ring), ring

    in_order, _ = rings.scanned(rolled, new, jnp.ones((1, shape.size, 2, 8)))
    in_place = rings.plain(shape, [], new, "XWH").executable
    assert compiled.large_copies(in_order, elements)
    assert not compiled.large_copies(in_place, elements)
    assert compiled.aliased_bytes(in_place) >= 8 * elements


def test_calls_are_timed_in_turn(monkeypatch):
    order = []
    monkeypatch.setattr(timing.time, "sleep", lambda seconds: None)
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    times = timing.interleaved(calls, rounds=3, turn_s=0.0)
    assert "".join(order) == "ababab"
    assert len(times["a"].seconds) == 3 and min(times["a"].seconds) >= 0
    order.clear()
    timing.interleaved(calls, rounds=2, turn_s=60.0, most=2)
    assert "".join(order) == "aabbaabb"


def test_models_are_whole_and_their_shards_are_too():
    for name, shape in shapes.ON_CPU.items():
        whole = shapes.MODELS[name]
        assert whole.heads % shape.heads == 0 and whole.heads // whole.kv_heads == shape.heads // shape.kv_heads
        assert (whole.left, whole.right, whole.head_dim) == (shape.left, shape.right, shape.head_dim)
        assert shape.queries > shape.size
