"""Linears whose activations are quantized first: one row, a few, and any number in chunks.

A single row, or a few, are quantized by the calling thread: they take less than waking others does.
Of many rows all threads take some, and as many are quantized at a time as stay in a core's cache
while all of the weights go by.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tir_kernels._tvm import T, Target, target_has_features
from tir_kernels.cpu.activations import planes_of, quantize_group

FEW = 4  # rows that share one pass over the weights
CACHED = 2**19  # bytes of quantized activations that stay in a core's cache beside the weights


def rows_in_registers(target: Target) -> int:
    """Rows whose accumulators fit beside the weights: of 32 vector registers, or of 16."""
    return 8 if target_has_features("avx512f", target) else 4


def with_quantized_rows(
    target: Target,
    K: int,
    group_size: int,
    act_bits: int,
    kernel_of: Callable[[int, int], Any],
    many: Any | None = None,
):
    """TIR (m, x, weights, offset, out) for any m. weights: a tuple of buffers, handed on.

    kernel_of(planes, rows): TIR for `height` quantized rows, `rows` at a time: (first, height, xq,
    xscale, xsum, weights, offset, out), where row r of the quantized ones is row first + r of out.
    xq: int32 [planes, ., K/4], xscale fp32 and xsum int32 [., K/G] (see `quantize_group`).

    many: what more than FEW rows are given to instead, with the arguments of the result.
    """
    groups, planes = K // group_size, planes_of(act_bits)
    quantize = quantize_group(target, group_size, act_bits)
    one, few, several = (kernel_of(planes, rows) for rows in (1, FEW, rows_in_registers(target)))
    size_of_chunk = max(CACHED // (planes * K) // 8 * 8, 8)

    @T.inline
    def quantize_row(first, r, x, xq, xscale, xsum):
        for g in range(groups):
            at = T.meta_var(row_words(r, g * group_size))
            quantize(x, first + r, g * group_size, xq, at, xscale, xsum, r, g)

    @T.inline
    def at_once(size, kernel, m, x, weights, offset, out):
        xq = T.alloc_buffer((planes, size, K // 4), "int32")
        xscale = T.alloc_buffer((size, groups), "float32")
        xsum = T.alloc_buffer((size, groups), "int32")
        for r in range(m):
            quantize_row(0, r, x, xq, xscale, xsum)
        kernel(0, m, xq, xscale, xsum, weights, offset, out)

    @T.inline
    def in_chunks(m, x, weights, offset, out):
        xq = T.alloc_buffer((planes, size_of_chunk, K // 4), "int32")
        xscale = T.alloc_buffer((size_of_chunk, groups), "float32")
        xsum = T.alloc_buffer((size_of_chunk, groups), "int32")
        for chunk in range(T.ceildiv(m, size_of_chunk)):
            first: T.let[T.int64] = chunk * size_of_chunk
            height: T.let[T.int64] = T.min(m - first, T.int64(size_of_chunk))
            for r in T.parallel(height):
                quantize_row(first, r, x, xq, xscale, xsum)
            several(first, height, xq, xscale, xsum, weights, offset, out)

    rest = many or in_chunks

    @T.inline
    def multiply(m, x, weights, offset, out):
        if m == 1:
            at_once(1, one, m, x, weights, offset, out)
        else:
            if m <= FEW:
                at_once(FEW, few, m, x, weights, offset, out)
            else:
                rest(m, x, weights, offset, out)

    return multiply


def row_words(r, first):
    """Where quantized activations of row r go, from input `first` on: [plane, row, K/4]."""

    def at(plane, k, lanes):
        word = (first + k) // 4
        return [plane, r, word if lanes == 1 else T.ramp(word, 1, lanes)]

    return at
