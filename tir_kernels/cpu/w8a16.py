"""8-bit weights times activations, by integer dot products: the output head.

For a group of inputs, with the activations as integers v of scale t (`activations`) and the stored
bytes u = q + 128,

    sum_k x[k] q[k] s  =  s t (sum_k v[k] u[k]  -  128 sum_k v[k])

and both sums are exact. A token needs every byte of the head once, for which `w8_row` is made; here
are several rows, which share one pass over the weights.
"""

from __future__ import annotations

from tir_kernels._tvm import PrimFunc, T, Target
from tir_kernels.cpu.blocked_group import store_block
from tir_kernels.cpu.integer_dot import integer_dot_of
from tir_kernels.cpu.quantized_rows import with_quantized_rows
from tir_kernels.cpu.w8_row import STEPS, dequantized_sum, factors_of, row_by_blocks
from tir_kernels.int8_weights import BLOCK_N, PACK, Int8Shape
from tir_kernels.memo import memoized

AHEAD = 16  # words of each output that are on their way from memory: 1024 bytes


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
        if rows == 1:
            return row_by_blocks(target, shape, out_dtype, planes)
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
        no_offset = T.meta_var(lambda column: T.float32(0))
        multiply(m, x, weights, no_offset, out)

    return linear


def _rows_by_blocks(target: Target, shape: Int8Shape, out_dtype: str, planes: int, rows: int):
    """As `row_by_blocks`, for any number of rows, `rows` at a time. Rows past the last repeat it
    and are not stored.
    """
    N, groups, blocks, words = shape.N, shape.groups, shape.blocks, shape.group_size // PACK
    dot = integer_dot_of(target)
    L = dot.lanes
    factors = factors_of(target, L)
    parts = factors.parts
    store = store_block(out_dtype, N, L)

    def pairs(bytes_, xq, p, r, word, i):
        every = T.ramp(0, 1, L)
        return [(bytes_[u, i, every], T.broadcast(xq[p, r, word + u], L)) for u in range(STEPS)]

    def group_sum(high, low, r, total):
        every = T.ramp(0, 1, L)
        by_plane = [(high, 8), (low, 0)] if planes == 2 else [(high, 0)]
        terms = [(sums[r, i, every], bits + 4 * i) for sums, bits in by_plane for i in range(parts)]
        return dequantized_sum(terms, factors.offset, total, L)

    @T.inline
    def clear(sums):
        for r in T.unroll(rows):
            for i in T.unroll(parts):
                sums[r, i, T.ramp(0, 1, L)] = T.broadcast(T.int32(0), L)

    @T.inline
    def add_plane(p, r0, height, xq, word, bytes_, sums):
        for r in T.unroll(rows):
            row = T.meta_var(T.min(r0 + r, height - 1))
            for i in T.unroll(parts):
                sums[r, i, T.ramp(0, 1, L)] = dot.add(
                    sums[r, i, T.ramp(0, 1, L)], pairs(bytes_, xq, p, row, word, i)
                )

    @T.inline
    def multiply_group(g, at, r0, height, b, xq, qweight, bytes_, high, low):
        clear(high)
        clear(low)
        for step in range(words // STEPS):
            word = T.meta_var(g * words + step * STEPS)
            for u in T.unroll(STEPS):
                # Past the last word this asks for what lies behind the weight: no harm.
                ahead = T.meta_var(T.address_of(qweight[b, word + u + AHEAD, 0]))
                T.evaluate(T.call_intrin("void", "tirx.prefetch", ahead, 0, 3, 1))
                for i in T.unroll(parts):
                    bytes_[u, i, T.ramp(0, 1, L)] = factors.part(
                        qweight[b, word + u, T.ramp(at, 1, L)], i
                    )
            add_plane(0, r0, height, xq, word, bytes_, high)
            if planes == 2:
                add_plane(1, r0, height, xq, word, bytes_, low)

    @T.inline
    def add_group(g, at, r0, height, b, xscale, xsum, scales, scale, high, low, total):
        every = T.meta_var(T.ramp(0, 1, L))
        scale[every] = T.Cast(f"float32x{L}", scales[b, g, T.ramp(at, 1, L)])
        for r in T.unroll(rows):
            row = T.meta_var(T.min(r0 + r, height - 1))
            total[r, every] = total[r, every] + group_sum(high, low, r, xsum[row, g]) * (
                scale[every] * T.broadcast(xscale[row, g], L)
            )

    @T.inline
    def multiply(first, height, xq, xscale, xsum, weights, offset, out):
        qweight, scales = T.meta_var(weights)
        for b in T.parallel(blocks):
            bytes_ = T.alloc_buffer((STEPS, parts, L), "int32")
            high = T.alloc_buffer((rows, parts, L), "int32")
            low = T.alloc_buffer((rows, parts, L), "int32")
            total = T.alloc_buffer((rows, L), "float32")
            scale = T.alloc_buffer((L,), "float32")
            for tile in range(T.ceildiv(height, rows)):
                r0 = T.meta_var(tile * rows)
                for vector in range(BLOCK_N // L):
                    at = T.meta_var(vector * L)
                    for r in T.unroll(rows):
                        total[r, T.ramp(0, 1, L)] = T.broadcast(T.float32(0), L)
                    for g in range(groups):
                        multiply_group(g, at, r0, height, b, xq, qweight, bytes_, high, low)
                        add_group(
                            g, at, r0, height, b, xscale, xsum, scales, scale, high, low, total
                        )
                    for r in T.unroll(rows):
                        if r0 + r < height:
                            store(total, r, 0, first + r0 + r, b * BLOCK_N + at, offset, out)

    return multiply
