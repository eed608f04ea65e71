"""Programs that torch launches itself: what their StableHLO says is what is done. Kernels are played, on a CPU."""

import ctypes
import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch_bridge as tb  # noqa: E402 (torch may be missing)
from torch_bridge import _by_row, _held, _launch, _stablehlo  # noqa: E402

SHAPE = (3, 4)
F32, I32 = jax.ShapeDtypeStruct(SHAPE, jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)


def at(pointer, size, kind=ctypes.c_float):
    return np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(kind)), (size,))


def twice(x, out):
    at(out, 12)[:] = 2 * at(x, 12)


def append(x, start, length, ring, out, new_length, new_ring):
    """Writes the new length, as a part of a grid may, before others have read the one it starts from."""
    at(new_length, 1, ctypes.c_int)[:] = at(length, 1, ctypes.c_int) + 1
    at(out, 12)[:] = at(x, 12) + at(start, 1, ctypes.c_int)
    at(new_ring, 12)[:] = at(ring, 12) + at(x, 12)


KERNELS = {"twice": twice, "append": append}


def played(module, device):
    return lambda pointers: KERNELS[module.decode()](*pointers)


def kernel(name, types, *operands, aliases=None):
    return jax.ffi.ffi_call("mosaic_gpu_v2", types, input_output_aliases=aliases)(*operands, module=name)


def lowered(f, *specs, **options):
    return jax.jit(f, **options).trace(*specs).lower(lowering_platforms=("cuda",)).compiler_ir()


def launched(f, *specs, in_place=0, **options):
    steps = _stablehlo.read(lowered(f, *specs, **options), torch.device("cpu"), played, in_place=in_place)
    return _launch.Launched(steps)


def spec(x):
    return jax.ShapeDtypeStruct(tuple(x.shape), str(x.dtype).removeprefix("torch."))


def test_arithmetic_around_kernels():
    """What a backward pass computes before its kernels: products in float32, minus infinities, padding, stacking."""

    def f(x, y, g):
        products = jnp.einsum("abc,abc->ba", x, g, preferred_element_type=jnp.float32)
        z = jnp.where(y == -jnp.inf, jnp.inf, kernel("twice", F32, y * 1.5))
        nothing = jnp.where(y == -jnp.inf, 0.0, jnp.zeros(SHAPE))
        padded = jnp.pad(products - 0.0, ((0, 0), (0, 2)), constant_values=7.0)
        both = jnp.stack([padded, z - nothing * 1.0], axis=1)
        return both, z.astype(jnp.bfloat16), jnp.swapaxes(z[1:, ::2], 0, 1)

    x, g = (torch.randn(2, 3, 5).bfloat16() for _ in range(2))
    y = torch.randn(SHAPE)
    y[1, 2] = -torch.inf
    both, half, turned = launched(f, *map(spec, (x, y, g)))([x, y, g])
    z = torch.where(y == -torch.inf, torch.inf, 3 * y)
    assert torch.equal(both[:, 1], z) and torch.equal(half, z.bfloat16()) and torch.equal(turned, z[1:, ::2].T)
    assert both.is_contiguous() and half.is_contiguous() and turned.is_contiguous()
    exact = torch.einsum("abc,abc->ba", x.double(), g.double())
    torch.testing.assert_close(both[:, 0, :2].double(), exact, atol=1e-5, rtol=1e-5)
    assert (both[:, 0, 2:] == 7.0).all()


def played_by_row(results, wide, narrow):
    """A kernel that computes the expressions of rows, in NumPy."""
    shape, count = wide[0].shape, len(wide)

    def kernel(*pointers):
        sizes = [(16, *shape)] * count + [(32, shape[0], shape[2], shape[1])] * len(narrow)
        given = []
        for pointer, (bits, *of) in zip(pointers, sizes, strict=False):
            x = at(pointer, int(np.prod(of)), {16: ctypes.c_uint16, 32: ctypes.c_float}[bits]).reshape(of)
            given.append((x.astype(np.uint32) << 16).view(np.float32) if bits == 16 else x)

        def value(x):
            if isinstance(x, _by_row.Wide):
                return np.einsum("btnh,btnh->bnt", given[x.left], given[x.right])
            if isinstance(x, _by_row.Narrow):
                return given[count + x.number]
            if isinstance(x, _by_row.Apply):
                operands = map(value, x.operands)
                return np.where(*operands) if x.function == "select" else _by_row.FUNCTIONS[x.function](*operands)
            return x

        rows = np.stack([np.broadcast_to(value(x), (shape[0], shape[2], shape[1])) for x in results], axis=2)
        at(pointers[-1], rows.size)[:] = rows.reshape(-1)

    KERNELS["by row"] = kernel
    made = jax.ShapeDtypeStruct((shape[0], shape[2], len(results), shape[1]), jnp.float32)
    return jax_kernel("by row", made, *wide, *narrow)


jax_kernel = kernel


def before_a_backward_pass(g, out, lse, g_lse, *, size=64):
    """What ringjax computes there, of one row of a batch, and a kernel that reads it."""
    delta = jnp.einsum("btnh,btnh->bnt", g, out, preferred_element_type=jnp.float32)
    delta = delta - jnp.where(lse == -jnp.inf, 0.0, g_lse) * jnp.ones((), jnp.float32)
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse * 1.5)
    lse, delta = jax.lax.optimization_barrier((lse, delta))
    more = ((0, 0), (0, 0), (0, size - lse.shape[2]))
    stacked = jnp.stack([jnp.pad(lse, more, constant_values=jnp.inf), jnp.pad(delta, more)], axis=2)
    return kernel("copy", jax.ShapeDtypeStruct(stacked.shape, jnp.float32), stacked)


@pytest.mark.parametrize(
    ("queries", "with_lse", "whole"),
    [(64, True, True), (64, False, True), (60, True, False)],
    ids=["with the lse's gradient", "without", "padded"],
)
def test_arithmetic_on_rows_is_one_kernel(monkeypatch, queries, with_lse, whole):
    """Of whole tiles; where rows have to be padded, torch does it."""
    KERNELS["copy"] = lambda x, out: at(out, 2 * 3 * 2 * 64).__setitem__(slice(None), at(x, 2 * 3 * 2 * 64))
    monkeypatch.setattr(_stablehlo, "by_row", played_by_row)
    g, out = (torch.randn(2, queries, 3, 64).bfloat16() for _ in range(2))
    lse, g_lse = (torch.randn(2, 3, queries) for _ in range(2))
    lse[1, 2, 5] = -torch.inf
    tensors = [g, out, lse, g_lse][: 3 + with_lse]

    def program(*arrays):
        return before_a_backward_pass(*arrays, *([] if with_lse else [jnp.zeros_like(arrays[2])]))

    found = launched(program, *map(spec, tensors))
    assert ((len(found._program.steps), found._program.operations) == (2, 1)) == whole
    (both,) = found(tensors)
    exact = torch.einsum("btnh,btnh->bnt", g.double(), out.double())
    exact -= torch.where(lse == -torch.inf, 0.0, g_lse) if with_lse else 0.0
    assert torch.equal(both[:, :, 0, :queries], torch.where(lse == -torch.inf, torch.inf, lse * 1.5))
    torch.testing.assert_close(both[:, :, 1, :queries].double(), exact, atol=1e-5, rtol=1e-5)


def test_without_such_a_kernel_torch_does_the_arithmetic(monkeypatch, caplog):
    def broken(*_):
        raise AttributeError("another version of JAX")

    monkeypatch.setattr(_stablehlo, "by_row", broken)
    KERNELS["copy"] = lambda x, out: at(out, 384).__setitem__(slice(None), at(x, 384))
    g, lse = torch.randn(1, 64, 3, 64).bfloat16(), torch.randn(1, 3, 64)
    with caplog.at_level("DEBUG", "torch_bridge"):
        found = launched(before_a_backward_pass, *map(spec, (g, g, lse, lse)))
    assert "no kernel for rows: AttributeError: another version of JAX" in caplog.text
    (both,) = found([g, g, lse, lse])
    torch.testing.assert_close(both[:, :, 1], torch.einsum("btnh,btnh->bnt", g.float(), g.float()) - lse)


def test_tensors_are_laid_out_as_kernels_read_them():
    """Slices, what is turned or expanded, what begins between two multiples of 16 bytes: copied, and counted."""
    found = launched(lambda x, y: kernel("twice", F32, x - kernel("twice", F32, y)), F32, F32)
    tb.reset_stats()
    storage = torch.arange(100.0)
    x = storage[1:13].view(SHAPE)
    assert x.data_ptr() % 16 and x.is_contiguous()
    for y in (torch.randn(3, 8)[:, ::2], torch.randn(4, 3).T, torch.tensor(2.0).expand(3, 4)):
        given = found.given([x, None, y])
        assert all(z.is_contiguous() and z.data_ptr() % 16 == 0 for z in given)
        assert torch.equal(found(given)[0], 2 * (x - 2 * y))
    assert (tb.stats().copies, tb.stats().strides, tb.stats().alignment) == (6, 3, 3)
    ready = found(given)[0]
    assert found.given([ready])[0] is ready and tb.stats().copies == 6


def test_what_needs_no_launch_is_none():
    """Padding by nothing, factors of 1, constants: a program of one kernel is that kernel alone."""

    def f(x):
        padded = jnp.pad(x, ((0, 0), (0, 0))) * 1.0 - 0.0
        unused = kernel("twice", F32, x + 1.0)
        return kernel("twice", F32, padded), unused

    found = launched(lambda x: f(x)[0], F32)
    x = torch.randn(SHAPE)
    assert torch.equal(found([x])[0], 2 * x) and found._program.operations == 0 and len(found._program.steps) == 1


def step(rings, x):
    ring, length = rings
    out, length, ring = kernel("append", [F32, I32, F32], x, length, length, ring, aliases={2: 1, 3: 2})
    return out.reshape(12), (ring, length)


def test_rings_are_updated_in_place():
    """A kernel that reads a length twice and writes it once gets a copy of what it only reads."""
    found = launched(step, (F32, I32), F32, in_place=2, donate_argnums=0)
    ring, length, x = torch.zeros(SHAPE), torch.tensor([5], dtype=torch.int32), torch.ones(SHAPE)
    for n in range(5, 8):
        (out,) = found([ring, length, x])
        assert (out == 1.0 + n).all() and length.item() == n + 1 and (ring == n - 4.0).all()
        assert out.shape == (12,) and out.data_ptr() != x.data_ptr()


def add(total, x):
    return kernel("add", F32, x, total, aliases={1: 0})


def test_a_kernel_adds_to_what_another_has_filled():
    """As the fused backward pass does: in memory that is neither an argument's nor anybody else's."""
    KERNELS["fill"] = lambda out: at(out, 12).fill(3.0)
    KERNELS["add"] = lambda x, total, out: np.add(at(total, 12), at(x, 12), out=at(out, 12))
    found = launched(
        lambda x: add(add(kernel("fill", jax.ShapeDtypeStruct((12,), jnp.float32)).reshape(SHAPE), x), x), F32
    )
    x = torch.randn(SHAPE)
    for _ in range(2):
        assert torch.equal(found([x])[0], 3.0 + x + x)


@pytest.mark.parametrize(
    ("f", "specs", "in_place", "why"),
    [
        (lambda x: x * 2.0, [F32], 0, "0 kernels"),
        (lambda x: kernel("twice", F32, jnp.sin(x)), [F32], 0, "stablehlo.sine"),
        (lambda x: kernel("twice", F32, x) @ x.T, [F32], 0, "a product of matrices"),
        (lambda x: (kernel("twice", F32, x), x), [F32], 0, "results that are arguments"),
        (lambda x: kernel("twice", F32, jnp.asarray(np.arange(12.0, dtype="f4").reshape(3, 4)) * x), [F32], 0, "const"),
        (lambda x: kernel("twice", F32, jnp.pad(x[1:], ((1, 0), (0, 0)))), [F32], 0, "padding in front"),
        (lambda x: [kernel("twice", F32, x).reshape(y) for y in (12, (2, 6))], [F32], 0, "or one another"),
        (lambda x: (kernel("twice", F32, x), jnp.zeros(3)), [F32], 0, "results that are constants"),
        (lambda x: add(zeros := kernel("fill", F32), x) - zeros, [F32], 0, "read after it was written to"),
        (lambda x: jax.ffi.ffi_call("another", F32)(x), [F32], 0, "another"),
        (lambda r, x: step(r, x), [(F32, I32), F32], 0, "to what is neither a ring nor"),
        (lambda r, x: (step(r, x)[0] + r[0].reshape(12), step(r, x)[1]), [(F32, I32), F32], 2, "after it was written"),
        (lambda r, x: (step(r, x)[0], (r[0] * 2.0, step(r, x)[1][1])), [(F32, I32), F32], 2, "after it was written"),
        (lambda r, x: (kernel("twice", F32, x), (r[0] * 2.0, r[1])), [(F32, I32), F32], 2, "not updated in place"),
    ],
)
def test_what_is_not_known_is_left_to_jax(f, specs, in_place, why):
    with pytest.raises(_stablehlo.Unknown, match=why):
        launched(f, *specs, in_place=in_place, **({"donate_argnums": 0} if in_place else {}))


def test_too_much_arithmetic_is_left_to_jax():
    def f(x):
        for n in range(20):
            x = x * (1.5 + n)
        return kernel("twice", F32, x)

    with pytest.raises(_stablehlo.Unknown, match="1 kernels and 20 operations"):
        launched(f, F32)


def test_a_jitted_program_is_lowered_for_tensors(monkeypatch, caplog):
    """With None where it is given none; what is left to JAX says why, to who listens."""
    monkeypatch.setattr(_launch, "_compiled", played)
    program = jax.jit(lambda rings, x, nothing, y: step(rings, x if nothing is None else y), donate_argnums=0)
    ring, length, x, y = torch.zeros(SHAPE), torch.tensor([5], dtype=torch.int32), torch.ones(SHAPE), torch.zeros(SHAPE)
    found = _launch._build(program, [x, None, y], (F32, I32), x.device)
    (out,) = found([ring, length, x, y])
    assert (out == 6.0).all() and length.item() == 6 and torch.equal(ring, x)
    with caplog.at_level("DEBUG", "torch_bridge"):
        assert _launch._build(jax.jit(jnp.sin), [x], None, x.device) is None
    assert "left to JAX's runtime: Unknown: stablehlo.sine" in caplog.text


@pytest.mark.parametrize("known", [True, False], ids=["jax 0.11's launcher", "another"])
def test_jaxs_launcher_runs_on_torchs_stream_in_a_thread_with_a_context(monkeypatch, known):
    """A thread that has asked CUDA for nothing has no context, and a launch there would end the process."""
    core = pytest.importorskip("jax.experimental.mosaic.gpu.core")
    kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p))
    asked, calls, its_torch = [], [], torch

    def compiled(module):
        torch, function, another = its_torch, 7, None
        launch_c = kind(lambda *given: calls.append((module, *given[:2], given[2][:3])))

        def launch(pointers, device):
            launch_c(function, torch.cuda.default_stream(device)._as_parameter_, pointers)

        def another_launch(pointers, device):
            assert another is None and torch.device(device) == its_torch.device("cuda", 3)
            launch_c(function, torch.cuda.default_stream(device)._as_parameter_, pointers)

        return (launch if known else another_launch), None

    monkeypatch.setattr(core, "_compile_as_torch_gpu_kernel", compiled)
    monkeypatch.setattr(_launch, "current_stream", lambda index: 10 + index)
    monkeypatch.setattr(torch.cuda, "mem_get_info", asked.append)
    monkeypatch.setattr(_launch, "_thread", _launch._Thread())
    launch = _launch._compiled(b"a kernel", torch.device("cuda", 3))
    launch([1, 2, 3])
    assert calls[-1] == (b"a kernel", 7, 13, [1, 2, 3]) and asked == [3]
    for _ in range(2):
        thread = threading.Thread(target=lambda: [launch([4, 5, 6]) for _ in range(2)])
        thread.start()
        thread.join()
    assert calls[-1] == (b"a kernel", 7, 13, [4, 5, 6]) and asked == [3] * 3


def test_a_ring_is_lent_to_torch_and_taken_back(monkeypatch):
    """Its memory stays; streams wait for the one that wrote last, and the host before JAX sees it. A GPU is played."""
    stream, events = [3], []

    class Stream(SimpleNamespace):
        def wait_stream(self, other):
            events.append(f"{self.raw} waits for {other.raw}")

        def synchronize(self):
            events.append(f"the host waits for {self.raw}")

    class Step:
        given = staticmethod(lambda tensors: [x for x in tensors if x is not None])

        def __call__(self, tensors):
            k, _, length, written, q, *_ = tensors
            k += 1.0
            length += 1
            written += 1
            return [q * 2.0]

    monkeypatch.setattr(_held, "find", lambda *_: Step())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(_held, "current_stream", lambda index: stream[0])
    monkeypatch.setattr(_held, "torch_stream", lambda device, raw: Stream(raw=raw))
    monkeypatch.setattr(_held.Lease, "move", lambda tensor, raw: events.append(f"used on {raw}"))
    ring = tb.RingBuffer.empty(1, 1, 8, tb.Window.causal(4), dtype=torch.float32, device="cpu")
    ring._device = SimpleNamespace(type="cuda", index=0)
    program, x = _held.Program(print), torch.ones(1, 1, 1, 8)
    assert np.asarray(ring._tree().length).tolist() == [0]  # JAX may remember this
    where = ring._tree().k.unsafe_buffer_pointer()

    assert (ring._step("attend", program, (x, x, x, None)) == 2.0).all()
    assert ring.window == tb.Window.causal(4) and ring.batch == 1 and events == []
    stream[0] = 5
    ring._step("attend", program, (x, x, x, None))
    assert events == ["5 waits for 3"] + ["used on 5"] * 4
    assert ring.length.tolist() == [2] and events[5:] == ["the host waits for 5"]
    assert np.asarray(ring._tree().length).tolist() == [2] and (np.asarray(ring._tree().k) == 2.0).all()
    assert ring._tree().k.unsafe_buffer_pointer() == where and len(events) == 6
    ring._step("attend", program, (x, x, x, None))
    assert len(events) == 6 and ring.length.tolist() == [3]


def test_only_half_precision_on_a_gpu_is_looked_at():
    assert _launch.find(None, [None, torch.zeros(2, dtype=torch.bfloat16)]) is None
