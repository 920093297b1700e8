"""The emulated CUDA device in TVM, and calling what was compiled for it."""

from __future__ import annotations

import ctypes
import functools
import math
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tvm_ffi

from tests.tir_kernels.cuda_emulator import compiling, sources
from tir_kernels._tvm import IRModule, PrimFunc, Target, tvm

# What TVM looks for by name. The emulator's library has each with "cuda_emulator." in front.
_NAMES = (
    "device_api.cuda",
    "device_api.cuda_host",
    "ffi.Module.create.cuda",
    "ffi.Module.load_from_bytes.cuda",
    "vm.builtin.cuda_graph.run_or_capture",
    "vm.builtin.cuda_graph.get_cached_alloc",
)
# -O1: a kernel runs for a second or two at most, and compiling it is most of the time.
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
_state = {"installed": 0}


def why_not() -> str | None:
    """Why this process cannot emulate CUDA, or None where it can."""
    if not _state["installed"] and _function("device_api.cuda") is not None:
        return "TVM has a real CUDA device in this process"
    return compiling.why_not()


def install_emulated_cuda(arch: str = "sm_80", seed: int | None = None) -> int:
    """Make tvm.cuda(0) an emulated device of architecture `arch`; returns the seed.

    The seed decides the order of blocks and threads from here on; it is random unless given. May
    be called again with another arch. It stays until `remove_emulated_cuda`; where that is easily
    forgotten, use `emulated_cuda`. Raises RuntimeError where `why_not` has a reason.
    """
    reason = why_not()
    if reason is not None:
        raise RuntimeError(f"CUDA cannot be emulated: {reason}")
    _load()
    for name in _NAMES:
        if _function(name) is None:
            tvm_ffi.register_global_func(name, _own(name))
    _state["installed"] = 1
    seed = secrets.randbits(63) if seed is None else seed
    _own("set_capability")(_capability(arch))
    _own("seed")(seed)
    return seed


def remove_emulated_cuda() -> None:
    """Make tvm.cuda(0) not exist again; what was compiled stays callable."""
    if _state["installed"]:
        for name in _NAMES:
            tvm_ffi.registry.remove_global_func(name)
        _own("forget_graphs")()
        _own("set_capability")(0)
        _state["installed"] = 0


@contextmanager
def emulated_cuda(arch: str = "sm_80", seed: int | None = None) -> Iterator[int]:
    """`install_emulated_cuda` for a with statement; as it was before afterwards."""
    before = _state["installed"]
    try:
        yield install_emulated_cuda(arch, seed)
    finally:
        if not before:
            remove_emulated_cuda()


@dataclass(frozen=True)
class Launch:
    """A kernel's launch; dynamic_shared in bytes."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    dynamic_shared: int

    @property
    def threads(self) -> int:
        """Threads in a block."""
        return math.prod(self.block)


@contextmanager
def planned_launches() -> Iterator[list[Launch]]:
    """Inside, host code runs and launches nothing; afterwards the list has what it would launch."""
    launches: list[Launch] = []
    _load()
    _own("start_planning")()
    try:
        yield launches
    finally:
        for name, *sizes in _own("stop_planning")():
            x, y, z, *block, shared = (int(size) for size in sizes)
            launches.append(Launch(str(name), (x, y, z), (block[0], block[1], block[2]), shared))


@dataclass
class MatrixLoads:
    """8x8 matrices that ldmatrix has loaded; each is one wavefront where no banks conflict."""

    matrices: int = 0
    wavefronts: int = 0


@contextmanager
def counted_matrix_loads() -> Iterator[MatrixLoads]:
    """Afterwards, what the launches inside have loaded by ldmatrix."""
    _load()
    loads = MatrixLoads()
    _own("take_matrix_loads")()
    try:
        yield loads
    finally:
        loads.matrices, loads.wavefronts = (int(n) for n in _own("take_matrix_loads")())


def load_emulated(executable: Any) -> Any:
    """A module whose CUDA part is still source, whoever compiled it, made to run on the emulator.

    executable: what tvm.compile returned, or its module; it is changed and returned.
    """
    _load()
    _own("emulate_imports")(getattr(executable, "mod", executable))
    return executable


class EmulatedKernel:
    """A compiled function; called with numpy arrays, it fills the outputs among them in place.

    seed: what decides the order of threads, for messages.
    """

    def __init__(
        self,
        function: PrimFunc | IRModule,
        target: Target | None = None,
        seed: int | None = None,
    ) -> None:
        target = target or Target({"kind": "cuda", "arch": "sm_80"}, host={"kind": "llvm"})
        self.arch = str(target.attrs["arch"])
        module = function
        if isinstance(function, PrimFunc):
            module = IRModule({"main": function.with_attr("global_symbol", "main")})
        with emulated_cuda(self.arch, seed) as self.seed, target:
            self.executable = tvm.compile(module, target=target)

    @property
    def source(self) -> str:
        """The CUDA source that runs."""
        return str(self.executable.mod.imports[0].inspect_source())

    def __call__(self, *arguments: Any, name: str = "main") -> None:
        with emulated_cuda(self.arch, self.seed):
            tensors = _to_device(arguments)
            self.executable[name](*tensors)
            _from_device(arguments, tensors)


def emulate(
    function: PrimFunc | IRModule, target: Target | None = None, seed: int | None = None
) -> EmulatedKernel:
    """Compile a scheduled PrimFunc for CUDA; the emulator runs it when it is called."""
    return EmulatedKernel(function, target, seed)


def run_source(
    source: str,
    name: str,
    grid: tuple[int, ...],
    block: tuple[int, ...],
    *arguments: Any,
    dynamic_shared: int = 0,
    arch: str = "sm_80",
    seed: int | None = None,
) -> None:
    """Launch a kernel of a CUDA source on numpy arrays, filled in place, and 32-bit integers."""
    with emulated_cuda(arch, seed):
        tensors = _to_device(arguments)
        sizes = [*grid, *[1] * (3 - len(grid)), *block, *[1] * (3 - len(block))]
        library = _build_kernel(source, name, _capability(arch))
        _own("launch")(library, name, *sizes, dynamic_shared, *tensors)
        _from_device(arguments, tensors)


def _to_device(arguments: tuple[Any, ...]) -> list[Any]:
    device = tvm.cuda(0)
    return [tvm.runtime.tensor(a, device) if isinstance(a, np.ndarray) else a for a in arguments]


def _from_device(arguments: tuple[Any, ...], tensors: list[Any]) -> None:
    for given, tensor in zip(arguments, tensors, strict=True):
        if isinstance(given, np.ndarray):
            given[...] = tensor.numpy()


def _function(name: str) -> Any:
    return tvm_ffi.get_global_func(name, allow_missing=True)


def _own(name: str) -> Any:
    return tvm_ffi.get_global_func(f"cuda_emulator.{name}")


def _capability(arch: str) -> int:
    number = re.fullmatch(r"sm_(\d+)a?", arch)
    if number is None:
        raise ValueError(f"arch {arch!r} is not of the form sm_80")
    return int(number[1])


@functools.cache
def _load() -> None:
    tvm_ffi.register_global_func("cuda_emulator.build_kernel", _build_kernel)
    # Global: the kernels find the emulator's functions in it.
    ctypes.CDLL(str(_build_runtime()), mode=ctypes.RTLD_GLOBAL)


def _build_runtime() -> Path:
    """The emulator's own library."""
    folder, tvm_folder = compiling.ROOT / "src", Path(tvm.__file__).parent
    libraries = (tvm_folder / "lib", Path(tvm_ffi.libinfo.find_libtvm_ffi()).parent)
    includes = (
        folder,
        tvm_folder / "include",
        tvm_ffi.libinfo.find_include_path(),
        tvm_ffi.libinfo.find_dlpack_include_path(),
    )
    options = ["-O2", "-fno-strict-aliasing", *(f"-I{path}" for path in includes)]
    link_options = [f"-L{path}" for path in libraries]
    link_options += ["-ltvm_runtime", "-ltvm_ffi", *(f"-Wl,-rpath,{path}" for path in libraries)]
    headers = [path.read_text() for path in sorted(folder.glob("*.h"))]
    key = f"{tvm.__version__} {tvm_ffi.__version__} {compiling.headers_key()} {headers}"
    paths = sorted(folder.glob("*.cpp"))
    return compiling.build("cuda_emulator", paths, options, link_options, key=key)


def _build_kernel(source: str, name: str, capability: int) -> str:
    options = [*_KERNEL_OPTIONS, f"-D__CUDA_ARCH__={10 * capability}"]
    text = sources.kernel_source(source, name)
    return str(compiling.build(name, [text], options, key=compiling.headers_key()))
