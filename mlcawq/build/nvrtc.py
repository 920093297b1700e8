"""NVRTC, NVIDIA's CUDA compiler as a library, through its C interface."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

_HEADERS = ("cuda_fp16.h", "cuda/std/cstdint")  # what TVM's generated code includes
_SUCCESS = 0
_COMPILATION_FAILED = 6


class NvrtcError(Exception):
    """str(): the compiler's log, or the name of the error where there is none."""


class Nvrtc:
    """One libnvrtc with the headers that belong to it."""

    def __init__(self, library: Path, includes: Sequence[Path]) -> None:
        """Raises OSError when the library cannot be loaded."""
        self.path = library
        self._includes = tuple(includes)
        # NVRTC opens its built-in functions by their bare name. Some wheels' libraries do not say
        # that they lie beside it; what is loaded already is found by that name.
        for builtins in library.parent.glob("libnvrtc-builtins.so*"):
            ctypes.CDLL(str(builtins))
        self._library = ctypes.CDLL(str(library))
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p

    @property
    def version(self) -> tuple[int, int]:
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check(self._library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
        return major.value, minor.value

    def architectures(self) -> set[int]:
        """The XX of every sm_XX that it compiles for."""
        count = ctypes.c_int()
        self._check(self._library.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
        found = (ctypes.c_int * count.value)()
        self._check(self._library.nvrtcGetSupportedArchs(found))
        return set(found)

    def compile(self, source: str, arch: str, options: Sequence[str]) -> tuple[bytes, str]:
        """CUDA C++ -> (cubin, log). Raises NvrtcError with the log when it does not compile."""
        cubin, _ptx, log = self.compile_with_ptx(source, arch, options)
        return cubin, log

    def compile_with_ptx(
        self, source: str, arch: str, options: Sequence[str]
    ) -> tuple[bytes, str, str]:
        """As `compile`, with the PTX that the machine code was made from: (cubin, PTX, log)."""
        arguments = [f"--gpu-architecture={arch}", *options]
        arguments += [f"--include-path={folder}" for folder in self._includes]
        encoded = (ctypes.c_char_p * len(arguments))(*(text.encode() for text in arguments))
        program = ctypes.c_void_p()
        self._check(
            self._library.nvrtcCreateProgram(
                ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None
            )
        )
        try:
            status = self._library.nvrtcCompileProgram(program, len(arguments), encoded)
            log = self._read("ProgramLog", program).rstrip(b"\0").decode(errors="replace")
            if status == _COMPILATION_FAILED:
                raise NvrtcError(log)
            self._check(status)
            ptx = self._read("PTX", program).rstrip(b"\0").decode()
            return self._read("CUBIN", program), ptx, log
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _read(self, what: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self._library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._library, f"nvrtcGet{what}")(program, buffer))
        return buffer.raw

    def _check(self, status: int) -> None:
        if status != _SUCCESS:
            raise NvrtcError(self._library.nvrtcGetErrorString(status).decode())


def find_nvrtc() -> tuple[Nvrtc | None, str]:
    """NVRTC of the Python packages, else of a CUDA toolkit; or None and what is missing."""
    reasons = []
    for folder in _roots():
        libraries = [*folder.glob("lib*/libnvrtc.so*"), *folder.glob("bin/nvrtc64*.dll")]
        if not libraries:
            continue
        includes = [folder / "include", folder / "include" / "cccl"]
        lacking = [name for name in _HEADERS if not any((i / name).is_file() for i in includes)]
        if lacking:
            reasons.append(f"{folder} has NVRTC but not {' and '.join(lacking)}")
            continue
        try:
            return Nvrtc(min(libraries, key=lambda path: len(path.name)), includes), ""
        except OSError as error:
            reasons.append(f"NVRTC cannot be loaded: {error}")
    return None, "; ".join(reasons) or "NVRTC is not installed"


def _roots() -> Iterator[Path]:
    """Folders that may hold lib/ and include/ of CUDA."""
    try:
        import nvidia
    except ImportError:
        pass
    else:
        for folder in nvidia.__path__:
            yield from sorted(Path(folder).glob("cu[0-9]*"), reverse=True)
    for named in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(named):
            yield Path(os.environ[named])
    yield Path("/usr/local/cuda")
