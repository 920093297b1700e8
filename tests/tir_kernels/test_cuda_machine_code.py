"""What CUDA's compiler makes of every kernel: no spills, no local memory, wide loads.

Without a GPU this is as far as a kernel can be seen; that it computes the right thing, the emulator
says.
"""

from __future__ import annotations

import functools
import itertools
import re

import numpy as np
import pytest

import tir_kernels.cuda
from mlcawq.build.nvrtc import find_nvrtc
from tests.tir_kernels.cuda_emulator import Launch, counted_matrix_loads, emulate, why_not
from tests.tir_kernels.machine_code import (
    REGISTERS,
    SHARED_LIMIT,
    STATIC_SHARED_LIMIT,
    CompiledModule,
    KernelCode,
    compile_source,
)
from tests.tir_kernels.ptx import read_ptx
from tir_kernels import dispatch
from tir_kernels._tvm import PrimFunc, Target
from tir_kernels.layouts import AUTOAWQ, TILED, LinearShape

_missing = why_not() or (None if find_nvrtc()[0] else find_nvrtc()[1])
pytestmark = pytest.mark.skipif(_missing is not None, reason=str(_missing))

ARCHS = (
    "sm_80",
    "sm_90",
    *(pytest.param(arch, marks=pytest.mark.slow) for arch in ("sm_75", "sm_86", "sm_89")),
)


def check_kernel(kernel: KernelCode) -> None:
    """What holds for every kernel."""
    report = kernel.report
    assert report.spill_stores == report.spill_loads == report.stack_bytes == 0, report
    assert report.shared_bytes <= STATIC_SHARED_LIMIT, report
    assert kernel.ptx.count("ld.local", "st.local") == 0, kernel.name
    if kernel.sass is not None:
        assert kernel.sass
        assert not [line for line in kernel.sass if " LDL" in f" {line}" or " STL" in f" {line}"]


def check_launch(kernel: KernelCode, launch: Launch, arch: str) -> None:
    """A block fits a multiprocessor."""
    assert launch.dynamic_shared + kernel.report.shared_bytes <= SHARED_LIMIT[arch] << 10, launch
    # Registers are given out in eights.
    assert -(-kernel.report.registers // 8) * 8 * launch.threads <= REGISTERS, launch


def room(target: Target) -> dict[str, PrimFunc]:
    """Every kernel between the linears, in the shapes of a model of 8B parameters."""
    kernels, dtype = tir_kernels.cuda, "float16"
    heads, kv_heads, head_dim = 32, 8, 128
    return {
        "rms_norm": kernels.rms_norm(target, 4096, 1e-5, dtype),
        "add_rms_norm": kernels.add_rms_norm(target, 4096, 1e-5, dtype),
        "qk_norm": kernels.qk_norm(target, heads, kv_heads, head_dim, 1e-6, dtype),
        "silu_multiply": kernels.silu_multiply(target, 14336, dtype),
        "split_rotary": kernels.split_rotary(target, heads, kv_heads, head_dim, dtype, 1.0),
        "take_rows": kernels.take_rows(target, 4096, dtype),
        "expert_sums": kernels.expert_sums(target, 128, 8),
        "last_row": kernels.last_row(target, 4096, dtype),
        "softmax_with_temperature": kernels.softmax_with_temperature(target),
        "apply_logit_bias_inplace": kernels.apply_logit_bias_inplace(target),
        "apply_penalty_inplace": kernels.apply_penalty_inplace(target),
        "apply_bitmask_inplace": kernels.apply_bitmask_inplace(target),
        "argsort_probs": kernels.argsort_probs(target),
        "multinomial_from_uniform": kernels.multinomial_from_uniform(target),
        "renormalize_by_top_p": kernels.renormalize_by_top_p(target),
        "sample_with_top_p": kernels.sample_with_top_p(target),
        "sampler_take_probs": kernels.sampler_take_probs(target),
        "gather_rows": kernels.gather_rows(target, dtype),
        "scatter_rows": kernels.scatter_rows(target, dtype),
        "merge_state": kernels.merge_state(target, heads, head_dim, dtype),
        "append_to_pages": kernels.append_to_pages(target, kv_heads, head_dim, dtype),
        "copy_page": kernels.copy_page(target, kv_heads, head_dim, dtype),
        "move_slots": kernels.move_slots(target, kv_heads, head_dim, dtype),
        "read_slots": kernels.read_slots(target, 32, kv_heads, head_dim, dtype),
        "attention_decode_paged": kernels.attention_decode_paged(
            target, heads, kv_heads, head_dim, dtype
        ),
        "attention_prefill_paged": kernels.attention_prefill_paged(
            target, heads, kv_heads, head_dim, dtype
        ),
        "attention_prefill_ragged": kernels.attention_prefill_ragged(
            target, heads, kv_heads, head_dim, dtype
        ),
    }


@functools.cache
def cuda_target(arch: str) -> Target:
    return Target({"kind": "cuda", "arch": arch}, host={"kind": "llvm"})


@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_between_the_linears(arch: str) -> None:
    functions = room(cuda_target(arch))
    experts = {"w4a16_experts_decode", "w4a16_experts_grouped"}
    linears = {"dense_linear", "w4a16_linear", *experts}
    assert functions.keys() == set(tir_kernels.cuda.__all__) - linears, "a kernel is not checked"
    module = CompiledModule(functions, arch)
    assert len(module.kernels) >= len(functions)
    for kernel in module.kernels.values():
        check_kernel(kernel)


# Rows for every kernel behind a linear's entry, few and many.
ROWS = (1, 2, 8, 9, 16, 17, 32, 33, 64, 65, 512, 2048)
MOST_FEW_ROWS = 16


def linears(target: Target, arch: str) -> dict[str, PrimFunc]:
    """Linears as a graph asks for them: K = 4096, N = 6144, groups of 128."""
    K, N = 4096, 6144
    functions = {
        "tiled_float16": dispatch.w4a16_linear(target, K, N, 128, layout=TILED),
        "stock_float16": dispatch.w4a16_linear(target, K, N, 128, layout=AUTOAWQ),
        "dense_float16": dispatch.dense_linear(target, K, N),
    }
    if arch != "sm_75":
        functions["tiled_bfloat16"] = dispatch.w4a16_linear(
            target, K, N, 128, "bfloat16", layout=TILED
        )
    return functions


def arguments(kind: str, dtype: str, m: int) -> list[tuple[tuple[int, ...], str]]:
    K, N = 4096, 6144
    if kind == "dense":
        return [((m, K), dtype), ((N, K), dtype), ((m, N), dtype)]
    layout = TILED if kind == "tiled" else AUTOAWQ
    weight = LinearShape(K, N, 128).parameters(layout).values()
    return [((m, K), dtype), *weight, ((m, N), dtype)]


@pytest.mark.parametrize("arch", ARCHS)
def test_linears(arch: str) -> None:
    functions = linears(cuda_target(arch), arch)
    module = CompiledModule(functions, arch)
    launched = set()
    for name, m in itertools.product(functions, ROWS):
        kind, dtype = name.split("_")
        for kernel, launch in module.launches(name, *arguments(kind, dtype, m)):
            launched.add(kernel.name)
            check_launch(kernel, launch, arch)
            check_linear(kernel, kind, m, arch)
    assert launched == module.kernels.keys()
    for kernel in module.kernels.values():
        check_kernel(kernel)


def check_linear(kernel: KernelCode, kind: str, m: int, arch: str) -> None:
    """Tensor cores work, lanes exchange nothing, weights come 16 bytes at a time."""
    ptx = kernel.ptx
    assert ptx.count("mma.sync", "wgmma.mma_async") > 0, kernel.name
    assert ptx.count("shfl", "vote", "red.sync") == 0, kernel.name
    place = kernel.parameters.index("weight" if kind == "dense" else "qweight")
    widths = {load.instruction.bytes for load in ptx.global_loads() if place in load.parameters}
    # Few rows of the stock layout: a lane reads one or two words of each of its inputs.
    wide = {4, 8} if kind == "stock" and m <= MOST_FEW_ROWS else {16}
    assert widths, kernel.name
    assert widths <= wide, kernel.name
    if m > MOST_FEW_ROWS and arch != "sm_75":
        assert ptx.count("cp.async.cg", "cp.async.ca") > 0, kernel.name
        assert ptx.count("ldmatrix", "wgmma.mma_async") > 0, kernel.name
    if kernel.sass is not None:
        text = "\n".join(kernel.sass)
        assert re.search(r"\b(HMMA|HGMMA)", text), kernel.name
        # The compiler counts a warp's atomics together, which takes a shuffle.
        assert len(re.findall(r"\bSHFL", text)) <= ptx.count("atom"), kernel.name
        if kind != "stock" or m > MOST_FEW_ROWS:
            assert re.search(r"\b(LDG|LDGSTS)\.\S*128", text), kernel.name


@pytest.mark.parametrize("layout", [TILED, AUTOAWQ])
def test_fragments_are_loaded_without_bank_conflicts(layout: str) -> None:
    K, N = 256, 128
    target = cuda_target("sm_80")
    kernel = emulate(dispatch.w4a16_linear(target, K, N, 128, layout=layout), target)
    shapes = LinearShape(K, N, 128).parameters(layout).values()
    weight = [np.zeros(shape, dtype) for shape, dtype in shapes]
    for m in (1, 16, 33, 130):
        x, out = np.zeros((m, K), np.float16), np.zeros((m, N), np.float16)
        with counted_matrix_loads() as loads:
            kernel(x, *weight, out)
        assert loads.wavefronts == loads.matrices > 0, m


def test_local_memory_is_seen() -> None:
    source = """
extern "C" __global__ void __launch_bounds__(32) pick(float* x, int n) {
  float kept[1024];
  for (int i = 0; i < 1024; ++i) kept[i] = x[i];
  x[threadIdx.x] = kept[n];
}
"""
    kernel = compile_source(source, "sm_80")["pick"]
    assert kernel.parameters == ("x", "n")
    assert kernel.ptx.count("ld.local") > 0
    with pytest.raises(AssertionError, match="stack_bytes=4096"):
        check_kernel(kernel)


def test_ptx_is_read() -> None:
    kernel = read_ptx(
        """
.visible .entry copy(
	.param .u64 copy_param_0,
	.param .u64 copy_param_1
)
.maxntid 64, 1, 1
{
	.reg .b64 	%rd<9>;
	ld.param.u64 	%rd1, [copy_param_0];
	ld.param.u64 	%rd2, [copy_param_1];
	cvta.to.global.u64 	%rd3, %rd2;
	mov.u32 	%r1, %tid.x;
	mul.wide.u32 	%rd4, %r1, 16;
	add.s64 	%rd5, %rd3, %rd4;
$L__BB0_1:
	ld.global.v4.u32 	{%r2, %r3, %r4, %r5}, [%rd5+32];
	// begin inline asm
	{
 .reg .pred p;
 setp.ne.b32 p, %r2, 0;
 @p cp.async.cg.shared.global [%r6], [%rd1], 8, %r3;
}
	// end inline asm
	ld.global.u64 	%rd7, [%rd6];
	add.s64 	%rd6, %rd1, 8;
	@%p1 bra 	$L__BB0_1;
	st.global.u32 	[%rd7], %r2;
	ret;
}
"""
    )["copy"]
    loads = [(load.instruction.bytes, set(load.parameters)) for load in kernel.global_loads()]
    # The last is reached from the end of the loop, and where its value points to is nobody's.
    assert loads == [(16, {1}), (8, {0}), (8, {0})]
    assert kernel.count("st.global") == kernel.count("ret") == 1
