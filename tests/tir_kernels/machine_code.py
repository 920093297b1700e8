"""Functions compiled to machine code for an NVIDIA architecture, without a GPU.

The source is the one that TVM generates; NVRTC makes PTX and machine code of it and the assembler
reports on each kernel; the emulator's host side says with how many threads and how much shared
memory each kernel is launched.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlcawq.build.cuda_compiler import KernelReport, read_reports
from mlcawq.build.nvrtc import find_nvrtc
from mlcawq.engine.cuda_arch import CUDA_ARCHS
from tests.tir_kernels.cuda_emulator import EmulatedKernel, Launch, emulated_cuda, planned_launches
from tests.tir_kernels.ptx import PtxKernel, read_ptx
from tir_kernels._tvm import IRModule, PrimFunc, Target, tvm

_OPTIONS = ("-default-device", "--diag-suppress=177", "--ptxas-options=-v")
_SASS = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(.*?);", re.MULTILINE)
# What a block may use of shared memory, and the registers of a multiprocessor (CUDA C++ Programming
# Guide, "Technical Specifications per Compute Capability").
SHARED_LIMIT = {"sm_75": 64, "sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227}  # KiB
STATIC_SHARED_LIMIT = 48 << 10
REGISTERS = 64 << 10


@dataclass(frozen=True)
class KernelCode:
    """One kernel: its parameters' names, the assembler's report, PTX, and SASS if it can be had."""

    name: str
    parameters: tuple[str, ...]
    report: KernelReport
    ptx: PtxKernel
    sass: tuple[str, ...] | None  # instructions with their operands


def compile_source(source: str, arch: str) -> dict[str, KernelCode]:
    """The kernels of a CUDA source by name. Raises RuntimeError without NVRTC."""
    nvrtc, missing = find_nvrtc()
    if nvrtc is None:
        raise RuntimeError(missing)
    cubin, ptx, log = nvrtc.compile_with_ptx(source, CUDA_ARCHS[arch].code, _OPTIONS)
    reports = {report.name: report for report in read_reports(log)}
    sass = disassemble(cubin)
    return {
        name: KernelCode(
            name,
            parameter_names(source, name),
            reports[name],
            kernel,
            None if sass is None else sass[name],
        )
        for name, kernel in read_ptx(ptx).items()
    }


class CompiledModule:
    """Functions for `arch`; kernels: by name, a function's own being named after it."""

    def __init__(self, functions: dict[str, PrimFunc], arch: str) -> None:
        named = {name: f.with_attr("global_symbol", name) for name, f in functions.items()}
        target = Target({"kind": "cuda", "arch": arch}, host={"kind": "llvm"})
        self.arch = arch
        self._emulated = EmulatedKernel(IRModule(named), target)
        self.kernels = compile_source(self._emulated.source, arch)

    def launches(
        self, name: str, *shapes: tuple[tuple[int, ...], str]
    ) -> list[tuple[KernelCode, Launch]]:
        """What a call of function `name` with arguments of these shapes and dtypes launches."""
        with emulated_cuda(self.arch):
            arguments: list[Any] = [tvm.runtime.empty(*shape, tvm.cuda(0)) for shape in shapes]
            with planned_launches() as launches:
                self._emulated.executable[name](*arguments)
        return [(self.kernels[launch.kernel], launch) for launch in launches]


def parameter_names(source: str, kernel: str) -> tuple[str, ...]:
    """The names of a kernel's parameters in CUDA source, without the `_ptr` that TVM adds."""
    signature = re.search(rf"\b{kernel}\(([^)]*)\)", source)
    if signature is None:
        raise ValueError(f"the source has no kernel {kernel}")
    names = (parameter.split()[-1] for parameter in signature[1].split(","))
    return tuple(name.removesuffix("_ptr") for name in names)


def disassemble(cubin: bytes) -> dict[str, tuple[str, ...]] | None:
    """SASS by kernel, or None without nvdisasm (the package nvidia-cuda-nvdisasm)."""
    program = _find_nvdisasm()
    if program is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.cubin"
        path.write_bytes(cubin)
        done = subprocess.run(
            [program, "--print-code", str(path)], capture_output=True, text=True, check=True
        )
    kernels: dict[str, tuple[str, ...]] = {}
    for section in re.split(r"^\s*\.section\s+\.text\.", done.stdout, flags=re.MULTILINE)[1:]:
        name = re.match(r"\w+", section)
        if name:
            kernels[name[0]] = tuple(_SASS.findall(section))
    return kernels


def _find_nvdisasm() -> str | None:
    site = Path(sysconfig.get_paths()["purelib"])
    packaged = sorted(site.glob("nvidia/cu*/bin/nvdisasm"), reverse=True)
    return str(packaged[0]) if packaged else shutil.which("nvdisasm")
