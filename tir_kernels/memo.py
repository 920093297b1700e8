"""Kernels are parsed once for each set of arguments: a model of 28 layers has a dozen of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

from tir_kernels._tvm import PrimFunc, Target


def memoized(factory: Callable[..., PrimFunc]) -> Callable[..., PrimFunc]:
    """`factory`, returning one function object for equal arguments; targets compare by text."""
    made: dict[Hashable, PrimFunc] = {}

    @functools.wraps(factory)
    def lookup(*args: Any, **kwargs: Any) -> PrimFunc:
        named = tuple(sorted(kwargs.items()))
        key = tuple(str(a) if isinstance(a, Target) else a for a in args) + named
        if key not in made:
            made[key] = factory(*args, **kwargs)
        return made[key]

    return lookup
