"""Every method of a ring, against lists of tokens. The random walk through all of them is test_buffer_stateful.py."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from token_lists import HEAD_DIM, KV_HEADS, VALUE_DIM, TokenList, appended, assert_holds, look, tokens

import ringjax as rj

W = rj.Window
BATCH = 4
KINDS = [(W.causal(5), 0), (W.causal(4, sinks=2), 3), (W.causal(1), 0), (W.causal(1, sinks=1), 2), (W(3, 3), 1)]
ids = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind[0]}-slack={kind[1]}")

append = jax.jit(lambda ring, k, v, lengths: ring.append(k, v, lengths=lengths))
append_all = jax.jit(lambda ring, k, v: ring.append(k, v))
rollback = jax.jit(lambda ring, n: ring.rollback(n))
select = jax.jit(rj.RingBuffer.select)
restore = jax.jit(rj.RingBuffer.restore, static_argnames=("window", "slack", "dtype"))


def empty(kind, batch=BATCH, dtype="float32"):
    return rj.RingBuffer.empty(batch, KV_HEADS, HEAD_DIM, kind[0], slack=kind[1], value_dim=VALUE_DIM, dtype=dtype), [
        TokenList(*kind) for _ in range(batch)
    ]


def chunk(first, length, batch=BATCH):
    rows = [tokens(first, length, row) for row in range(batch)]
    return np.stack([k for k, _ in rows]), np.stack([v for _, v in rows])


def started(kind, lengths):
    """A ring whose rows are as long as `lengths` says, and its lists."""
    ring, lists = empty(kind, len(lengths))
    k, v = chunk(0, 24, len(lengths))
    return append(ring, k, v, np.array(lengths, np.int32)), appended(lists, k, v, lengths)


def poisoned(k, v, lengths):
    k, v = k.copy(), v.copy()
    for row, n in enumerate(lengths):
        k[row, n:], v[row, n:] = np.nan, np.inf
    return k, v


# --- empty ---


@ids
def test_empty(kind):
    ring, lists = empty(kind)
    window, slack = kind
    assert ring.capacity == window.sinks + window.size + slack
    assert ring.k.size * VALUE_DIM == ring.v.size * HEAD_DIM == BATCH * KV_HEADS * ring.capacity * HEAD_DIM * VALUE_DIM
    assert ring.window == window and ring.slack == slack
    assert_holds(ring, lists)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(dtype):
    """A ring keeps its dtype: tokens of any other are cast to it."""
    kind = KINDS[1]
    ring, lists = empty(kind, dtype=dtype)
    for first, length, given in ((0, 5, np.float32), (5, 1, jnp.bfloat16), (6, 2, np.float16)):
        k, v = chunk(first, length)
        k, v = k.astype(given), v.astype(given)
        ring = append_all(ring, k, v)
        appended(lists, k, v, [length] * BATCH)
        assert ring.k.dtype == ring.v.dtype == dtype
        assert_holds(ring, lists)
    assert rj.RingBuffer.empty(1, 1, 4, kind[0]).k.dtype == jnp.bfloat16
    assert rj.RingBuffer.empty(1, 1, 4, kind[0]).v.shape == (1, 1, 9 - 3, 4)


def test_a_ring_is_a_pytree_of_four_arrays():
    ring, _ = started(KINDS[1], [3, 9, 0])
    leaves, structure = jax.tree.flatten(ring)
    assert len(leaves) == 4
    again = jax.tree.unflatten(structure, leaves)
    assert again.window == ring.window and again.slack == ring.slack
    chex.assert_trees_all_equal(again, ring)
    shapes = jax.eval_shape(lambda ring: ring.append(*chunk(0, 30, 3)).rollback(1).export(), ring)
    assert [x.shape for x in shapes] == [(3, 9, 2, 3), (3, 9, 2, 2), (3, 9), (3,)]


# --- append ---


@ids
@pytest.mark.parametrize("length", [0, 1, 2, 5, 9, 23])
def test_append_any_chunk_at_any_phase(kind, length):
    """Shorter than, equal to and longer than window and capacity; rows begin at every phase of the first two wraps."""
    capacity = empty(kind)[0].capacity
    for start in range(0, 2 * capacity + BATCH, BATCH):
        ring, lists = started(kind, [start + row for row in range(BATCH)])
        k, v = chunk(1000, length)
        assert_holds(append_all(ring, k, v), appended([row.copy() for row in lists], k, v, [length] * BATCH))
        lengths = [(length * row) // (BATCH - 1) for row in range(BATCH)]
        ragged = append(ring, *poisoned(k, v, lengths), np.array(lengths, np.int32))
        assert_holds(ragged, appended(lists, k, v, lengths))


@ids
def test_append_of_one_row(kind):
    """A batch of one takes a path of its own for one token; with lengths of 0 and 1."""
    ring, lists = empty(kind, batch=1)
    for step in range(3 * ring.capacity):
        k, v = chunk(step, 1, 1)
        ring = append_all(ring, k, v)
        assert_holds(ring, appended(lists, k, v, [1]))
        real = step % 2
        ring = append(ring, *poisoned(k, v, [real]), np.array([real], np.int32))
        assert_holds(ring, appended(lists, k, v, [real]))


@ids
@pytest.mark.parametrize(("a", "b"), [(1, 1), (1, 4), (3, 9), (7, 2), (12, 13)])
def test_append_is_associative(kind, a, b):
    """Law 3, to the bit: a then b is a ++ b, ragged, from every phase, with NaN for padding: 64 cases each."""
    rng = np.random.default_rng(a * 100 + b)
    rows = 8
    for _ in range(8):
        ring, _ = started(kind, rng.integers(0, 20, rows).tolist())
        ring = rollback(ring, np.minimum(ring.length, rng.integers(0, kind[1] + 1, rows)).astype(np.int32))
        n, m = rng.integers(0, a + 1, rows), rng.integers(0, b + 1, rows)
        (ka, va), (kb, vb) = chunk(1000, a, rows), chunk(2000, b, rows)
        k, v = (np.full((rows, a + b, *x.shape[2:]), np.nan, np.float32) for x in (ka, va))
        for row in range(rows):
            k[row, : n[row] + m[row]] = np.concatenate([ka[row, : n[row]], kb[row, : m[row]]])
            v[row, : n[row] + m[row]] = np.concatenate([va[row, : n[row]], vb[row, : m[row]]])
        one_by_one = append(ring, *poisoned(ka, va, n), n.astype(np.int32))
        one_by_one = append(one_by_one, *poisoned(kb, vb, m), m.astype(np.int32))
        chex.assert_trees_all_equal(one_by_one, append(ring, k, v, (n + m).astype(np.int32)))


@ids
@pytest.mark.parametrize("length", [1, 3, 14])
def test_padding_is_never_written(kind, length):
    """Law 8: padding evicts nothing and changes no slot, whatever it holds."""
    ring, lists = started(kind, [0, 3, 8, 17])
    none = np.zeros(BATCH, np.int32)
    k, v = (np.full_like(x, np.nan) for x in chunk(0, length))
    chex.assert_trees_all_equal(append(ring, k, v, none), ring)
    chex.assert_trees_all_equal(ring.append(k, v, lengths=none), ring)
    lengths = [length, 0, 1, 0]
    after = append(ring, *poisoned(*chunk(500, length), lengths), np.array(lengths, np.int32))
    for row in (1, 3):
        chex.assert_trees_all_equal(*(jax.tree.map(lambda x, row=row: x[row], r) for r in (after, ring)))
    assert bool(jnp.isfinite(after.k).all() & jnp.isfinite(after.v).all())
    assert_holds(after, appended(lists, *chunk(500, length), lengths))


def test_append_in_a_scan():
    """The carry of a loop: same structure, same dtypes, the same ring as by hand."""
    kind = KINDS[1]
    ring, lists = empty(kind)
    k, v = chunk(0, 21)

    @jax.jit
    def stream(ring, k, v):
        cut = [jnp.moveaxis(x.reshape(BATCH, 7, 3, *x.shape[2:]), 1, 0) for x in (k, v)]
        return jax.lax.scan(lambda ring, kv: (ring.append(*kv).rollback(1), None), ring, tuple(cut))[0]

    for i in range(7):
        appended(lists, k[:, 3 * i :], v[:, 3 * i :], [3] * BATCH)
        for row in lists:
            row.rollback(1)
    assert_holds(stream(ring, k, v), lists)


def test_gradients_flow_through_a_ring_to_what_it_holds():
    """The derivative of what a ring holds with respect to the tokens: 1 for those it still holds, 0 for the rest."""
    ring, _ = started(KINDS[1], [0, 3, 8, 17])
    for length in (1, 3, 14):
        k, v = chunk(500, length)

        def held(k, v, ring, length=length):
            exported = ring.append(k, v, lengths=np.array([length, 0, 1, length], np.int32)).export()
            return exported.k.sum() + 2 * exported.v.sum()

        dk, dv, dring = jax.jit(jax.grad(held, argnums=(0, 1, 2), allow_int=True))(k, v, ring)
        after = ring.append(k, v, lengths=np.array([length, 0, 1, length], np.int32)).positions()
        for row in range(BATCH):
            new = np.arange(length) + int(ring.length[row])
            kept = np.isin(new, np.asarray(after)[row]).astype(np.float32)[:, None, None]
            np.testing.assert_array_equal(dk[row], np.broadcast_to(kept, dk[row].shape))
            np.testing.assert_array_equal(dv[row], np.broadcast_to(2 * kept, dv[row].shape))
            still = np.isin(np.asarray(ring.positions())[row], np.asarray(after)[row])
            still &= np.asarray(ring.positions())[row] >= 0
            expected = np.broadcast_to(still[None, :, None], dring.k[row].shape)
            np.testing.assert_array_equal(dring.k[row], expected.astype(np.float32))


# --- rollback ---


def visible(ring):
    """For each row, what the next query sees: {position: bytes of key and value}."""
    found = []
    positions, k, v = (np.asarray(x) for x in (look(ring)[0], ring.k, ring.v))
    for row, length in enumerate(ring.length.tolist()):
        seen = (positions[row] >= 0) & np.asarray(ring.window.visible(np.int32(length), positions[row]))
        found.append(
            {int(positions[row, s]): k[row, :, s].tobytes() + v[row, :, s].tobytes() for s in np.flatnonzero(seen)}
        )
    return found


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(("window", "slack"), [(W.causal(4), 3), (W.causal(3, sinks=2), 2), (W.causal(1), 4)])
def test_rollback_restores_what_was_visible(window, slack, traced):
    """Law 9, at every phase before and after the wrap, each row by a number of its own; then another future."""
    rows = 5
    for start in range(0, 25, rows):
        ring, lists = started((window, slack), [min(24, start + row) for row in range(rows)])
        n = np.array([(start + row) % (slack + 1) for row in range(rows)], np.int32)
        after = append(ring, *chunk(500, slack, rows), n)
        back = (rollback if traced else rj.RingBuffer.rollback)(after, n)
        assert visible(back) == visible(ring)
        assert back.length.tolist() == ring.length.tolist()
        assert_holds(
            back, [r.rollback(int(m)) for r, m in zip(appended(lists, *chunk(500, slack, rows), n), n, strict=True)]
        )
        # The tokens that were taken back leave no trace in any future.
        other = chunk(900, 7, rows)
        assert visible(append_all(back, *other)) == visible(append_all(ring, *other))


def test_rollback_by_one_number_for_all_rows():
    ring, lists = started(KINDS[1], [3, 9, 20])
    for n in (2, np.int64(2), jnp.int32(2)):
        chex.assert_trees_all_equal(ring.rollback(n), ring.rollback(np.array([2, 2, 2])))
    assert_holds(ring.rollback(2), [row.rollback(2) for row in lists])


def test_rollbacks_count_together_until_their_tokens_are_replaced():
    ring, lists = started((W.causal(4), 3), [10])
    ring = ring.rollback(2).rollback(1)
    with pytest.raises(ValueError, match=r"RingBuffer\.rollback: n must be between 0 and the slack, 3"):
        ring.rollback(1)
    lists[0].rollback(3)
    assert_holds(ring, lists)
    ring = ring.append(*chunk(500, 2, 1))
    with pytest.raises(ValueError):
        ring.rollback(3)
    appended(lists, *chunk(500, 2, 1), [2])
    assert_holds(ring.rollback(2), [lists[0].copy().rollback(2)])
    ring = ring.append(*chunk(600, 1, 1))
    assert_holds(ring.rollback(3), [appended(lists, *chunk(600, 1, 1), [1])[0].rollback(3)])


@pytest.mark.parametrize("n", [-1, 4, [0, 4, 0], [0, 0, -2], 2**31 - 1], ids=str)
def test_rollback_too_far(n):
    """An error outside jit, which changes nothing; inside jit an empty row, and never a wrong key."""
    n = n if isinstance(n, int) else np.array(n, np.int32)
    ring, lists = started((W.causal(4, sinks=1), 3), [3, 9, 20])
    before = jax.tree.map(np.array, ring)
    with pytest.raises(ValueError, match=r"RingBuffer\.rollback: n must be between"):
        ring.rollback(n)
    chex.assert_trees_all_equal(ring, before)
    counts = np.broadcast_to(n, 3).tolist()
    lost = rollback(ring, np.array(counts, np.int32))
    assert_holds(lost, [row.rollback(m) for row, m in zip(lists, counts, strict=True)])
    assert not all(row.valid for row in lists)


def test_more_tokens_than_there_are_cannot_be_rolled_back():
    ring, lists = started((W.causal(4), 3), [2, 3, 0])
    with pytest.raises(ValueError):
        ring.rollback(3)
    assert_holds(rollback(ring, np.full(3, 3, np.int32)), [row.rollback(3) for row in lists])
    assert [row.valid for row in lists] == [False, True, False]


@pytest.mark.parametrize("sinks", [0, 2])
def test_a_lost_row_is_empty_for_ever(sinks):
    """Whatever is done to it, until `insert` or `reset` replaces it; its neighbours notice nothing."""
    kind = (W.causal(4, sinks=sinks), 2)
    attend = jax.jit(rj.attend)
    ring, lists = started(kind, [12, 12])
    ring = rollback(ring, np.array([3, 1], np.int32))
    for row, n in zip(lists, (3, 1), strict=True):
        row.rollback(n)
    for step, length in enumerate((1, 2, 1, 13)):
        k, v = chunk(100 * step, length, 2)
        ring = append_all(ring, k, v)
        assert_holds(ring, appended(lists, k, v, [length] * 2))
        assert ring.valid.tolist() == [False, True] and not lists[0].held
        out, _ = attend(np.ones((2, 1, 2 * KV_HEADS, HEAD_DIM), np.float32), k[:, :1], v[:, :1], ring)
        assert not np.asarray(out[0]).any() and np.asarray(out[1]).all()
    assert_holds(rollback(ring, np.zeros(2, np.int32)), lists)
    assert_holds(select(ring, np.array([1, 0])), [lists[1], lists[0]])
    exported = jax.jit(rj.RingBuffer.restore, static_argnums=1, static_argnames="slack")(
        ring.export(), kind[0], slack=2
    )
    assert exported.valid.tolist() == [False, True]
    with pytest.raises(ValueError, match="the export must hold every token"):
        rj.RingBuffer.restore(ring.export(), kind[0], slack=2)
    fresh, fresh_lists = started(kind, [5])
    assert_holds(ring.insert(0, fresh), [fresh_lists[0], lists[1]])
    assert_holds(ring.reset(np.array([True, False])), [TokenList(*kind), lists[1]])


# --- rows ---


def test_select():
    """Forks, another order and another batch size; a copy lives a life of its own."""
    ring, lists = started(KINDS[1], [2, 9, 20])
    for rows in ([0, 1, 2], [2, 2, 0], [1], [0, 0, 1, 1, 2]):
        picked = select(ring, np.array(rows))
        copies = [lists[row].copy() for row in rows]
        assert_holds(picked, copies)
        k, v = chunk(700, 3, len(rows))
        assert_holds(append_all(picked, k, v), appended(copies, k, v, [3] * len(rows)))
    chex.assert_trees_all_equal(ring.select([2, 0, 0]), select(ring, np.array([2, 0, 0])))
    for rows in ([3], [-1, 0]):
        with pytest.raises(ValueError, match=r"RingBuffer\.select: rows must be between 0 and 2"):
            ring.select(np.array(rows))


def test_insert():
    ring, lists = started(KINDS[1], [2, 9, 20])
    for count, at in ((1, 0), (1, 2), (2, 1), (3, 0)):
        other, others = started(KINDS[1], [7 + row for row in range(count)])
        expected = lists[:at] + others + lists[at + count :]
        assert_holds(ring.insert(at, other), expected)
        assert_holds(jax.jit(rj.RingBuffer.insert)(ring, np.int32(at), other), expected)
    for at in (-1, 2):
        with pytest.raises(ValueError, match=r"RingBuffer\.insert: row must be between 0 and 1"):
            ring.insert(at, started(KINDS[1], [1, 1])[0])
    strangers = [empty((W.causal(4, sinks=2), 2), 1)[0], empty((W.causal(5, sinks=1), 3), 1)[0]]
    strangers += [empty(KINDS[1], 1, dtype="bfloat16")[0], rj.RingBuffer.empty(1, 2, 3, *KINDS[1][:1], slack=3)]
    for other in strangers:
        with pytest.raises(ValueError, match=r"RingBuffer\.insert: both rings must have the same"):
            ring.insert(0, other)


def test_reset():
    ring, lists = started(KINDS[1], [2, 9, 20])
    assert_holds(ring.reset(), [TokenList(*KINDS[1]) for _ in lists])
    rows = np.array([False, True, False])
    expected = [lists[0], TokenList(*KINDS[1]), lists[2]]
    assert_holds(ring.reset(rows), expected)
    again = jax.jit(rj.RingBuffer.reset)(ring, rows)
    k, v = chunk(800, 11, 3)
    assert_holds(append_all(again, k, v), appended(expected, k, v, [11] * 3))


# --- export and restore ---


def test_an_export_outlives_a_donated_ring():
    ring, _ = started((W.causal(4, sinks=2), 3), [9, 2])
    exported = ring.export()
    jax.jit(lambda ring: ring.rollback(1), donate_argnums=0)(ring)
    assert ring.length.is_deleted()
    assert exported.length.tolist() == [9, 2] and rj.RingBuffer.restore(exported, W.causal(4)).valid.all()


@pytest.mark.parametrize(
    ("window", "slack"),
    [
        (W.causal(4, sinks=2), 3),  # the same
        (W.causal(4, sinks=2), 0),  # less slack
        (W.causal(4, sinks=2), 20),  # more
        (W.causal(2, sinks=2), 1),  # a smaller window
        (W.causal(7, sinks=2), 0),  # a larger one, which the slack pays for
        (W.causal(4), 0),  # without the sinks
        (W.causal(3, sinks=1), 2),
        (W.causal(5), 4),
    ],
)
def test_restore_into_another_ring(window, slack):
    """From every phase: what is seen from there on is what a ring that saw the whole stream sees."""
    for start in range(0, 20, 5):
        ring, lists = started((W.causal(4, sinks=2), 3), [start + row for row in range(5)])
        whole, _ = started((window, slack), [start + row for row in range(5)])
        restored = restore(look(ring)[2], window, slack=slack)
        assert restored.window == window and restored.slack == slack
        lists = [row.restored(window, slack) for row in lists]
        assert_holds(restored, lists)
        assert visible(restored) == visible(whole)
        for length in (1, 5, 2, 12):
            k, v = chunk(1000 * length, length, 5)
            restored, whole = append_all(restored, k, v), append_all(whole, k, v)
            assert_holds(restored, appended(lists, k, v, [length] * 5))
            assert visible(restored) == visible(whole)


@pytest.mark.parametrize(
    ("window", "slack"),
    [(W.causal(9, sinks=2), 0), (W.causal(4, sinks=5), 0), (W.causal(12), 3), (W.causal(8), 0)],
    ids=str,
)
def test_restore_refuses_a_window_that_sees_what_is_gone(window, slack):
    """An error outside jit. Inside, such a row is empty; rows so short that nothing is gone yet are not."""
    ring, lists = started((W.causal(4, sinks=2), 3), [3, 7, 20, 21])
    lists = [row.restored(window, slack) for row in lists]
    assert [row.valid for row in lists] == [True, True, False, False]
    with pytest.raises(ValueError, match=r"RingBuffer\.restore: the export must hold every token"):
        rj.RingBuffer.restore(look(ring)[2], window, slack=slack)
    assert_holds(restore(look(ring)[2], window, slack=slack), lists)


def test_restore_keeps_or_changes_the_dtype():
    ring, lists = started(KINDS[1], [2, 9, 20])
    for dtype in (None, "float32", jnp.bfloat16, np.float16):
        again = restore(look(ring)[2], ring.window, slack=ring.slack, dtype=dtype)
        assert again.k.dtype == again.v.dtype == (dtype or "float32")
        assert_holds(again, lists)


def test_an_export_is_plain_arrays_without_storage_order():
    """Two rings that hold the same tokens in different slots export the same; NumPy arrays restore too."""
    ring, lists = started(KINDS[1], [2, 9, 20])
    moved = restore(look(ring)[2], ring.window, slack=8)
    assert not np.array_equal(look(moved)[0][:, :9], look(ring)[0])
    back = rj.RingBuffer.restore(rj.RingExport(*map(np.asarray, look(moved)[2])), ring.window, slack=ring.slack)
    chex.assert_trees_all_equal(look(back)[2], ring.export())
    assert_holds(back, lists)


# --- values ---


def test_a_ring_is_a_value():
    """No method changes the ring that it is called on."""
    ring, _ = started(KINDS[1], [2, 9, 20])
    before = jax.tree.map(np.array, ring)
    ring.append(*chunk(0, 3, 3)).rollback(1).select(np.array([0, 0, 0])).reset()
    ring.insert(1, started(KINDS[1], [4])[0])
    ring.export()
    chex.assert_trees_all_equal(ring, before)
    with pytest.raises(AttributeError):
        ring.length = jnp.zeros(3, jnp.int32)
