"""torch and JAX on one GPU: one memory, right order on every stream, nothing freed early. `pytest -m gpu`."""

import gc
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ringjax as rj

torch = pytest.importorskip("torch")

from bridge import dense  # noqa: E402 (torch may be missing)

import torch_bridge as tb  # noqa: E402
from torch_bridge import _dlpack  # noqa: E402

pytestmark = pytest.mark.gpu
B, N, K, H = 2, 4, 2, 64
WINDOW = rj.Window.causal(48, sinks=2)
LONG = 20_000_000  # cycles that a stream is kept busy: some 10 ms


@pytest.fixture(autouse=True)
def cuda(numpy_promotion):
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    tb.reset_stats()
    yield
    torch.cuda.synchronize()


def tokens(length, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return [torch.randn(B, length, heads, H, device="cuda").to(dtype) for heads in (N, K, K)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.bool], ids=str)
def test_both_ways_on_one_memory(dtype):
    tensor = torch.arange(48, device="cuda").reshape(2, 3, 8).to(dtype)
    array = tb.to_jax(tensor)
    assert array.unsafe_buffer_pointer() == tensor.data_ptr()
    assert torch.equal(tb.to_torch(array), tensor)
    assert tb.to_torch(array).data_ptr() == tensor.data_ptr()
    turned = tensor.transpose(0, 2)
    assert tb.to_jax(turned).unsafe_buffer_pointer() == tensor.data_ptr()
    assert np.array_equal(np.asarray(tb.to_jax(turned)).astype(np.float32), turned.float().cpu().numpy())
    made = array | array if dtype == torch.bool else array + array
    assert tb.to_torch(made).data_ptr() == made.unsafe_buffer_pointer()
    assert tb.stats().copies == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_numbers_are_ringjaxs_and_gradients_exact(dtype):
    q, k, v = (x.requires_grad_() for x in tokens(160, dtype))
    out, lse = tb.attention(q, k, v, WINDOW, return_lse=True)
    native = jax.jit(lambda q, k, v: rj.attention(q, k, v, WINDOW, return_lse=True))
    for mine, theirs in zip((out, lse), native(*(tb.to_jax(x.detach()) for x in (q, k, v))), strict=True):
        assert torch.equal(mine.detach(), tb.to_torch(theirs))
    g = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, v), g)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    mask = dense.causal(160, 160, 48, 2).cuda()
    exact = torch.autograd.grad(dense.attention(*wide, mask)[0], wide, g.double())
    for mine, theirs in zip(found, exact, strict=True):
        error = float((mine.double() - theirs).norm() / theirs.norm())
        assert error < (1e-2 if dtype == torch.bfloat16 else 2e-3)  # bf16 rounds; a GPU's float32 products are tf32


def two_streams(calls):
    """Each call's inputs are written just before it and overwritten just after, each stream behind in its own time.

    All values are one number, so all outputs must be it. Returns the largest error.
    """
    streams = [torch.cuda.Stream() for _ in range(2)]
    made = [tokens(160, torch.bfloat16, seed) for seed in range(2)]
    worst = [torch.zeros((), device="cuda") for _ in range(2)]
    torch.cuda.synchronize()
    for i in range(calls):
        with torch.cuda.stream(streams[i % 2]):
            q, k, v = made[i % 2]
            if i % 50 < 2:
                torch.cuda._sleep(LONG)
            number = float(1 + i % 64)
            v.fill_(number)
            out = tb.attention(q, k, v, WINDOW)
            v.fill_(-1000.0)
            worst[i % 2].copy_(torch.maximum(worst[i % 2], (out.float() - number).abs().max()))
            del out  # and its memory is free for the other stream's call
    torch.cuda.synchronize()
    return max(float(x) for x in worst)


def test_a_thousand_calls_on_two_streams():
    assert two_streams(4) < 0.5
    assert two_streams(1000) < 0.5  # bf16's rounding of 64 is 0.25


def test_without_waiting_for_torch_it_would_be_wrong(monkeypatch):
    assert two_streams(4) < 0.5
    monkeypatch.setattr(torch.cuda.ExternalStream, "wait_event", lambda self, event: None)
    assert not two_streams(100) < 0.5


def test_without_waiting_for_jax_it_would_be_wrong(monkeypatch):
    @jax.jit
    def slow(x):
        return jax.lax.fori_loop(0, 200, lambda i, y: jnp.tanh(y @ x), x)

    x = jnp.eye(2048) * 1.01
    expected = np.asarray(slow(x))
    assert np.array_equal(tb.to_torch(slow(x)).cpu().numpy(), expected)

    class NoStream:  # says to JAX that nobody needs to wait
        def __init__(self, array):
            self.array = array

        def __dlpack__(self, **_):
            return self.array.__dlpack__()

        def __dlpack_device__(self):
            return self.array.__dlpack_device__()

    wrong = [not np.array_equal(torch.from_dlpack(NoStream(slow(x))).cpu().numpy(), expected) for _ in range(5)]
    if not any(wrong):
        pytest.skip("this JAX waits on the host by itself")


def test_nothing_is_freed_that_a_stream_still_reads():
    size = (64, 1 << 18)  # 64 MiB
    side = torch.cuda.Stream()
    for _ in range(3):
        tensor = tb.to_torch(jnp.full(size, 5.0))
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(LONG * 5)
            read = tensor + 0.0
            del tensor  # the last reference, and the kernel that reads it has not begun
        others = [jax.block_until_ready(jnp.full(size, float(i))) for i in range(4)]
        side.synchronize()
        assert bool((read == 5.0).all())
        del others, read


def test_nothing_is_freed_that_jax_still_reads():
    @jax.jit
    def slow(x, busy):
        busy = jax.lax.fori_loop(0, 300, lambda i, y: jnp.tanh(y @ y), busy)
        return x + 0.0 * busy[0, 0]

    busy = jnp.eye(2048)
    x = tb.to_jax(torch.full((64, 1 << 18), 5.0, device="cuda"))
    jax.block_until_ready(slow(x, busy))
    result = slow(x, busy)
    del x  # the last reference; torch may hand the memory out again
    others = [torch.full((64, 1 << 18), 9.0, device="cuda") for _ in range(4)]
    torch.cuda.synchronize()
    assert (np.asarray(result) == 5.0).all()
    del others


def test_stream_equals_batch_and_rings_change_hands():
    made = tokens(160)
    ring = tb.RingBuffer.empty(B, K, H, WINDOW, dtype=torch.float32, device="cuda")
    outs = []
    for start, stop in ((0, 100), (100, 101), (101, 102), (102, 103)):
        outs.append(tb.attend(*(x[:, start:stop].contiguous() for x in made), ring)[0])
        if stop == 102:
            where = ring._tree().k.unsafe_buffer_pointer()
            taken = ring.release()
            ring.adopt(taken)
    assert ring._tree().k.unsafe_buffer_pointer() == where
    assert ring.device.type == "cuda"
    exact = dense.attention(*made, dense.causal(160, 160, 48, 2).cuda())[0][:, :103]
    assert float((torch.cat(outs, dim=1).double() - exact).norm() / exact.norm()) < 2e-3
    assert tb.stats().copies == 0
    assert ring.to("cpu").device.type == "cpu"


def test_memory_is_flat_over_100_000_steps():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def held():
        torch.cuda.synchronize()
        return jax.devices()[0].memory_stats()["bytes_in_use"], torch.cuda.memory_allocated(), resident()

    token = [x.to(torch.bfloat16) for x in tokens(1)]
    ring = tb.RingBuffer.empty(B, K, H, WINDOW, device="cuda")
    with torch.no_grad():
        for i in range(100_000):
            tb.attend(*token, ring)
            if i == 2000:
                gc.collect()
                before = held()
    after = held()
    assert after[0] - before[0] < 2**20
    assert after[1] == before[1]
    assert after[2] - before[2] < 32 * 2**20
    assert ring.length.tolist() == [100_000] * B
    assert len(_dlpack._Lease._returned[0]) < 10


def test_the_snippet_with_cuda():
    q, k, v = tokens(160)
    config = tb.RingBufferConfig(buffer_size=2048, block_size=128, tile_size=32, head_tile_size=4, prefill_size=512)
    model = tb.CompleteRingBufferAttention(config).cuda()
    out, state = model(q=q, k=k, v=v, requires_grad=True)
    step = [x[:, :1].contiguous() for x in (q, k, v)]
    decoded = model(*step, position=0, is_decoder=True, buffer_state=state)
    assert out.device.type == decoded.device.type == state.device.type == "cuda"
    with pytest.raises(ValueError, match="position must be at most last_calculated"):
        model(*step, position=5, is_decoder=True, buffer_state=state)


def test_wrong_calls_of_two_devices():
    q, k, v = tokens(8)
    ring = tb.RingBuffer.empty(B, K, H, WINDOW, dtype=torch.float32, device="cpu")
    for call, error, first in (
        (
            lambda: tb.attention(q, k.cpu(), v, WINDOW),
            ValueError,
            "attention: q, k and v must be on one device, got cuda:0, cpu and cuda:0.",
        ),
        (
            lambda: tb.attention(q.double(), k.double(), v.double(), WINDOW),
            TypeError,
            "attention: q must be one of float32, bfloat16, float16, got float64[2, 8, 4, 64].",
        ),
        (
            lambda: tb.attend(q, k, v, ring),
            ValueError,
            "attend: q and the rings must be on one device, got cuda:0 and cpu.",
        ),
    ):
        with pytest.raises(error) as raised:
            call()
        assert str(raised.value).splitlines()[0] == first
    assert ring.length.tolist() == [0, 0]


def test_cpu_tensors_still_work_where_jax_prefers_the_gpu():
    made = [x.cpu() for x in tokens(20)]
    out = tb.attention(*made, WINDOW)
    torch.testing.assert_close(out, dense.attention(*made, dense.causal(20, 20, 48, 2))[0].float())


def test_a_cuda_graph_cannot_capture_jax():
    q, k, v = tokens(160, torch.bfloat16)
    tb.attention(q, k, v, WINDOW)
    torch.cuda.synchronize()
    graph = torch.cuda.graph(torch.cuda.CUDAGraph())
    with pytest.raises(RuntimeError, match="a CUDA graph cannot capture a call of JAX"), graph:
        tb.attention(q, k, v, WINDOW)
