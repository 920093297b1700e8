"""Several rows against a weight in blocks: a tile of rows by a vector of outputs in registers."""

from __future__ import annotations

from tir_kernels._tvm import T
from tir_kernels.cpu.blocked_weight import BlockedWeight, group_product, store_outputs
from tir_kernels.cpu.integer_dot import MOST
from tir_kernels.layouts import BLOCK_N


def rows_by_blocks(weight: BlockedWeight, out_dtype: str, planes: int, rows: int):
    """TIR for quantized rows against all blocks, `rows` at a time, in parallel.

    Arguments as of `blocked_row.row_by_blocks`. Rows past the last of the last tile repeat it, and
    are not stored.
    """
    blocks, groups, words, parts = weight.blocks, weight.groups, weight.words, weight.parts
    L = weight.dot.lanes
    store = store_outputs(out_dtype, weight.N, L)
    # Parts of one place share sums: the pairs of all their words in a step are added at once.
    places = sorted(set(weight.shifts))
    steps = min(MOST * len(places) // parts, words)

    def pairs(bytes_, xq, p, row, word, place):
        return [
            (
                bytes_[u, i, T.ramp(0, 1, L)],
                T.broadcast(xq[p, row, weight.activation(word + u, i)], L),
            )
            for u in range(steps)
            for i in range(parts)
            if weight.shifts[i] == places[place]
        ]

    def plane_sum(sums, p, r):
        at = T.ramp(0, 1, L)
        total = sums[p, r, 0, at]
        for i, bits in enumerate(places[1:], 1):
            total = total + T.shift_left(sums[p, r, i, at], T.broadcast(T.int32(bits), L))
        return total

    def add_places(p, r, row, word, xq, bytes_, sums):
        """TIR's loops have no numbers for Python's, which chooses the pairs of a place."""
        for place in range(len(places)):
            at = [p, r, place, T.ramp(0, 1, L)]
            added = weight.dot.add(sums[tuple(at)], pairs(bytes_, xq, p, row, word, place))
            T.buffer_store(sums, added, at)

    @T.inline
    def multiply_step(tile, v, height, b, word, xq, qweight, bytes_, sums):
        for u in T.unroll(steps):
            for i in T.unroll(parts):
                bytes_[u, i, T.ramp(0, 1, L)] = weight.part(
                    qweight[b, word + u, T.ramp(v * L, 1, L)], i
                )
        for r in T.unroll(rows):
            row = T.meta_var(T.min(tile * rows + r, height - 1))
            for p in T.unroll(planes):
                add_places(p, r, row, word, xq, bytes_, sums)

    @T.inline
    def multiply(first, height, xq, xscale, xsum, weights, offset, out):
        for b in T.parallel(blocks):
            bytes_ = T.alloc_buffer((steps, parts, L), "int32")
            sums = T.alloc_buffer((planes, rows, len(places), L), "int32")
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
                            for i in T.unroll(len(places)):
                                sums[p, r, i, every] = T.broadcast(T.int32(0), L)
                    for step in range(words // steps):
                        word = T.meta_var(g * words + step * steps)
                        multiply_step(tile, v, height, b, word, xq, weights[0], bytes_, sums)
                    weight.factors(weights, b, g, v * L, zero, scale, 0)
                    for r in T.unroll(rows):
                        row = T.meta_var(T.min(tile * rows + r, height - 1))
                        total[r, every] = total[r, every] + group_product(
                            [plane_sum(sums, p, r) for p in range(planes)],
                            zero[every],
                            xsum[row, g],
                            L,
                        ) * (scale[every] * T.broadcast(xscale[row, g], L))
                for r in T.unroll(rows):
                    if tile * rows + r < height:
                        column = T.meta_var(b * BLOCK_N + v * L)
                        store(total, r, 0, first + tile * rows + r, column, offset, out)

    return multiply
