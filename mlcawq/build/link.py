"""Generated code -> a shared library: the compilers that this takes, and their use."""

from __future__ import annotations

import os
import shutil
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlcawq.build.cuda_compiler import CudaCompiler, KernelReport, find_cuda_compiler
from mlcawq.build.cuda_library import export_cuda_library, keeping_cuda_source
from mlcawq.checkpoint.writing import scratch_folder
from mlcawq.errors import Problem, UserError

if TYPE_CHECKING:
    from mlcawq.graph._tvm import Target


@dataclass(frozen=True)
class Tools:
    """cxx: the C++ compiler that links. cuda: what compiles CUDA source and for which GPU
    architecture; None for other targets.
    """

    cxx: str
    cuda: tuple[CudaCompiler, str] | None = None

    def generating(self) -> AbstractContextManager[None]:
        """In what TVM is to generate code that `link` takes."""
        return nullcontext() if self.cuda is None else keeping_cuda_source()

    def link(self, executable: Any, path: Path) -> tuple[KernelReport, ...]:
        """Write TVM's executable as the shared library `path`, whole or not at all.

        Returns what the assembler says of each CUDA kernel in it. Raises UserError where a
        compiler fails.
        """
        folder = scratch_folder(path.parent, f".{path.name}.")
        try:
            # TVM picks the linker's mode from the suffix.
            partial = folder / path.name
            try:
                kernels = self._export(executable, partial)
            except RuntimeError as error:
                lines = str(error).strip().splitlines()
                raise UserError.one(
                    f"linking failed: {lines[-1] if lines else error}",
                    self.cxx,
                    "check that this compiler can link a shared library, or set CXX to another",
                ) from error
            os.replace(partial, path)
            return kernels
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _export(self, executable: Any, path: Path) -> tuple[KernelReport, ...]:
        if self.cuda is None:
            executable.export_library(str(path), cc=self.cxx)
            return ()
        compiler, arch = self.cuda
        cubins = export_cuda_library(executable.mod, path, arch, compiler, self.cxx)
        return tuple(kernel for cubin in cubins for kernel in cubin.kernels)


def find_tools(target: Target) -> Tools:
    """The compilers for `target`. Raises one UserError with everything that is missing."""
    problems: list[Problem] = []
    cxx, cuda = "", None
    try:
        cxx = find_compiler()
    except UserError as error:
        problems += error.problems
    if target.kind.name == "cuda":
        arch = str(target.attrs["arch"])
        try:
            cuda = find_cuda_compiler(arch), arch
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    return Tools(cxx, cuda)


def find_compiler() -> str:
    """The C++ compiler that links libraries ($CXX, g++, clang++, c++). Raises UserError if none."""
    named = os.environ.get("CXX")
    for candidate in filter(None, (named, "g++", "clang++", "c++")):
        found = shutil.which(candidate)
        if found:
            return found
    raise UserError.one(
        "no C++ compiler was found; one is needed to link the model library",
        fix="install one (Debian: apt install g++), or name it in the environment variable CXX",
    )
