"""`attention` and `merge` against the float64 oracle, within law 13's bound."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import Case

import ringjax as rj
from ringjax._kernels import xla
from ringjax._kernels.tiles import Tiles

W = rj.Window

# Beside the table: what the xla implementation does otherwise from 64 queries on (one head at a time on a CPU), with
# windows of one block and of many, and both where the keys' storage is cut in two by sinks.
LARGE = Case("", W.causal(9), queries=70, keys=70, batch=2, heads=6, kv_heads=2, head_dim=4, value_dim=4)
PATHS = [
    LARGE.replace(name="heads-one-block", tiles=Tiles(None, 16, None)),
    LARGE.replace(name="heads-many-blocks", tiles=Tiles(4, 16, None)),
    LARGE.replace(name="heads-unbounded", window=W.causal(), tiles=Tiles(16, 16, 1), softcap=2.0),
    LARGE.replace(name="heads-full", window=W.full(), tiles=Tiles(16, 32, 3), sink_logits=True),
    LARGE.replace(name="heads-sinks-beyond-a-tile", window=W.causal(5, sinks=37), tiles=Tiles(8, 8, 1)),
    LARGE.replace(name="heads-packed-many-blocks", segments="padded", tiles=Tiles(4, 16, 1), sink_logits=True),
    LARGE.replace(name="heads-own-tiles", tiles=None, window=W(40, 3, 2), sink_logits=True),
    LARGE.replace(name="heads-offset-per-row", q_offset=(3, 60), tiles=Tiles(8, 16, None)),
    LARGE.replace(name="heads-bfloat16", dtype="bfloat16", tiles=Tiles(4, 16, 3), sink_logits=True, softcap=3.0),
    LARGE.replace(name="all-heads-long-window", queries=15, window=W.causal(60), tiles=Tiles(8, 4, None)),
    LARGE.replace(name="all-heads-sinks-beyond-a-tile", queries=15, window=W.causal(6, sinks=30), tiles=Tiles(8, 4)),
    LARGE.replace(name="all-heads-all-sinks", queries=15, keys=20, window=W.causal(6, sinks=64), tiles=Tiles(8, 4)),
    LARGE.replace(name="all-heads-far-rows", queries=15, window=W.causal(2), tiles=Tiles(16, 8), q_offset=(3, 60)),
    LARGE.replace(name="all-heads-far-side", queries=15, window=W(3, 2**31 - 2), tiles=Tiles(8, 8)),
    LARGE.replace(name="all-heads-packed", queries=15, window=W.causal(60), tiles=Tiles(8, 4), segments="padded"),
]
DTYPES = ("float32", "bfloat16", "float16")
SOME = ("all-logits", "padded", "more-queries-both-sides")
TABLE = [
    *cases.CASES,
    *[cases.BY_NAME[name].replace(name=f"{name}-{d}", dtype=d) for name in SOME for d in DTYPES[1:]],
]


def check(*runs):
    """Law 13 for the runs `(case, got, arrays)` of one case taken together: a few numbers have luck, many have not."""
    for case, (out, lse), _ in runs:
        assert out.dtype == case.dtype and lse.dtype == jnp.float32
        assert out.shape == (case.batch, case.queries, case.heads, case.value_dim)
        assert lse.shape == (case.batch, case.heads, case.queries)
    got = [got for _, got, _ in runs]
    exact, plain = ([f(case, arrays) for case, _, arrays in runs] for f in (cases.exact, cases.plain))
    for what, *parts in zip(("out", "lse"), *(zip(*x, strict=True) for x in (got, exact, plain)), strict=True):
        cases.assert_close(*(np.concatenate([np.asarray(x) for x in part]) for part in parts), what)


@pytest.mark.parametrize("case", [*TABLE, *PATHS], ids=str)
def test_attention_is_the_oracle(case):
    run = jax.jit(lambda arrays: cases.run(case, arrays))
    check(*((case, run(arrays), arrays) for arrays in (cases.arrays(case, seed) for seed in range(5))))


def test_the_table_covers_both_paths_of_xla():
    """Head by head and all heads at once, one block and many: what `PATHS` is for."""
    ways = set()
    original = xla._plan

    def spy(problem, rows):
        plan = original(problem, rows)
        ways.add((xla._head_by_head(problem), plan.blocks > 1, plan.sinks > plan.sizes.block_size))
        return plan

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla, "_plan", spy)
        for case in PATHS:
            jax.eval_shape(lambda arrays, case=case: cases.run(case, arrays), cases.arrays(case))
    wanted = {(heads, many, False) for heads in (True, False) for many in (True, False)}
    wanted |= {(heads, True, True) for heads in (True, False)}
    # One block and all heads at once: the small table.
    assert wanted - {(False, False, False)} <= ways


def test_without_return_lse_the_output_comes_alone():
    case = cases.BY_NAME["all-logits"]
    arrays = cases.arrays(case)
    out = rj.attention(*arrays[:3], case.window, **cases.options(case, arrays))
    np.testing.assert_array_equal(out, cases.run(case, arrays)[0])


@pytest.mark.parametrize("tiles", [Tiles(1, 1, 1), Tiles(4, 16, 2), Tiles(64, 5, 3), Tiles(7, 100, 6), Tiles(None, 8)])
def test_tile_sizes_change_nothing(tiles):
    """Sizes of one, sizes that divide nothing, sizes beyond the arrays, head tiles that do not divide the group."""

    class Config:  # any object with the three fields
        block_size, tile_size, head_tile_size = tiles

    case = cases.BY_NAME["all-logits"].replace(heads=6, tiles=Config)
    arrays = cases.arrays(case)
    check((case, jax.jit(lambda arrays: cases.run(case, arrays))(arrays), arrays))


OFFSET = Case("offsets", W(4, 1, 2), batch=3, queries=6, keys=17, sink_logits=True)


@pytest.fixture(scope="module")
def attention_at():
    """`attention` at offsets that are traced: int32 [] for all rows, or [B]."""

    @jax.jit
    def run(arrays, q_offset):
        options = cases.options(OFFSET, arrays) | {"q_offset": q_offset}
        return rj.attention(*arrays[:3], OFFSET.window, return_lse=True, **options)

    return run


def test_offsets_per_row(attention_at):
    """From before the first key to beyond the last."""
    runs, rng = [], np.random.default_rng(0)
    for seed in range(200):
        offsets = rng.integers(-9, 26, 3)
        case = OFFSET.replace(q_offset=tuple(offsets))
        arrays = cases.arrays(case, seed)
        runs.append((case, attention_at(arrays, offsets.astype(np.int32)), arrays))
    check(*runs)


def test_an_offset_is_the_same_however_it_is_given(attention_at):
    arrays = cases.arrays(OFFSET)
    case = OFFSET.replace(q_offset=5)
    for form in (np.int64(5), [5, 5, 5]):
        options = cases.options(OFFSET, arrays) | {"q_offset": form}
        run = jax.jit(
            lambda arrays, options=options: rj.attention(*arrays[:3], case.window, return_lse=True, **options)
        )
        check((case, run(arrays), arrays))
    check((case, attention_at(arrays, jnp.int32(5)), arrays))
    check((case, attention_at(arrays, jnp.full(3, 5, jnp.int32)), arrays))


def test_numpy_arrays_are_taken():
    case = cases.BY_NAME["padded"]
    arrays = cases.arrays(case)
    as_numpy = jax.tree.map(np.asarray, arrays)
    for a, b in zip(cases.run(case, as_numpy), cases.run(case, arrays), strict=True):
        np.testing.assert_array_equal(a, b)


# merge: attention to parts of the keys, joined, is attention to all of them.

UNION = Case("union", W(7, 2, 2), keys=21, queries=21)
PARTS = 4


def attend_to_parts(arrays, part_of_key):
    """Outputs and lses of attention to each part: keys of another part are of a segment nobody is in."""
    parts = []
    for part in range(PARTS):
        segments = jnp.where(part_of_key == part, 0, -1).astype(jnp.int32)
        parts.append(
            rj.attention(
                *arrays[:3],
                UNION.window,
                segment_ids=jnp.zeros((UNION.batch, UNION.queries), jnp.int32),
                kv_segment_ids=segments,
                return_lse=True,
                config=cases.SMALL_TILES,
            )
        )
    return tuple(zip(*parts, strict=True))


@pytest.fixture(scope="module")
def merged():
    @jax.jit
    def run(arrays, part_of_key):
        outs, lses = attend_to_parts(arrays, part_of_key)
        # What saw nothing may hold anything.
        outs = [jnp.where(jnp.isneginf(lse).mT[..., None], jnp.nan, o) for o, lse in zip(outs, lses, strict=True)]
        return rj.merge(outs, lses, return_lse=True), rj.merge(outs[::-1], lses[::-1])

    return run


def test_merge_is_attention_to_the_union(merged):
    """However the keys are dealt out; some parts are empty, wholly or for some queries."""
    forwards, backwards, rng = [], [], np.random.default_rng(0)
    for seed in range(200):
        arrays = cases.arrays(UNION, seed)
        part_of_key = rng.integers(0, rng.integers(1, PARTS + 1), (UNION.batch, UNION.keys))
        (out, lse), reverse = merged(arrays, part_of_key)
        forwards.append((UNION, (out, lse), arrays))
        backwards.append((UNION, (reverse, lse), arrays))
    check(*forwards)
    check(*backwards)


def test_merge_gradients_are_those_of_the_union():
    arrays = cases.arrays(UNION)
    part_of_key = np.random.default_rng(1).integers(0, PARTS, (UNION.batch, UNION.keys))

    @jax.jit
    def gradients(q, k, v, g, g_lse):
        def f(q, k, v):
            return rj.merge(*attend_to_parts(arrays._replace(q=q, k=k, v=v), part_of_key), return_lse=True)

        return jax.vjp(f, q, k, v)[1]((g, g_lse))

    got = gradients(*arrays[:3], arrays.g, arrays.g_lse)
    exact, plain = cases.exact_gradients(UNION, arrays), cases.plain_gradients(UNION, arrays)
    for name, a, b, c in zip("qkv", got, exact[:3], plain[:3], strict=True):
        cases.assert_close(a, b, c, name)


def test_merge_of_nothing_is_nothing_and_its_gradient_zero():
    out, lse = jnp.full((1, 3, 2, 4), jnp.nan), jnp.full((1, 2, 3), -jnp.inf)
    merged_out, merged_lse = rj.merge([out, out], [lse, lse], return_lse=True)
    np.testing.assert_array_equal(merged_out, 0.0)
    np.testing.assert_array_equal(merged_lse, -jnp.inf)
    gradients = jax.grad(lambda out, lse: rj.merge([out, out], [lse, lse]).sum(), (0, 1))(out, lse)
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, 0.0)


def test_merge_of_one_part_and_of_a_part_with_nothing_changes_nothing():
    case = cases.BY_NAME["more-queries"]  # with empty rows
    arrays = cases.arrays(case)
    out, lse = cases.run(case, arrays)
    nothing = jnp.full_like(out, jnp.nan), jnp.full_like(lse, -jnp.inf)
    for outs, lses in (([out], [lse]), ([nothing[0], out], [nothing[1], lse])):
        merged_out, merged_lse = rj.merge(outs, lses, return_lse=True)
        np.testing.assert_array_equal(merged_out, out)
        np.testing.assert_array_equal(merged_lse, lse)


def test_merge_takes_the_dtype_of_the_first():
    out, lse = jnp.ones((1, 2, 2, 4), jnp.bfloat16), jnp.zeros((1, 2, 2))
    assert rj.merge([out, out.astype(jnp.float32)], [lse, lse]).dtype == jnp.bfloat16


@pytest.mark.parametrize("far", [100.0, -100.0, 1e4])
def test_large_logits_neither_overflow_nor_vanish(far):
    """A constant added to all logits changes the lse by itself and the output not at all."""
    case = Case("far", W.causal(5), head_dim=8, scale=1.0)
    arrays = cases.arrays(case)
    # The last feature adds `far` to every logit; small integers make the sums exact.
    q, k = jnp.round(arrays.q).at[..., -1].set(1.0), jnp.round(arrays.k).at[..., -1].set(far)
    moved = arrays._replace(q=q, k=k)
    check((case, cases.run(case, moved), moved))


@pytest.mark.parametrize("logit", [-200.0, 0.0, 60.0, 200.0])
def test_sink_logits_of_any_size(logit):
    """A sink logit far above the others takes all the weight, one far below none."""
    case = Case("sink", W.causal(5), sink_logits=True)
    arrays = cases.arrays(case)._replace(sink_logits=jnp.full(4, logit))
    check((case, cases.run(case, arrays), arrays))
    if logit == 200.0:
        np.testing.assert_array_equal(cases.run(case, arrays)[0], 0.0)


def test_the_oracle_and_the_window_agree_on_what_is_seen():
    """`oracle.visible` writes its own mask; were it another one, every test above would say so, but not why."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        left, right = (None if side == 9 else int(side) for side in rng.integers(0, 10, 2))
        window = W(left, right, int(rng.integers(0, 4)))
        p, j = rng.integers(0, 12, 5), rng.integers(-2, 12, 7)
        bounds = {"left": left, "right": right, "sinks": window.sinks}
        seen = oracle.visible(**bounds, q_positions=p, k_positions=j)
        np.testing.assert_array_equal(seen[0], window.visible(p[:, None], j[None, :]))
