"""The C++ half of the WebGPU runtime, compiled on this machine at first use and kept.

TVM's headers and libraries, and those of wgpu-native, are inside the installed Python packages; a
C++ compiler is all that is needed besides. The result is kept under `$XDG_CACHE_HOME/mlcawq`
(`~/.cache/mlcawq`), apart for every state of the sources and every version of the packages.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mlcawq.errors import UserError

_SOURCES = Path(__file__).with_name("cpp")
_UNIT = _SOURCES / "mlcawq_wgpu.cc"
_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared")
_SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"
_LOG_TAIL = 30  # lines of a compiler's complaints that are worth reading


@dataclass(frozen=True)
class _Dependencies:
    """Where the installed packages keep what the runtime is compiled against."""

    includes: tuple[Path, ...]
    libraries: tuple[Path, ...]
    versions: str


def built_library() -> Path:
    """The compiled runtime, compiling it if this is its first use.

    Safe to call from several processes at once: one compiles, the others wait for it.

    Raises UserError when the package wgpu or a C++ compiler is missing, or compiling fails.
    """
    found = _dependencies()
    folder = _cache_folder() / _fingerprint(found)
    compiler = _find_compiler()
    if compiler is None:
        kept = sorted(folder.glob(f"*{_SUFFIX}"))
        if kept:
            return kept[0]
        raise UserError.one(
            "no C++ compiler was found; one is needed, once, to compile the Vulkan runtime",
            fix="install one (Debian: apt install g++), or name it in the environment variable CXX",
        )
    library = folder / f"{_compiler_tag(compiler)}{_SUFFIX}"
    if library.exists():
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError:
        # A home that cannot be written to costs the time of compiling, and nothing else.
        library = Path(tempfile.mkdtemp(prefix="mlcawq-wgpu-")) / library.name
    with _lock(library.with_suffix(".lock")):
        if not library.exists():
            _compile(compiler, found, library)
    return library


def _dependencies() -> _Dependencies:
    import tvm
    import tvm_ffi

    wgpu = importlib.util.find_spec("wgpu")
    resources = Path(wgpu.origin).parent / "resources" if wgpu and wgpu.origin else None
    native = sorted(resources.glob("libwgpu_native*")) if resources else []
    if resources is None and sys.version_info < (3, 11):
        raise UserError.one(
            "the Vulkan runtime needs the Python package wgpu, whose release does not install on "
            f"Python {sys.version_info[0]}.{sys.version_info[1]}",
            fix="use Python 3.11 or newer",
        )
    if resources is None or not native or not (resources / "webgpu.h").exists():
        raise UserError.one(
            "the Vulkan runtime needs the Python package wgpu, which is "
            + (
                "not installed" if resources is None else f"without its native library: {resources}"
            ),
            fix='pip install "mlcawq[vulkan]"',
        )
    return _Dependencies(
        (
            Path(tvm.libinfo.find_include_path()),
            Path(tvm_ffi.libinfo.find_include_path()),
            Path(tvm_ffi.libinfo.find_dlpack_include_path()),
            resources,
        ),
        (
            Path(tvm.libinfo.find_libtvm_runtime()),
            Path(tvm_ffi.libinfo.find_libtvm_ffi()),
            native[0],
        ),
        f"tvm {tvm.__version__} ffi {tvm_ffi.__version__} wgpu {_version('wgpu')}",
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _fingerprint(found: _Dependencies) -> str:
    digest = hashlib.sha256()
    for path in sorted(_SOURCES.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    # The library refers to wgpu-native by its path: another environment is another library.
    digest.update("\n".join([*_FLAGS, found.versions, *map(str, found.libraries)]).encode())
    return digest.hexdigest()[:16]


def _find_compiler() -> str | None:
    for candidate in filter(None, (os.environ.get("CXX"), "g++", "clang++", "c++")):
        if path := shutil.which(candidate):
            return path
    return None


def _compiler_tag(compiler: str) -> str:
    outcome = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    told = f"{Path(compiler).name}\n{outcome.stdout}"
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mlcawq" / "wgpu"


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one process at a time; where locks are unknown, all of them compile, and one wins."""
    with path.open("w") as file:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(compiler: str, found: _Dependencies, library: Path) -> None:
    """Compile beside `library` and put it in place in one step."""
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        output = Path(scratch) / library.name
        command = [compiler, *_FLAGS, str(_UNIT), "-o", str(output)]
        command += [f"-I{path}" for path in found.includes]
        command += [str(path) for path in found.libraries]
        outcome = subprocess.run(command, capture_output=True, text=True, check=False)
        if outcome.returncode != 0:
            tail = "\n".join(outcome.stderr.strip().splitlines()[-_LOG_TAIL:])
            raise UserError.one(
                f"the Vulkan runtime could not be compiled:\n{tail}",
                compiler,
                "name another C++17 compiler in the environment variable CXX",
            )
        os.replace(output, library)
