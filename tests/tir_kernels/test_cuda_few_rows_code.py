"""What CUDA's compiler makes of the kernels for few rows, for the linears of an 8B model."""

from __future__ import annotations

from typing import Any

import pytest

from mlcawq.build.nvrtc import find_nvrtc
from tests.tir_kernels.cuda_emulator import why_not
from tests.tir_kernels.machine_code import CompiledModule, KernelCode
from tests.tir_kernels.test_cuda_machine_code import ARCHS, check_kernel, check_launch
from tir_kernels._tvm import PrimFunc
from tir_kernels.cuda.by_rows import by_rows
from tir_kernels.cuda.dense import dense_function
from tir_kernels.cuda.dense_few_rows import dense_few_rows
from tir_kernels.cuda.epilogue import Epilogue
from tir_kernels.cuda.few_rows_schedule import (
    ROW_LIMITS,
    dense_few_rows_schedule,
    stock_few_rows_schedule,
    tiled_few_rows_schedule,
)
from tir_kernels.cuda.stock_few_rows import stock_few_rows
from tir_kernels.cuda.tiled_few_rows import tiled_few_rows
from tir_kernels.cuda.w4a16 import w4a16_function
from tir_kernels.layouts import AUTOAWQ, TILED, LinearShape

_missing = why_not() or (None if find_nvrtc()[0] else find_nvrtc()[1])
pytestmark = pytest.mark.skipif(_missing is not None, reason=str(_missing))

DTYPE = "float16"


def for_all_limits(kernel_for: Any) -> Any:
    *kernels, last = (kernel_for(rows) for rows in ROW_LIMITS)
    return by_rows(ROW_LIMITS[:-1], kernels, last)


def tiled(capability: int, shape: LinearShape, silu: bool = False) -> PrimFunc:
    epilogue = Epilogue(shape.N, DTYPE, silu)
    multiply = for_all_limits(
        lambda rows: tiled_few_rows(
            shape, DTYPE, tiled_few_rows_schedule(capability, shape, rows), epilogue
        )
    )
    return w4a16_function(shape, TILED, DTYPE, False, epilogue, multiply)


def stock(capability: int, shape: LinearShape) -> PrimFunc:
    epilogue = Epilogue(shape.N, DTYPE)
    multiply = for_all_limits(
        lambda rows: stock_few_rows(
            shape, DTYPE, stock_few_rows_schedule(capability, shape, rows), epilogue
        )
    )
    return w4a16_function(shape, AUTOAWQ, DTYPE, False, epilogue, multiply)


def dense(capability: int, K: int, N: int) -> PrimFunc:
    epilogue = Epilogue(N, "float32")
    multiply = for_all_limits(
        lambda rows: dense_few_rows(
            K, DTYPE, dense_few_rows_schedule(capability, K, N, rows), epilogue
        )
    )
    return dense_function(K, DTYPE, False, epilogue, multiply)


def check(
    kernels: CompiledModule, name: str, arch: str, shapes: list[Any], weight: str, width: int
) -> None:
    """shapes: of the arguments between x and out, then of a row of x and of out."""
    *between, (K, _), (N, out_dtype) = shapes
    for m in ROW_LIMITS:
        arguments = [((m, K), DTYPE), *between, ((m, N), out_dtype)]
        ((kernel, launch),) = kernels.launches(name, *arguments)
        check_kernel(kernel)
        check_launch(kernel, launch, arch)
        assert weight_loads(kernel, weight) == {width}, kernel.name
        assert kernel.ptx.count("mma.sync") > 0
        assert kernel.ptx.count("shfl", "vote") == 0, "lanes exchange nothing"


def weight_loads(kernel: KernelCode, weight: str) -> set[int]:
    """How many bytes a lane reads of the weight at once."""
    place = kernel.parameters.index(weight)
    loads = kernel.ptx.global_loads()
    return {load.instruction.bytes for load in loads if place in load.parameters}


@pytest.mark.parametrize("arch", ARCHS)
def test_linears_of_an_8b_model(arch: str) -> None:
    capability = int(arch[3:])
    qkv = LinearShape(4096, 6144, 128)
    gate_up, down = LinearShape(4096, 28672, 128), LinearShape(14336, 4096, 32)
    module = CompiledModule(
        {
            "gate_up": tiled(capability, gate_up, silu=True),
            "down": tiled(capability, down),
            "stock": stock(capability, qkv),
            "lm_head": dense(capability, 4096, 128256),
        },
        arch,
    )

    def quantized(shape: LinearShape, layout: str, stored: int) -> list[Any]:
        return [*shape.parameters(layout).values(), (shape.K, DTYPE), (stored, DTYPE)]

    check(module, "gate_up", arch, quantized(gate_up, TILED, 14336), "qweight", 16)
    check(module, "down", arch, quantized(down, TILED, 4096), "qweight", 16)
    check(module, "stock", arch, quantized(qkv, AUTOAWQ, 6144), "qweight", 4)
    lm_head = [((128256, 4096), DTYPE), (4096, DTYPE), (128256, "float32")]
    check(module, "lm_head", arch, lm_head, "weight", 16)
