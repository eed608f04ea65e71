"""Pictures draw what the schedule and the ring say: as many tiles and slots of each class, in the right places."""

import sys
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import ringjax as rj

plt = pytest.importorskip("matplotlib.pyplot")
W = rj.Window


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def tiles_of(ax):
    """Class of each tile that was drawn, by its upper left corner."""
    found = {}
    for collection in ax.collections:
        if collection.get_gid() in ("full", "edge", "skipped"):
            for path in collection.get_paths():
                corner = tuple(int(x) for x in path.vertices.min(0))
                assert corner not in found
                found[corner] = collection.get_gid()
    return found


@pytest.mark.parametrize(
    ("window", "T", "S", "sizes"),
    [
        (W.causal(24, sinks=4), 64, 64, {"tile_size": 8, "block_size": 8}),
        (W(5, 9), 30, 50, {"tile_size": 7, "block_size": 4, "q_offset": 3}),
        (W.full(), 20, 20, {"tile_size": 6, "block_size": 5}),
        (W(None), 33, 20, {}),
    ],
    ids=str,
)
def test_tiles_are_drawn_in_their_class(window, T, S, sizes):
    ax = rj.plot_tiles(window, T, S, **sizes)
    found = tiles_of(ax)
    tile, block = sizes.get("tile_size", 3), sizes.get("block_size", 2)  # a sixteenth, rounded up
    left, right = (2**30 if side is None else side for side in (window.left, window.right))
    at = np.arange(T) + sizes.get("q_offset", S - T)
    seen = oracle.visible(left=left, right=right, sinks=window.sinks, q_positions=at, k_positions=np.arange(S))[0]
    wanted = {}
    for t in range(0, T, tile):
        for s in range(0, S, block):
            part = seen[t : t + tile, s : s + block]
            full = part.all() and part.shape[1] == block
            wanted[s, t] = "full" if full else "edge" if part.any() else "skipped"
    assert found == wanted
    counts = Counter(wanted.values())
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels[:3] == [f"{kind} ({counts[kind]:,})" for kind in ("full", "edge", "skipped")]
    assert "tiles of" in ax.get_xlabel()
    assert ax.get_ylabel().startswith("query")
    # The dark bands cover exactly the visible pairs: look at the middle of each.
    middles = np.stack(np.meshgrid(np.arange(S) + 0.5, np.arange(T) + 0.5), axis=-1).reshape(-1, 2)
    dark = np.zeros(T * S, bool)
    for collection in ax.collections:
        if collection.get_gid() == "visible":
            for path in collection.get_paths():
                dark |= path.contains_points(middles)
    np.testing.assert_array_equal(dark.reshape(T, S), seen)


def test_tiles_agree_with_explain():
    window = W.causal(100, sinks=10)
    x = jax.ShapeDtypeStruct((1, 512, 1, 8), jnp.float32)
    sizes = rj.RingBufferConfig(buffer_size=100, tile_size=32, block_size=64)
    (source,) = rj.explain(x, x, x, window, implementation="xla", config=sizes).sources
    counts = Counter(tiles_of(rj.plot_tiles(window, 512, tile_size=32, block_size=64)).values())
    assert counts == {"full": source.full, "edge": source.edge, "skipped": source.skipped}


def ring_of(length, rolled_back=0, *, size=6, sinks=2, slack=3):
    ring = rj.RingBuffer.empty(2, 1, 2, W.causal(size, sinks=sinks), slack=slack, dtype=jnp.float32)
    if length:
        tokens = jnp.zeros((2, length, 1, 2))
        ring = ring.append(tokens, tokens, lengths=jnp.array([0, length], jnp.int32))
    return ring.rollback(jnp.array([0, rolled_back], jnp.int32))


def slots_of(ax):
    return Counter(patch.get_gid() for patch in ax.patches if patch.get_gid())


@pytest.mark.parametrize(
    ("length", "rolled_back", "wanted", "positions"),
    [
        (0, 0, {"empty": 11}, []),
        (1, 0, {"sink": 1, "empty": 10}, [0]),
        (5, 0, {"sink": 2, "window": 3, "empty": 6}, [0, 1, 2, 3, 4]),
        (5, 2, {"sink": 2, "window": 1, "stale": 2, "empty": 6}, [0, 1, 2]),
        (40, 0, {"sink": 2, "window": 6, "slack": 3}, [0, 1, *range(31, 40)]),
        (40, 2, {"sink": 2, "window": 6, "slack": 1, "stale": 2}, [0, 1, *range(31, 38)]),
        (40, 3, {"sink": 2, "window": 6, "stale": 3}, [0, 1, *range(31, 37)]),
    ],
)
def test_slots_are_drawn_in_their_class(length, rolled_back, wanted, positions):
    ring = ring_of(length, rolled_back)
    ax = rj.plot_ring(ring, row=1)
    assert slots_of(ax) == wanted
    assert sorted(int(t.get_text()) for t in ax.texts if t.get_text().isdigit()) == positions
    assert slots_of(rj.plot_ring(ring)) == {"empty": 11}  # row 0 has no tokens
    labels = " ".join(text.get_text() for text in ax.get_legend().get_texts())
    assert all(kind in labels for kind in wanted)
    assert "write head" in labels


@pytest.mark.parametrize("length", [1, 7, 10, 11, 25, 40])
def test_write_head_points_at_the_slot_written_next(length):
    ring = ring_of(length)
    after = ring.append(*(jnp.ones((2, 1, 1, 2)),) * 2)
    (slot,) = np.flatnonzero(np.asarray((after.k != ring.k)[1, 0, :, 0]))
    ax = rj.plot_ring(ring, row=1)
    (arrow,) = [text for text in ax.texts if getattr(text, "arrow_patch", None)]
    tip = np.array(arrow.xy)
    if slot < 2:
        left = [patch for patch in ax.patches if patch.get_gid()][9 + slot].get_x()
        assert left < tip[0] < left + 0.14
    else:
        wedge = [patch for patch in ax.patches if patch.get_gid()][slot - 2]
        turn = np.rad2deg(np.arctan2(tip[1], tip[0]))
        assert 0 < (turn - wedge.theta1) % 360 < (wedge.theta2 - wedge.theta1)


def test_a_large_ring_is_drawn_in_runs():
    ax = rj.plot_ring(ring_of(900, 10, size=512, sinks=4, slack=64), row=1)
    assert sum(slots_of(ax).values()) <= 8
    assert set(slots_of(ax)) == {"sink", "window", "slack", "stale"}
    given = plt.subplots()[1]
    assert rj.plot_ring(ring_of(3), ax=given) is given
    assert rj.plot_tiles(W(3), 8, ax=given) is given


def test_without_matplotlib(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    for call, f in (("plot_tiles", lambda: rj.plot_tiles(W(3), 8)), ("plot_ring", lambda: rj.plot_ring(ring_of(0)))):
        with pytest.raises(ImportError) as error:
            f()
        assert str(error.value) == f"{call}: needs matplotlib.\n  Hint: pip install ringjax[plot]"


@pytest.mark.parametrize(
    ("f", "kind", "first"),
    [
        (lambda: rj.plot_tiles(3, 8), TypeError, "plot_tiles: window must be a Window, got int."),
        (lambda: rj.plot_tiles(W(3), 0), ValueError, "plot_tiles: T must be at least 1, got 0."),
        (lambda: rj.plot_tiles(W(3), 8, tile_size=2.0), TypeError, "plot_tiles: tile_size must be an int, got float."),
        (lambda: rj.plot_ring(W(3)), TypeError, "plot_ring: buffer must be a RingBuffer, got Window."),
        (lambda: rj.plot_ring(ring_of(0), row=2), ValueError, "plot_ring: row must be less than 2, the batch, got 2."),
        (
            lambda: jax.eval_shape(rj.plot_ring, ring_of(0)),
            TypeError,
            "plot_ring: buffer must be concrete, got one that is traced.",
        ),
    ],
    ids=range(6),
)
def test_wrong_calls(f, kind, first):
    with pytest.raises(kind) as error:
        f()
    assert str(error.value).splitlines()[0] == first
