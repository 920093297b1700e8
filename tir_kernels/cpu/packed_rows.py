"""Rows of a packed table: the embedding, where it is one array with the output head.

A row lies strewn over a block of 16 rows, one word in sixteen; a block is read in one stream.
"""

from __future__ import annotations

from tir_kernels import int8_weights
from tir_kernels._tvm import PrimFunc, T, Target
from tir_kernels.int8_weights import Int8Shape
from tir_kernels.layouts import BLOCK_N, BLOCKED, PACK, LinearShape
from tir_kernels.memo import memoized


@memoized
def take_int8_rows(
    target: Target, shape: Int8Shape, dtype: str, *, scale_dtype: str = "float16"
) -> PrimFunc:
    """(qweight, scales, rows int32 [m], out [m, K]); a row out of range is clipped."""
    N, K, G, pack = shape.N, shape.K, shape.group_size, int8_weights.PACK
    (q_shape, _), (s_shape, _) = shape.parameters(scale_dtype).values()

    @T.prim_func(private=True, s_tir=True)
    def take(
        qweight: T.Buffer(q_shape, "int32"),
        scales: T.Buffer(s_shape, scale_dtype),
        rows_handle: T.handle,
        out_handle: T.handle,
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        m = T.int64()
        rows = T.match_buffer(rows_handle, (m,), "int32")
        out = T.match_buffer(out_handle, (m, K), dtype)
        for r in T.parallel(m):
            row: T.let[T.int32] = T.max(T.min(rows[r], N - 1), 0)
            block: T.let[T.int32] = T.floordiv(row, BLOCK_N)
            n: T.let[T.int32] = T.floormod(row, BLOCK_N)
            for word in range(K // pack):
                for j in T.unroll(pack):
                    stored = T.meta_var(
                        T.bitwise_and(T.shift_right(qweight[block, word, n], 8 * j), 255)
                    )
                    out[r, word * pack + j] = T.Cast(
                        dtype,
                        T.Cast("float32", stored - int8_weights.OFFSET)
                        * T.Cast("float32", scales[block, word * pack // G, n]),
                    )

    return take


@memoized
def take_int4_rows(
    target: Target, shape: LinearShape, dtype: str, *, scale_dtype: str = "float16"
) -> PrimFunc:
    """(qweight, qzeros, scales, rows int32 [m], out [m, K]), of the blocked layout; a row out of
    range is clipped.
    """
    N, K, G = shape.N, shape.K, shape.group_size
    parameters = shape.parameters(BLOCKED, scale_dtype)
    (q_shape, _), (z_shape, _), (s_shape, _) = parameters.values()

    @T.prim_func(private=True, s_tir=True)
    def take(
        qweight: T.Buffer(q_shape, "int32"),
        qzeros: T.Buffer(z_shape, "int32"),
        scales: T.Buffer(s_shape, scale_dtype),
        rows_handle: T.handle,
        out_handle: T.handle,
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        m = T.int64()
        rows = T.match_buffer(rows_handle, (m,), "int32")
        out = T.match_buffer(out_handle, (m, K), dtype)
        for r in T.parallel(m):
            row: T.let[T.int32] = T.max(T.min(rows[r], N - 1), 0)
            block: T.let[T.int32] = T.floordiv(row, BLOCK_N)
            n: T.let[T.int32] = T.floormod(row, BLOCK_N)
            for word in range(K // PACK):
                for k in T.unroll(PACK):
                    g = T.meta_var(word * PACK // G)
                    # Input k of the eight is in byte k % 4, in its high nibble from 4 on.
                    q = T.meta_var(
                        T.bitwise_and(
                            T.shift_right(qweight[block, word, n], k % 4 * 8 + k // 4 * 4), 15
                        )
                    )
                    zero = T.meta_var(
                        T.bitwise_and(T.shift_right(qzeros[block, g, n // PACK], n % PACK * 4), 15)
                    )
                    out[r, word * PACK + k] = T.Cast(
                        dtype,
                        T.Cast("float32", q - zero) * T.Cast("float32", scales[block, g, n]),
                    )

    return take
