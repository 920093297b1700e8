"""4-bit weights times activations: kernels for each layout and number of rows."""

from __future__ import annotations

from typing import Any

from tir_kernels._tvm import PrimFunc, T, Target
from tir_kernels.layouts import AUTOAWQ, TILED, LinearShape
from tir_kernels.memo import memoized
from tir_kernels.vulkan import launch, schedule
from tir_kernels.vulkan.epilogue import Epilogue
from tir_kernels.vulkan.limits import limits_of
from tir_kernels.vulkan.many_rows import many_rows
from tir_kernels.vulkan.reading import Reader, widest_read
from tir_kernels.vulkan.stages import stock_weights, tiled_weights
from tir_kernels.vulkan.stock_few_rows import stock_few_rows
from tir_kernels.vulkan.tiled_few_rows import tiled_few_rows


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
    """(x [m, K], qweight, qzeros, scales[, bias [N]], out [m, N or N / 2]) for symbolic m.

    Raises NotImplementedError for weights in the stock layout that are larger than a storage
    binding.
    """
    epilogue = Epilogue(shape.N, out_dtype, bias, silu)
    kernels = _tiled if layout == TILED else _stock
    multiply = kernels(target, shape, act_dtype, scale_dtype, epilogue)
    qweight_shape, qzeros_shape, scales_shape = (s for s, _ in shape.parameters(layout).values())
    K, N, width = shape.K, shape.N, epilogue.width
    if bias:

        @T.prim_func(private=True, s_tir=True)
        def linear_bias(
            x_handle: T.handle,
            qweight: T.Buffer(qweight_shape, "int32"),
            qzeros: T.Buffer(qzeros_shape, "int32"),
            scales: T.Buffer(scales_shape, scale_dtype),
            bias_vector: T.Buffer((N,), act_dtype),
            out_handle: T.handle,
        ):
            T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
            m = T.int64()
            x = T.match_buffer(x_handle, (m, K), act_dtype)
            out = T.match_buffer(out_handle, (m, width), out_dtype)
            multiply(T.Cast("int32", m), x, (qweight, qzeros, scales), bias_vector, out)

        return linear_bias

    @T.prim_func(private=True, s_tir=True)
    def linear(
        x_handle: T.handle,
        qweight: T.Buffer(qweight_shape, "int32"),
        qzeros: T.Buffer(qzeros_shape, "int32"),
        scales: T.Buffer(scales_shape, scale_dtype),
        out_handle: T.handle,
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        m = T.int64()
        x = T.match_buffer(x_handle, (m, K), act_dtype)
        out = T.match_buffer(out_handle, (m, width), out_dtype)
        multiply(T.Cast("int32", m), x, (qweight, qzeros, scales), None, out)

    return linear


def _tiled(
    target: Target, shape: LinearShape, act_dtype: str, scale_dtype: str, epilogue: Epilogue
) -> Any:
    limits = limits_of(target)
    reader = Reader(shape.K, act_dtype, tiled=True)

    def linear(block: Any) -> Any:
        return launch.tiled(target, shape, scale_dtype, epilogue, reader, block)

    few = [
        (s.rows, linear(tiled_few_rows(shape, reader, s, epilogue, limits)))
        for s in schedule.tiled_few_rows(shape, limits)
    ]
    *small, large = schedule.many_rows(limits)
    weights = tiled_weights(shape)
    many = [(s.up_to, linear(many_rows(reader, weights, s, epilogue))) for s in small]
    return launch.by_rows(few + many, linear(many_rows(reader, weights, large, epilogue)))


def _stock(
    target: Target, shape: LinearShape, act_dtype: str, scale_dtype: str, epilogue: Epilogue
) -> Any:
    limits = limits_of(target)
    short = Reader(shape.K, act_dtype, most=4)
    reader = Reader(shape.K, act_dtype, most=widest_read(target))

    def linear(reader: Reader, block: Any) -> Any:
        return launch.stock(target, shape, scale_dtype, reader, block)

    few = [
        (s.rows, linear(short, stock_few_rows(shape, short, s, epilogue, limits)))
        for s in schedule.stock_few_rows(limits)
    ]
    *small, large = schedule.many_rows(limits)
    weights = stock_weights(shape)
    many = [(s.up_to, linear(reader, many_rows(reader, weights, s, epilogue))) for s in small]
    return launch.by_rows(few + many, linear(reader, many_rows(reader, weights, large, epilogue)))
