"""The files that are measured, made once and kept by what they depend on.

A folder NAME-KEY below the cache: KEY digests all that NAME is made from, and what older keys made
is removed, so that the cache does not grow.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.cpu import source
from benchmarks.cpu.shapes import Shape

_HERE = Path(__file__).resolve().parent
_ROOT = _HERE.parents[2]
_BUILDERS = ("mlcawq/build", "mlcawq/checkpoint", "mlcawq/families", "mlcawq/graph", "tir_kernels")
Say = Callable[[str], None]


class PreparationError(RuntimeError):
    """A contender's files cannot be made; the message says why."""


def digest(parts: Iterable[Any]) -> str:
    """Of values that JSON can write, and of files, given as paths, by their content."""
    found = hashlib.sha256()
    for part in parts:
        content = part.read_bytes() if isinstance(part, Path) else json.dumps(part).encode()
        found.update(hashlib.sha256(content).digest())
    return found.hexdigest()[:12]


class Files:
    """cache: the folder that holds all. say: told of what takes time."""

    def __init__(self, cache: Path, say: Say) -> None:
        self._cache, self._say = cache, say

    def source(self, shape: Shape) -> Path:
        """The bfloat16 checkpoint."""
        return self._made(
            f"{shape.name}-source",
            self._origin(shape),
            lambda folder: source.write_source(shape, folder),
        )

    def built(self, shape: Shape, name: str, options: Sequence[str]) -> Path:
        """What `mlcawq build OPTIONS` makes of the AWQ checkpoint."""
        code = sorted(path for room in _BUILDERS for path in (_ROOT / room).rglob("*.py"))
        key = [*self._origin(shape), *code, list(options), version("apache-tvm")]

        def build(folder: Path) -> None:
            command = [sys.executable, "-m", "mlcawq", "build", str(self._awq(shape))]
            command += ["-o", str(folder / "model"), "--no-verify", *options]
            _run(command)

        return self._made(f"{shape.name}-{name}", key, build) / "model"

    def gguf(self, shape: Shape, kind: str, python: Path, project: str) -> Path:
        """llama.cpp's `kind` of the checkpoint. project: its version."""
        script = _HERE / "gguf_files.py"
        key = [*self._origin(shape), script, kind, project]

        def quantize(folder: Path) -> None:
            half = folder / "float16.gguf"
            _run([str(python), str(script), str(self.source(shape)), str(half)])
            _run([str(python), str(script), str(half), str(folder / "model.gguf"), kind])
            half.unlink()

        return self._made(f"{shape.name}-{kind}", key, quantize) / "model.gguf"

    def note(
        self, name: str, key: Iterable[Any], find: Callable[[], Any], *, again: bool = False
    ) -> Any:
        """Something small that is known once it has been found: JSON. again: find it anew."""

        def write(folder: Path) -> None:
            (folder / "note.json").write_text(json.dumps(find()))

        if again:
            self._forget(name)
        return json.loads((self._made(name, list(key), write) / "note.json").read_text())

    def log(self, name: str) -> Path:
        """Where a contender's process writes what it has to say."""
        folder = self._cache / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{name.replace(' ', '_').replace('/', '_')}.log"

    def _origin(self, shape: Shape) -> list[Any]:
        return [shape.config, Path(source.__file__)]

    def _awq(self, shape: Shape) -> Path:
        return self._made(
            f"{shape.name}-awq",
            self._origin(shape),
            lambda folder: source.write_awq(self.source(shape), folder),
        )

    def _made(self, name: str, key: list[Any], make: Callable[[Path], None]) -> Path:
        folder = self._cache / f"{name}-{digest(key)}"
        if folder.is_dir():
            return folder
        self._say(f"preparing {name}")
        self._cache.mkdir(parents=True, exist_ok=True)
        self._forget(name)
        partial = self._cache / f".{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        make(partial)
        os.replace(partial, folder)
        return folder

    def _forget(self, name: str) -> None:
        for old in self._cache.glob(f"{name}-" + "[0-9a-f]" * 12):
            shutil.rmtree(old)


def _run(command: Sequence[str]) -> None:
    """Raises PreparationError with the last lines that were printed."""
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        last = " / ".join(done.stdout.strip().splitlines()[-3:])
        raise PreparationError(f"{' '.join(command[1:5])} failed: {last}")
