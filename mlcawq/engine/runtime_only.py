"""Importing TVM as a runtime alone, for processes that only run models.

TVM_USE_RUNTIME_LIB leaves out the compiler (half the time and memory of the import). The rest
saves what is spent on nothing here, half a second in all:

- apache-tvm-ffi imports torch whenever it is installed, only to prevent a clash of symbols on one
  version of Windows: a second and 200 MB.
- tvm registers classes for the compiler's types too, and passes over those that the library does
  not know. Each of these is an error inside, and for the first one the debug information of all
  libraries of the process is read (0.2 s), for a traceback that nobody sees.
- numpy's BLAS starts a thread for each core, which spins for a while.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_LOOK_UP = "_object_type_key_to_index"  # of tvm_ffi.core, which register_object calls


def import_tvm_runtime() -> None:
    """Import tvm without its compiler and without torch.

    Does nothing where tvm is there already: a process that compiles keeps its compiler.
    """
    if "tvm" in sys.modules:
        return
    os.environ.setdefault("TVM_USE_RUNTIME_LIB", "1")
    modules: dict[str, Any] = sys.modules
    hide_torch = "torch" not in modules and "tvm_ffi" not in modules
    if hide_torch:
        modules["torch"] = None  # makes `import torch` an ImportError, which tvm_ffi expects
    try:
        with _unknown_types_are_no_errors():
            import tvm  # noqa: F401
    finally:
        if hide_torch:
            del modules["torch"]


def without_blas_threads() -> None:
    """For a process that does no linear algebra in numpy. Call it before numpy is imported."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


@contextmanager
def _unknown_types_are_no_errors() -> Iterator[None]:
    """While classes are registered, look types up in the list of those that there are."""
    from tvm_ffi import core, registry

    look_up: Any = getattr(core, _LOOK_UP, None)
    if look_up is None:  # another version of tvm_ffi, which may have another way
        yield
        return

    def look_up_known(key: str) -> Any:
        return look_up(key) if key in registry.get_registered_type_keys() else None

    setattr(core, _LOOK_UP, look_up_known)
    try:
        yield
    finally:
        setattr(core, _LOOK_UP, look_up)
