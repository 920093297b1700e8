"""Kernels on a Vulkan device: contenders, their check against float64, their times."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import tvm

from benchmarks import generic_schedule
from benchmarks.cases import GROUP_SIZE, Linear
from benchmarks.prebuilt import row_class
from tir_kernels import dispatch, reference
from tir_kernels._tvm import IRModule, PrimFunc, Target
from tir_kernels.layouts import AUTOAWQ, PACK, TILED

_SAMPLE = 16  # rows of a result that are checked against float64; all are checked for NaN
_WARM_UP = 2
_REPEATS = (5, 30)  # at least and at most
_MOST_COPIES = 256
_TARGET = Target({"kind": "webgpu"}, host={"kind": "llvm"})


class WrongResultError(Exception):
    """str(): which kernel is wrong, and by how much."""


@dataclass(frozen=True)
class Timer:
    """batch: seconds that the launches between two waits take at least. budget: seconds that one
    measurement should not exceed by much. rotated: bytes of weights that are read in turn.
    """

    device: Any
    batch: float
    budget: float
    rotated: int

    def seconds(self, runs: Sequence[Callable[[], object]]) -> float:
        """The median time of one of `runs`, which do the same on different copies of the weights.

        Launches follow each other as in decoding, and their cost for the CPU is in the time.
        """
        turns = itertools.cycle(runs)
        self._batch(turns, _WARM_UP)
        launches = int(self.batch / self._batch(turns, 1)) + 1
        times: list[float] = []
        while len(times) < _REPEATS[0] or (
            len(times) < _REPEATS[1] and sum(times) * launches < self.budget
        ):
            times.append(self._batch(turns, launches) / launches)
        return median(times)

    def _batch(self, turns: Iterator[Callable[[], object]], launches: int) -> float:
        start = time.perf_counter()
        for _ in range(launches):
            next(turns)()
        self.device.sync()
        return time.perf_counter() - start

    def copies(self, nbytes: int) -> int:
        """How many copies of so many bytes are as much as `rotated`."""
        return max(2, min(_MOST_COPIES, -(-self.rotated // nbytes)))

    def copy_bandwidth(self, rng: np.random.Generator) -> float:
        """Bytes a second that copies on the device read and write together."""
        size = min(self.rotated, 2**27)
        bits = rng.integers(0, 2**32, size // 4, np.uint32)
        source = tvm.runtime.tensor(bits, self.device)
        targets = [tvm.runtime.empty(bits.shape, "uint32", self.device) for _ in range(2)]
        runs = [partial(source.copyto, target) for target in targets]
        return 2 * bits.nbytes / self.seconds(runs)


@dataclass(frozen=True)
class Contender:
    """name: in the table. layout: of the weights it takes. function: of K, N and m, its kernel;
    equal for values of m that share one. tolerance: relative error that its arithmetic may have.
    """

    name: str
    layout: str
    function: Callable[[int, int, int], tuple[str, PrimFunc]]
    tolerance: float


def contenders(dtype: str) -> list[Contender]:
    """Ours in both layouts, and where activations are float16, the schedule TVM would choose."""
    tolerance = 2e-3 if dtype == "float16" else 2e-5

    def ours(layout: str) -> Callable[[int, int, int], tuple[str, PrimFunc]]:
        def function(K: int, N: int, m: int) -> tuple[str, PrimFunc]:
            return "any", dispatch.w4a16_linear(
                _TARGET, K, N, GROUP_SIZE, dtype, layout=layout, scale_dtype=dtype
            )

        return function

    def generic(K: int, N: int, m: int) -> tuple[str, PrimFunc]:
        name = row_class(m)
        return name, generic_schedule.scheduled(K, N, GROUP_SIZE, name, _TARGET)

    found = [
        Contender("ours", TILED, ours(TILED), tolerance),
        Contender("ours, stock", AUTOAWQ, ours(AUTOAWQ), tolerance),
    ]
    if dtype == "float16":
        found.append(Contender("generic", AUTOAWQ, generic, 5e-2))
    return found


@dataclass
class Row:
    """seconds: by contender."""

    linear: Linear
    m: int
    seconds: dict[str, float]


def measure_linear(
    linear: Linear,
    named: Sequence[Contender],
    ms: Sequence[int],
    dtype: str,
    timer: Timer,
    rng: np.random.Generator,
) -> list[Row]:
    """A row for each m. Raises WrongResultError before anything wrong is timed."""
    K, N, groups = linear.K, linear.N, linear.K // GROUP_SIZE
    bits = rng.integers(0, 2**32, (K + groups, N // PACK), np.uint32).view(np.int32)
    scales = ((0.5 + rng.random((groups, N), np.float32)) * 0.01).astype(dtype)
    stock = (bits[:K], bits[K:], scales)
    layouts = {AUTOAWQ: stock, TILED: reference.tile(*stock)}
    inputs = [rng.standard_normal((m, K), np.float32).astype(dtype) for m in ms]
    sampled = [_sample(m, rng) for m in ms]
    stacked = np.concatenate([x[rows] for x, rows in zip(inputs, sampled, strict=True)])
    ends = np.cumsum([len(rows) for rows in sampled])[:-1]
    expected = np.split(reference.w4a16_linear(stacked, *stock), ends)
    out = [Row(linear, m, {}) for m in ms]
    for contender in named:
        arrays = layouts[contender.layout]
        count = timer.copies(sum(array.nbytes for array in arrays))
        first = [tvm.runtime.tensor(array, timer.device) for array in arrays]
        copies = [first] + [_copy(first, timer.device) for _ in range(count - 1)]
        kernels: dict[str, Any] = {}
        for row, x, rows, right in zip(out, inputs, sampled, expected, strict=True):
            name, function = contender.function(K, N, row.m)
            if name not in kernels:
                kernels[name] = _compiled(function)
            kernel = kernels[name]
            given = tvm.runtime.tensor(x, timer.device)
            result = tvm.runtime.tensor(np.full((row.m, N), np.nan, dtype), timer.device)
            kernel(given, *first, result)
            _check(contender, row, result.numpy(), rows, right)
            row.seconds[contender.name] = timer.seconds(
                [partial(kernel, given, *weights, result) for weights in copies]
            )
    return out


def _sample(m: int, rng: np.random.Generator) -> np.ndarray:
    return np.sort(rng.choice(m, min(m, _SAMPLE), replace=False))


def _copy(tensors: Sequence[Any], device: Any) -> list[Any]:
    return [t.copyto(tvm.runtime.empty(t.shape, t.dtype, device)) for t in tensors]


def _compiled(function: PrimFunc) -> Any:
    module = IRModule({"main": function.with_attr("global_symbol", "main")})
    with _TARGET:
        return tvm.compile(module, target=_TARGET)["main"]


def _check(
    contender: Contender, row: Row, result: np.ndarray, rows: np.ndarray, expected: np.ndarray
) -> None:
    error = np.linalg.norm(result[rows] - expected) / np.linalg.norm(expected)
    if not (error <= contender.tolerance and np.isfinite(result).all()):
        raise WrongResultError(
            f"{contender.name} is wrong for {row.linear.model} {row.linear.name}, m={row.m}: "
            f"relative error {error:.1e}, {contender.tolerance:.0e} allowed"
        )
