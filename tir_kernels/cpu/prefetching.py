"""Asking for memory ahead of its use, where a processor does not see by itself what comes next."""

from __future__ import annotations

from typing import Any

from tir_kernels._tvm import T


def asked_for(element: Any, level: int = 3) -> Any:
    """The expression that asks for the cache line of a buffer's element: for reading, data (the
    arguments of LLVM's prefetch). level: 3 to keep it in all caches, 2 in all but the first. Past
    the buffer's end it asks for what lies behind, which does no harm.
    """
    return T.call_intrin("void", "tirx.prefetch", T.address_of(element), 0, level, 1)
