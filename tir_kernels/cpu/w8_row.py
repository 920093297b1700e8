"""One row against 8-bit weights, as fast as memory is read: the logits of a token.

As `blocked_row` does, each thread reads two streams, a part of the first half of the blocks and one
of the second, and asks for what follows in them ahead of time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tir_kernels._tvm import T, Target, target_has_features
from tir_kernels.cpu.blocked_group import store_block
from tir_kernels.cpu.integer_dot import integer_dot_of
from tir_kernels.int8_weights import BLOCK_N, OFFSET, PACK, Int8Shape

AHEAD = 24  # words of each output that are on their way from memory: 1536 bytes
GROUPS_AHEAD = 64  # whose scales are
STREAMS = 2
STEPS = 4  # words of each output between two touches of an accumulator


@dataclass(frozen=True)
class Factors:
    """What a vector of stored bytes is multiplied as.

    part(word, i): the i-th of `parts` vectors of bytes; their products, each times 16^i, sum up to
    the product of the weights plus `offset` times the sum of the other factor.
    """

    parts: int
    offset: int
    part: Callable[[Any, Any], Any]


def factors_of(target: Target, lanes: int) -> Factors:
    """Bytes as they are where there is an instruction for them, else their nibbles one by one."""

    def all_lanes(value: int) -> Any:
        return T.broadcast(T.int32(value), lanes)

    if any(target_has_features(f, target) for f in ("avx512vnni", "avxvnni")):
        return Factors(1, OFFSET, lambda word, i: word)
    if target_has_features("dotprod", target):  # of signed bytes
        return Factors(1, 0, lambda word, i: T.bitwise_xor(word, all_lanes(-0x7F7F7F80)))

    def nibble(word, i):
        shifted = T.shift_right(word, T.broadcast(4 * i, lanes))
        return T.bitwise_and(shifted, all_lanes(0x0F0F0F0F))

    return Factors(2, OFFSET, nibble)


def dequantized_sum(terms: list[tuple[Any, int]], offset: int, total: Any, lanes: int) -> Any:
    """sum_k v[k] q[k] of a group in fp32. terms: sums over the stored bytes, each with the power of
    two that it counts for; total: sum_k v[k].
    """
    dots = T.broadcast(-offset * total, lanes)
    for value, bits in terms:
        dots = dots + (T.shift_left(value, T.broadcast(T.int32(bits), lanes)) if bits else value)
    return T.Cast(f"float32x{lanes}", dots)


def row_by_blocks(target: Target, shape: Int8Shape, out_dtype: str, planes: int):
    """TIR for one quantized row against all blocks, in parallel.

    Arguments as `quantized_rows.with_quantized_rows` calls it; weights: qweight, scales; offset:
    column -> fp32, what is added to a sum.
    """
    N, groups, blocks, words = shape.N, shape.groups, shape.blocks, shape.group_size // PACK
    dot = integer_dot_of(target)
    L = dot.lanes
    factors = factors_of(target, L)
    parts = factors.parts
    store = store_block(out_dtype, N, BLOCK_N)
    length = -(-blocks // STREAMS)

    def block_of(i, s):
        """Where there are too few blocks, the last one is computed again."""
        return T.min(s * length + i, blocks - 1)

    def pairs(bytes_, xq, p, word, v, i):
        at = T.ramp(v * L, 1, L)
        return [(bytes_[u, i, at], T.broadcast(xq[p, 0, word + u], L)) for u in range(STEPS)]

    def group_sum(high, low, s, v, total):
        at = T.ramp(v * L, 1, L)
        by_plane = [(high, 8), (low, 0)] if planes == 2 else [(high, 0)]
        terms = [(sums[s, i, at], bits + 4 * i) for sums, bits in by_plane for i in range(parts)]
        return dequantized_sum(terms, factors.offset, total, L)

    @T.inline
    def prefetch(array, b, i):
        # Past the array's end this asks for what lies behind it, which does no harm.
        address = T.meta_var(T.address_of(array[b, i, 0]))
        T.evaluate(T.call_intrin("void", "tirx.prefetch", address, 0, 3, 1))

    @T.inline
    def clear(sums):
        for s in T.unroll(STREAMS):
            for i in T.unroll(parts):
                sums[s, i, T.ramp(0, 1, BLOCK_N)] = T.broadcast(T.int32(0), BLOCK_N)

    @T.inline
    def add_plane(p, s, xq, word, bytes_, sums):
        for i in T.unroll(parts):
            for v in T.unroll(BLOCK_N // L):
                sums[s, i, T.ramp(v * L, 1, L)] = dot.add(
                    sums[s, i, T.ramp(v * L, 1, L)], pairs(bytes_, xq, p, word, v, i)
                )

    @T.inline
    def multiply(first, height, xq, xscale, xsum, weights, offset, out):
        qweight, scales = T.meta_var(weights)
        for block in T.parallel(length):
            bytes_ = T.alloc_buffer((STEPS, parts, BLOCK_N), "int32")
            high = T.alloc_buffer((STREAMS, parts, BLOCK_N), "int32")
            low = T.alloc_buffer((STREAMS, parts, BLOCK_N), "int32")
            total = T.alloc_buffer((STREAMS, BLOCK_N), "float32")
            for s in T.unroll(STREAMS):
                total[s, T.ramp(0, 1, BLOCK_N)] = T.broadcast(T.float32(0), BLOCK_N)
            for g in range(groups):
                clear(high)
                clear(low)
                for step in range(words // STEPS):
                    word = T.meta_var(g * words + step * STEPS)
                    for s in T.unroll(STREAMS):
                        b = T.meta_var(block_of(block, s))
                        for u in T.unroll(STEPS):
                            prefetch(qweight, b, word + u + AHEAD)
                            for v in T.unroll(BLOCK_N // L):
                                for i in T.unroll(parts):
                                    bytes_[u, i, T.ramp(v * L, 1, L)] = factors.part(
                                        qweight[b, word + u, T.ramp(v * L, 1, L)], i
                                    )
                        add_plane(0, s, xq, word, bytes_, high)
                        if planes == 2:
                            add_plane(1, s, xq, word, bytes_, low)
                for s in T.unroll(STREAMS):
                    b = T.meta_var(block_of(block, s))
                    prefetch(scales, b, g + GROUPS_AHEAD)
                    for v in T.unroll(BLOCK_N // L):
                        at = T.meta_var(T.ramp(v * L, 1, L))
                        total[s, at] = total[s, at] + group_sum(high, low, s, v, xsum[0, g]) * (
                            T.Cast(f"float32x{L}", scales[b, g, at]) * T.broadcast(xscale[0, g], L)
                        )
            for s in T.unroll(STREAMS):
                b = T.meta_var(block_of(block, s))
                store(total, s, 0, first, b * BLOCK_N, offset, out)

    return multiply
