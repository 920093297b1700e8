"""8-bit weights times activations, by integer dot products: the output head.

For a group of inputs, with the activations as integers v of scale t (`activations`) and the stored
bytes u = q + 128,

    sum_k x[k] q[k] s  =  s t (sum_k v[k] u[k]  -  128 sum_k v[k])

and both sums are exact. A token needs every byte of the head once: each thread reads its blocks
from one end to the other and asks for what follows ahead of time.

Where bytes cannot be multiplied as they are, the nibbles of a byte are multiplied one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tir_kernels._tvm import PrimFunc, T, Target, target_has_features
from tir_kernels.cpu.integer_dot import integer_dot_of
from tir_kernels.cpu.quantized_rows import with_quantized_rows
from tir_kernels.int8_weights import BLOCK_N, OFFSET, PACK, Int8Shape
from tir_kernels.memo import memoized

AHEAD = 8  # words of each output that are on their way from memory: 512 bytes
STEPS = 4  # words of each output between two touches of an accumulator
CHAINS = 2  # sums of a single row that do not wait for each other


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

    def kernel_of(planes, rows):
        return _rows_by_blocks(target, shape, out_dtype, planes, rows)

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
        no_offset = T.meta_var(None)
        multiply(m, x, weights, no_offset, out)

    return linear


@dataclass(frozen=True)
class _Factors:
    """What a vector of stored bytes is multiplied as.

    part(word, i): the i-th of `parts` vectors of bytes; their products, each times 16^i, sum up to
    the product of the weights plus `offset`.
    """

    parts: int
    offset: int
    part: Callable[[Any, Any], Any]


def _factors_of(target: Target, lanes: int) -> _Factors:
    def all_lanes(value: int) -> Any:
        return T.broadcast(T.int32(value), lanes)

    if any(target_has_features(f, target) for f in ("avx512vnni", "avxvnni")):
        return _Factors(1, OFFSET, lambda word, i: word)
    if target_has_features("dotprod", target):  # of signed bytes
        return _Factors(1, 0, lambda word, i: T.bitwise_xor(word, all_lanes(-0x7F7F7F80)))

    def nibble(word, i):
        shifted = T.shift_right(word, T.broadcast(4 * i, lanes))
        return T.bitwise_and(shifted, all_lanes(0x0F0F0F0F))

    return _Factors(2, OFFSET, nibble)


def _rows_by_blocks(target: Target, shape: Int8Shape, out_dtype: str, planes: int, rows: int):
    """See `with_quantized_rows`; the weights are (qweight, scales)."""
    N, groups, blocks, words = shape.N, shape.groups, shape.blocks, shape.group_size // PACK
    dot = integer_dot_of(target)
    L = dot.lanes
    vectors = BLOCK_N // L
    factors = _factors_of(target, L)
    parts, offset = factors.parts, factors.offset
    # A single row leaves registers for a whole block, read in one go.
    together = vectors if rows == 1 else 1
    chains = CHAINS if rows == 1 else 1
    steps = STEPS * chains
    width = together * L

    def pairs(bytes_, xq, p, r, word, v, i, chain):
        return [
            (bytes_[u, i, T.ramp(v * L, 1, L)], T.broadcast(xq[p, r, word + u], L))
            for u in (chain * STEPS + step for step in range(STEPS))
        ]

    def shifted(value, bits):
        return T.shift_left(value, T.broadcast(T.int32(bits), L)) if bits else value

    def group_sum(high, low, r, v):
        """The dot product over a group with the stored bytes, of all planes, parts and chains."""
        at = T.ramp(v * L, 1, L)
        by_plane = [(high, 8), (low, 0)] if planes == 2 else [(high, 0)]
        terms = [
            shifted(sums[r, i, c, at], bits + 4 * i)
            for sums, bits in by_plane
            for i in range(parts)
            for c in range(chains)
        ]
        return sum(terms[1:], terms[0])

    @T.inline
    def prefetch(qweight, b, word):
        # Past the last word this asks for what lies behind the weight, which does no harm.
        address = T.meta_var(T.address_of(qweight[b, word, 0]))
        T.evaluate(T.call_intrin("void", "tirx.prefetch", address, 0, 3, 1))

    @T.inline
    def add_plane(p, r0, height, xq, word, bytes_, sums):
        for r in T.unroll(rows):
            row = T.meta_var(r0 if rows == 1 else T.min(r0 + r, height - 1))
            for i in T.unroll(parts):
                for c in T.unroll(chains):
                    for v in T.unroll(together):
                        sums[r, i, c, T.ramp(v * L, 1, L)] = dot.add(
                            sums[r, i, c, T.ramp(v * L, 1, L)],
                            pairs(bytes_, xq, p, row, word, v, i, c),
                        )

    @T.inline
    def clear(sums):
        for r in T.unroll(rows):
            for i in T.unroll(parts):
                for c in T.unroll(chains):
                    sums[r, i, c, T.ramp(0, 1, width)] = T.broadcast(T.int32(0), width)

    @T.inline
    def multiply_group(g, v0, r0, height, b, xq, qweight, bytes_, high, low):
        clear(high)
        clear(low)
        for step in range(words // steps):
            word = T.meta_var(g * words + step * steps)
            for u in T.unroll(steps):
                prefetch(qweight, b, word + u + AHEAD)
                for v in T.unroll(together):
                    for i in T.unroll(parts):
                        bytes_[u, i, T.ramp(v * L, 1, L)] = factors.part(
                            qweight[b, word + u, T.ramp((v0 + v) * L, 1, L)], i
                        )
            add_plane(0, r0, height, xq, word, bytes_, high)
            if planes == 2:
                add_plane(1, r0, height, xq, word, bytes_, low)

    @T.inline
    def finish_group(g, v0, r0, height, b, xscale, xsum, scales, scale, high, low, total):
        for v in T.unroll(together):
            at = T.meta_var(T.ramp(v * L, 1, L))
            scale[at] = T.Cast(f"float32x{L}", scales[b, g, T.ramp((v0 + v) * L, 1, L)])
        for r in T.unroll(rows):
            row = T.meta_var(r0 if rows == 1 else T.min(r0 + r, height - 1))
            for v in T.unroll(together):
                at = T.meta_var(T.ramp(v * L, 1, L))
                stored = T.meta_var(T.broadcast(offset * xsum[row, g], L))
                total[r, at] = total[r, at] + T.Cast(
                    f"float32x{L}", group_sum(high, low, r, v) - stored
                ) * (scale[at] * T.broadcast(xscale[row, g], L))

    @T.inline
    def store(first, v0, r0, height, b, total, out):
        for r in T.unroll(rows):
            if r0 + r < height:
                if N % BLOCK_N == 0 or b < blocks - 1:
                    for j in T.vectorized(width):
                        out[first + r0 + r, b * BLOCK_N + v0 * L + j] = T.Cast(
                            out_dtype, total[r, j]
                        )
                else:
                    for j in range(width):
                        column = T.meta_var(b * BLOCK_N + v0 * L + j)
                        if column < N:
                            out[first + r0 + r, column] = T.Cast(out_dtype, total[r, j])

    @T.inline
    def multiply(first, height, xq, xscale, xsum, weights, no_offset, out):
        for b in T.parallel(blocks):
            bytes_ = T.alloc_buffer((steps, parts, width), "int32")
            high = T.alloc_buffer((rows, parts, chains, width), "int32")
            low = T.alloc_buffer((rows, parts, chains, width), "int32")
            total = T.alloc_buffer((rows, width), "float32")
            scale = T.alloc_buffer((width,), "float32")
            for tile in range(T.ceildiv(height, rows)):
                r0 = T.meta_var(tile * rows)
                for part_of_block in range(vectors // together):
                    v0 = T.meta_var(part_of_block * together)
                    for r in T.unroll(rows):
                        total[r, T.ramp(0, 1, width)] = T.broadcast(T.float32(0), width)
                    for g in range(groups):
                        multiply_group(g, v0, r0, height, b, xq, weights[0], bytes_, high, low)
                        finish_group(
                            g, v0, r0, height, b,
                            xscale, xsum, weights[1], scale, high, low, total,
                        )  # fmt: skip
                    store(first, v0, r0, height, b, total, out)

    return multiply
