"""A machine with NVIDIA GPUs that compute nothing: a driver and a CUDA runtime of ten lines each.

TVM's own CUDA runtime loads against them, so that what libraries are made of, and what the engine
asks of a GPU, is seen by the code that reads it on a real one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

_SOURCE = Path(__file__).with_name("driver.c")
_PROJECT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Call:
    """One call that the stub wrote down: what, of what, and numbers (see driver.c)."""

    what: str
    name: str
    numbers: tuple[int, ...]


@dataclass(frozen=True)
class Answer:
    """What a program printed (stdout and stderr), its exit status and the calls it made."""

    status: int
    output: str
    calls: tuple[Call, ...]

    def named(self, what: str) -> list[Call]:
        return [call for call in self.calls if call.what == what]


class StubMachine:
    """gpus, capability (90 for 9.0), cuda (13000 for 13.0), memory in bytes: see driver.c."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        names = folder / "versions"
        names.write_text("libcudart.so.13 { global: cu*; local: *; };\n")
        # The driver and the runtime share their state: one library, under two names.
        runtime = folder / "libcudart.so.13"
        _link(runtime, str(_SOURCE), f"-Wl,--version-script={names}")
        _link(folder / "libcuda.so.1", "-Wl,--no-as-needed", str(runtime), "-Wl,-rpath,$ORIGIN")

    def run(self, code: str, *arguments: object, **settings: object) -> Answer:
        """Run Python code on this machine; settings become STUB_… variables."""
        log = self.folder / "calls"
        log.unlink(missing_ok=True)
        environment = {
            **os.environ,
            "LD_LIBRARY_PATH": str(self.folder),
            "STUB_LOG": str(log),
            "PYTHONPATH": str(_PROJECT),
            **{f"STUB_{name.upper()}": str(value) for name, value in settings.items()},
        }
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        lines = log.read_text().splitlines() if log.is_file() else []
        calls = tuple(_call(line) for line in lines)
        return Answer(done.returncode, done.stdout + done.stderr, calls)


def can_be_built() -> bool:
    return sys.platform == "linux" and shutil.which("gcc") is not None


def _call(line: str) -> Call:
    what, name, *numbers = line.split()
    return Call(what, name, tuple(map(int, numbers)))


def _link(path: Path, *arguments: str) -> None:
    command = ["gcc", "-shared", "-fPIC", "-O1", "-o", str(path), f"-Wl,-soname,{path.name}"]
    subprocess.run([*command, *arguments], check=True)
