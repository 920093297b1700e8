"""A prepared folder: kernels as libraries, and of TVM no more than its runtime.

It is made by `prepare.py` on any machine. Here it is run with torch and apache-tvm-ffi, so that
the machine with the GPU needs neither TVM's compiler nor CUDA's.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
RUNTIME = ("libtvm_runtime.so", "libtvm_runtime_cuda.so")
# Functions of the generic schedule, and the rows that each serves at most; None: any number.
CLASSES: Mapping[str, int | None] = {"one": 1, "two": 2, "eight": 8, "many": None}


def row_class(m: int) -> str:
    """The function of the generic schedule that runs m rows."""
    return next(name for name, most in CLASSES.items() if most is None or m <= most)


class PreparedError(Exception):
    """str(): what is wrong with a prepared folder."""


@dataclass
class Prebuilt:
    """The libraries of a prepared folder, loaded when they are first asked for."""

    folder: Path
    _modules: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def manifest(self) -> dict[str, Any]:
        path = self.folder / MANIFEST
        try:
            content: dict[str, Any] = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise PreparedError(f"{path}: {error}; make the folder with --prepare") from None
        return content

    def function(self, library: str, name: str) -> Any:
        """A kernel's host function. Raises PreparedError where the folder does not have it."""
        names = self.manifest["libraries"].get(library, [])
        if name not in names:
            raise PreparedError(f"{self.folder} has no {library} kernel {name}")
        return getattr(self.module(library), name)

    def module(self, library: str) -> Any:
        import tvm_ffi

        if library not in self._modules:
            self._load_runtime()
            path = self.folder / f"{library}.so"
            self._modules[library] = tvm_ffi.load_module(str(path))
        return self._modules[library]

    def _load_runtime(self) -> None:
        """TVM's runtime, once a process. torch has loaded the CUDA runtime that it needs."""
        import tvm_ffi

        if tvm_ffi.get_global_func("device_api.cuda", allow_missing=True) is None:
            for name in RUNTIME:
                ctypes.CDLL(str(self.folder / name), mode=ctypes.RTLD_GLOBAL)
