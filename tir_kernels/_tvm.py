"""The one place where tir_kernels takes names from TVM: they move between releases."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import tvm
from tvm import IRModule, tirx
from tvm.script import tirx as T  # noqa: N812 - TVMScript's own name for it
from tvm.script.ir_builder import IRBuilder
from tvm.script.parser.core.parser import ScriptMacro
from tvm.target import Target
from tvm.target.codegen import target_has_features
from tvm.tirx import PrimFunc
from tvm.tirx.buffer import is_buffer_var

__all__ = [
    "IRBuilder",
    "IRModule",
    "PrimFunc",
    "T",
    "Target",
    "is_buffer_var",
    "target_has_features",
    "tirx",
    "tvm",
]


def _find_parser(macro: ScriptMacro) -> Any:
    """The parser that is running: the nearest caller's global of that name."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        parser = frame.f_globals.get(macro.parser_object_name)
        if parser is not None:
            return parser
        frame = frame.f_back
    raise RuntimeError("a T.inline function is called outside of TVMScript")


# TVM looks for it with inspect.getouterframes, which reads the source file of every caller each
# time a T.inline function is called. Kernels made of many such functions parse seven times faster
# without.
ScriptMacro._find_parser_def = _find_parser
