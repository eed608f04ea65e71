"""Crossing between torch and JAX: one memory, counted copies, nothing freed or overwritten that somebody holds."""

import gc
import logging
import os
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch_bridge as tb  # noqa: E402 (torch may be missing)
from torch_bridge import _dlpack  # noqa: E402

DTYPES = sorted(_dlpack.TO_JAX, key=str)


@pytest.fixture(autouse=True)
def counting_from_zero():
    tb.reset_stats()


def same(array, tensor):
    return np.array_equal(np.asarray(array.astype(jnp.complex64)), tensor.to(torch.complex64).numpy())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_ways_on_one_memory(dtype):
    tensor = torch.arange(48).reshape(2, 3, 8).to(dtype)
    array = tb.to_jax(tensor)
    assert array.unsafe_buffer_pointer() == tensor.data_ptr()
    assert str(array.dtype) == _dlpack.TO_JAX[dtype]
    assert same(array, tensor)
    back = tb.to_torch(array)
    assert (back.data_ptr(), back.dtype, back.shape) == (tensor.data_ptr(), dtype, tensor.shape)
    made = array ^ array if dtype == torch.bool else array + array
    there = tb.to_torch(made)
    assert there.data_ptr() == made.unsafe_buffer_pointer()
    assert same(made, there)
    assert tb.stats() == tb.Stats()


@pytest.mark.parametrize("axes", [(0, 2, 1, 3), (3, 0, 2, 1), (2, 3, 0, 1)])
def test_a_transposed_tensor_needs_no_copy(axes):
    tensor = torch.randn(2, 3, 4, 8).permute(axes)
    array = tb.to_jax(tensor)
    assert array.unsafe_buffer_pointer() == tensor.data_ptr()
    assert same(array, tensor)
    assert same(jax.jit(lambda x: x * 2)(array), tensor * 2)
    assert tb.stats().copies == 0


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 4), (2, 1, 1, 8), (0, 3)])
def test_odd_shapes_need_no_copy(shape):
    tensor = torch.ones(shape)
    assert tb.to_jax(tensor).shape == shape
    assert tuple(tb.to_torch(jnp.ones(shape)).shape) == shape
    assert tb.stats().copies == 0


def strided():
    packed = torch.randn(2, 5, 3, 4, 8)
    return {
        "packed QKV": (packed[:, :, 1], "strides"),
        "every other": (torch.randn(8, 4)[::2], "strides"),
        "expanded": (torch.randn(1, 3).expand(4, 3), "strides"),
        "one token of many": (torch.randn(2, 5, 4)[:, 2:3], "strides"),
        "not aligned": (torch.randn(100)[1:], "alignment"),
    }


@pytest.mark.parametrize("name", strided())
def test_what_has_to_be_copied_is_counted_and_logged(name, caplog):
    tensor, reason = strided()[name]
    with caplog.at_level(logging.DEBUG, "torch_bridge"):
        array = tb.to_jax(tensor)
    assert same(array, tensor)
    assert tb.stats() == tb.Stats(copies=1, copied_bytes=tensor.numel() * 4, **{reason: 1})
    assert reason in caplog.text


def test_a_copy_that_is_asked_for_is_its_own():
    tensor, array = torch.zeros(64), jnp.zeros(64)
    there, back = tb.to_jax(tensor, copy=True), tb.to_torch(array, copy=True)
    tensor.fill_(1.0)
    back.fill_(1.0)
    assert not np.asarray(there).any()
    assert not np.asarray(array).any()
    assert tb.stats().wanted == 2


def test_conjugate_and_negative_views_are_resolved():
    z = torch.randn(4, dtype=torch.complex64)
    assert np.array_equal(np.asarray(tb.to_jax(z.conj())), z.numpy().conj())
    assert np.array_equal(np.asarray(tb.to_jax(z.conj().imag)), -z.numpy().imag)


def test_neither_side_frees_what_the_other_holds():
    """A freed block of this size is the next one that the allocator hands out."""
    tensor = torch.full((1 << 16,), 7.0)
    pointer, array = tensor.data_ptr(), tb.to_jax(tensor)
    del tensor
    others = [torch.zeros(1 << 16) for _ in range(8)]
    assert pointer not in [x.data_ptr() for x in others]
    assert (np.asarray(array) == 7.0).all()

    made = jnp.full(1 << 16, 5.0) + 0.0
    pointer, tensor = made.unsafe_buffer_pointer(), tb.to_torch(made)
    del made
    more = [jnp.full(1 << 16, float(i)) for i in range(8)]
    assert pointer not in [x.unsafe_buffer_pointer() for x in more]
    assert bool((tensor == 5.0).all())
    view = tensor[100:200]
    del tensor
    more += [jnp.full(1 << 16, float(i)) for i in range(8)]
    assert bool((view == 5.0).all())


def test_both_sides_free_what_nobody_holds():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    if not Path("/proc/self/statm").exists():
        pytest.skip("reads the memory in use from Linux's /proc")
    for i in range(150):
        tb.to_torch(tb.to_jax(torch.full((1 << 20,), float(i))) + 1.0)
        if i == 20:
            gc.collect()
            before = resident()
    gc.collect()
    assert resident() - before < 100 * 2**20  # leaked, it would be 130 times 8 MiB


def test_what_torch_reads_has_been_written():
    @jax.jit
    def slow(x):
        return jax.lax.fori_loop(0, 20, lambda i, y: y @ x, x)

    x = jnp.eye(400) * 1.01
    expected = np.array(slow(x))
    got = tb.to_torch(slow(x)).clone()  # JAX returns at once and computes on
    assert np.array_equal(got.numpy(), expected)


def test_jax_has_read_what_torch_overwrites_next(monkeypatch):
    """A call that returns has read its tensors. Without the wait for its output, the test sees zeros being read."""

    def call():
        q, k, v = (torch.ones(1, 4096, 2, 64) for _ in range(3))
        out = tb.attention(q, k, v, tb.Window.causal(512))
        v.zero_()
        return out

    call()
    assert float((call() - 1.0).abs().max()) < 1e-3

    from torch_bridge import _ops

    monkeypatch.setattr(_ops, "view_in_torch", lambda array: array)
    assert not np.abs(np.asarray(call()) - 1.0).max() < 1e-3


def test_an_array_stays_until_jax_waits_for_torchs_streams(monkeypatch):
    """On a GPU the last view goes while kernels still read it. Here the streams, 7, then 6, and 8, are played."""
    current = [7]
    monkeypatch.setattr(_dlpack, "current_stream", lambda index: current[0])
    waited = []

    class Event:
        def record(self, stream):
            waited.append(stream)

    class External:
        def wait_event(self, event):
            waited.append("JAX waits")

    class Device:
        local_hardware_id = 3

    monkeypatch.setattr(_dlpack, "_stream", lambda index, raw: (index, raw))
    monkeypatch.setitem(_dlpack._events.of, device := Device(), (99, External(), Event()))

    class Array:
        pass

    array = Array()
    alive = weakref.ref(array)
    tensor = torch.zeros(8)
    _dlpack.Lease.on(tensor, array, 3, 7)
    del array
    _dlpack.Lease.move(tensor, 6)
    view, graph = tensor[2:], (tensor.requires_grad_() * tensor).sum()
    del tensor, view
    gc.collect()
    assert not _dlpack.Lease._returned[3]  # the tape still holds it
    current[0] = 8
    del graph
    gc.collect()
    assert alive() is not None
    current[0] = 5
    assert _dlpack._tell_jax(device, None) == 99  # nobody promises to run a program: nothing is freed
    assert waited == [(3, 5), "JAX waits"]
    freed = []
    assert _dlpack._tell_jax(device, freed) == 99
    assert sorted(x for x in waited[2:] if x != "JAX waits") == [(3, 5), (3, 6), (3, 8)]
    _dlpack.give_back(device, freed)  # the program was not launched
    del freed
    gc.collect()
    assert alive() is not None
    assert len(_dlpack.Lease.take(3)) == 1
    gc.collect()
    assert alive() is None


def test_what_torch_has_read_is_let_go_where_jax_runs_nothing(monkeypatch):
    """An array stays until the streams that used it are done; before new memory is taken, they are waited for."""
    done = set()

    class Event:
        def __init__(self, raw):
            self.raw = raw

        def query(self):
            return self.raw in done

        def synchronize(self):
            done.add(self.raw)

    class Stream:
        def __init__(self, raw):
            self.raw = raw

        def record_event(self):
            return Event(self.raw)

    class Array:
        pass

    class Device:
        platform, local_hardware_id = "gpu", 4

    monkeypatch.setattr(_dlpack, "current_stream", lambda index: 5)
    monkeypatch.setattr(_dlpack, "_stream", lambda index, raw: Stream(raw))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def dropped(raw):
        array = Array()
        _dlpack.Lease.on(torch.zeros(8), array, 4, raw)
        return weakref.ref(array)

    first = dropped(7)
    _dlpack.Lease.settle(4)
    second = dropped(5)
    done.add(5)
    _dlpack.Lease.settle(4)
    assert first() is not None, "stream 7 may still read it"
    assert second() is not None, "one after the other"
    done.add(7)
    _dlpack.Lease.settle(4)
    assert first() is None and second() is None
    done.clear()
    third = dropped(7)
    _dlpack.make_room(Device())
    assert third() is None and done == {5, 7}


def test_the_short_way_in_is_jaxs_own(monkeypatch):
    """What is called instead of `jax.dlpack.from_dlpack` gives what that gives."""
    assert _dlpack._managed_tensor_to_buffer is not None
    tensors = [torch.randn(2, 3, 4).transpose(0, 1), None, torch.arange(5, dtype=torch.int32)]
    short = _dlpack.views_in_jax(tensors)
    monkeypatch.setattr(_dlpack, "_managed_tensor_to_buffer", None)
    public = _dlpack.views_in_jax(tensors)
    for a, b in zip(short, public, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.unsafe_buffer_pointer() == b.unsafe_buffer_pointer()
            assert (a.shape, a.dtype, a.format, a.devices()) == (b.shape, b.dtype, b.format, b.devices())
