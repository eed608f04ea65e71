"""A ring against plain lists of tokens, through any order of operations, across many wraps."""

import jax
import numpy as np
from hypothesis import note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from token_lists import HEAD_DIM, KV_HEADS, VALUE_DIM, TokenList, appended, assert_holds, tokens

import ringjax as rj

BATCH = 3
CHUNKS = [1, 2, 3, 6, 13]  # shorter than, equal to and longer than each ring's window and capacity
KINDS = [(rj.Window.causal(4, sinks=2), 3), (rj.Window.causal(3, sinks=1), 0), (rj.Window.causal(6), 5)]


def empty(window, slack, batch=BATCH):
    sizes = {"slack": slack, "value_dim": VALUE_DIM, "dtype": "float32"}
    return rj.RingBuffer.empty(batch, KV_HEADS, HEAD_DIM, window, **sizes)


append = jax.jit(lambda ring, k, v, lengths: ring.append(k, v, lengths=lengths))
append_all = jax.jit(lambda ring, k, v: ring.append(k, v))
rollback = jax.jit(lambda ring, n: ring.rollback(n))
select = jax.jit(lambda ring, rows: ring.select(rows))
insert = jax.jit(lambda ring, row, other: ring.insert(row, other))
reset = jax.jit(lambda ring, rows: ring.reset(rows))
export = jax.jit(lambda ring: ring.export())
restore = jax.jit(rj.RingBuffer.restore, static_argnames=("window", "slack"))


class Rings(RuleBasedStateMachine):
    @initialize(kind=st.sampled_from(KINDS))
    def begin(self, kind):
        self.ring = empty(*kind)
        self.lists = [TokenList(*kind) for _ in range(BATCH)]
        self.written = 0

    def chunk(self, length, batch=BATCH):
        """New tokens for each row."""
        self.written += length
        rows = [tokens(self.written - length, length, row) for row in range(batch)]
        return np.stack([k for k, _ in rows]), np.stack([v for _, v in rows])

    @rule(length=st.sampled_from(CHUNKS))
    def append(self, length):
        k, v = self.chunk(length)
        self.ring = append_all(self.ring, k, v)
        appended(self.lists, k, v, [length] * BATCH)

    @rule(length=st.sampled_from(CHUNKS), data=st.data())
    def append_ragged(self, length, data):
        lengths = np.array([data.draw(st.integers(0, length)) for _ in range(BATCH)], np.int32)
        k, v = self.chunk(length)
        for row, n in enumerate(lengths):
            k[row, n:], v[row, n:] = np.nan, np.inf
        self.ring = append(self.ring, k, v, lengths)
        appended(self.lists, k, v, lengths)

    @rule(data=st.data())
    def rollback(self, data):
        """Each row by as many tokens as it may be."""
        n = []
        for row in self.lists:
            most = min(len(row.tokens), row.slack - row.written + len(row.tokens)) if row.valid else 0
            n.append(data.draw(st.integers(0, most)))
            row.rollback(n[-1])
        self.ring = rollback(self.ring, np.array(n, np.int32))

    @rule(row=st.integers(0, BATCH - 1), excess=st.integers(1, 3))
    def rollback_too_far(self, row, excess):
        """One row; it is lost, the others are not."""
        n = [0] * BATCH
        one = self.lists[row]
        n[row] = max(0, min(len(one.tokens), one.slack - one.written + len(one.tokens))) + excess
        for tokens_, count in zip(self.lists, n, strict=True):
            tokens_.rollback(count)
        assert not one.valid
        self.ring = rollback(self.ring, np.array(n, np.int32))

    @rule(rows=st.lists(st.integers(0, BATCH - 1), min_size=BATCH, max_size=BATCH))
    def select(self, rows):
        self.ring = select(self.ring, np.array(rows, np.int32))
        self.lists = [self.lists[row].copy() for row in rows]

    @rule(row=st.integers(0, BATCH - 1), length=st.sampled_from(CHUNKS))
    def insert(self, row, length):
        """A new stream takes a row's place."""
        kind = self.ring.window, self.ring.slack
        k, v = self.chunk(length, batch=1)
        self.ring = insert(self.ring, np.int32(row), append_all(empty(*kind, batch=1), k, v))
        self.lists[row] = TokenList(*kind).append(k[0], v[0])

    @rule(rows=st.lists(st.booleans(), min_size=BATCH, max_size=BATCH))
    def reset(self, rows):
        self.ring = reset(self.ring, np.array(rows))
        for row, emptied in enumerate(rows):
            if emptied:
                self.lists[row] = TokenList(self.ring.window, self.ring.slack)

    @rule(kind=st.sampled_from(KINDS))
    def export_and_restore(self, kind):
        """Into a ring of another window, slack and number of sinks; a row that lacks something is empty there."""
        window, slack = kind
        self.ring = restore(export(self.ring), window, slack=slack)
        self.lists = [row.restored(window, slack) for row in self.lists]
        note(f"restored into {window}, slack {slack}: {[row.valid for row in self.lists]}")

    @precondition(lambda self: not all(row.valid for row in self.lists))
    @rule()
    def give_up_lost_rows(self):
        """So that most of the walk is spent with rows that live."""
        self.reset([not row.valid for row in self.lists])

    @invariant()
    def holds_what_the_lists_say(self):
        assert_holds(self.ring, self.lists)


Rings.TestCase.settings = settings(max_examples=200, stateful_step_count=25)
test_a_ring_is_a_list_of_tokens = Rings.TestCase
