"""Linears on Vulkan: against the numpy reference, for every path through m, and as WGSL."""

from __future__ import annotations

import re
from math import prod
from typing import Any

import numpy as np
import pytest

from mlcawq.engine import wgpu
from tests.tir_kernels.backends import WEBGPU, Random, VulkanKernel, backend_named
from tests.tir_kernels.kernels import poisoned, relative_error
from tir_kernels import dispatch, reference
from tir_kernels._tvm import IRModule, PrimFunc, Target, tvm
from tir_kernels.layouts import AUTOAWQ, TILED
from tir_kernels.vulkan import limits, schedule

ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 64, 127, 512)
A_FEW_ROWS = (1, 4, 5, 16, 33, 70)  # of every kernel
TOLERANCE = {"float16": 2e-3, "float32": 2e-5}

QUANTIZED = [
    # K, N, group, dtype, bias, layout, silu
    (96, 24, 32, "float16", True, TILED, False),  # half a tile of inputs, half a stripe
    (896, 40, 64, "float32", False, TILED, False),
    (640, 2064, 128, "float16", False, TILED, False),  # an odd number of stripes, two at once
    (512, 112, 128, "float16", True, TILED, True),
    (160, 16, 32, "float32", False, TILED, True),
    (96, 24, 32, "float32", True, AUTOAWQ, False),
    (1152, 328, 64, "float16", False, AUTOAWQ, False),
    (384, 40, 128, "float16", True, AUTOAWQ, False),
]
DENSE = [
    # K, N, dtype, out_dtype, bias
    (1000, 264, "float16", "float32", False),
    (100, 37, "float16", "float16", True),
    (6, 3, "float32", "float32", True),
    (384, 2056, "float32", "float32", False),
]


def quantized(rng: Random, K: int, N: int, group: int, scale_dtype: str) -> tuple[np.ndarray, ...]:
    bits = rng.integers(0, 2**32, (K + K // group, N // 8), dtype=np.uint32).view(np.int32)
    scales = (rng.random((K // group, N)) * 0.02 + 0.001).astype(scale_dtype)
    return bits[:K], bits[K:], scales


def check_quantized(
    function: PrimFunc, target: Target, rng: Random, case: tuple[Any, ...], rows: tuple[int, ...]
) -> None:
    K, N, group, dtype, bias, layout, silu = case
    kernel = VulkanKernel(function, target)
    weights = quantized(rng, K, N, group, dtype)
    arrays = reference.tile(*weights, silu=silu) if layout == TILED else weights
    offset = [rng.floats(N, dtype=dtype)] if bias else []
    for m in rows:
        x = rng.floats(m, K, dtype=dtype)
        out = poisoned((m, N // 2 if silu else N), dtype)
        kernel(x, *arrays, *offset, out)
        expected = reference.w4a16_linear(x, *weights, *offset)
        if silu:
            expected = reference.silu_multiply(expected)
        error = relative_error(out, expected)
        assert error < TOLERANCE[dtype], (m, error, rng.seed)


def check_dense(
    function: PrimFunc, rng: Random, case: tuple[Any, ...], rows: tuple[int, ...]
) -> None:
    K, N, dtype, out_dtype, bias = case
    kernel = VulkanKernel(function, WEBGPU)
    weight = rng.floats(N, K, dtype=dtype)
    offset = [rng.floats(N, dtype=dtype)] if bias else []
    for m in rows:
        x = rng.floats(m, K, dtype=dtype)
        out = poisoned((m, N), out_dtype)
        kernel(x, weight, *offset, out)
        error = relative_error(out, reference.dense_linear(x, weight, *offset))
        assert error < TOLERANCE[out_dtype], (m, error, rng.seed)


@pytest.fixture(scope="module")
def device() -> None:
    backend_named("vulkan")


def w4a16_linear(case: tuple[Any, ...], target: Target = WEBGPU) -> PrimFunc:
    K, N, group, dtype, bias, layout, silu = case
    return dispatch.w4a16_linear(
        target, K, N, group, dtype, bias, layout=layout, silu=silu, scale_dtype=dtype
    )


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("case", QUANTIZED, ids=str)
def test_w4a16(case: tuple[Any, ...], rng: Random) -> None:
    check_quantized(w4a16_linear(case), WEBGPU, rng, case, ROWS)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("case", DENSE, ids=str)
def test_dense(case: tuple[Any, ...], rng: Random) -> None:
    K, N, dtype, out_dtype, bias = case
    function = dispatch.dense_linear(WEBGPU, K, N, dtype, bias, out_dtype)
    check_dense(function, rng, case, ROWS)


@pytest.mark.slow
@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("layout", [TILED, AUTOAWQ])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(("factor", "N"), [(1, 8), (3, 72), (7, 1024), (34, 2064)])
def test_w4a16_of_many_shapes(
    layout: str, group: int, dtype: str, factor: int, N: int, rng: Random
) -> None:
    case = (group * factor, N, group, dtype, factor % 2 == 1, layout, layout == TILED and N == 1024)
    check_quantized(w4a16_linear(case), WEBGPU, rng, case, ROWS)


@pytest.mark.usefixtures("device")
def test_smallest_workgroups(rng: Random) -> None:
    # 128 invocations are the least that Vulkan promises.
    target = Target({"kind": "webgpu", "max_num_threads": 128}, host={"kind": "llvm"})
    case = (640, 56, 64, "float16", False, TILED, False)
    function = w4a16_linear(case, target)
    assert all(kernel.invocations <= 128 for kernel in kernels_of(function, target))
    check_quantized(function, target, rng, case, A_FEW_ROWS)


@pytest.mark.usefixtures("device")
def test_weights_larger_than_a_binding_go_in_parts(
    rng: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert limits.WINDOW_BIT == wgpu.WINDOW_BIT
    monkeypatch.setattr(limits, "BINDING_BYTES", 2**17)
    # Three parts each, the last one smaller.
    case = (264, 600, "float16", "float32", True)
    function = dispatch.dense_linear(WEBGPU, 264, 600, "float16", True, "float32")
    check_dense(function, rng, case, A_FEW_ROWS)
    quantized_case = (320, 16 * 70, 64, "float16", True, TILED, True)
    check_quantized(w4a16_linear(quantized_case), WEBGPU, rng, quantized_case, A_FEW_ROWS)
    with pytest.raises(NotImplementedError, match="n16k64"):
        w4a16_linear((320, 16 * 71, 64, "float16", True, AUTOAWQ, False))
    vulkan = Target({"kind": "vulkan", "max_storage_buffer_range": 2**17})
    with pytest.raises(NotImplementedError, match="cannot be split"):
        dispatch.dense_linear(vulkan, 264, 600)


@pytest.mark.slow
@pytest.mark.usefixtures("device")
def test_logits_of_a_large_vocabulary(rng: Random) -> None:
    # Larger than the 128 MiB that WebGPU promises, and that software Vulkan has.
    K, N = 896, 151936
    kernel = VulkanKernel(dispatch.dense_linear(WEBGPU, K, N, "float16", False, "float32"), WEBGPU)
    weight = rng.standard_normal((N, K), np.float32).astype(np.float16)
    for m in (1, 3, 9):
        x = rng.floats(m, K)
        out = poisoned((m, N), "float32")
        kernel(x, weight, out)
        expected = x.astype(np.float32) @ weight.astype(np.float32).T
        assert relative_error(out, expected) < 1e-5, (m, rng.seed)


@pytest.mark.usefixtures("device")
def test_sums_are_fp32() -> None:
    # In fp16, 4096 ones added to 2048 stay 2048.
    K = 4096
    kernel = VulkanKernel(dispatch.dense_linear(WEBGPU, K, 8, "float16", False, "float32"), WEBGPU)
    for m in (1, 9):
        out = poisoned((m, 8), "float32")
        kernel(np.ones((m, K), np.float16), np.ones((8, K), np.float16), out)
        assert (out == K).all()


@pytest.mark.usefixtures("device")
def test_silu_of_large_values() -> None:
    # exp of what WGSL has no infinity for, in either direction.
    case = (64, 16, 64, "float32", True, TILED, True)
    kernel = VulkanKernel(w4a16_linear(case), WEBGPU)
    zeros = reference.tile(
        np.zeros((64, 2), np.int32), np.zeros((1, 2), np.int32), np.ones((1, 16), np.float32)
    )
    offset = np.repeat(np.array([-1e4, 1e4, 3, 2], np.float32), 4)
    for m in (1, 9):
        out = poisoned((m, 8), "float32")
        kernel(np.ones((m, 64), np.float32), *zeros, offset, out)
        np.testing.assert_allclose(out, np.tile(np.repeat([0, 2e4], 4), (m, 1)), atol=1e-6)


class KernelSource:
    """One kernel as WGSL."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.bindings = dict(re.findall(r"var<storage, \w+> (\w+) : array<([^;]+)>;", source))
        shared = re.findall(r"var<workgroup> \w+ : array<(?:vec(\d)<)?f32>?, (\d+)>;", source)
        self.shared_bytes = sum(4 * int(lanes or 1) * int(size) for lanes, size in shared)
        assert len(shared) == source.count("var<workgroup>")
        (size,) = re.findall(r"@workgroup_size\((\d+), (\d+), (\d+)\)", source)
        self.invocations = prod(map(int, size))

    def loads_whole(self, name: str) -> bool:
        """Whether every load of a binding gets an element whole, of which there is at least one."""
        loads = [line for line in self.source.splitlines() if f"{name}[" in line]
        return bool(loads) and not any("][" in line for line in loads)


def kernels_of(function: PrimFunc, target: Target = WEBGPU) -> list[KernelSource]:
    with target:
        module = IRModule({"main": function.with_attr("global_symbol", "main")})
        built = tvm.compile(module, target=target)
    source = built.mod.imports[0].inspect_source()
    kernels = re.split(r"//-+\n// Function: \w+\n//-+\n", source)[1:]
    assert all(kernel.count("@compute") == 1 for kernel in kernels)
    return [KernelSource(kernel) for kernel in kernels]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("layout", [TILED, AUTOAWQ])
def test_quantized_kernels_stay_within_limits(layout: str, dtype: str) -> None:
    kernels = kernels_of(w4a16_linear((4096, 28672, 128, dtype, True, layout, layout == TILED)))
    assert len(kernels) == 6  # for 1, 4, 8, 16, 64 and more rows
    for kernel in kernels:
        assert kernel.shared_bytes <= limits.WORKGROUP_BYTES
        assert kernel.invocations <= limits.WORKGROUP_INVOCATIONS
        assert len(kernel.bindings) <= 8  # in a shader stage, at least
        assert "subgroup" not in kernel.source
        assert ("f16" in kernel.source) == (dtype == "float16")
        if layout == TILED:
            assert kernel.bindings["words_ptr"] == "vec4<i32>"
            assert kernel.loads_whole("words_ptr")
            assert kernel.loads_whole("x_view_ptr")


@pytest.mark.parametrize(("dtype", "vector"), [("float16", "vec4<u32>"), ("float32", "vec4<f32>")])
def test_dense_weights_are_loaded_16_bytes_at_a_time(dtype: str, vector: str) -> None:
    for kernel in kernels_of(dispatch.dense_linear(WEBGPU, 896, 4096, dtype, True, "float32")):
        for name in ("weight_view_ptr", "x_view_ptr"):
            assert kernel.bindings[name] == vector
            assert kernel.loads_whole(name)
        assert kernel.shared_bytes <= limits.WORKGROUP_BYTES
        assert kernel.invocations <= limits.WORKGROUP_INVOCATIONS
        assert ("f16" in kernel.bindings["bias_vector_ptr"]) == (dtype == "float16")


def test_schedules_suit_shapes_and_limits() -> None:
    least = limits.Limits()
    for K in (896, 3584, 4096, 4864, 14336, 18944):
        shape = dispatch.LinearShape(K, 4096, 128)
        one = schedule.tiled_few_rows(shape, least)[0]
        chunk = one.slices * one.depth
        assert -shape.tile_columns % chunk <= shape.tile_columns / 6, (K, one)
    for small in ({"max_num_threads": 64}, {"max_shared_memory_per_block": 8192}):
        with pytest.raises(ValueError, match="too small"):
            limits.limits_of(Target({"kind": "vulkan", **small}))
