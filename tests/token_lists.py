"""What a ring must hold, kept as plain lists of tokens: the model that rings are compared with."""

import jax
import numpy as np
import oracle

KV_HEADS, HEAD_DIM, VALUE_DIM = 2, 3, 2


def tokens(first, count, row=0):
    """Keys [count, K, H] and values [count, K, Hv] that no other token of the test has, exact in float32."""
    number = (np.arange(first, first + count, dtype=np.float32) + 1 + 4096 * row)[:, None, None]
    k = number + np.arange(KV_HEADS * HEAD_DIM, dtype=np.float32).reshape(1, KV_HEADS, HEAD_DIM) / 16
    v = -number - np.arange(KV_HEADS * VALUE_DIM, dtype=np.float32).reshape(1, KV_HEADS, VALUE_DIM) / 16
    return k, v


class TokenList:
    """One row of a ring: all its tokens, and which positions a ring of this window and slack still holds."""

    def __init__(self, window, slack):
        self.window, self.slack = window, slack
        self.tokens, self.held = [], set()
        self.written, self.valid = 0, True

    def copy(self):
        other = TokenList(self.window, self.slack)
        other.tokens, other.held = list(self.tokens), set(self.held)
        other.written, other.valid = self.written, self.valid
        return other

    @property
    def around(self):
        return self.window.size + self.slack

    def append(self, k, v):
        for token in zip(k, v, strict=True):
            position = len(self.tokens)
            self.tokens.append(token)
            if position - self.around >= self.window.sinks:
                self.held.discard(position - self.around)
            self.held.add(position)
        self.written = max(self.written, len(self.tokens))
        if not self.valid:
            self.held = set()
        return self

    def allows(self, n):
        return self.valid and 0 <= n <= len(self.tokens) and self.written - len(self.tokens) + n <= self.slack

    def rollback(self, n):
        """Too far, and the row is empty for ever."""
        allowed = self.allows(n)
        self.tokens = self.tokens[: len(self.tokens) - max(0, min(n, len(self.tokens)))]
        self.held = {p for p in self.held if p < len(self.tokens)}
        if not allowed:
            self.valid, self.held = False, set()
        return self

    def restored(self, window, slack):
        """In another ring: what did not come along counts as overwritten there."""
        other = TokenList(window, slack)
        other.tokens = list(self.tokens)
        other.written = length = len(self.tokens)
        while not set(range(max(window.sinks, other.written - other.around), length)) <= self.held:
            other.written += 1
        other.held = {p for p in self.held if p < window.sinks or p >= other.written - other.around}
        sinks = set(range(min(window.sinks, length)))
        other.valid = sinks <= other.held and other.written - length <= slack
        if not other.valid:
            other.held = set()
        return other

    def seen_next(self):
        """The positions before its own that the next token sees."""
        window, length = self.window, len(self.tokens)
        sides = {"left": window.left, "right": window.right, "sinks": window.sinks}
        seen = oracle.visible(**sides, q_positions=[length], k_positions=np.arange(length))
        return set(np.flatnonzero(seen[0, 0]).tolist())


def appended(lists, k, v, lengths):
    """Each row's list after `append(k, v, lengths=lengths)`."""
    for row, n in enumerate(lengths):
        lists[row].append(k[row, :n], v[row, :n])
    return lists


@jax.jit
def look(ring):
    """What a ring says of itself; compiled, since one by one its operations take most of a test's time."""
    return ring.positions(), ring.valid, ring.export()


def assert_holds(ring, lists):
    """A ring [B, ...] holds what B lists of tokens say, in storage order and exported, and all that comes into view."""
    positions, valid, exported = jax.tree.map(np.asarray, look(ring))
    k, v = np.asarray(ring.k), np.asarray(ring.v)
    assert np.asarray(ring.length).tolist() == [len(tokens.tokens) for tokens in lists]
    assert valid.tolist() == [tokens.valid for tokens in lists]
    assert positions.dtype == np.int32 and exported[2].dtype == np.int32
    for row, tokens in enumerate(lists):
        held = sorted(tokens.held)
        if tokens.valid:  # the model itself: nothing that the window still sees is ever lost
            assert tokens.seen_next() <= tokens.held
        slots = np.flatnonzero(positions[row] >= 0)
        assert sorted(positions[row, slots].tolist()) == held
        for slot in slots:
            expected = tokens.tokens[positions[row, slot]]
            np.testing.assert_array_equal(k[row, :, slot], expected[0].astype(k.dtype))
            np.testing.assert_array_equal(v[row, :, slot], expected[1].astype(v.dtype))
        assert exported[2][row].tolist() == held + [-1] * (ring.capacity - len(held))
        assert exported[3][row] == len(tokens.tokens)
        for x, which in ((exported[0], 0), (exported[1], 1)):
            wanted = np.zeros_like(x[row])
            if held:
                wanted[: len(held)] = np.stack([tokens.tokens[p][which].astype(x.dtype) for p in held])
            np.testing.assert_array_equal(x[row], wanted)
