"""Asking for memory ahead of its use, where a processor does not see by itself what comes next."""

from __future__ import annotations

from typing import Any

from tir_kernels._tvm import T


def asked_for(element: Any) -> Any:
    """The expression that asks for the cache line of a buffer's element: for reading, to be kept in
    all caches, data (the arguments of LLVM's prefetch). Past the buffer's end it asks for what lies
    behind, which does no harm.
    """
    return T.call_intrin("void", "tirx.prefetch", T.address_of(element), 0, 3, 1)
