"""What CUDA's compiler makes of the kernels for experts, in the shapes of published models."""

from __future__ import annotations

from typing import Any

import pytest

from mlcawq.build.nvrtc import find_nvrtc
from tests.tir_kernels.cuda_emulator import why_not
from tests.tir_kernels.machine_code import SHARED_LIMIT, CompiledModule
from tests.tir_kernels.test_cuda_few_rows_code import weight_loads
from tests.tir_kernels.test_cuda_machine_code import check_kernel, check_launch
from tests.tir_kernels.test_cuda_many_rows_code import check_loads
from tir_kernels import dispatch
from tir_kernels._tvm import Target
from tir_kernels.cuda.experts import ALONE, FEW, MORE
from tir_kernels.layouts import ExpertsShape

_missing = why_not() or (None if find_nvrtc()[0] else find_nvrtc()[1])
pytestmark = pytest.mark.skipif(_missing is not None, reason=str(_missing))

DTYPE = "float16"
# Experts of a token, and all of them.
MIXTRAL_8X7B = (2, ExpertsShape(14336, 4096, 128, 8))
QWEN3_30B = (8, ExpertsShape(2048, 1536, 128, 128))


@pytest.mark.parametrize(
    ("arch", "model"),
    [
        pytest.param("sm_80", MIXTRAL_8X7B, id="mixtral-sm_80"),
        pytest.param("sm_90", QWEN3_30B, id="qwen3-sm_90"),
        *(
            pytest.param(arch, model, marks=pytest.mark.slow, id=f"{name}-{arch}")
            for arch in SHARED_LIMIT
            for name, model in (("mixtral", MIXTRAL_8X7B), ("qwen3", QWEN3_30B))
        ),
    ],
)
def test_experts(arch: str, model: tuple[int, ExpertsShape]) -> None:
    chosen, shape = model
    experts, K, N = shape.experts, shape.K, shape.N
    target = Target({"kind": "cuda", "arch": arch}, host={"kind": "llvm"})
    sizes = (experts, K, N, shape.group_size)
    module = CompiledModule(
        {
            "decode": dispatch.w4a16_experts_decode(target, *sizes, x_rows=1, rows=chosen),
            "grouped": dispatch.w4a16_experts_grouped(target, *sizes),
        },
        arch,
    )
    weights: list[Any] = list(shape.parameters().values())

    def check(name: str, x_rows: int, routing: tuple[int, ...], rows: int) -> None:
        arguments = [((x_rows, K), DTYPE), (routing, "int32"), *weights, ((rows, N), DTYPE)]
        ((kernel, launch),) = module.launches(name, *arguments)
        check_kernel(kernel)
        check_launch(kernel, launch, arch)
        assert kernel.ptx.count("mma.sync") > 0
        assert kernel.ptx.count("shfl", "vote") == 0, "lanes exchange nothing"
        if rows > experts * FEW:
            check_loads(kernel, "qweight", arch)
        else:
            assert weight_loads(kernel, "qweight") <= {4, 8}, kernel.name

    check("decode", 1, (1, chosen), chosen)
    for m in (ALONE, experts * FEW, experts * MORE, experts * MORE + 1):
        check("grouped", m, (experts + 1,), m)
