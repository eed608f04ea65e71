"""Law 7: what is not read may hold NaN and infinity; outputs and gradients do not change.

Each test runs one call twice, on arrays that are clean and on arrays that are poisoned wherever nothing is read, and
first asserts that there is something to poison.
"""

import cases
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ringjax as rj
from ringjax._kernels.tiles import Tiles

W = rj.Window
POISONS = [np.nan, np.inf]
HEADS, KV_HEADS, HEAD_DIM, VALUE_DIM = 4, 2, 8, 5
TILES = Tiles(block_size=4, tile_size=4)


def poison(x, where, value):
    """x [B, T, ...] with `value` where `where` [B, T]."""
    return np.where(where[:, :, *[None] * (x.ndim - 2)], np.asarray(value, x.dtype), x)


def assert_same(found, clean):
    """Equal, but for the order of the sums: what cleans up may not read the same blocks as what need not."""
    chex.assert_tree_all_finite(clean)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(clean), strict=True):
        x, y = (np.asarray(z).astype(np.float64) for z in (x, y))
        bound = 16 * np.finfo(np.float32).eps * max(1.0, np.abs(y).max(initial=0.0))
        assert np.abs(x - y).max(initial=0.0) <= bound  # a NaN fails too


# --- attention: padding is a negative segment ---


@pytest.mark.parametrize("name", ["padded", "more-keys-packed", "one-kv-head"])
def test_attention_does_not_read_padding(name):
    """Tokens of negative segments hold NaN: q, k and v, and the cotangent of their outputs is ignored."""
    case = cases.BY_NAME[name].replace(segments="padded")
    arrays = cases.arrays(case)
    q_padding, kv_padding = (np.asarray(x) < 0 for x in (arrays.segment_ids, arrays.kv_segment_ids))
    assert q_padding.any() and kv_padding.any()

    @jax.jit
    def run(q, k, v, sink_logits, g, g_lse):
        def f(q, k, v, sink_logits):
            return cases.run(case, arrays._replace(q=q, k=k, v=v, sink_logits=sink_logits))

        (out, lse), vjp = jax.vjp(f, q, k, v, sink_logits)
        return out, jnp.exp(lse), vjp((g, g_lse))

    q, k, v, sink_logits, g, g_lse = (*arrays[:4], arrays.g, arrays.g_lse)
    clean = run(q, k, v, sink_logits, g, g_lse)
    for value in POISONS:
        kv = [poison(x, kv_padding, value) for x in (k, v)]
        assert_same(run(poison(q, q_padding, value), *kv, sink_logits, poison(g, q_padding, value), g_lse), clean)


def test_gradients_from_residuals_and_batches_of_calls_do_not_read_padding():
    """`attention_gradients`, and both calls under `vmap`: a batch of a clean and of two poisoned calls agrees."""
    case = cases.BY_NAME["padded"]
    arrays = cases.arrays(case)
    padding = np.asarray(arrays.segment_ids) < 0
    assert padding.any()

    @jax.jit
    @jax.vmap
    def run(q, k, v, g):
        options = cases.options(case, arrays)
        out, lse = rj.attention(q, k, v, case.window, return_lse=True, **options)
        options = {"g_lse": arrays.g_lse, **options}
        return out, jnp.exp(lse), rj.attention_gradients(q, k, v, case.window, out, lse, g, **options)

    values = [0.0, *POISONS]
    found = run(*(np.stack([poison(x, padding, value) for value in values]) for x in (*arrays[:3], arrays.g)))
    clean, *others = [jax.tree.map(lambda x, i=i: x[i], found) for i in range(len(values))]
    for other in others:
        assert_same(other, clean)
    for x in clean[2][:3]:
        assert np.asarray(x).any() and not np.asarray(x)[padding].any()


@pytest.mark.parametrize("window", [W.causal(3), W.causal(2, sinks=2)], ids=str)
def test_attention_does_not_load_tiles_that_no_query_sees(window):
    """Keys a tile or more away from all that is seen, on either side, and between the sinks and the window."""
    case = cases.Case("unseen", window, queries=6, keys=30, q_offset=17, sink_logits=True, tiles=TILES)
    arrays = cases.arrays(case)
    seen = cases.seen(case, arrays).any(axis=1)
    near = np.stack([np.convolve(row, np.ones(2 * TILES.block_size + 1), "same") > 0 for row in seen])
    unseen = ~near
    assert unseen[:, : case.q_offset].sum() >= 6 and unseen[:, case.q_offset :].sum() >= 4

    @jax.jit
    def run(q, k, v, sink_logits):
        f = lambda *x: cases.run(case, arrays._replace(q=x[0], k=x[1], v=x[2], sink_logits=x[3]))  # noqa: E731
        found, vjp = jax.vjp(f, q, k, v, sink_logits)
        return found, vjp((arrays.g, arrays.g_lse))

    q, k, v, sink_logits = arrays[:4]
    clean = run(q, k, v, sink_logits)
    for value in POISONS:
        assert_same(run(q, poison(k, unseen, value), poison(v, unseen, value), sink_logits), clean)


# --- attend: slots and padding ---


def tokens(seed, batch, length):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = [(HEADS, HEAD_DIM), (KV_HEADS, HEAD_DIM), (KV_HEADS, VALUE_DIM)]
    return [jax.random.normal(key, (batch, length, *shape)) for key, shape in zip(keys, shapes, strict=True)]


def poisoned_ring(ring, value, positions):
    """The ring with `value` in every slot that holds none of `positions` [B, C] (-1 there)."""
    spoil = (np.asarray(positions) < 0)[:, None, :, None]
    return jax.tree.map(lambda x: np.where(spoil, np.asarray(value, x.dtype), x) if x.ndim == 4 else x, ring)


def attend_with_gradients(length):
    def run(q, k, v, ring, sink_logits, lengths):
        def f(q, k, v, ring_k, ring_v, sink_logits):
            held = jax.tree.unflatten(jax.tree.structure(ring), [ring_k, ring_v, ring.length, ring.written])
            out, after = rj.attend(q, k, v, held, lengths=lengths, sink_logits=sink_logits, softcap=5.0, config=TILES)
            return out, after

        out, vjp, after = jax.vjp(f, q, k, v, ring.k, ring.v, sink_logits, has_aux=True)
        return out, vjp(jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)), after.export()

    return jax.jit(run)


SINKS = W.causal(3, sinks=2)


@pytest.mark.parametrize(
    ("window", "length", "batch"),
    [(W.causal(4), 1, 2), (SINKS, 2, 2), (SINKS, 11, 2)],
)
def test_attend_does_not_read_slots_that_hold_nothing(window, length, batch):
    """Slots never written, at each fill of the ring; rolled back; and the slack, whose tokens no query still sees."""
    slack = 3
    run, appending = attend_with_gradients(length), jax.jit(rj.RingBuffer.append)
    sink_logits, lengths = jnp.linspace(-1.0, 1.0, HEADS), jnp.full(batch, length, jnp.int32)
    _, k, v = tokens(0, batch, 24)
    new = tokens(1, batch, length)
    poisonings = 0
    for start in (0, 1, 2, 4, 8, 21):
        starts = (start + 2 * jnp.arange(batch, dtype=jnp.int32)).astype(jnp.int32)
        empty = rj.RingBuffer.empty(
            batch, KV_HEADS, HEAD_DIM, window, slack=slack, value_dim=VALUE_DIM, dtype="float32"
        )
        ring = appending(empty, k, v, lengths=starts + jnp.minimum(start, 1))
        ring = ring.rollback(min(start, 1))  # leaves a token that is no more
        positions = np.asarray(ring.positions())
        seen = (positions >= 0) & np.asarray(window.visible(np.asarray(ring.length)[:, None], positions))
        poisonings += (~seen).sum()
        clean = run(*new, ring, sink_logits, lengths)
        for value in POISONS:
            # `seen`: the slack's tokens count as unread as well, but they are still the ring's: compare all but them.
            out, gradients, _ = run(*new, poisoned_ring(ring, value, np.where(seen, 0, -1)), sink_logits, lengths)
            assert_same((out, gradients), clean[:2])
            assert_same(run(*new, poisoned_ring(ring, value, positions), sink_logits, lengths), clean)
    assert poisonings > 20


@pytest.mark.parametrize(("length", "batch"), [(1, 2), (3, 1), (11, 2)])
def test_attend_does_not_read_padding(length, batch):
    """Beyond `lengths` anything may stand, in q, k and v and in the cotangent; the ring stays clean."""
    window, run = W.causal(4, sinks=1), attend_with_gradients(length)
    _, k, v = tokens(0, batch, 9)
    ring = rj.RingBuffer.empty(batch, KV_HEADS, HEAD_DIM, window, slack=1, value_dim=VALUE_DIM, dtype="float32")
    ring = ring.append(k, v)
    new, sink_logits = tokens(1, batch, length), jnp.linspace(-1.0, 1.0, HEADS)
    for real in ([0, length], [length // 2, length - 1], [length - 1, 0]):
        lengths = jnp.asarray(real[:batch], jnp.int32)
        padding = np.arange(length)[None] >= np.asarray(lengths)[:, None]
        assert padding.any()
        clean = run(*new, ring, sink_logits, lengths)
        assert not np.asarray(clean[0])[padding].any()
        for dx in clean[1][:3]:
            assert not np.asarray(dx)[padding].any()
        for value in POISONS:
            assert_same(run(*(poison(x, padding, value) for x in new), ring, sink_logits, lengths), clean)


def test_a_lost_row_may_hold_anything():
    """A row that was rolled back too far is read by nothing, nor are its gradients anything but 0."""
    window, run = W.causal(4), attend_with_gradients(2)
    _, k, v = tokens(0, 2, 9)
    ring = rj.RingBuffer.empty(2, KV_HEADS, HEAD_DIM, window, slack=1, value_dim=VALUE_DIM, dtype="float32")
    ring = jax.jit(rj.RingBuffer.rollback)(ring.append(k, v), jnp.array([3, 1], jnp.int32))
    new, sink_logits = tokens(1, 2, 2), jnp.linspace(-1.0, 1.0, HEADS)
    lengths = jnp.full(2, 2, jnp.int32)
    clean = run(*new, ring, sink_logits, lengths)
    assert not clean[0][0].any() and bool(clean[0][1].any())
    for dx in clean[1][:5]:
        assert not dx[0].any() and bool(dx[1].any())
    for value in POISONS:
        spoiled = poisoned_ring(ring, value, np.asarray(ring.positions()))
        assert_same(run(*new, spoiled, sink_logits, lengths), clean)
