"""Unquantized linears, weight [N, K] as Hugging Face stores it: the entry."""

from __future__ import annotations

from typing import Any

from tir_kernels._tvm import PrimFunc, T, Target
from tir_kernels.cuda.by_rows import by_rows
from tir_kernels.cuda.dense_few_rows import dense_few_rows
from tir_kernels.cuda.epilogue import Epilogue
from tir_kernels.cuda.few_rows_schedule import ROW_LIMITS, dense_few_rows_schedule
from tir_kernels.cuda.many_rows_entry import dense_problem, many_rows_kernels
from tir_kernels.cuda.schedule import capability_for
from tir_kernels.memo import memoized


@memoized
def dense_linear(
    target: Target, K: int, N: int, act_dtype: str, out_dtype: str, bias: bool
) -> PrimFunc:
    """(x [m, K], weight [N, K][, bias [N]], out [m, N]) for symbolic m.

    x, weight and bias are of `act_dtype` (float16, or bfloat16 from sm_80 on); sums are fp32 and
    rounded once, to `out_dtype`. Raises ValueError for what the architecture does not have.
    """
    capability = capability_for(target, act_dtype)
    epilogue = Epilogue(N, out_dtype)
    few_rows = [
        dense_few_rows(K, act_dtype, dense_few_rows_schedule(capability, K, N, rows), epilogue)
        for rows in ROW_LIMITS
    ]
    multiply = by_rows(
        ROW_LIMITS,
        few_rows,
        many_rows_kernels(capability, dense_problem(K, N, epilogue), act_dtype),
    )

    return dense_function(K, act_dtype, bias, epilogue, multiply)


def dense_function(
    K: int, act_dtype: str, bias: bool, epilogue: Epilogue, multiply: Any
) -> PrimFunc:
    """The function whose body is an inline builder (m, x, parameters, bias [N] or None, out)."""
    N, out_dtype = epilogue.N, epilogue.out_dtype

    @T.prim_func(private=True, s_tir=True)
    def linear(x_handle: T.handle, weight: T.Buffer((N, K), act_dtype), out_handle: T.handle):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        m = T.int64()
        x = T.match_buffer(x_handle, (m, K), act_dtype)
        out = T.match_buffer(out_handle, (m, N), out_dtype)
        multiply(m, x, (weight,), None, out)

    @T.prim_func(private=True, s_tir=True)
    def linear_bias(
        x_handle: T.handle,
        weight: T.Buffer((N, K), act_dtype),
        bias_vector: T.Buffer((N,), act_dtype),
        out_handle: T.handle,
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        m = T.int64()
        x = T.match_buffer(x_handle, (m, K), act_dtype)
        out = T.match_buffer(out_handle, (m, N), out_dtype)
        multiply(m, x, (weight,), bias_vector, out)

    return linear_bias if bias else linear
