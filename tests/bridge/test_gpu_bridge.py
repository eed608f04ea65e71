"""torch and JAX on one GPU: one memory, right order on every stream, nothing freed early. `pytest -m gpu`."""

import gc
import os
import pickle
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ringjax as rj

torch = pytest.importorskip("torch")

from bridge import dense  # noqa: E402 (torch may be missing)

import torch_bridge as tb  # noqa: E402
from torch_bridge import _held, _launch, _ops  # noqa: E402

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


@pytest.fixture(params=["torch launches", "JAX runs"])
def way(request, monkeypatch):
    """Both ways of a call in 16 bits."""
    if request.param == "JAX runs":
        by_jax(monkeypatch)
    return request.param


def by_jax(monkeypatch):
    """Every call through JAX's runtime."""
    for module in (_ops, _held):
        monkeypatch.setattr(module, "find", lambda *_: None)


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
def test_numbers_are_ringjaxs_and_gradients_exact(dtype, way):
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


def test_a_thousand_calls_on_two_streams(way):
    assert two_streams(4) < 0.5
    assert two_streams(1000) < 0.5  # bf16's rounding of 64 is 0.25


def test_without_waiting_for_torch_it_would_be_wrong(monkeypatch):
    by_jax(monkeypatch)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_stream_equals_batch_and_rings_change_hands(dtype, way):
    made = tokens(160, dtype)
    ring = tb.RingBuffer.empty(B, K, H, WINDOW, dtype=dtype, device="cuda")
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
    error = float((torch.cat(outs, dim=1).double() - exact).norm() / exact.norm())
    assert error < (1e-2 if dtype == torch.bfloat16 else 2e-3)
    assert tb.stats().copies == 0
    assert ring.to("cpu").device.type == "cpu"


def test_a_ring_goes_back_and_forth_between_torch_and_jax(monkeypatch):
    """torch writes to JAX's memory: whatever JAX is asked afterwards must know, on any stream, whatever it knew before.

    The same steps, all of them through JAX, are what it must equal.
    """
    made, other = tokens(70, torch.bfloat16), torch.cuda.Stream()

    def steps():
        ring, seen = tb.RingBuffer.empty(B, K, H, WINDOW, slack=3, device="cuda"), []
        for t in range(66):
            one = [x[:, t : t + 1].contiguous() for x in made]
            if t % 16 == 15:  # the other stream is behind, and still writes when this one reads on
                other.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(other):
                    torch.cuda._sleep(LONG)
                    seen.append(tb.attend(*one, ring)[0])
                torch.cuda.current_stream().wait_stream(other)
            else:
                seen.append(tb.attend(*one, ring)[0])
            if t % 16 == 8:
                seen += [ring.length.clone(), ring.positions()]
                ring.rollback(2)
                seen += [np.asarray(x) for x in jax.tree.leaves(jax.device_get(ring._tree()))[2:]]
            if t % 16 == 11:
                kept, clone = ring.to_jax(), ring.clone()
                before = np.array(kept.k).astype(np.float32)
                tb.attend(*one, ring)  # and this step must not write to what was lent
                assert np.array_equal(np.array(kept.k).astype(np.float32), before)
                tb.attend(*one, clone)
                seen += [ring.state_dict()["k"], clone.state_dict()["k"]]
            if t == 50:
                ring = pickle.loads(pickle.dumps(ring))
        return [x.cpu() if isinstance(x, torch.Tensor) else torch.from_numpy(np.array(x)) for x in seen]

    launches = []
    plain = _launch.Launched.__call__
    monkeypatch.setattr(_launch.Launched, "__call__", lambda self, x: launches.append(1) or plain(self, x))
    found = steps()
    assert len(launches) > 60
    by_jax(monkeypatch)
    for a, b in zip(found, steps(), strict=True):
        assert torch.equal(a, b)


def test_torch_launches_what_jax_would(monkeypatch):
    """Odd lengths, both sides, lse and gradients: the same to the bit, and XLA's sums apart from the last one.

    A wide window's backward pass is one kernel, which adds to what another has filled.
    """
    plain = _launch.Launched.__call__
    cases = [
        (160, WINDOW, {}),
        (256, rj.Window(30, 10), {"softcap": 20.0}),
        (512, rj.Window.causal(2048), {}),
        (131, WINDOW, {"sink_logits": torch.randn(N, device="cuda")}),
    ]
    for length, window, options in cases:
        q, k, v = (x.requires_grad_() for x in tokens(length, torch.bfloat16, seed=length))
        found, launches = [], []
        monkeypatch.setattr(
            _launch.Launched, "__call__", lambda self, x, seen=launches: seen.append(self) or plain(self, x)
        )
        for _ in range(2):
            out, lse = tb.attention(q, k, v, window, return_lse=True, **options)
            found.append((out, lse, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))))
            by_jax(monkeypatch)
        monkeypatch.undo()
        assert len(launches) == (1 if "sink_logits" in options else 2)
        (out, lse, *mine), (jax_out, jax_lse, *theirs) = found
        assert torch.equal(out, jax_out) and torch.equal(lse, jax_lse)
        for a, b in zip(mine, theirs, strict=True):
            assert float((a.double() - b.double()).norm() / b.double().norm()) < 3e-3


def test_what_lies_otherwise_is_copied_and_launched(monkeypatch):
    """Slices of packed tensors, and the gradient of a sum, which is one number expanded; no torch operation else."""
    launches, plain = [], _launch.Launched.__call__
    monkeypatch.setattr(_launch.Launched, "__call__", lambda self, x: launches.append(self) or plain(self, x))
    torch.manual_seed(3)
    packed = torch.randn(B, 128, N + 2 * K, H, device="cuda").bfloat16().requires_grad_()
    expected = [x.detach().contiguous().requires_grad_() for x in packed.split([N, K, K], dim=2)]
    for _ in range(2):
        out = tb.attention(*packed.split([N, K, K], dim=2), WINDOW)
        (found,) = torch.autograd.grad(out.sum(), packed)
        exact = tb.attention(*expected, WINDOW)
        gradients = torch.autograd.grad(exact, expected, torch.ones_like(exact))
        assert torch.equal(out, exact) and torch.equal(found, torch.cat(gradients, dim=2))
    assert len(launches) == 8 and [len(x._program.steps) for x in launches[:2]] == [1, 3]
    assert tb.stats().strides == tb.stats().copies == 2 * (3 + 4)


def test_a_thread_that_has_asked_cuda_for_nothing():
    """Its first call finds no context, and memory in torch's cache: a launch would end the process."""
    made = [x.requires_grad_() for x in tokens(128, torch.bfloat16)]

    def call():
        out = tb.attention(*made, WINDOW)
        with torch.autograd.set_multithreading_enabled(False):
            return out.detach(), *torch.autograd.grad(out, made, torch.ones_like(out))

    expected, found = call(), []
    torch.cuda.synchronize()
    thread = threading.Thread(target=lambda: found.extend(call()))
    thread.start()
    thread.join()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_memory_is_flat_over_100_000_steps(way):
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


def test_handles_that_are_dropped_leave_no_memory_behind(way):
    """Also where torch launches every program, so that no program of JAX's comes by to wait for torch."""
    token = [x.to(torch.bfloat16) for x in tokens(1)]
    rings = jax.devices()[0].memory_stats

    with torch.no_grad():
        for i in range(200):
            ring = tb.RingBuffer.empty(B, K, H, rj.Window.causal(8192), device="cuda")
            tb.attend(*token, ring)
            del ring
            if i == 20:
                gc.collect()
                torch.cuda.synchronize()
                before = rings()["bytes_in_use"]
    torch.cuda.synchronize()
    assert rings()["bytes_in_use"] - before < 4 * 2 * B * K * 8192 * H * 2


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


def test_a_cuda_graph_captures_what_torch_launches():
    q, k, v = tokens(160, torch.bfloat16)
    tb.attention(q, k, v, WINDOW)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = tb.attention(q, k, v, WINDOW)
    v.fill_(3.0)
    graph.replay()
    torch.cuda.synchronize()
    assert bool((out == 3.0).all())


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_a_cuda_graph_captures_a_decoding_step():
    """Its replays go on where the ring is, each with what the inputs hold then."""
    made = tokens(80, torch.bfloat16)
    rings = [tb.RingBuffer.empty(B, K, H, WINDOW, device="cuda") for _ in range(2)]
    static = [x[:, :1].contiguous() for x in made]
    for ring in rings:
        tb.attend(*static, ring)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = tb.attend(*static, rings[0])
    for t in range(1, 80):
        for x, new in zip(static, made, strict=True):
            x.copy_(new[:, t : t + 1])
        graph.replay()
        assert torch.equal(out, tb.attend(*static, rings[1])[0])
    assert rings[0].length.tolist() == rings[1].length.tolist() == [80] * B
    empty = tb.RingBuffer.empty(B, K, H, WINDOW, device="cuda")
    with pytest.raises(RuntimeError, match="a CUDA graph cannot capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        tb.attend(*static, empty)  # its memory is still JAX's: take a step first


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_a_cuda_graph_cannot_capture_jax():
    q, k, v = tokens(160)
    tb.attention(q, k, v, WINDOW)
    torch.cuda.synchronize()
    graph = torch.cuda.graph(torch.cuda.CUDAGraph())
    with pytest.raises(RuntimeError, match="a CUDA graph cannot capture a call of JAX"), graph:
        tb.attention(q, k, v, WINDOW)
