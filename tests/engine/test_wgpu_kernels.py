"""Kernels of TVM's code generator on the WebGPU device."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import tvm
from wgpu_for_tests import Random, compiled, needs_vulkan

from mlcawq.engine import wgpu
from tir_kernels._tvm import T

pytestmark = needs_vulkan

THREADS = 64


def multiply_add(dtype: str) -> tvm.tirx.PrimFunc:
    """out = a * factor + b, elementwise, for any length and any number `factor`."""

    @T.prim_func
    def multiply_add(a: T.handle, b: T.handle, factor: T.float32, out: T.handle):
        n = T.int32()
        A = T.match_buffer(a, (n,), dtype)
        B = T.match_buffer(b, (n,), dtype)
        Out = T.match_buffer(out, (n,), dtype)
        for block in T.thread_binding(T.ceildiv(n, THREADS), thread="blockIdx.x"):
            for thread in T.thread_binding(THREADS, thread="threadIdx.x"):
                i = T.meta_var(block * THREADS + thread)
                if i < n:
                    Out[i] = A[i] * T.Cast(dtype, factor) + B[i]

    return multiply_add


def row_sums(width: int) -> tvm.tirx.PrimFunc:
    """out[i] = sum of row i, by a tree in workgroup memory. width: a power of two."""
    steps = width.bit_length() - 1

    @T.prim_func
    def row_sums(a: T.handle, out: T.handle):
        m = T.int32()
        A = T.match_buffer(a, (m, width), "float32")
        Out = T.match_buffer(out, (m,), "float32")
        for row in T.thread_binding(m, thread="blockIdx.x"):
            for i in T.thread_binding(width, thread="threadIdx.x"):
                partial = T.alloc_buffer((width,), "float32", scope="shared")
                partial[i] = A[row, i]
                for step in T.unroll(steps):
                    T.tvm_storage_sync("shared")
                    if i < T.shift_right(width // 2, step):
                        partial[i] = partial[i] + partial[i + T.shift_right(width // 2, step)]
                if i == 0:
                    Out[row] = partial[0]

    return row_sums


@pytest.fixture(scope="module")
def device() -> tvm.runtime.Device:
    return tvm.device("webgpu", 0)


@pytest.fixture(scope="module")
def add():
    return compiled(multiply_add("float32"))


def poisoned(shape, dtype: str, device) -> tvm.runtime.Tensor:
    return tvm.runtime.tensor(np.full(shape, np.nan, dtype), device=device)


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 4097, 65535 * THREADS, 65535 * THREADS + 1])
def test_any_length_and_scalar_arguments(add, device, n: int) -> None:
    """The last two: as many blocks as a grid dimension has, and one more."""
    random = Random()
    a, b = random.floats(n), random.floats(n)
    factor = float(np.float32(random.floats(1)[0]))
    out = poisoned(n, "float32", device)
    add(tvm.runtime.tensor(a, device=device), tvm.runtime.tensor(b, device=device), factor, out)
    expected = a.astype(np.float64) * factor + b
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_blocks_beyond_a_grid_dimension_run_once(device) -> None:
    """An odd number of blocks beyond 65,535 is folded into a grid with blocks to spare."""
    rows = 65_535 * 2 + 1

    @T.prim_func
    def count(out: T.handle):
        Out = T.match_buffer(out, (rows + 8, 2), "int32")
        for x in T.thread_binding(rows, thread="blockIdx.x"):
            for y in T.thread_binding(2, thread="blockIdx.y"):
                for _ in T.thread_binding(1, thread="threadIdx.x"):
                    Out[x, y] = Out[x, y] + 1

    out = tvm.runtime.tensor(np.zeros((rows + 8, 2), np.int32), device=device)
    compiled(count)(out)
    assert (out.numpy()[:rows] == 1).all()
    assert (out.numpy()[rows:] == 0).all()


@pytest.mark.parametrize("width", [32, 256])
def test_workgroup_memory_and_barriers(device, width: int) -> None:
    random = Random()
    rows = random.floats(77, width)
    out = poisoned(77, "float32", device)
    compiled(row_sums(width))(tvm.runtime.tensor(rows, device=device), out)
    expected = rows.astype(np.float64).sum(axis=1)
    np.testing.assert_allclose(
        out.numpy(), expected, rtol=1e-4, atol=1e-4, err_msg=f"seed {random.seed}"
    )


def test_half_precision(device) -> None:
    if not wgpu.limits().shader_f16:
        pytest.skip("the GPU has no shader-f16")
    random = Random()
    a, b = random.floats(1001, dtype="float16"), random.floats(1001, dtype="float16")
    out = poisoned(1001, "float16", device)
    inputs = (tvm.runtime.tensor(x, device=device) for x in (a, b))
    compiled(multiply_add("float16"))(*inputs, 0.5, out)
    expected = a.astype(np.float64) * 0.5 + b
    error = np.linalg.norm(out.numpy() - expected) / np.linalg.norm(expected)
    assert error < 1e-3, f"seed {random.seed}"


def test_one_tensor_as_input_and_output(add, device) -> None:
    random = Random()
    a, b = random.floats(5000), random.floats(5000)
    x, y = (tvm.runtime.tensor(v, device=device) for v in (a, b))
    add(x, y, 2.0, x)
    np.testing.assert_allclose(x.numpy(), a * 2 + b, rtol=1e-5, atol=1e-5)
    add(y, y, 2.0, y)
    np.testing.assert_allclose(y.numpy(), b * 3, rtol=1e-5, atol=1e-5)


def test_dependent_dispatches_run_in_order_and_in_few_submissions(add, device) -> None:
    count = 5000
    before = wgpu.statistics()
    x, one = (tvm.runtime.tensor(np.full(100, v, "float32"), device=device) for v in (0, 1))
    for _ in range(count):
        add(x, one, 1.0, x)
    assert (x.numpy() == count).all()
    after = wgpu.statistics()
    assert after["dispatches"] - before["dispatches"] == count
    assert after["submissions"] - before["submissions"] < count / 100


def test_threads_share_a_kernel(add, device) -> None:
    wrong: list[int] = []

    def work(value: int) -> None:
        x, y = (tvm.runtime.tensor(np.full(500, v, "float32"), device=device) for v in (0, value))
        for _ in range(100):
            add(x, y, 1.0, x)
        if not (x.numpy() == 100 * value).all():
            wrong.append(value)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_copies_between_dispatches_keep_their_place(add, device) -> None:
    one = tvm.runtime.tensor(np.ones(10, "float32"), device=device)
    x = tvm.runtime.tensor(np.zeros(10, "float32"), device=device)
    seen = []
    for i in range(40):
        add(x, one, 1.0, x)
        copy = tvm.runtime.empty((10,), "float32", device=device)
        x.copyto(copy)
        seen.append(copy)
        if i == 20:
            x.copyfrom(np.full(10, 100, "float32"))
    values = [float(copy.numpy()[3]) for copy in seen]
    assert values == [*range(1, 22), *range(101, 120)]


def test_a_tensor_at_an_offset(add, device) -> None:
    """Host code is handed a pointer into an allocation: the buffer is bound from there on."""
    random = Random()
    data = random.floats(3, 1024)
    whole = tvm.runtime.tensor(data, device=device)
    part = wgpu.window(whole, (1024,), byte_offset=2 * 4096)
    out = poisoned(1024, "float32", device)
    add(part, part, 1.0, out)
    np.testing.assert_array_equal(out.numpy(), data[2] * 2)
    del whole
    np.testing.assert_array_equal(part.numpy(), data[2])
    with pytest.raises(ValueError, match="no part of a contiguous tensor"):
        wgpu.window(part, (1025,))


def test_a_tensor_beyond_one_binding_is_refused_unless_it_comes_in_windows(device) -> None:
    limit = wgpu.limits().max_storage_buffer_binding_size
    if limit > 2**28:
        pytest.skip(f"a binding of this GPU holds {limit} bytes, more than a test should allocate")
    n, rest = limit // 4 + 1000, 1000

    def kernel(part: int, marked: bool) -> tvm.tirx.PrimFunc:
        offset = wgpu.WINDOW_BIT if marked else 0

        @T.prim_func
        def double(a: T.handle, out: T.handle):
            A = T.match_buffer(a, (n,), "float32")
            Out = T.match_buffer(out, (rest,), "float32")
            Part = T.decl_buffer(
                (rest,),
                "float32",
                data=T.handle_add_byte_offset(
                    T.address_of(A[part * (limit // 4)]), T.int64(offset)
                ),
            )
            for i in T.thread_binding(rest, thread="blockIdx.x"):
                for _ in T.thread_binding(1, thread="threadIdx.x"):
                    Out[i] = Part[i] * T.float32(2)

        return double

    random = Random()
    data = np.zeros(n, "float32")
    data[:rest], data[-rest:] = random.floats(rest), random.floats(rest)
    large = tvm.runtime.tensor(data, device=device)
    for part, expected in enumerate((data[:rest], data[-rest:])):
        out = poisoned(rest, "float32", device)
        compiled(kernel(part, marked=True))(large, out)
        np.testing.assert_array_equal(out.numpy(), expected * 2, err_msg=f"seed {random.seed}")
    with pytest.raises(
        ValueError, match=r"'Part_ptr' of the kernel 'double_kernel' has .* windows"
    ):
        compiled(kernel(0, marked=False))(large, out)
