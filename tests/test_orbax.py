"""A ring saved in the middle of its stream and restored by orbax continues as if it had never been away."""

import chex
import jax
import numpy as np
import pytest

import ringjax as rj

ocp = pytest.importorskip("orbax.checkpoint")

pytestmark = pytest.mark.usefixtures("numpy_promotion")
BATCH, KV_HEADS, HEAD_DIM, VALUE_DIM = 2, 2, 4, 3
WINDOW = rj.Window.causal(5, sinks=2)
attend, append, rollback = jax.jit(rj.attend), jax.jit(rj.RingBuffer.append), jax.jit(rj.RingBuffer.rollback)
export, restore = jax.jit(rj.RingBuffer.export), jax.jit(rj.RingBuffer.restore, static_argnames=("window", "slack"))


def arrays(seed, length):
    rng = np.random.default_rng(seed)
    shapes = [(2 * KV_HEADS, HEAD_DIM), (KV_HEADS, HEAD_DIM), (KV_HEADS, VALUE_DIM)]
    return [rng.standard_normal((BATCH, length, *shape)).astype(np.float32) for shape in shapes]


@pytest.fixture(params=["float32", "bfloat16"])
def ring(request):
    """Three tokens past the second wrap of one row, and in the first lap of the other; one token rolled back."""
    ring = rj.RingBuffer.empty(BATCH, KV_HEADS, HEAD_DIM, WINDOW, slack=2, value_dim=VALUE_DIM, dtype=request.param)
    _, k, v = arrays(0, 20)
    return rollback(append(ring, k, v, lengths=np.array([20, 6], np.int32)), 1)


def saved(path, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "ring", tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path / "ring", jax.tree.map(ocp.utils.to_shape_dtype_struct, tree))


def continued(ring):
    """Outputs of a few steps and of a chunk."""
    outs = []
    for step, length in enumerate((1, 7, 1)):
        out, ring = attend(*(x.astype(ring.k.dtype) for x in arrays(step + 1, length)), ring)
        outs.append(out)
    return outs, ring


def test_the_same_ring_continues_exactly(ring, tmp_path):
    again = saved(tmp_path, ring)
    assert isinstance(again, rj.RingBuffer) and again.window == WINDOW and again.slack == 2
    chex.assert_trees_all_equal(again, ring)
    chex.assert_trees_all_equal(continued(again), continued(ring))
    chex.assert_trees_all_equal(rollback(again, 1), rollback(ring, 1))


@pytest.mark.parametrize("ring", ["float32"], indirect=True)
@pytest.mark.parametrize(("window", "slack"), [(WINDOW, 9), (rj.Window.causal(3, sinks=2), 4)], ids=str)
def test_an_export_continues_in_a_ring_of_another_capacity(ring, tmp_path, window, slack):
    """As a ring of that capacity does which saw the whole stream."""
    exported = saved(tmp_path, export(ring))
    chex.assert_trees_all_equal(exported, export(ring))
    restored = restore(rj.RingExport(*exported), window, slack=slack)
    whole = rj.RingBuffer.empty(BATCH, KV_HEADS, HEAD_DIM, window, slack=slack, value_dim=VALUE_DIM, dtype=ring.k.dtype)
    _, k, v = arrays(0, 20)
    whole = append(whole, k, v, lengths=np.array([19, 5], np.int32))
    assert restored.capacity == window.sinks + window.size + slack
    chex.assert_trees_all_equal(continued(restored)[0], continued(whole)[0])
