"""`explain`: every number it gives is counted again by brute force, and what it says is computed is what runs."""

import dataclasses
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import ringjax as rj
from ringjax import _attention, _counting, _explain
from ringjax._kernels import mosaic, xla
from ringjax._kernels.tiles import Tiles

W = rj.Window


def shaped(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def arrays(batch, queries, keys, heads=2, kv_heads=1, head_dim=4):
    """q, k, v of zeros: nothing here depends on values."""
    return tuple(jnp.zeros((batch, n, h, head_dim)) for n, h in ((queries, heads), (keys, kv_heads), (keys, kv_heads)))


def mask_of(window, q_positions, k_positions):
    left, right = (2**30 if side is None else side for side in (window.left, window.right))
    return oracle.visible(left=left, right=right, sinks=window.sinks, q_positions=q_positions, k_positions=k_positions)[
        0
    ]


def count(mask, tile, block):
    """Full, edge and skipped tiles of a mask, tile by tile. A tile that overhangs the keys is never full."""
    found = [0, 0, 0]
    for t in range(0, mask.shape[0], tile):
        for s in range(0, mask.shape[1], block):
            part = mask[t : t + tile, s : s + block]
            full = part.all() and part.shape[1] == block
            found[0 if full else 1 if part.any() else 2] += 1
    return tuple(found)


def counted(source):
    return source.full, source.edge, source.skipped


def test_tiles_and_pairs_equal_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(200):
        queries, keys = rng.integers(1, 40, 2).tolist()
        left = [None, *range(20)][rng.integers(21)]
        right = [0, 0, None, 3, 9][rng.integers(5)]
        window = W(left, right, int(rng.integers(0, 3) * rng.integers(0, 7)))
        offset = None if rng.integers(2) else int(rng.integers(-10, 50))
        tiles = Tiles(*rng.integers(1, 12, 2).tolist())
        got = rj.explain(*(shaped(1, n, 2, 4) for n in (queries, keys, keys)), window, q_offset=offset, config=tiles)
        positions = np.arange(queries) + (keys - queries if offset is None else offset)
        mask = mask_of(window, positions, np.arange(keys))
        (source,) = got.sources
        what = f"{window}, T={queries}, S={keys}, offset={offset}, {tiles}"
        assert counted(source) == count(mask, source.sizes.tile_size, source.sizes.block_size), what
        assert source.tiles == sum(counted(source)), what
        assert got.visible_pairs == mask.sum(), what
        assert got.dense_pairs == mask.size, what


@pytest.mark.parametrize("chunk", [1, 3, 5, 23], ids="chunk={}".format)
def test_ring_equals_brute_force(chunk):
    """A ring's tiles are counted in storage order, in every phase of its wrap, after rollbacks, in ragged batches."""
    rng = np.random.default_rng(chunk)
    for _ in range(40):
        window = W(int(rng.integers(1, 9)), int(rng.integers(0, 3)), int(rng.integers(0, 4)))
        slack = int(rng.integers(0, 4))
        tiles = Tiles(block_size=int(rng.integers(1, 7)), tile_size=int(rng.integers(1, 9)))
        ring = jax.eval_shape(lambda w=window, s=slack: rj.RingBuffer.empty(2, 1, 4, w, slack=s, dtype=jnp.float32))
        written = rng.integers(slack, 60, 2).astype(np.int32)
        length = (written - rng.integers(0, slack + 1, 2)).astype(np.int32)
        ring = dataclasses.replace(ring, length=length, written=written)
        real = None if rng.integers(2) else rng.integers(0, chunk + 1, 2).astype(np.int32)
        got = rj.explain(
            *(shaped(2, chunk, n, 4, dtype=jnp.float32) for n in (2, 1, 1)), ring, lengths=real, config=tiles
        )
        wanted, pairs = {source.name: np.zeros(3, int) for source in got.sources}, 0
        for row in range(2):
            here, n = int(length[row]), chunk if real is None else int(real[row])
            for source in got.sources:
                queries = here + np.arange(min(n, source.problem.queries))
                if source.name == "chunk":
                    at = np.where(np.arange(chunk) < n, here + np.arange(chunk), -1)
                elif len(got.sources) == 2:
                    at = held(here, written[row], window, slack)
                else:  # the tokens are in the ring already
                    at = held(here + n, max(written[row], here + n), window, slack)
                mask = mask_of(window, queries, at) if len(queries) else np.zeros((0, len(at)), bool)
                full, edge, _ = count(mask, source.sizes.tile_size, source.sizes.block_size)
                # Tiles of padding are skipped like any other that nobody needs.
                wanted[source.name] += (full, edge, source.tiles // 2 - full - edge)
                pairs += mask.sum()
        for source in got.sources:
            assert counted(source) == tuple(wanted[source.name]), f"{source}"
        assert got.visible_pairs == pairs
        assert [s.name for s in got.sources] == (["ring"] if chunk <= slack + 1 else ["ring", "chunk"])


def held(length, written, window, slack):
    """Positions in a ring's slots, written one after another."""
    slots = np.full(window.sinks + window.size + slack, -1)
    around = len(slots) - window.sinks
    for p in range(written):
        slots[p if p < window.sinks else window.sinks + (p - window.sinks) % around] = p
    return np.where(slots < length, slots, -1)


@pytest.fixture
def run_pairs(monkeypatch):
    """Pairs whose logits `xla` computes while a function runs, counted on the device."""
    counts = []
    logits = xla._logits

    def counting(problem, q, block):
        share = q.shape[1] * q.shape[2] / problem.heads  # all heads together, or some of them at a time
        pairs = q.shape[0] * share * q.shape[3] * block.k.shape[2]
        jax.debug.callback(lambda _: counts.append(pairs), q[0, 0, 0, 0, 0])
        return logits(problem, q, block)

    monkeypatch.setattr(xla, "_logits", counting)

    def run(f, *args):
        counts.clear()
        jax.block_until_ready(f(*args))
        jax.effects_barrier()
        return sum(counts)

    return run


@pytest.mark.parametrize(
    ("window", "queries", "keys", "options"),
    [
        (W.causal(5), 24, 24, {}),
        (W.causal(9, sinks=3), 21, 30, {}),
        (W(None), 24, 24, {}),
        (W(4, 7, 2), 21, 21, {}),
        (W.causal(5), 21, 21, {"q_offset": np.array([0, 9], np.int32)}),
        (W.causal(64), 80, 80, {}),  # head by head
    ],
    ids=str,
)
def test_computed_pairs_are_what_xla_computes(run_pairs, window, queries, keys, options):
    q, k, v = arrays(2, queries, keys)
    options["config"] = Tiles(block_size=8, tile_size=8)
    got = rj.explain(q, k, v, window, implementation="xla", **options)
    f = jax.jit(lambda q, k, v: rj.attention(q, k, v, window, implementation="xla", **options))
    assert run_pairs(f, q, k, v) == got.computed_pairs


@pytest.mark.parametrize("chunk", [1, 3, 12, 40])
def test_computed_pairs_of_a_ring_are_what_xla_computes(run_pairs, chunk):
    tiles = Tiles(block_size=4, tile_size=8)
    ring = rj.RingBuffer.empty(2, 1, 4, W.causal(7, sinks=2), slack=2, dtype=jnp.float32)
    q, k, v = arrays(2, chunk, chunk)
    f = jax.jit(lambda q, k, v, ring: rj.attend(q, k, v, ring, implementation="xla", config=tiles))
    for length in ([0, 0], [4, 0], [5, 30]):
        ring = dataclasses.replace(ring, length=jnp.array(length, jnp.int32), written=jnp.array(length, jnp.int32))
        got = rj.explain(q, k, v, ring, implementation="xla", config=tiles)
        assert run_pairs(f, q, k, v, ring) == got.computed_pairs, length


def test_text():
    q, k = shaped(1, 2048, 8, 64), shaped(1, 2048, 2, 64)
    sizes = Tiles(block_size=128, tile_size=64, head_tile_size=3)
    text = str(rj.explain(q, k, k, W.causal(512, sinks=4), implementation="xla", config=sizes)).splitlines()
    head = "attention: q bfloat16[1, 2048, 8, 64] to k bfloat16[1, 2048, 2, 64], Window(left=511, sinks=4)"
    assert text[0] == head
    mask = mask_of(W.causal(512, sinks=4), np.arange(2048), np.arange(2048))
    full, edge, skipped = count(mask, 64, 128)
    for line in (
        "  path:    no history: one set of keys",
        "  tiles:   64 x 128 (queries x keys), 2 of 4 query heads of a kv head at once",
        f"           {full:,} full, {edge:,} edge, {skipped:,} skipped, 512 in all, of one head",
        f"  pairs:   {mask.sum():,} visible of 4,194,304 (22.0%), of one head",
        "  FLOPs:   forward 1.89 G, backward 4.73 G (visible pairs, all heads)",
        "           forward 8.59 G if dense, 4.54 times as many",
        "  bytes:   q 2.0 MiB, k 512.0 KiB, v 512.0 KiB, out 2.0 MiB, lse 64.0 KiB",
        "  ring:    258.0 KiB, however long the stream; a cache that grows: 1.0 MiB after 2,048 tokens",
        "  note:    head_tile_size is rounded: 3 asked for, 2 used; it must divide the 4 query heads of a kv head.",
    ):
        assert line in text, "\n".join(text)
    assert any(line.startswith("  runs:    'xla' on ") for line in text)


def test_flops_and_bytes_with_another_value_dim():
    q, k, v = shaped(2, 6, 4, 8), shaped(2, 6, 2, 8), shaped(2, 6, 2, 16)
    got = rj.explain(q, k, v, W.causal(2, sinks=1), return_lse=True)
    pairs = 2 * (1 + 2 + 3 + 3 + 3 + 3)
    assert got.visible_pairs == pairs
    assert got.flops == 4 * pairs * 2 * (8 + 16)
    assert got.backward_flops == 4 * pairs * 2 * (3 * 8 + 2 * 16)
    assert got.dense_flops == 4 * 2 * 36 * 2 * (8 + 16)
    assert got.computed_flops >= got.flops
    assert dict(got.bytes) == {"q": 768, "k": 384, "v": 768, "out": 1536, "lse": 192}
    ring = rj.RingBuffer.empty(2, 2, 8, W.causal(2, sinks=1), value_dim=16)
    assert got.ring_bytes == sum(x.nbytes for x in jax.tree.leaves(ring))
    assert got.cache_bytes == 2 * 6 * 2 * (8 + 16) * 2
    same = rj.explain(q, k, k, W.causal(2))
    assert same.backward_flops == 2.5 * same.flops
    assert rj.explain(q, k, k, W(None)).ring_bytes is None


def test_sizes_that_are_rounded_are_named():
    q, k, _ = arrays(1, 10, 12)
    notes = rj.explain(q, k, k, W.causal(3), implementation="xla", config=Tiles(100, 20, 2)).notes
    assert notes == (
        "block_size is rounded: 100 asked for, 12 used; there are 12 keys.",
        "tile_size is rounded: 20 asked for, 10 used; there are 10 queries.",
    )
    assert rj.explain(q, k, k, W.causal(3), implementation="xla", config=Tiles(4, 5, 1)).notes == ()


def test_paths_of_a_ring():
    ring = rj.RingBuffer.empty(1, 1, 4, W.causal(4), slack=2, dtype=jnp.float32)
    for chunk, start, names in (
        (1, "decoding step, one source: the ring", ["ring"]),
        (3, "chunk of 3 <= slack + 1 tokens, one source: the ring", ["ring"]),
        (4, "chunk of 4 > slack + 1 tokens, two sources: the ring as it was, and the chunk", ["ring", "chunk"]),
    ):
        got = rj.explain(*arrays(1, chunk, chunk), ring)
        assert got.path.startswith(start)
        assert [source.name for source in got.sources] == names
        assert got.ring_bytes == sum(x.nbytes for x in jax.tree.leaves(ring))
        assert got.cache_tokens == chunk
    alone = rj.RingBuffer.empty(1, 1, 4, W.causal(1), dtype=jnp.float32)
    assert [source.name for source in rj.explain(*arrays(1, 2, 2), alone).sources] == ["chunk"]


def test_what_is_unknown_is_said():
    q, k, v = arrays(2, 8, 8)
    texts = []

    @jax.jit
    def traced(q, k, v, offset, ring):
        texts.append(rj.explain(q, k, v, W.causal(3), q_offset=offset))
        texts.append(rj.explain(q, k, v, ring))
        return offset

    ring = rj.RingBuffer.empty(2, 1, 4, W.causal(4), dtype=jnp.float32)
    traced(q, k, v, jnp.zeros(2, jnp.int32), ring)
    texts.append(rj.explain(q, k, v, W.causal(3), q_offset=shaped(2, dtype=jnp.int32)))
    texts.append(rj.explain(q, k, v, jax.eval_shape(lambda: ring)))
    for got, unknown in zip(texts, ["q_offset is", "the rows' lengths are"] * 2, strict=True):
        assert got.visible_pairs is got.computed_pairs is got.flops is None
        assert got.sources[0].full is None
        assert got.sources[0].sizes is not None  # these are static
        assert any(note.startswith(f"{unknown} not known here") for note in got.notes)
        assert "pairs:   unknown" in str(got)
    known = rj.explain(q, k, v, W.causal(3), q_offset=np.array([0, 5], np.int32))
    by_row = [rj.explain(*(x[:1] for x in (q, k, v)), W.causal(3), q_offset=p) for p in (0, 5)]
    assert known.visible_pairs == sum(got.visible_pairs for got in by_row)
    segments = rj.explain(q, k, v, W.causal(3), segment_ids=shaped(2, 8, dtype=jnp.int32))
    assert segments.notes[0].startswith("segment ids hide more pairs than the window")


def test_a_chosen_implementation_and_reasons(monkeypatch):
    q, k, v = arrays(1, 8, 8)
    got = rj.explain(q, k, v, W.causal(3), implementation="xla")
    assert got.implementation == "xla"
    assert got.against["xla"] == ()
    monkeypatch.setattr(xla, "unsupported", lambda problem: ["it is a Monday"])
    got = rj.explain(q, k, v, W.causal(3), implementation="xla")
    assert got.implementation is None
    assert "not 'xla': it is a Monday" in str(got)
    assert got.visible_pairs == 21
    assert got.sources[0].sizes is None
    monkeypatch.undo()
    monkeypatch.delattr(xla, "walk")
    got = rj.explain(q, k, v, W.causal(3), implementation="xla")
    assert got.sources[0].full is None
    assert got.notes == ("which tiles 'xla' computes is not known here.",)


def test_the_kernels_for_hopper_compute_whole_tiles_of_a_grid(monkeypatch):
    """128 queries x 128 keys at head size 128: full and edge tiles, and no part of another."""
    monkeypatch.setattr(_attention, "_device", lambda x: ("gpu", "NVIDIA H200"))
    monkeypatch.setattr(mosaic, "_JAX", (0, 11))
    q, k, window = shaped(1, 1000, 4, 128), shaped(1, 1000, 2, 128), W.causal(300, sinks=3)
    got = rj.explain(q, k, k, window, config=Tiles(100, 100, 2))
    (source,) = got.sources
    assert got.implementation == "mosaic"
    assert source.sizes == Tiles(128, 128, 1) or source.sizes == Tiles(64, 128, 1)
    mask = mask_of(window, np.arange(1000)[None], np.arange(1000))
    assert counted(source) == count(mask, 128, source.sizes.block_size)
    assert source.computed == (source.full + source.edge) * 128 * source.sizes.block_size
    assert "tile_size is rounded: 100 asked for, 128 used; 'mosaic' has tiles of this size only." in got.notes
    ring = rj.RingBuffer.empty(1, 2, 128, W.causal(300, sinks=3), slack=3)
    got = rj.explain(q.update(shape=(1, 1, 4, 128)), *[k.update(shape=(1, 1, 2, 128))] * 2, ring)
    assert got.implementation == "mosaic" and got.sources[0].sizes is None
    assert got.notes == ("which tiles 'mosaic' computes is not known here.",)


@pytest.mark.parametrize(
    ("change", "kind", "first"),
    [
        ({"implementation": "magic"}, ValueError, "explain: implementation must be one of "),
        ({"lengths": np.ones(1, np.int32)}, ValueError, "explain: lengths must be None with a Window, got int32[1]."),
        ({"window": 4}, TypeError, "explain: window must be a Window, got int."),
        (
            {"k": shaped(1, 8, 1, 8, dtype=jnp.float32)},
            ValueError,
            "explain: q and k must agree on head_dim, got 4",
        ),
        ({"ring": True, "q_offset": 3}, ValueError, "explain: q_offset must be None with a RingBuffer, got int."),
        ({"ring": True, "lengths": [9]}, ValueError, "explain: lengths must be between 0 and 8, the length of the"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_wrong_calls(change, kind, first):
    q, k, v = arrays(1, 8, 8)
    call = {"q": q, "k": k, "v": v, "window": W.causal(3)}
    if change.pop("ring", False):
        call["window"] = rj.RingBuffer.empty(1, 1, 4, W.causal(3), dtype=jnp.float32)
    with pytest.raises(kind) as error:
        rj.explain(**call | change)
    assert str(error.value).splitlines()[0].startswith(first)


def test_no_array_of_all_pairs(monkeypatch):
    """131072 queries: what explain allocates is a few numbers per tile of queries, far from one bit per pair."""
    largest = []
    tiles = _counting.full_and_edge_tiles

    def watched(problem, row, sizes):
        tracemalloc.start()
        found = tiles(problem, row, sizes)
        largest.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        return found

    monkeypatch.setattr(_explain, "full_and_edge_tiles", watched)
    q = shaped(1, 131072, 1, 64)
    got = rj.explain(q, q, q, W.causal(4096, sinks=4), config=Tiles(128, 16))
    assert got.sources[0].tiles == 131072 // 16 * (131072 // 128)
    assert 0 < largest[0] < 64 * 131072
