"""The emulated CUDA device in TVM, and calling what was compiled for it."""

from __future__ import annotations

import functools
import re
import secrets
from pathlib import Path
from typing import Any

import numpy as np
import tvm_ffi

from tests.tir_kernels.cuda_emulator import compiling, sources
from tir_kernels._tvm import IRModule, PrimFunc, Target, tvm

# -O1: most kernels run for a second or two at most, and compiling is most of the time.
_KERNEL_OPTIONS = (
    "-O1",
    "-fno-exceptions",
    "-fno-threadsafe-statics",
    "-fno-strict-aliasing",  # generated code reads vectors through casted pointers
    "-fsanitize=thread,alignment,bounds,shift-exponent,integer-divide-by-zero",
    "--param=tsan-instrument-func-entry-exit=0",
    "-ftrivial-auto-var-init=pattern",
    "-w",
    "-DMLCAWQ_EMULATED",
    "-include",
    "cuda_emulator.h",
)


@functools.cache
def _runtime() -> Path:
    """The emulator's own library."""
    folder = Path(tvm.__file__).parent
    ffi_lib = Path(tvm_ffi.libinfo.find_libtvm_ffi())
    options = [
        "-O2",
        "-fno-strict-aliasing",
        f"-I{compiling.ROOT / 'src'}",
        f"-I{folder / 'include'}",
        f"-I{folder / 'src'}",
        f"-I{tvm_ffi.libinfo.find_include_path()}",
        f"-I{tvm_ffi.libinfo.find_dlpack_include_path()}",
    ]
    link_options = [
        f"-L{folder / 'lib'}",
        "-ltvm_runtime",
        f"-L{ffi_lib.parent}",
        "-ltvm_ffi",
        f"-Wl,-rpath,{folder / 'lib'}:{ffi_lib.parent}",
    ]
    paths = sorted((compiling.ROOT / "src").glob("*.cpp"))
    texts = [path.read_text() for path in sorted((compiling.ROOT / "src").glob("*.h"))]
    key = f"{tvm.__version__} {tvm_ffi.__version__} {compiling.headers_key()} {texts}"
    return compiling.build("cuda_emulator", paths, options, link_options, key=key)


def _build_kernel(source: str, name: str, capability: int) -> str:
    options = [*_KERNEL_OPTIONS, f"-D__CUDA_ARCH__={10 * capability}"]
    text = sources.kernel_source(source, name)
    return str(compiling.build(name, [text], options, key=compiling.headers_key()))


@functools.cache
def _install() -> None:
    if tvm_ffi.get_global_func("device_api.cuda", allow_missing=True) is not None:
        raise RuntimeError("TVM has a real CUDA device in this process")
    tvm_ffi.register_global_func("cuda_emulator.build_kernel", _build_kernel)
    # Global: kernels find the emulator's functions in it.
    import ctypes

    ctypes.CDLL(str(_runtime()), mode=ctypes.RTLD_GLOBAL)


def install_emulated_cuda(arch: str = "sm_80", seed: int | None = None) -> int:
    """Make tvm.cuda(0) an emulated device of compute capability `arch`; returns the seed.

    The seed decides the order of threads and blocks from here on; it is random unless given. May
    be called again, with another arch. Raises RuntimeError where TVM already has a CUDA device or
    g++ is missing.
    """
    _install()
    number = re.fullmatch(r"sm_(\d+)a?", arch)
    if number is None:
        raise ValueError(f"arch {arch!r} is not of the form sm_80")
    tvm_ffi.get_global_func("cuda_emulator.set_capability")(int(number[1]))
    seed = secrets.randbits(32) if seed is None else seed
    tvm_ffi.get_global_func("cuda_emulator.seed")(seed)
    return seed


def load_emulated(executable: Any) -> Any:
    """A module compiled before the emulator was installed, or elsewhere, made to run on it.

    executable: what tvm.compile returned, or its module. Its CUDA part must be source.
    """
    install_emulated_cuda()
    module = getattr(executable, "mod", executable)
    load = tvm_ffi.get_global_func("ffi.Module.load_from_bytes.cuda")
    imports = [load(m.save_to_bytes()) if m.kind == "cuda" else m for m in module.imports]
    module.clear_imports()
    for imported in imports:
        module.import_module(imported)
    return executable


class EmulatedKernel:
    """A compiled function; called with numpy arrays, it fills the outputs among them in place."""

    def __init__(self, function: PrimFunc | IRModule, target: Target | None = None) -> None:
        target = target or Target({"kind": "cuda", "arch": "sm_80"}, host={"kind": "llvm"})
        self.seed = install_emulated_cuda(str(target.attrs["arch"]))
        module = function
        if isinstance(function, PrimFunc):
            module = IRModule({"main": function.with_attr("global_symbol", "main")})
        with target:
            self.executable = tvm.compile(module, target=target)

    @property
    def source(self) -> str:
        """The CUDA source that runs."""
        return self.executable.mod.imports[0].inspect_source()

    def __call__(self, *arguments: Any, name: str = "main") -> None:
        tensors = [
            tvm.runtime.tensor(a, tvm.cuda(0)) if isinstance(a, np.ndarray) else a
            for a in arguments
        ]
        self.executable[name](*tensors)
        for given, tensor in zip(arguments, tensors, strict=True):
            if isinstance(given, np.ndarray):
                given[...] = tensor.numpy()


def emulate(function: PrimFunc | IRModule, target: Target | None = None) -> EmulatedKernel:
    """Compile a scheduled PrimFunc for CUDA and run it on the emulator when it is called."""
    return EmulatedKernel(function, target)


def run_source(
    source: str,
    name: str,
    grid: tuple[int, ...],
    block: tuple[int, ...],
    *arguments: Any,
    dynamic_shared: int = 0,
    capability: int = 80,
) -> None:
    """Launch a kernel of a CUDA source on numpy arrays (copied back) and 32-bit integers."""
    install_emulated_cuda(f"sm_{capability}")
    tensors = [
        tvm.runtime.tensor(a, tvm.cuda(0)) if isinstance(a, np.ndarray) else a for a in arguments
    ]
    sizes = [*grid, *[1] * (3 - len(grid)), *block, *[1] * (3 - len(block))]
    library = _build_kernel(source, name, capability)
    launch = tvm_ffi.get_global_func("cuda_emulator.launch")
    launch(library, name, *sizes, dynamic_shared, *tensors)
    for given, tensor in zip(arguments, tensors, strict=True):
        if isinstance(given, np.ndarray):
            given[...] = tensor.numpy()
