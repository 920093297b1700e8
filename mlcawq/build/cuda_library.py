"""A library for NVIDIA GPUs, linked with machine code in it, on any machine.

Where TVM finds no CUDA driver its code generator keeps CUDA source, which only a machine with
TVM's compiler and CUDA's could run; where it finds one, it compiles for the GPU that is there
with compilers of its own choice. Here the source is always kept, and then compiled for the target
and put in the source's place, so that a library does not depend on where it was built.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlcawq.build.cuda_compiler import Cubin, CudaCompiler, compile_cuda
from mlcawq.build.packed_modules import (
    DeviceCode,
    PackedModules,
    pack,
    pack_device_code,
    unpack,
    unpack_device_code,
)

_KIND = "cuda"
_KEEP_SOURCE = "TVM_COMPILE_FORCE_FALLBACK"


@contextmanager
def keeping_cuda_source() -> Iterator[None]:
    """Inside, TVM's code generator for CUDA leaves source uncompiled, with a driver or without."""
    before = os.environ.get(_KEEP_SOURCE)
    os.environ[_KEEP_SOURCE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_KEEP_SOURCE]
        else:
            os.environ[_KEEP_SOURCE] = before


def compile_kernels(
    packed: PackedModules, arch: str, compiler: CudaCompiler
) -> tuple[PackedModules, list[Cubin]]:
    """CUDA source among the modules becomes machine code for `arch`; the rest stays as it is.

    Raises UserError when the compiler does not take the source.
    """
    modules, made = [], []
    for kind, content in packed.modules:
        if kind == _KIND and content is not None:
            source = unpack_device_code(content)
            cubin = compile_cuda(source.code.decode(), arch, compiler)
            made.append(cubin)
            code = DeviceCode("cubin", source.functions, source.names, cubin.code)
            content = pack_device_code(code)
        modules.append((kind, content))
    return PackedModules(packed.tree, tuple(modules)), made


def export_cuda_library(
    module: Any, path: Path, arch: str, compiler: CudaCompiler, linker: str
) -> list[Cubin]:
    """Link a module that was generated within `keeping_cuda_source` into the library `path`.

    module: TVM's runtime module with host code and CUDA source. Returns what was compiled.
    Raises UserError when CUDA's compiler fails and RuntimeError when the linker does.
    """
    from mlcawq.graph._tvm import tvm

    made: list[Cubin] = []

    def pack_imports(root: Any, system_lib: bool, prefix: str, folder: str) -> str:
        blob = tvm.get_global_func("runtime.ModulePackImportsToTensor")(root).numpy().tobytes()
        packed, cubins = compile_kernels(unpack(blob), arch, compiler)
        made.extend(cubins)
        generate = tvm.get_global_func("codegen.codegen_blob")
        host = generate(pack(packed), system_lib, _host_target(root), prefix)
        out = Path(folder) / "imports.o"
        host.write_to_file(str(out))
        return str(out)

    module.export_library(str(path), cc=linker, fpack_imports=pack_imports)
    return made


def _host_target(module: Any) -> str:
    """The LLVM target that the host code was generated for, as TVM writes it."""
    waiting = [module]
    while waiting:
        found = waiting.pop()
        if found.kind == "llvm":
            return str(found.get_function("_get_target_string")())
        waiting.extend(found.imports)
    raise ValueError("the module has no host code")
