"""One row against a weight in blocks, as fast as memory is read.

Each thread reads two streams, a part of the first half of the blocks and one of the second: a
processor's own prefetching follows a stream only so fast and begins anew wherever it breaks off.
With what is asked for ahead of time in software, two long ones come close to what memory gives to a
core. Scales and zero points are streams of their own, so slow that no prefetcher follows them.
"""

from __future__ import annotations

from typing import Any

from tir_kernels._tvm import T
from tir_kernels.cpu.blocked_weight import BlockedWeight, group_product, prefetch, store_outputs
from tir_kernels.layouts import BLOCK_N

GROUPS_AHEAD = 64  # whose scales and zero points are
STREAMS = 2
STEPS = 4  # words of each output between two touches of an accumulator


def row_by_blocks(weight: BlockedWeight, out_dtype: str, planes: int):
    """TIR for one quantized row against all blocks, in parallel.

    Arguments as `quantized_rows.with_quantized_rows` calls it; offset: column -> fp32, what is
    added to a sum.
    """
    step = row_step(weight, out_dtype, planes)

    @T.inline
    def multiply(first, height, xq, xscale, xsum, weights, offset, out):
        for i in T.parallel(steps_of(weight)):
            step(i, first, xq, xscale, xsum, weights, offset, out)

    return multiply


def row_step(weight: BlockedWeight, out_dtype: str, planes: int, finish: Any = None):
    """TIR (i, first, xq, xscale, xsum, weights, offset, out) for step i of `steps_of`: block i of
    both streams. finish: TIR (total fp32 [STREAMS, BLOCK_N], i, first, offset, out) that does
    something else with the sums of these two blocks than to store them.
    """
    blocks, groups, words, parts = weight.blocks, weight.groups, weight.words, weight.parts
    L = weight.dot.lanes
    vectors = BLOCK_N // L
    store = store_outputs(out_dtype, weight.N, BLOCK_N)

    def block_of(i, s):
        """Where there are too few blocks, the last one is computed again."""
        return T.min(s * steps_of(weight) + i, blocks - 1)

    @T.inline
    def store_both(total, i, first, offset, out):
        for s in T.unroll(STREAMS):
            store(total, s, 0, first, block_of(i, s) * BLOCK_N, offset, out)

    def pairs(bytes_, xq, p, word, s, v, i):
        at = T.ramp(v * L, 1, L)
        return [
            (bytes_[s, u, i, at], T.broadcast(xq[p, 0, weight.activation(word + u, i)], L))
            for u in range(STEPS)
        ]

    def plane_sum(sums, s, p, v):
        """Each part has sums of its own: they would wait for each other."""
        at = T.ramp(v * L, 1, L)
        terms = [_shifted(sums[s, p, i, at], weight.shifts[i], L) for i in range(parts)]
        return sum(terms[1:], terms[0])

    finish_both = finish or store_both

    @T.inline
    def multiply_step(i, g, word, xq, weights, bytes_, sums):
        for s in T.unroll(STREAMS):
            for u in T.unroll(STEPS):
                prefetch(weights[0], block_of(i, s), word + u + weight.ahead)
                for v in T.unroll(vectors):
                    for part in T.unroll(parts):
                        bytes_[s, u, part, T.ramp(v * L, 1, L)] = weight.part(
                            weights[0][block_of(i, s), word + u, T.ramp(v * L, 1, L)], part
                        )
            for p in T.unroll(planes):
                for part in T.unroll(parts):
                    for v in T.unroll(vectors):
                        sums[s, p, part, T.ramp(v * L, 1, L)] = weight.dot.add(
                            sums[s, p, part, T.ramp(v * L, 1, L)],
                            pairs(bytes_, xq, p, word, s, v, part),
                        )

    @T.inline
    def finish_group(i, g, xscale, xsum, weights, zero, scale, sums, total):
        for s in T.unroll(STREAMS):
            weight.prefetch_factors(weights, block_of(i, s), g + GROUPS_AHEAD)
            for v in T.unroll(vectors):
                at = T.meta_var(T.ramp(v * L, 1, L))
                weight.factors(weights, block_of(i, s), g, v * L, zero, scale, v * L)
                total[s, at] = total[s, at] + group_product(
                    [plane_sum(sums, s, p, v) for p in range(planes)], zero[at], xsum[0, g], L
                ) * (scale[at] * T.broadcast(xscale[0, g], L))

    @T.inline
    def step(i, first, xq, xscale, xsum, weights, offset, out):
        bytes_ = T.alloc_buffer((STREAMS, STEPS, parts, BLOCK_N), "int32")
        sums = T.alloc_buffer((STREAMS, planes, parts, BLOCK_N), "int32")
        total = T.alloc_buffer((STREAMS, BLOCK_N), "float32")
        zero = T.alloc_buffer((BLOCK_N,), "int32")
        scale = T.alloc_buffer((BLOCK_N,), "float32")
        every = T.meta_var(T.ramp(0, 1, BLOCK_N))
        for s in T.unroll(STREAMS):
            total[s, every] = T.broadcast(T.float32(0), BLOCK_N)
        for g in range(groups):
            for s in T.unroll(STREAMS):
                for p in T.unroll(planes):
                    for part in T.unroll(parts):
                        sums[s, p, part, every] = T.broadcast(T.int32(0), BLOCK_N)
            for n in range(words // STEPS):
                word = T.meta_var(g * words + n * STEPS)
                multiply_step(i, g, word, xq, weights, bytes_, sums)
            finish_group(i, g, xscale, xsum, weights, zero, scale, sums, total)
        finish_both(total, i, first, offset, out)

    return step


def steps_of(weight: BlockedWeight) -> int:
    """Blocks of each stream: the row kernel's parallel steps."""
    return -(-weight.blocks // STREAMS)


def _shifted(value, bits, lanes):
    return T.shift_left(value, T.broadcast(T.int32(bits), lanes)) if bits else value
