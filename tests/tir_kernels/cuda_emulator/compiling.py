"""g++ as the device compiler: shared objects cached by what they were made from."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).parent
INCLUDE = ROOT / "include"
_KEPT_SECONDS = 30 * 24 * 3600
_COMPILE = ("-fPIC", "-std=c++17", "-march=native", f"-I{INCLUDE}")


def cache_folder() -> Path:
    """Where compiled objects are kept: $MLCAWQ_EMULATOR_CACHE, or the user's cache folder."""
    given = os.environ.get("MLCAWQ_EMULATOR_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = Path(given) if given else base / "mlcawq" / "cuda-emulator"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@functools.cache
def _cache() -> Path:
    """The cache folder, rid of what no run has used for a month."""
    folder = cache_folder()
    for path in folder.glob("*.so"):
        with suppress(FileNotFoundError):  # another process is at it too
            if time.time() - path.stat().st_mtime > _KEPT_SECONDS:
                path.unlink()
    return folder


@functools.cache
def why_not() -> str | None:
    """What this machine lacks for compiling device code, or None."""
    if platform.machine() != "x86_64" or not {"avx2", "fma", "f16c"} <= set(_cpu_flags().split()):
        return "it takes an x86-64 processor with AVX2, FMA and F16C"
    if shutil.which("g++") is None:
        return "it takes g++ 12 or newer, which is not on PATH"
    version = subprocess.run(["g++", "-dumpversion"], capture_output=True, text=True).stdout
    if int(version.split(".")[0]) < 12:
        return f"it takes g++ 12 or newer, and this one is {version.strip()}"
    return None


def _cpu_flags() -> str:
    flags = re.search(r"^flags.*$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return flags.group() if flags else ""


@functools.cache
def _environment_key() -> str:
    """What an object depends on besides its source and options: the compiler and the processor."""
    version = subprocess.run(["g++", "--version"], capture_output=True, text=True).stdout
    return version + _cpu_flags()


@functools.cache
def headers_key() -> str:
    """The emulator's headers, by content."""
    texts = [path.read_bytes() for path in sorted(INCLUDE.rglob("*.h"))]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()


def build(
    name: str,
    sources: Sequence[Path | str],
    options: Sequence[str],
    link_options: Sequence[str] = (),
    *,
    key: str = "",
) -> Path:
    """Compile and link C++ (paths, or text) into a file of the cache, unless it is there.

    key: what else the result depends on (headers, libraries). Raises RuntimeError with the
    compiler's messages.
    """
    digest = hashlib.sha256()
    for part in (_environment_key(), key, *options, *link_options):
        digest.update(part.encode() + b"\0")
    for source in sources:
        digest.update((source if isinstance(source, str) else source.read_text()).encode() + b"\0")
    made_from = digest.hexdigest()
    output = _cache() / f"{name}-{made_from[:24]}.so"
    if output.exists():
        output.touch()
        return output
    with _locked(_cache() / f"{made_from[:2]}.lock"), tempfile.TemporaryDirectory() as scratch:
        if output.exists():  # another process was compiling it
            return output
        objects = []
        for i, source in enumerate(sources):
            path = source
            if isinstance(source, str):
                path = Path(scratch) / f"{name}.cpp"
                path.write_text(source)
            objects.append(f"{scratch}/{i}.o")
            _run(name, ["-c", str(path), "-o", objects[-1], *_COMPILE, *options])
        made = output.with_suffix(f".{os.getpid()}.tmp")
        # Linked in a step of its own: told of a sanitizer, the linker would add its runtime.
        _run(name, ["-shared", "-o", str(made), *objects, *link_options])
        made.rename(output)
    return output


def _run(name: str, arguments: Sequence[str]) -> None:
    done = subprocess.run(["g++", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"g++ cannot compile {name}:\n{done.stderr[:8000]}")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
