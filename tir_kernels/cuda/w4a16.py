"""4-bit weights times 16-bit activations: the entry."""

from __future__ import annotations

from typing import Any

from tir_kernels._tvm import PrimFunc, T, Target
from tir_kernels.cuda.by_rows import by_rows
from tir_kernels.cuda.epilogue import Epilogue
from tir_kernels.cuda.few_rows_schedule import (
    ROW_LIMITS,
    stock_few_rows_schedule,
    tiled_few_rows_schedule,
)
from tir_kernels.cuda.many_rows_entry import many_rows_kernels, w4a16_problem
from tir_kernels.cuda.schedule import capability_for
from tir_kernels.cuda.stock_few_rows import stock_few_rows
from tir_kernels.cuda.tiled_few_rows import tiled_few_rows
from tir_kernels.layouts import AUTOAWQ, TILED, LinearShape
from tir_kernels.memo import memoized


@memoized
def w4a16_linear(
    target: Target,
    shape: LinearShape,
    act_dtype: str,
    out_dtype: str,
    bias: bool,
    *,
    layout: str = AUTOAWQ,
    silu: bool = False,
    scale_dtype: str = "float16",
) -> PrimFunc:
    """(x [m, K], qweight, qzeros, scales[, bias [N]], out [m, N]) for symbolic m.

    x and bias are of `act_dtype` (float16, or bfloat16 from sm_80 on); sums are fp32 and rounded
    once, to `out_dtype`. silu (tiled layout): out [m, N / 2] is silu(gate) * up.

    Raises ValueError for what the architecture does not have, and for scales that are not float16.
    """
    capability = capability_for(target, act_dtype)
    if scale_dtype != "float16":
        raise ValueError(f"scales of CUDA kernels are float16, not {scale_dtype}")
    epilogue = Epilogue(shape.N, out_dtype, silu)

    def few_rows(rows: int) -> Any:
        if layout == TILED:
            schedule = tiled_few_rows_schedule(capability, shape, rows)
            return tiled_few_rows(shape, act_dtype, schedule, epilogue)
        stock_schedule = stock_few_rows_schedule(capability, shape, rows)
        return stock_few_rows(shape, act_dtype, stock_schedule, epilogue)

    problem = w4a16_problem(shape, act_dtype, epilogue, layout)
    multiply = by_rows(
        ROW_LIMITS,
        [few_rows(rows) for rows in ROW_LIMITS],
        many_rows_kernels(capability, problem, act_dtype),
    )
    return w4a16_function(shape, layout, act_dtype, bias, epilogue, multiply)


def w4a16_function(
    shape: LinearShape, layout: str, act_dtype: str, bias: bool, epilogue: Epilogue, multiply: Any
) -> PrimFunc:
    """The function whose body is an inline builder (m, x, parameters, bias [N] or None, out)."""
    K, N = shape.K, shape.N
    shapes = [shape for shape, _ in shape.parameters(layout).values()]
    qweight_shape, qzeros_shape, scales_shape = shapes
    stored, out_dtype = epilogue.stored, epilogue.out_dtype

    @T.prim_func(private=True, s_tir=True)
    def linear(
        x_handle: T.handle,
        qweight: T.Buffer(qweight_shape, "int32"),
        qzeros: T.Buffer(qzeros_shape, "int32"),
        scales: T.Buffer(scales_shape, "float16"),
        out_handle: T.handle,
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        m = T.int64()
        x = T.match_buffer(x_handle, (m, K), act_dtype)
        out = T.match_buffer(out_handle, (m, stored), out_dtype)
        multiply(m, x, (qweight, qzeros, scales), None, out)

    @T.prim_func(private=True, s_tir=True)
    def linear_bias(
        x_handle: T.handle,
        qweight: T.Buffer(qweight_shape, "int32"),
        qzeros: T.Buffer(qzeros_shape, "int32"),
        scales: T.Buffer(scales_shape, "float16"),
        bias_vector: T.Buffer((N,), act_dtype),
        out_handle: T.handle,
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        m = T.int64()
        x = T.match_buffer(x_handle, (m, K), act_dtype)
        out = T.match_buffer(out_handle, (m, stored), out_dtype)
        multiply(m, x, (qweight, qzeros, scales), bias_vector, out)

    return linear_bias if bias else linear
