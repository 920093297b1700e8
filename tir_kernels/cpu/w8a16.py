"""8-bit weights times activations, by integer dot products: the output head.

For a group of inputs, with the activations as integers v of scale t (`activations`) and the stored
bytes u = q + 128,

    sum_k x[k] q[k] s  =  s t (sum_k v[k] u[k]  -  128 sum_k v[k])

and both sums are exact. `blocked_weight` has what differs from weights of 4 bits.
"""

from __future__ import annotations

from tir_kernels._tvm import PrimFunc, T, Target
from tir_kernels.cpu.blocked_row import row_by_blocks
from tir_kernels.cpu.blocked_rows import rows_by_blocks
from tir_kernels.cpu.blocked_weight import eight_bit_weight
from tir_kernels.cpu.quantized_rows import with_quantized_rows
from tir_kernels.int8_weights import Int8Shape
from tir_kernels.memo import memoized


@memoized
def w8a16_linear(
    target: Target,
    shape: Int8Shape,
    act_dtype: str,
    out_dtype: str,
    *,
    scale_dtype: str = "float16",
    act_bits: int = 16,
) -> PrimFunc:
    """(x [m, K], qweight, scales, out [m, N]) for symbolic m; `int8_weights` has the layout.

    act_bits: 8 or 16, of the quantized activations.
    """
    K, N = shape.K, shape.N
    (q_shape, _), (s_shape, _) = shape.parameters(scale_dtype).values()
    weight = eight_bit_weight(target, shape)

    def kernel_of(planes, rows):
        if rows == 1:
            return row_by_blocks(weight, out_dtype, planes)
        return rows_by_blocks(weight, out_dtype, planes, rows)

    multiply = with_quantized_rows(target, K, shape.group_size, act_bits, kernel_of)

    @T.prim_func(private=True, s_tir=True)
    def linear(
        x_handle: T.handle,
        qweight: T.Buffer(q_shape, "int32"),
        scales: T.Buffer(s_shape, scale_dtype),
        out_handle: T.handle,
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        m = T.int64()
        x = T.match_buffer(x_handle, (m, K), act_dtype)
        out = T.match_buffer(out_handle, (m, N), out_dtype)
        weights = T.meta_var((qweight, scales))
        no_offset = T.meta_var(lambda column: T.float32(0))
        multiply(m, x, weights, no_offset, out)

    return linear
