"""4-bit weights in the blocked layout times activations, by integer dot products.

For a group of inputs, with the activations as integers v of scale t (`activations`),

    sum_k x[k] (q[k] - z) s  =  s t (sum_k v[k] q[k]  -  z sum_k v[k])

and both sums are exact. A single row (decoding) is bound by reading the weights (`blocked_row`);
several are bound by arithmetic, and are multiplied a tile of rows at a time, in vector registers
(`blocked_rows`) or, where the target has AMX and they are many, in its tiles (`blocked_tiles`).
"""

from __future__ import annotations

from tir_kernels._tvm import PrimFunc, T, Target, target_has_features
from tir_kernels.cpu.blocked_row import row_by_blocks
from tir_kernels.cpu.blocked_rows import rows_by_blocks
from tir_kernels.cpu.blocked_tiles import rows_in_tiles
from tir_kernels.cpu.blocked_weight import four_bit_weight
from tir_kernels.cpu.quantized_rows import with_quantized_rows
from tir_kernels.layouts import BLOCKED, LinearShape
from tir_kernels.memo import memoized


@memoized
def blocked_linear(
    target: Target,
    shape: LinearShape,
    act_dtype: str,
    out_dtype: str,
    bias: bool,
    *,
    scale_dtype: str = "float16",
    act_bits: int = 16,
) -> PrimFunc:
    """(x [m, K], qweight, qzeros, scales[, bias [N]], out [m, N]) for symbolic m.

    The weight's arrays are in the layout BLOCKED. act_bits: 8 or 16, of the quantized activations.
    """
    K, N = shape.K, shape.N
    multiply = _multiply(target, shape, out_dtype, act_bits)
    parameters = shape.parameters(BLOCKED, scale_dtype)
    (q_shape, _), (z_shape, _), (s_shape, _) = parameters.values()

    @T.prim_func(private=True, s_tir=True)
    def linear(
        x_handle: T.handle,
        qweight: T.Buffer(q_shape, "int32"),
        qzeros: T.Buffer(z_shape, "int32"),
        scales: T.Buffer(s_shape, scale_dtype),
        out_handle: T.handle,
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        m = T.int64()
        x = T.match_buffer(x_handle, (m, K), act_dtype)
        out = T.match_buffer(out_handle, (m, N), out_dtype)
        no_offset = T.meta_var(lambda column: T.float32(0))
        weights = T.meta_var((qweight, qzeros, scales))
        multiply(m, x, weights, no_offset, out)

    @T.prim_func(private=True, s_tir=True)
    def linear_bias(
        x_handle: T.handle,
        qweight: T.Buffer(q_shape, "int32"),
        qzeros: T.Buffer(z_shape, "int32"),
        scales: T.Buffer(s_shape, scale_dtype),
        bias_vector: T.Buffer((N,), act_dtype),
        out_handle: T.handle,
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        m = T.int64()
        x = T.match_buffer(x_handle, (m, K), act_dtype)
        out = T.match_buffer(out_handle, (m, N), out_dtype)
        offset = T.meta_var(lambda column: T.Cast("float32", bias_vector[column]))
        weights = T.meta_var((qweight, qzeros, scales))
        multiply(m, x, weights, offset, out)

    return linear_bias if bias else linear


def _multiply(target: Target, shape: LinearShape, out_dtype: str, act_bits: int):
    weight = four_bit_weight(target, shape)

    def kernel_of(planes, rows):
        if rows == 1:
            return row_by_blocks(weight, out_dtype, planes)
        return rows_by_blocks(weight, out_dtype, planes, rows)

    tiled = target_has_features("amx-int8", target)
    many = rows_in_tiles(target, shape, out_dtype, act_bits) if tiled else None
    return with_quantized_rows(target, shape.K, shape.group_size, act_bits, kernel_of, many)
