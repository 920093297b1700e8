"""What the kernels on the blocked layout do with a group of inputs, around its dot products."""

from __future__ import annotations

from typing import Any

from tir_kernels._tvm import T
from tir_kernels.cpu.integer_dot import MOST
from tir_kernels.layouts import BLOCK_N, PACK

STEPS = MOST // 2  # words of an output that one sum of dot products takes: both nibbles of each


def unpacked(words: Any, half: Any, lanes: int) -> Any:
    """The low (half 0) or high nibbles of a vector of words, one to a byte."""
    shifted = T.shift_right(words, T.broadcast(4 * half, lanes))
    return T.bitwise_and(shifted, T.broadcast(T.int32(0x0F0F0F0F), lanes))


def group_factors(lanes: int):
    """TIR: zero points and fp32 scales of `lanes` outputs of a block, from output `first` on.

    (qzeros, scales, b, g, first, zero, scale, at): written to zero[at ...] and scale[at ...].
    """

    @T.inline
    def load(qzeros, scales, b, g, first, zero, scale, at):
        for j in T.vectorized(lanes):
            zero[at + j] = T.bitwise_and(
                T.shift_right(
                    T.Select(first + j < PACK, qzeros[b, g, 0], qzeros[b, g, 1]),
                    T.bitwise_and(first + j, PACK - 1) * 4,
                ),
                15,
            )
            scale[at + j] = T.Cast("float32", scales[b, g, first + j])

    return load


def group_product(high: Any, low: Any | None, zero: Any, total: Any, lanes: int) -> Any:
    """sum_k v[k] (q[k] - z) of a group in fp32, from the planes' dot products and total = sum v.

    low: None where activations have one plane.
    """
    dots = high if low is None else T.shift_left(high, T.broadcast(T.int32(8), lanes)) + low
    return T.Cast(f"float32x{lanes}", dots - zero * T.broadcast(total, lanes))


def store_block(out_dtype: str, N: int, width: int):
    """TIR: fp32 total[row, at .. at + width - 1] plus offsets into out[r, column ...], as far as N.

    (total, row, at, r, column, offset, out), for `width` outputs of a block.
    """

    @T.inline
    def store(total, row, at, r, column, offset, out):
        if N % BLOCK_N == 0 or column + width <= N:
            for j in T.vectorized(width):
                out[r, column + j] = T.Cast(out_dtype, total[row, at + j] + offset(column + j))
        else:
            for j in range(width):
                if column + j < N:
                    out[r, column + j] = T.Cast(out_dtype, total[row, at + j] + offset(column + j))

    return store
