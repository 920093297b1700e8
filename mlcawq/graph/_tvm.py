"""The one place where the graph takes names from TVM: they move between releases."""

from __future__ import annotations

import tvm
from tvm import IRModule, relax, tirx
from tvm.relax import vm_build
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import op
from tvm.relax.frontend.nn.llm import kv_cache as tvm_kernels
from tvm.relax.frontend.nn.llm.kv_cache import PagedKVCache, RopeMode
from tvm.target import Target
from tvm.tirx import PrimFunc

__all__ = [
    "IRModule",
    "PagedKVCache",
    "PrimFunc",
    "RopeMode",
    "Target",
    "nn",
    "op",
    "relax",
    "tirx",
    "tvm",
    "tvm_kernels",
    "vm_build",
]
