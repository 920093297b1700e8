"""What tests of the WebGPU device share: whether it can run here, small kernels, subprocesses."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from vulkan_device import needs_vulkan

__all__ = ["Random", "compiled", "needs_vulkan", "output", "run_python"]


class Random:
    """Fresh inputs; `seed` belongs into the message of every assertion about them."""

    def __init__(self) -> None:
        self.seed = secrets.randbits(32)
        self.generator = np.random.default_rng(self.seed)

    def bytes(self, nbytes: int) -> np.ndarray:
        return self.generator.integers(0, 256, nbytes, np.uint8)

    def floats(self, *shape: int, dtype: str = "float32") -> np.ndarray:
        return self.generator.standard_normal(shape).astype(dtype)


def compiled(function: Any) -> Any:
    """A TIR function compiled for the device, by its one entry."""
    import tvm

    target = tvm.target.Target("webgpu", host="llvm")
    return tvm.compile(function, target=target)[str(function.attrs["global_symbol"])]


def run_python(code: str, *args: str, **environment: str) -> subprocess.Popen[str]:
    """Another interpreter at work on `code`, with the environment changed as told."""
    root = Path(__file__).parents[2]
    paths = [str(root), str(Path(__file__).parent), *sys.path]
    return subprocess.Popen(
        [sys.executable, "-c", code, *args],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output(process: subprocess.Popen[str], *, seconds: float = 120) -> str:
    """What it printed. Fails when the process did, with its complaints."""
    out, err = process.communicate(timeout=seconds)
    assert process.returncode == 0, f"exit code {process.returncode}:\n{err[-3000:]}"
    return out
