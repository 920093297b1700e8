"""The one place where tir_kernels takes names from TVM: they move between releases."""

from __future__ import annotations

import tvm
from tvm import IRModule
from tvm.script import tirx as T  # noqa: N812 - TVMScript's own name for it
from tvm.target import Target
from tvm.target.codegen import target_has_features
from tvm.tirx import PrimFunc

__all__ = [
    "IRModule",
    "PrimFunc",
    "T",
    "Target",
    "target_has_features",
    "tvm",
]
