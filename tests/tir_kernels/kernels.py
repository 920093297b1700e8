"""Compiling one kernel and calling it on numpy arrays."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mlcawq.build.cpu_target import level_target
from mlcawq.build.targets import resolve_target
from mlcawq.engine.processor import this_processor
from tir_kernels._tvm import IRModule, PrimFunc, Target, tvm

# Two vector widths: the host's, and one that every x86 and ARM machine of the day has.
HOST = resolve_target("cpu")


def targets_that_run_here() -> dict[str, Target]:
    """Of each level of instruction sets that this machine has, by its name, best last."""
    return {level.name: level_target(level) for level in this_processor().levels}


def narrow_target() -> Target:
    """The same architecture with 128-bit vectors or the least that LLVM assumes."""
    return Target({"kind": "llvm"})


class Kernel:
    """A compiled function; called with arrays, it returns the outputs that `outputs` describes."""

    def __init__(self, function: PrimFunc, target: Target = HOST) -> None:
        module = IRModule({"main": function.with_attr("global_symbol", "main")})
        # As in a build: this pass finds nothing to do and takes half of the time.
        idle = ["s_tir.CompactBufferAllocation"]
        with target, tvm.transform.PassContext(disabled_pass=idle):
            self.function = tvm.compile(module, target=target)["main"]

    def __call__(self, *arguments: Any) -> None:
        """Outputs are numpy arrays among the arguments, filled in place."""
        tensors = [tvm.runtime.tensor(a) if isinstance(a, np.ndarray) else a for a in arguments]
        self.function(*tensors)
        for given, tensor in zip(arguments, tensors, strict=True):
            if isinstance(given, np.ndarray):
                given[...] = tensor.numpy()


def on_threads(count: int, work: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """`work` in a thread of its own, whose pool is made for so many."""
    monkeypatch.setenv("TVM_NUM_THREADS", str(count))
    monkeypatch.setenv("TVM_BIND_THREADS", "0")
    found: list[Any] = []

    def run() -> None:
        tvm.get_global_func("runtime.config_threadpool")(1, count)
        found.extend((tvm.get_global_func("runtime.NumThreads")(), work()))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found[0] == count
    return found[1]


def poisoned(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """An output that nothing has been written to."""
    return np.full(shape, np.nan, dtype)


def in_eight_bits(x: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """int8 [..., groups, group] and fp32 scales [..., groups] of x [..., K], as kernels round."""
    groups = x.reshape(*x.shape[:-1], -1, group).astype(np.float32)
    most = np.abs(groups).max(-1, keepdims=True)
    inverse = np.float32(127) / np.where(most > 0, most, np.float32(1))
    return np.rint(groups * inverse).astype(np.int8), most[..., 0] / np.float32(127)


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """The norm of the difference over the norm of what was expected; NaN stays NaN."""
    difference = actual.astype(np.float64) - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected))
