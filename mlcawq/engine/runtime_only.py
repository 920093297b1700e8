"""Importing TVM as a runtime alone, for processes that only run models.

TVM_USE_RUNTIME_LIB leaves out the compiler (half the time and memory of the import). And
apache-tvm-ffi imports torch whenever it is installed, only to prevent a clash of symbols on one
version of Windows: a second and 200 MB for nothing here.
"""

from __future__ import annotations

import os
import sys
from typing import Any


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
        import tvm  # noqa: F401
    finally:
        if hide_torch:
            del modules["torch"]
