"""4-bit experts on the stock AutoAWQ layout: the kernels of a linear, expert after expert.

On a CPU the host is the device: it reads which experts are wanted and runs those, each on all
threads. Weights of experts without rows are not read.
"""

from __future__ import annotations

from typing import Any

from tir_kernels._tvm import PrimFunc, T, Target
from tir_kernels.cpu.w4a16 import FEW_ROWS, few_rows_linear, many_rows_linear
from tir_kernels.experts import clipped, part
from tir_kernels.layouts import ExpertsShape
from tir_kernels.memo import memoized


@memoized
def w4a16_experts_decode(
    target: Target,
    shape: ExpertsShape,
    x_rows: int,
    rows: int,
    act_dtype: str,
    out_dtype: str,
    *,
    scale_dtype: str = "float16",
) -> PrimFunc:
    """(x [x_rows, K], chosen int32 [1, rows], qweight, qzeros, scales, out [rows, N])."""
    K, N, words, groups, experts = shape.K, shape.N, shape.words, shape.groups, shape.experts
    multiply = few_rows_linear(target, shape, out_dtype)
    of_expert = _of_expert(shape)

    @T.prim_func(private=True, s_tir=True)
    def decode(
        x: T.Buffer((x_rows, K), act_dtype),
        chosen: T.Buffer((1, rows), "int32"),
        qweight: T.Buffer((experts, K, words), "int32"),
        qzeros: T.Buffer((experts, groups, words), "int32"),
        scales: T.Buffer((experts, groups, N), scale_dtype),
        out: T.Buffer((rows, N), out_dtype),
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        for r in range(rows):
            expert = T.meta_var(clipped(chosen[0, r], experts))
            x_row = part(x, (r if x_rows > 1 else 0) * K, (1, K))
            out_row = part(out, r * N, (1, N))
            of_expert(multiply, 1, expert, x_row, qweight, qzeros, scales, out_row)

    return decode


@memoized
def w4a16_experts_grouped(
    target: Target,
    shape: ExpertsShape,
    act_dtype: str,
    out_dtype: str,
    *,
    scale_dtype: str = "float16",
) -> PrimFunc:
    """(x [m, K], indptr int32 [experts + 1], qweight, qzeros, scales, out [m, N])."""
    K, N, words, groups, experts = shape.K, shape.N, shape.words, shape.groups, shape.experts
    few_rows = few_rows_linear(target, shape, out_dtype)
    many_rows = many_rows_linear(target, shape, out_dtype)
    of_expert = _of_expert(shape)

    @T.prim_func(private=True, s_tir=True)
    def grouped(
        x_handle: T.handle,
        indptr: T.Buffer((experts + 1,), "int32"),
        qweight: T.Buffer((experts, K, words), "int32"),
        qzeros: T.Buffer((experts, groups, words), "int32"),
        scales: T.Buffer((experts, groups, N), scale_dtype),
        out_handle: T.handle,
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        m = T.int64()
        x = T.match_buffer(x_handle, (m, K), act_dtype)
        out = T.match_buffer(out_handle, (m, N), out_dtype)
        for expert in range(experts):
            first: T.let[T.int64] = T.Cast("int64", indptr[expert])
            rows: T.let[T.int64] = T.Cast("int64", indptr[expert + 1]) - first
            x_rows = part(x, first * K, (rows, K))
            out_rows = part(out, first * N, (rows, N))
            if rows > 0:
                if rows <= FEW_ROWS:
                    of_expert(few_rows, rows, expert, x_rows, qweight, qzeros, scales, out_rows)
                else:
                    of_expert(many_rows, rows, expert, x_rows, qweight, qzeros, scales, out_rows)

    return grouped


def _of_expert(shape: ExpertsShape) -> Any:
    """An inline builder (multiply, m, expert, x, qweight, qzeros, scales, out)."""
    K, N, words, groups = shape.K, shape.N, shape.words, shape.groups

    @T.inline
    def of_expert(multiply, m, expert, x, qweight, qzeros, scales, out):
        number = T.meta_var(T.Cast("int64", expert))
        own_qweight = part(qweight, number * (K * words), (K, words))
        own_qzeros = part(qzeros, number * (groups * words), (groups, words))
        own_scales = part(scales, number * (groups * N), (groups, N))
        no_offset = T.meta_var(lambda column: T.float32(0))
        multiply(m, x, own_qweight, own_qzeros, own_scales, no_offset, out)

    return of_expert
