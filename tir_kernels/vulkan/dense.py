"""Unquantized linears, weight [N, K] as Hugging Face stores it."""

from __future__ import annotations

from typing import Any

from tir_kernels._tvm import PrimFunc, T, Target
from tir_kernels.memo import memoized
from tir_kernels.vulkan import launch, schedule
from tir_kernels.vulkan.dense_few_rows import dense_few_rows
from tir_kernels.vulkan.epilogue import Epilogue
from tir_kernels.vulkan.limits import limits_of
from tir_kernels.vulkan.many_rows import many_rows
from tir_kernels.vulkan.reading import Reader, widest_read
from tir_kernels.vulkan.stages import dense_weights


@memoized
def dense_linear(
    target: Target, K: int, N: int, act_dtype: str, out_dtype: str, bias: bool
) -> PrimFunc:
    """(x [m, K], weight [N, K][, bias [N]], out [m, N]) for symbolic m."""
    multiply = _kernels(target, K, N, act_dtype, Epilogue(N, out_dtype, bias))
    if bias:

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
            multiply(T.Cast("int32", m), x, weight, bias_vector, out)

        return linear_bias

    @T.prim_func(private=True, s_tir=True)
    def linear(x_handle: T.handle, weight: T.Buffer((N, K), act_dtype), out_handle: T.handle):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        m = T.int64()
        x = T.match_buffer(x_handle, (m, K), act_dtype)
        out = T.match_buffer(out_handle, (m, N), out_dtype)
        multiply(T.Cast("int32", m), x, weight, None, out)

    return linear


def _kernels(target: Target, K: int, N: int, act_dtype: str, epilogue: Epilogue) -> Any:
    limits = limits_of(target)
    reader = Reader(K, act_dtype, most=widest_read(target))
    weights = dense_weights(reader)

    def linear(block: Any) -> Any:
        return launch.dense(target, N, reader, block)

    few = [
        (s.rows, linear(dense_few_rows(reader, s, epilogue, limits)))
        for s in schedule.dense_few_rows(K, N, reader.width, limits)
    ]
    *small, large = schedule.many_rows(limits)
    many = [(s.up_to, linear(many_rows(reader, weights, s, epilogue))) for s in small]
    return launch.by_rows(few + many, linear(many_rows(reader, weights, large, epilogue)))
