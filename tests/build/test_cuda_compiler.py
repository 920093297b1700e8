"""CUDA C++ to machine code, without a GPU: NVRTC, nvcc, their reports and their refusals."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import pytest

from mlcawq.build import cuda_compiler as module
from mlcawq.build.cuda_compiler import (
    KernelReport,
    NvccCompiler,
    compile_cuda,
    find_cuda_compiler,
    read_reports,
)
from mlcawq.build.nvrtc import find_nvrtc
from mlcawq.errors import UserError

# Two kernels, one of which keeps an array that its index forces into memory.
SOURCE = """
extern "C" __global__ void scale(float *x, float by) { x[threadIdx.x] *= by; }
extern "C" __global__ void shuffle(const int *order, float *x) {
  __shared__ float tile[256];
  float own[64];
  for (int i = 0; i < 64; ++i) own[order[i] & 63] = x[i + threadIdx.x];
  tile[threadIdx.x] = own[order[threadIdx.x] & 63];
  __syncthreads();
  x[threadIdx.x] = tile[255 - threadIdx.x];
}
"""
needs_nvcc = pytest.mark.skipif(module.find_nvcc() is None, reason="nvcc is not installed")


def elf_arch(code: bytes) -> int:
    """The XX of sm_XX in a cubin's ELF header (flags: bits 8 to 15 in CUDA 13's form)."""
    assert code[:5] == b"\x7fELF\x02"
    assert struct.unpack_from("<H", code, 18)[0] == 190  # EM_CUDA
    return int(struct.unpack_from("<I", code, 48)[0]) >> 8 & 0xFF


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90a"])
def test_nvrtc_compiles_for_any_architecture(arch: str) -> None:
    cubin = compile_cuda(SOURCE, arch)
    assert cubin.compiler.startswith("NVRTC")
    assert elf_arch(cubin.code) == int(arch[3:5])
    scale, shuffle = sorted(cubin.kernels, key=lambda kernel: kernel.name)
    assert (scale.name, scale.shared_bytes, scale.stack_bytes) == ("scale", 0, 0)
    assert 0 < scale.registers < 32
    assert shuffle.shared_bytes == 1024
    assert shuffle.stack_bytes == 256


@needs_nvcc
def test_nvcc_that_is_named_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVCC", str(module.find_nvcc()))
    cubin = compile_cuda(SOURCE, "sm_80")
    assert cubin.compiler.startswith("nvcc")
    assert elf_arch(cubin.code) == 80
    assert {kernel.name for kernel in cubin.kernels} == {"scale", "shuffle"}


@pytest.mark.parametrize("named", [False, pytest.param(True, marks=needs_nvcc)])
def test_a_source_that_does_not_compile(named: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if named:
        monkeypatch.setenv("NVCC", str(module.find_nvcc()))
    with pytest.raises(UserError, match='identifier "missing" is undefined'):
        compile_cuda("__global__ void f(float *x) { *x = missing; }", "sm_80")


def test_an_architecture_that_the_compiler_does_not_know() -> None:
    with pytest.raises(UserError, match="does not compile for sm_500"):
        find_cuda_compiler("sm_500")


def test_nothing_to_compile_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "find_nvrtc", lambda: (None, "NVRTC is not installed"))
    monkeypatch.setattr(module, "find_nvcc", lambda: None)
    with pytest.raises(UserError, match=r"no CUDA compiler.*NVRTC is not installed") as error:
        find_cuda_compiler()
    assert "pip install 'mlcawq[cuda]'" in str(error.value)
    monkeypatch.setenv("NVCC", str(tmp_path / "nvcc"))
    with pytest.raises(UserError, match="nvcc does not run"):
        find_cuda_compiler()


@needs_nvcc
def test_nvcc_serves_where_nvrtc_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_nvrtc", lambda: (None, "NVRTC is not installed"))
    assert isinstance(find_cuda_compiler("sm_90a"), NvccCompiler)


def test_nvrtc_without_headers_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvrtc, _ = find_nvrtc()
    assert nvrtc is not None
    (tmp_path / "lib").mkdir()
    shutil.copy(nvrtc.path, tmp_path / "lib")
    monkeypatch.setattr("mlcawq.build.nvrtc._roots", lambda: iter([tmp_path]))
    assert find_nvrtc()[0] is None
    assert "not cuda_fp16.h" in find_nvrtc()[1]
    (tmp_path / "lib" / nvrtc.path.name).write_bytes(b"no library")
    monkeypatch.setattr("mlcawq.build.nvrtc._HEADERS", ())
    assert "cannot be loaded" in find_nvrtc()[1]


def test_spills_are_read_from_the_report() -> None:
    log = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'gemm' for 'sm_80'
ptxas info    : Function properties for gemm
    128 bytes stack frame, 156 bytes spill stores, 172 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 41984 bytes smem
ptxas info    : Function properties for helper
    8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
"""
    assert read_reports(log) == (KernelReport("gemm", 255, 41984, 128, 156, 172),)
