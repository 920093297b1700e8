"""Kernels for Arm on a machine that need not be one: their assembly, and runs under QEMU."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import tvm_ffi

from tir_kernels._tvm import IRModule, PrimFunc, Target, tvm

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
_HARNESS = Path(__file__).with_name("arm_harness.c")
_CODES = {"i": 0, "u": 1, "f": 2}  # DLPack's, of numpy's kinds


def missing_programs() -> str:
    """What running lacks; empty when all is there."""
    return ", ".join(name for name in (COMPILER, EMULATOR) if shutil.which(name) is None)


def generated(function: PrimFunc, target: Target) -> Any:
    """TVM's module with the code of `function` under the name kernel."""
    module = IRModule({"kernel": function.with_attr("global_symbol", "kernel")})
    with target:
        return tvm.tirx.build(module, target=target)


def instructions(function: PrimFunc, target: Target) -> Counter[str]:
    """How often each instruction stands in the code; a call as "bl NAME"."""
    assembly = generated(function, target).inspect_source("asm")
    found = re.findall(r"^\t(bl\t\S+|[a-z][a-z0-9.]*)", assembly, re.MULTILINE)
    return Counter(name.replace("\t", " ") for name in found)


class ArmKernel:
    """A compiled function, called like `kernels.Kernel`; cpu: QEMU's name of the processor."""

    def __init__(self, function: PrimFunc, target: Target, cpu: str, folder: Path) -> None:
        self.folder, self.cpu = folder, cpu
        self.program = folder / "kernel"
        code = folder / "kernel.o"
        generated(function, target).write_to_file(str(code))
        includes = (
            tvm_ffi.libinfo.find_include_path(),
            tvm_ffi.libinfo.find_dlpack_include_path(),
        )
        command = [COMPILER, "-O1", "-static", *(f"-I{include}" for include in includes)]
        command += [str(_HARNESS), str(code), "-lm", "-o", str(self.program)]
        subprocess.run(command, check=True)

    def __call__(self, *arguments: np.ndarray) -> None:
        """Outputs are among the arguments, filled in place."""
        path = self.folder / "tensors"
        content, starts = struct.pack("<Q", len(arguments)), []
        for array in arguments:
            header = (array.itemsize * 8, _CODES[array.dtype.kind], array.ndim, *array.shape)
            content += struct.pack(f"<{len(header)}Q", *header)
            starts.append(len(content))
            content += np.ascontiguousarray(array).tobytes()
        path.write_bytes(content)
        command = [EMULATOR, "-cpu", self.cpu, str(self.program), str(path)]
        subprocess.run(command, check=True, timeout=120)
        content = path.read_bytes()
        for array, start in zip(arguments, starts, strict=True):
            array[...] = np.frombuffer(content, array.dtype, array.size, start).reshape(array.shape)
