"""4-bit weights in the blocked layout times activations, by integer dot products.

For a group of inputs, with the activations as integers v of scale t (`activations`),

    sum_k x[k] (q[k] - z) s  =  s t (sum_k v[k] q[k]  -  z sum_k v[k])

and both sums are exact. A single row (decoding) is bound by reading the weights (`blocked_row`);
several are bound by arithmetic, and are multiplied a tile of rows at a time, in vector registers
(`blocked_rows`) or, where the target has AMX and they are many, in its tiles (`blocked_tiles`).
"""

from __future__ import annotations

from tir_kernels._tvm import PrimFunc, T, Target, target_has_features
from tir_kernels.cpu.activations import planes_of, quantize_group
from tir_kernels.cpu.blocked_row import row_by_blocks
from tir_kernels.cpu.blocked_rows import rows_by_blocks
from tir_kernels.cpu.blocked_tiles import rows_in_tiles
from tir_kernels.layouts import BLOCKED, LinearShape
from tir_kernels.memo import memoized

FEW = 4  # rows that are quantized by the thread that calls: less than waking others takes
CACHED = 2**19  # bytes of quantized activations that stay in a core's cache beside the weights


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
        multiply(m, x, qweight, qzeros, scales, no_offset, out)

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
        multiply(m, x, qweight, qzeros, scales, offset, out)

    return linear_bias if bias else linear


def _multiply(target: Target, shape: LinearShape, out_dtype: str, act_bits: int):
    K, G, groups, planes = shape.K, shape.group_size, shape.groups, planes_of(act_bits)
    chunk = max(CACHED // (planes * K) // 8 * 8, 8)
    quantize = quantize_group(target, G, act_bits)
    one = row_by_blocks(target, shape, out_dtype, planes)
    several = rows_by_blocks(target, shape, out_dtype, planes)

    @T.inline
    def quantize_row(first, r, x, xq, xscale, xsum):
        for g in range(groups):
            at = T.meta_var(_row_words(r, g * G))
            quantize(x, first + r, g * G, xq, at, xscale, xsum, r, g)

    @T.inline
    def at_once(size, kernel, m, x, qweight, qzeros, scales, offset, out):
        xq = T.alloc_buffer((planes, size, K // 4), "int32")
        xscale = T.alloc_buffer((size, groups), "float32")
        xsum = T.alloc_buffer((size, groups), "int32")
        for r in range(m):
            quantize_row(0, r, x, xq, xscale, xsum)
        kernel(0, m, xq, xscale, xsum, qweight, qzeros, scales, offset, out)

    @T.inline
    def in_chunks(m, x, qweight, qzeros, scales, offset, out):
        xq = T.alloc_buffer((planes, chunk, K // 4), "int32")
        xscale = T.alloc_buffer((chunk, groups), "float32")
        xsum = T.alloc_buffer((chunk, groups), "int32")
        for i in range(T.ceildiv(m, chunk)):
            first: T.let[T.int64] = i * chunk
            height: T.let[T.int64] = T.min(m - first, T.int64(chunk))
            for r in T.parallel(height):
                quantize_row(first, r, x, xq, xscale, xsum)
            several(first, height, xq, xscale, xsum, qweight, qzeros, scales, offset, out)

    amx = target_has_features("amx-int8", target)
    many = rows_in_tiles(target, shape, out_dtype, act_bits) if amx else in_chunks

    @T.inline
    def multiply(m, x, qweight, qzeros, scales, offset, out):
        if m == 1:
            at_once(1, one, m, x, qweight, qzeros, scales, offset, out)
        else:
            if m <= FEW:
                at_once(FEW, several, m, x, qweight, qzeros, scales, offset, out)
            else:
                many(m, x, qweight, qzeros, scales, offset, out)

    return multiply


def _row_words(r, first):
    """Where quantized activations of row r go, from input `first` on: [plane, row, K/4]."""

    def at(plane, k, lanes):
        word = (first + k) // 4
        return [plane, r, word if lanes == 1 else T.ramp(word, 1, lanes)]

    return at
