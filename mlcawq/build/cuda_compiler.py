"""CUDA C++ -> machine code of one GPU architecture, with what the assembler says of each kernel.

NVRTC does it without a CUDA toolkit; nvcc does it where NVRTC is not installed, or where the
environment variable NVCC names one.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from mlcawq.build.nvrtc import Nvrtc, NvrtcError, find_nvrtc
from mlcawq.engine.cuda_arch import capability_of
from mlcawq.errors import UserError

INSTALL = "pip install 'mlcawq[cuda]'"
# Functions that generated code does not call are no news; the assembler's report is.
# Nothing like --use_fast_math: its sine and cosine are off by whole turns at large positions.
_NVRTC_OPTIONS = ("-default-device", "--diag-suppress=177", "--ptxas-options=-v")
_NVCC_OPTIONS = ("--cubin", "-O3", "--diag-suppress=177", "--ptxas-options=-v")
_LOG_LINES = 20


@dataclass(frozen=True)
class KernelReport:
    """What the assembler says of one kernel: registers a thread, bytes of static shared memory a
    block, bytes a thread of stack, and of registers stored to memory and loaded back (spills).
    """

    name: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_stores: int
    spill_loads: int


@dataclass(frozen=True)
class Cubin:
    """Machine code: an ELF file as bytes. compiler: name and version of what made it."""

    code: bytes = field(repr=False)
    arch: str
    compiler: str
    kernels: tuple[KernelReport, ...]


class CudaCompiler(Protocol):
    """describe: name and version, for people."""

    describe: str

    def compile(self, source: str, arch: str) -> tuple[bytes, str]:
        """CUDA C++ -> (cubin, log). Raises UserError with the end of the log."""

    def knows(self, arch: str) -> bool:
        """Whether it compiles for `arch`."""


class NvrtcCompiler:
    def __init__(self, nvrtc: Nvrtc) -> None:
        self._nvrtc = nvrtc
        self.describe = "NVRTC {}.{}".format(*nvrtc.version)

    def compile(self, source: str, arch: str) -> tuple[bytes, str]:
        try:
            return self._nvrtc.compile(source, arch, _NVRTC_OPTIONS)
        except NvrtcError as error:
            raise _failed(self.describe, arch, str(error)) from None

    def knows(self, arch: str) -> bool:
        major, minor = capability_of(arch)
        return 10 * major + minor in self._nvrtc.architectures()


class NvccCompiler:
    def __init__(self, path: str) -> None:
        """Raises UserError when the program does not run."""
        self._path = path
        release = re.search(r"release ([\d.]+)", self._run("--version").stdout)
        self.describe = f"nvcc {release[1] if release else ''}".strip()

    def compile(self, source: str, arch: str) -> tuple[bytes, str]:
        with tempfile.TemporaryDirectory(prefix="mlcawq-nvcc-") as folder:
            text, binary = Path(folder) / "kernels.cu", Path(folder) / "kernels.cubin"
            text.write_text(source)
            done = self._run(*_NVCC_OPTIONS, f"-arch={arch}", "-o", str(binary), str(text))
            log = done.stderr + done.stdout
            if done.returncode:
                raise _failed(self.describe, arch, log)
            return binary.read_bytes(), log

    def knows(self, arch: str) -> bool:
        return arch.removesuffix("a") in self._run("--list-gpu-code").stdout.split()

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(
                [self._path, *arguments], capture_output=True, text=True, check=False
            )
        except OSError as error:
            raise UserError.one(f"nvcc does not run: {error}", self._path, INSTALL) from None


def find_cuda_compiler(arch: str | None = None) -> CudaCompiler:
    """A compiler that is there and compiles for `arch`. Raises UserError when there is none."""
    compiler, reason = _present()
    if compiler is None:
        raise UserError.one(f"no CUDA compiler was found ({reason})", fix=INSTALL)
    if arch is not None and not compiler.knows(arch):
        raise UserError.one(
            f"{compiler.describe} does not compile for {arch}",
            fix="pip install --upgrade 'mlcawq[cuda]' for a newer compiler, or name another "
            "architecture",
        )
    return compiler


def compile_cuda(source: str, arch: str, compiler: CudaCompiler | None = None) -> Cubin:
    """Compile `source` for `arch` (sm_XX). Raises UserError with the end of the compiler's log."""
    compiler = compiler or find_cuda_compiler(arch)
    code, log = compiler.compile(source, arch)
    return Cubin(code, arch, compiler.describe, read_reports(log))


def read_reports(log: str) -> tuple[KernelReport, ...]:
    """The assembler's report (ptxas -v), kernel by kernel."""
    memory: dict[str, tuple[int, int, int]] = {}
    out, name, about = [], "", ""
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)'", line):
            name = match[1]
        elif match := re.search(r"Function properties for (\S+)", line):
            about = match[1]
        elif match := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            memory[about] = (int(match[1]), int(match[2]), int(match[3]))
        elif name and (match := re.search(r"Used (\d+) registers", line)):
            shared = re.search(r"(\d+) bytes smem", line)
            sizes = (int(match[1]), int(shared[1]) if shared else 0)
            out.append(KernelReport(name, *sizes, *memory.get(name, (0, 0, 0))))
            name = ""
    return tuple(out)


def _present() -> tuple[CudaCompiler | None, str]:
    named = os.environ.get("NVCC")
    if named:
        return NvccCompiler(named), ""
    nvrtc, reason = find_nvrtc()
    if nvrtc is not None:
        return NvrtcCompiler(nvrtc), ""
    found = find_nvcc()
    return (NvccCompiler(found), "") if found else (None, reason)


def find_nvcc() -> str | None:
    """nvcc on the PATH or in a CUDA toolkit's usual place."""
    places = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    usual = (Path(place) / "bin" / "nvcc" for place in places if place)
    return shutil.which("nvcc") or next((str(path) for path in usual if path.is_file()), None)


def _failed(compiler: str, arch: str, log: str) -> UserError:
    lines = [line for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    shown = lines[-_LOG_LINES:]
    missed = [line for line in errors[:3] if line not in shown]
    return UserError.one(
        "\n    ".join([f"{compiler} failed for {arch}:", *missed, *shown]),
        fix="report this as a bug of mlcawq; another compiler may do: name an nvcc in NVCC",
    )
