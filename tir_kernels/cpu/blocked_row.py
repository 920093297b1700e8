"""One row against the blocked layout, as fast as memory is read.

Each thread reads two streams, a part of the first half of the blocks and one of the second: a
processor's own prefetching follows a stream only so fast and begins anew wherever it breaks off.
With what is asked for ahead of time in software, two long ones come close to what memory gives to a
core. Scales and zero points are streams of their own, so slow that no prefetcher follows them.
"""

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

AHEAD = 24  # words of each output that are on their way from memory: 1536 bytes
GROUPS_AHEAD = 64  # whose scales and zero points are
STREAMS = 2


def row_by_blocks(target: Target, shape: LinearShape, out_dtype: str, planes: int):
    """TIR for one quantized row against all blocks, in parallel.

    Arguments as `quantized_rows.with_quantized_rows` calls it; weights: qweight, qzeros, scales;
    offset: column -> fp32, what is added to a sum.
    """
    N, groups, blocks, words = shape.N, shape.groups, shape.blocks, shape.group_size // PACK
    dot = integer_dot_of(target)
    L = dot.lanes
    vectors = BLOCK_N // L
    load_factors = group_factors(L)
    store = store_block(out_dtype, N, BLOCK_N)

    length = -(-blocks // STREAMS)

    def block_of(i, s):
        """Where there are too few blocks, the last one is computed again."""
        return T.min(s * length + i, blocks - 1)

    def pairs(nibbles, xq, p, word, s, v, half):
        """Low and high nibbles have sums of their own: they would wait for each other."""
        at = T.ramp(v * L, 1, L)
        return [
            (nibbles[s, u, half, at], T.broadcast(xq[p, 0, 2 * (word + u) + half], L))
            for u in range(STEPS)
        ]

    def plane_sum(part, s, p, v):
        at = T.ramp(v * L, 1, L)
        return part[s, p, 0, at] + part[s, p, 1, at]

    @T.inline
    def prefetch(array, b, i):
        # Past the array's end this asks for what lies behind it, which does no harm.
        address = T.meta_var(T.address_of(array[b, i, 0]))
        T.evaluate(T.call_intrin("void", "tirx.prefetch", address, 0, 3, 1))

    @T.inline
    def multiply(first, height, xq, xscale, xsum, weights, offset, out):
        qweight, qzeros, scales = T.meta_var(weights)
        for i in T.parallel(length):
            nibbles = T.alloc_buffer((STREAMS, STEPS, 2, BLOCK_N), "int32")
            part = T.alloc_buffer((STREAMS, planes, 2, BLOCK_N), "int32")
            total = T.alloc_buffer((STREAMS, BLOCK_N), "float32")
            zero = T.alloc_buffer((BLOCK_N,), "int32")
            scale = T.alloc_buffer((BLOCK_N,), "float32")
            every = T.meta_var(T.ramp(0, 1, BLOCK_N))
            for s in T.unroll(STREAMS):
                total[s, every] = T.broadcast(T.float32(0), BLOCK_N)
            for g in range(groups):
                for s in T.unroll(STREAMS):
                    for p in T.unroll(planes):
                        for half in T.unroll(2):
                            part[s, p, half, every] = T.broadcast(T.int32(0), BLOCK_N)
                for step in range(words // STEPS):
                    word = T.meta_var(g * words + step * STEPS)
                    for s in T.unroll(STREAMS):
                        b = T.meta_var(block_of(i, s))
                        for u in T.unroll(STEPS):
                            prefetch(qweight, b, word + u + AHEAD)
                            for v in T.unroll(vectors):
                                for half in T.unroll(2):
                                    nibbles[s, u, half, T.ramp(v * L, 1, L)] = unpacked(
                                        qweight[b, word + u, T.ramp(v * L, 1, L)], half, L
                                    )
                        for p in T.unroll(planes):
                            for half in T.unroll(2):
                                for v in T.unroll(vectors):
                                    part[s, p, half, T.ramp(v * L, 1, L)] = dot.add(
                                        part[s, p, half, T.ramp(v * L, 1, L)],
                                        pairs(nibbles, xq, p, word, s, v, half),
                                    )
                for s in T.unroll(STREAMS):
                    b = T.meta_var(block_of(i, s))
                    prefetch(scales, b, g + GROUPS_AHEAD)
                    prefetch(qzeros, b, g + GROUPS_AHEAD)
                    for v in T.unroll(vectors):
                        at = T.meta_var(T.ramp(v * L, 1, L))
                        load_factors(qzeros, scales, b, g, v * L, zero, scale, v * L)
                        total[s, at] = total[s, at] + group_product(
                            plane_sum(part, s, 0, v),
                            plane_sum(part, s, 1, v) if planes == 2 else None,
                            zero[at],
                            xsum[0, g],
                            L,
                        ) * (scale[at] * T.broadcast(xscale[0, g], L))
            for s in T.unroll(STREAMS):
                b = T.meta_var(block_of(i, s))
                store(total, s, 0, first, b * BLOCK_N, offset, out)

    return multiply
