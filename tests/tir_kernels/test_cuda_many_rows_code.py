"""What CUDA's compiler makes of the kernels for many rows, for the linears of an 8B model."""

from __future__ import annotations

from typing import Any

import pytest

from mlcawq.build.nvrtc import find_nvrtc
from tests.tir_kernels.cuda_emulator import Launch, why_not
from tests.tir_kernels.machine_code import SHARED_LIMIT, CompiledModule, KernelCode
from tests.tir_kernels.test_cuda_machine_code import ARCHS, check_kernel, check_launch
from tir_kernels._tvm import PrimFunc
from tir_kernels.cuda.dense import dense_function
from tir_kernels.cuda.epilogue import Epilogue
from tir_kernels.cuda.many_rows_entry import dense_problem, many_rows_kernels, w4a16_problem
from tir_kernels.cuda.many_rows_schedule import Problem, many_rows_schedule, resident_blocks
from tir_kernels.cuda.tile import STEPS
from tir_kernels.cuda.w4a16 import w4a16_function
from tir_kernels.layouts import AUTOAWQ, TILED, LinearShape

_missing = why_not() or (None if find_nvrtc()[0] else find_nvrtc()[1])
pytestmark = pytest.mark.skipif(_missing is not None, reason=str(_missing))

DTYPE = "float16"
LIMITS = {32: 32, 64: 64, 2048: None}  # a number of rows, and the limit of the kernel for it

QKV = LinearShape(4096, 6144, 128)
GATE_UP = LinearShape(4096, 28672, 128)
DOWN = LinearShape(14336, 4096, 32)
SMALL = LinearShape(896, 1152, 64)
LM_HEAD = (4096, 128256)


class Linear:
    """A linear's kernels and what they are called with."""

    def __init__(
        self, capability: int, shape: LinearShape, layout: str, bias: bool = False
    ) -> None:
        epilogue = Epilogue(shape.N, DTYPE, silu=shape == GATE_UP and layout == TILED)
        self.problem: Problem = w4a16_problem(shape, DTYPE, epilogue, layout)
        self.function: PrimFunc = w4a16_function(
            shape, layout, DTYPE, bias, epilogue, many_rows_kernels(capability, self.problem, DTYPE)
        )
        self.weights: list[Any] = list(shape.parameters(layout).values())
        if bias:
            self.weights.append(((shape.N,), DTYPE))
        self.weight = "qweight"


class Dense(Linear):
    def __init__(self, capability: int, K: int, N: int, out_dtype: str) -> None:
        epilogue = Epilogue(N, out_dtype)
        self.problem = dense_problem(K, N, epilogue)
        multiply = many_rows_kernels(capability, self.problem, DTYPE)
        self.function = dense_function(K, DTYPE, False, epilogue, multiply)
        self.weights = [((N, K), DTYPE)]
        self.weight = "weight"


def check(module: CompiledModule, name: str, linear: Linear, arch: str) -> None:
    problem, capability = linear.problem, int(arch[3:])
    epilogue = problem.epilogue
    for m, limit in LIMITS.items():
        x, out = ((m, problem.K), DTYPE), ((m, epilogue.stored), epilogue.out_dtype)
        ((kernel, launch),) = module.launches(name, x, *linear.weights, out)
        schedule = many_rows_schedule(capability, problem, limit)
        check_kernel(kernel)
        check_launch(kernel, launch, arch)
        assert launch.threads == schedule.threads
        check_residence(kernel, launch, resident_blocks(capability, problem, schedule))
        check_loads(kernel, linear.weight, arch)
        if schedule.wgmma:
            check_wgmma(kernel)
        else:
            assert kernel.ptx.count("mma.sync") > 0
            assert kernel.ptx.count("ldmatrix.sync.aligned.m8n8.x4") > 0


def check_residence(kernel: KernelCode, launch: Launch, blocks: int) -> None:
    """A multiprocessor holds as many blocks as the schedule was judged with."""
    assert blocks * -(-kernel.report.registers // 8) * 8 * launch.threads <= 64 << 10, launch


def check_loads(kernel: KernelCode, weight: str, arch: str) -> None:
    """Activations and weights are read 16 bytes at a time, and past the registers from sm_80 on."""
    x = kernel.parameters.index("x")
    place = kernel.parameters.index(weight)
    loads = [load for load in kernel.ptx.global_loads() if {x, place} & load.parameters]
    assert {load.instruction.bytes for load in loads} == {16}, kernel.name
    wanted = "ld.global.nc" if arch == "sm_75" else "cp.async.cg"
    assert all(load.instruction.opcode.startswith(wanted) for load in loads), kernel.name


def check_wgmma(kernel: KernelCode) -> None:
    """Products are asynchronous: the assembler waits where we do and nowhere else."""
    waits = kernel.ptx.count("wgmma.wait_group")
    assert waits == STEPS + 1  # after each step of the loop, and after the loop
    assert kernel.ptx.count("mma.sync", "ldmatrix") == 0
    if kernel.sass is not None:
        found = [line for line in kernel.sass if "WARPGROUP.DEPBAR" in line]
        assert len(found) == waits, kernel.name


def compile_and_check(arch: str, linears: dict[str, Linear]) -> None:
    module = CompiledModule({name: one.function for name, one in linears.items()}, arch)
    for name, linear in linears.items():
        check(module, name, linear, arch)


@pytest.mark.parametrize("arch", ARCHS)
def test_tiled_linears(arch: str) -> None:
    capability = int(arch[3:])
    compile_and_check(
        arch,
        {
            "gate_up": Linear(capability, GATE_UP, TILED),
            "down": Linear(capability, DOWN, TILED),
        },
    )


@pytest.mark.parametrize("arch", [pytest.param(a, marks=pytest.mark.slow) for a in SHARED_LIMIT])
def test_other_linears(arch: str) -> None:
    capability = int(arch[3:])
    compile_and_check(
        arch,
        {
            "qkv": Linear(capability, QKV, TILED, bias=True),
            "small": Linear(capability, SMALL, TILED, bias=True),
            "stock": Linear(capability, QKV, AUTOAWQ),
            "small_stock": Linear(capability, SMALL, AUTOAWQ, bias=True),
            "lm_head": Dense(capability, *LM_HEAD, "float32"),
            "dense": Dense(capability, 4096, 4096, DTYPE),
        },
    )
