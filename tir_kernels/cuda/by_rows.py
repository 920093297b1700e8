"""A kernel for each range of rows behind one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tir_kernels._tvm import T


def by_rows(limits: Sequence[int], kernels: Sequence[Any], more: Any) -> Any:
    """An inline (m, x, parameters, bias, out), host code, of inlines of the same arguments.

    kernels[i] serves m <= limits[i], in rising order, and `more` what is left.
    """
    if not limits:
        return more
    limit, kernel = limits[0], kernels[0]
    rest = by_rows(limits[1:], kernels[1:], more)

    @T.inline
    def multiply(m, x, parameters, bias, out):
        if T.tvm_thread_invariant(m <= limit):
            kernel(m, x, parameters, bias, out)
        else:
            rest(m, x, parameters, bias, out)

    return multiply
