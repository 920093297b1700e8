"""Many rows of every kind of weight: a kernel for each range of rows, chosen on the host."""

from __future__ import annotations

from typing import Any

from tir_kernels.cuda.by_rows import by_rows
from tir_kernels.cuda.dense_weight import DenseWeight
from tir_kernels.cuda.epilogue import Epilogue
from tir_kernels.cuda.many_rows import many_rows
from tir_kernels.cuda.many_rows_schedule import (
    MANY_ROW_LIMITS,
    Problem,
    many_rows_schedule,
    resident_blocks,
)
from tir_kernels.cuda.stock_weight import StockWeight
from tir_kernels.cuda.tile import ManyRows
from tir_kernels.cuda.tiled_weight import TiledWeight
from tir_kernels.layouts import TILED, LinearShape


def w4a16_problem(shape: LinearShape, act_dtype: str, epilogue: Epilogue, layout: str) -> Problem:
    """A linear on 4-bit weights."""
    operand = TiledWeight if layout == TILED else StockWeight
    return Problem(
        layout, shape.K, shape.N, shape.group_size, epilogue,
        lambda schedule: operand(shape, schedule, act_dtype),
    )  # fmt: skip


def dense_problem(K: int, N: int, epilogue: Epilogue) -> Problem:
    """A linear on 16-bit weights."""
    return Problem("dense", K, N, 0, epilogue, lambda schedule: DenseWeight(K, N, schedule))


def many_rows_kernels(capability: int, problem: Problem, act_dtype: str) -> Any:
    """An inline builder (m, x [m, K], parameters, bias [N] or None, out), host code, for any m.

    parameters: the weight's buffers as a tuple: (qweight, qzeros, scales), or (weight,).
    """
    *kernels, more = (
        _kernel(capability, problem, act_dtype, many_rows_schedule(capability, problem, limit))
        for limit in (*MANY_ROW_LIMITS, None)
    )
    return by_rows(MANY_ROW_LIMITS, kernels, more)


def _kernel(capability: int, problem: Problem, act_dtype: str, schedule: ManyRows) -> Any:
    return many_rows(
        problem.make(schedule),
        problem.K,
        act_dtype,
        problem.epilogue,
        resident=resident_blocks(capability, problem, schedule),
        asynchronous=capability >= 80,
    )
