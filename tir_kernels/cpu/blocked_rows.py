"""Several rows against the blocked layout: a tile of rows by a vector of outputs in registers."""

from __future__ import annotations

from tir_kernels._tvm import T, Target
from tir_kernels.cpu.blocked_group import (
    STEPS,
    group_factors,
    group_product,
    store_block,
    unpacked,
)
from tir_kernels.cpu.integer_dot import integer_dot_of
from tir_kernels.layouts import BLOCK_N, PACK, LinearShape


def rows_by_blocks(target: Target, shape: LinearShape, out_dtype: str, planes: int, rows: int):
    """TIR for quantized rows against all blocks, `rows` at a time, in parallel.

    Arguments as of `blocked_row.row_by_blocks`. Rows past the last of the last tile repeat it, and
    are not stored.
    """
    N, groups, blocks, words = shape.N, shape.groups, shape.blocks, shape.group_size // PACK
    dot = integer_dot_of(target)
    L = dot.lanes
    load_factors = group_factors(L)
    store = store_block(out_dtype, N, L)

    def pairs(nibbles, xq, p, row, word):
        return [
            (nibbles[u, half, T.ramp(0, 1, L)], T.broadcast(xq[p, row, 2 * (word + u) + half], L))
            for u in range(STEPS)
            for half in (0, 1)
        ]

    @T.inline
    def multiply(first, height, xq, xscale, xsum, weights, offset, out):
        qweight, qzeros, scales = T.meta_var(weights)
        for b in T.parallel(blocks):
            nibbles = T.alloc_buffer((STEPS, 2, L), "int32")
            part = T.alloc_buffer((planes, rows, L), "int32")
            total = T.alloc_buffer((rows, L), "float32")
            zero = T.alloc_buffer((L,), "int32")
            scale = T.alloc_buffer((L,), "float32")
            every = T.meta_var(T.ramp(0, 1, L))
            for tile, v in T.grid(T.ceildiv(height, rows), BLOCK_N // L):
                for r in T.unroll(rows):
                    total[r, every] = T.broadcast(T.float32(0), L)
                for g in range(groups):
                    for p in T.unroll(planes):
                        for r in T.unroll(rows):
                            part[p, r, every] = T.broadcast(T.int32(0), L)
                    for step in range(words // STEPS):
                        word = T.meta_var(g * words + step * STEPS)
                        for u in T.unroll(STEPS):
                            for half in T.unroll(2):
                                nibbles[u, half, every] = unpacked(
                                    qweight[b, word + u, T.ramp(v * L, 1, L)], half, L
                                )
                        for r in T.unroll(rows):
                            row = T.meta_var(T.min(tile * rows + r, height - 1))
                            for p in T.unroll(planes):
                                part[p, r, every] = dot.add(
                                    part[p, r, every], pairs(nibbles, xq, p, row, word)
                                )
                    load_factors(qzeros, scales, b, g, v * L, zero, scale, 0)
                    for r in T.unroll(rows):
                        row = T.meta_var(T.min(tile * rows + r, height - 1))
                        total[r, every] = total[r, every] + group_product(
                            part[0, r, every],
                            part[1, r, every] if planes == 2 else None,
                            zero[every],
                            xsum[row, g],
                            L,
                        ) * (scale[every] * T.broadcast(xscale[row, g], L))
                for r in T.unroll(rows):
                    if tile * rows + r < height:
                        store(
                            total, r, 0, first + tile * rows + r, b * BLOCK_N + v * L, offset, out
                        )

    return multiply
