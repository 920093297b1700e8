"""4-bit weights in the blocked layout times activations, by integer dot products.

For a group of inputs, with the activations as integers v of scale t (`activations`),

    sum_k x[k] (q[k] - z) s  =  s t (sum_k v[k] q[k]  -  z sum_k v[k])

and both sums are exact. Few rows (decoding) are bound by reading the weights: each thread reads its
blocks from one end to the other, once, and asks for what follows ahead of time. Many rows (prefill)
take as many rows at a time as fit into registers, or AMX's tiles where the target has them.
"""

from __future__ import annotations

from tir_kernels._tvm import PrimFunc, T, Target, target_has_features
from tir_kernels.cpu.activations import planes_of, quantize_group
from tir_kernels.cpu.integer_dot import MOST, integer_dot_of
from tir_kernels.layouts import BLOCK_N, BLOCKED, PACK, LinearShape
from tir_kernels.memo import memoized

AHEAD = 8  # words of each output that are on their way from memory: 512 bytes
FEW = 4  # rows that share one pass over the weights
STEPS = MOST // 2  # words of each output between two touches of an accumulator
CHUNK = 512  # rows that are quantized at a time


@memoized
def blocked_linear(
    target: Target,
    shape: LinearShape,
    act_dtype: str,
    out_dtype: str,
    bias: bool,
    *,
    scale_dtype: str = "float16",
    act_bits: int = 16,
) -> PrimFunc:
    """(x [m, K], qweight, qzeros, scales[, bias [N]], out [m, N]) for symbolic m.

    The weight's arrays are in the layout BLOCKED. act_bits: 8 or 16, of the quantized activations.
    """
    K, N = shape.K, shape.N
    multiply = _multiply(target, shape, out_dtype, act_bits)
    parameters = shape.parameters(BLOCKED, scale_dtype)
    (q_shape, _), (z_shape, _), (s_shape, _) = parameters.values()

    @T.prim_func(private=True, s_tir=True)
    def linear(
        x_handle: T.handle,
        qweight: T.Buffer(q_shape, "int32"),
        qzeros: T.Buffer(z_shape, "int32"),
        scales: T.Buffer(s_shape, scale_dtype),
        out_handle: T.handle,
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        m = T.int64()
        x = T.match_buffer(x_handle, (m, K), act_dtype)
        out = T.match_buffer(out_handle, (m, N), out_dtype)
        no_offset = T.meta_var(lambda column: T.float32(0))
        multiply(m, x, qweight, qzeros, scales, no_offset, out)

    @T.prim_func(private=True, s_tir=True)
    def linear_bias(
        x_handle: T.handle,
        qweight: T.Buffer(q_shape, "int32"),
        qzeros: T.Buffer(z_shape, "int32"),
        scales: T.Buffer(s_shape, scale_dtype),
        bias_vector: T.Buffer((N,), act_dtype),
        out_handle: T.handle,
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        m = T.int64()
        x = T.match_buffer(x_handle, (m, K), act_dtype)
        out = T.match_buffer(out_handle, (m, N), out_dtype)
        offset = T.meta_var(lambda column: T.Cast("float32", bias_vector[column]))
        multiply(m, x, qweight, qzeros, scales, offset, out)

    return linear_bias if bias else linear


def _multiply(target: Target, shape: LinearShape, out_dtype: str, act_bits: int):
    K, G, groups, planes = shape.K, shape.group_size, shape.groups, planes_of(act_bits)
    quantize = quantize_group(target, G, act_bits)
    in_registers = _rows_in_registers(target)
    one, few, many = (
        rows_by_blocks(target, shape, out_dtype, planes, rows) for rows in (1, FEW, in_registers)
    )

    @T.inline
    def quantize_row(first, r, x, xq, xscale, xsum):
        for g in range(groups):
            at = T.meta_var(_row_words(r, g * G))
            quantize(x, first + r, g * G, xq, at, xscale, xsum, r, g)

    @T.inline
    def at_once(size, kernel, m, x, qweight, qzeros, scales, offset, out):
        xq = T.alloc_buffer((planes, size, K // 4), "int32")
        xscale = T.alloc_buffer((size, groups), "float32")
        xsum = T.alloc_buffer((size, groups), "int32")
        for r in range(m):
            quantize_row(0, r, x, xq, xscale, xsum)
        kernel(0, m, xq, xscale, xsum, qweight, qzeros, scales, offset, out)

    @T.inline
    def in_chunks(m, x, qweight, qzeros, scales, offset, out):
        xq = T.alloc_buffer((planes, CHUNK, K // 4), "int32")
        xscale = T.alloc_buffer((CHUNK, groups), "float32")
        xsum = T.alloc_buffer((CHUNK, groups), "int32")
        for chunk in range(T.ceildiv(m, CHUNK)):
            first: T.let[T.int64] = chunk * CHUNK
            height: T.let[T.int64] = T.min(m - first, T.int64(CHUNK))
            for r in T.parallel(height):
                quantize_row(first, r, x, xq, xscale, xsum)
            many(first, height, xq, xscale, xsum, qweight, qzeros, scales, offset, out)

    @T.inline
    def multiply(m, x, qweight, qzeros, scales, offset, out):
        if m == 1:
            at_once(1, one, m, x, qweight, qzeros, scales, offset, out)
        else:
            if m <= FEW:
                at_once(FEW, few, m, x, qweight, qzeros, scales, offset, out)
            else:
                in_chunks(m, x, qweight, qzeros, scales, offset, out)

    return multiply


def _rows_in_registers(target: Target) -> int:
    """Rows whose accumulators fit beside the weights: of 32 vector registers, or of 16."""
    return 8 if target_has_features("avx512f", target) else 4


def _row_words(r, first):
    """Where quantized activations of row r go, from input `first` on: [plane, row, K/4]."""

    def at(plane, k, lanes):
        word = (first + k) // 4
        return [plane, r, word if lanes == 1 else T.ramp(word, 1, lanes)]

    return at


def rows_by_blocks(target: Target, shape: LinearShape, out_dtype: str, planes: int, rows: int):
    """TIR for `height` quantized rows, `rows` at a time, against all blocks, in parallel.

    (first, height, xq, xscale, xsum, qweight, qzeros, scales, offset, out): row r of the quantized
    ones is row first + r of out; offset: column -> fp32, what is added to a sum.
    """
    N, groups, blocks, words = shape.N, shape.groups, shape.blocks, shape.group_size // PACK
    dot = integer_dot_of(target)
    L = dot.lanes
    vectors = BLOCK_N // L
    # A single row leaves registers for a whole block, read in one go, and its sums would wait for
    # each other if the two nibbles of a byte did not have their own.
    together = vectors if rows == 1 else 1
    chains = 2 if rows == 1 else 1
    width = together * L

    def unpacked(word, half):
        shifted = T.shift_right(word, T.broadcast(4 * half, L))
        return T.bitwise_and(shifted, T.broadcast(T.int32(0x0F0F0F0F), L))

    def pairs(nibbles, xq, p, r, word, v, chain):
        """What a sum of dot products takes of STEPS words: of one nibble, or of both."""
        return [
            (
                nibbles[u, half, T.ramp(v * L, 1, L)],
                T.broadcast(xq[p, r, 2 * (word + u) + half], L),
            )
            for u in range(STEPS)
            for half in ((chain,) if chains == 2 else (0, 1))
        ]

    def plane_sum(part, p, r, v):
        at = T.ramp(v * L, 1, L)
        return part[p, r, 0, at] + part[p, r, 1, at] if chains == 2 else part[p, r, 0, at]

    def group_sum(part, r, v):
        """The dot product over a group, of all planes."""
        high = plane_sum(part, 0, r, v)
        if planes == 1:
            return high
        return T.shift_left(high, T.broadcast(T.int32(8), L)) + plane_sum(part, 1, r, v)

    @T.inline
    def prefetch(qweight, b, word):
        # Past the last word this asks for what lies behind the weight, which does no harm.
        address = T.meta_var(T.address_of(qweight[b, word, 0]))
        T.evaluate(T.call_intrin("void", "tirx.prefetch", address, 0, 3, 1))

    @T.inline
    def multiply_group(g, v0, r0, height, b, xq, qweight, nibbles, part):
        for p in T.unroll(planes):
            for r in T.unroll(rows):
                for c in T.unroll(chains):
                    part[p, r, c, T.ramp(0, 1, width)] = T.broadcast(T.int32(0), width)
        for step in range(words // STEPS):
            word = T.meta_var(g * words + step * STEPS)
            for u in T.unroll(STEPS):
                prefetch(qweight, b, word + u + AHEAD)
                for v in T.unroll(together):
                    for half in T.unroll(2):
                        nibbles[u, half, T.ramp(v * L, 1, L)] = unpacked(
                            qweight[b, word + u, T.ramp((v0 + v) * L, 1, L)], half
                        )
            for r in T.unroll(rows):
                row = T.meta_var(r0 if rows == 1 else T.min(r0 + r, height - 1))
                for p in T.unroll(planes):
                    for c in T.unroll(chains):
                        for v in T.unroll(together):
                            part[p, r, c, T.ramp(v * L, 1, L)] = dot.add(
                                part[p, r, c, T.ramp(v * L, 1, L)],
                                pairs(nibbles, xq, p, row, word, v, c),
                            )

    @T.inline
    def finish_group(g, v0, r0, height, b, xscale, xsum, qzeros, scales, zero, scale, part, total):
        for v in T.unroll(together):
            for j in T.vectorized(L):
                lane = T.meta_var((v0 + v) * L + j)
                zero[v * L + j] = T.bitwise_and(
                    T.shift_right(
                        T.Select(lane < PACK, qzeros[b, g, 0], qzeros[b, g, 1]),
                        T.bitwise_and(lane, 7) * 4,
                    ),
                    15,
                )
                scale[v * L + j] = T.Cast("float32", scales[b, g, lane])
        for r in T.unroll(rows):
            row = T.meta_var(r0 if rows == 1 else T.min(r0 + r, height - 1))
            for v in T.unroll(together):
                at = T.meta_var(T.ramp(v * L, 1, L))
                total[r, at] = total[r, at] + T.Cast(
                    f"float32x{L}",
                    group_sum(part, r, v) - zero[at] * T.broadcast(xsum[row, g], L),
                ) * (scale[at] * T.broadcast(xscale[row, g], L))

    @T.inline
    def store(first, v0, r0, height, b, offset, total, out):
        for r in T.unroll(rows):
            if r0 + r < height:
                if N % BLOCK_N == 0 or b < blocks - 1:
                    for j in T.vectorized(width):
                        column = T.meta_var(b * BLOCK_N + v0 * L + j)
                        out[first + r0 + r, column] = T.Cast(
                            out_dtype, total[r, j] + offset(column)
                        )
                else:
                    for j in range(width):
                        column = T.meta_var(b * BLOCK_N + v0 * L + j)
                        if column < N:
                            out[first + r0 + r, column] = T.Cast(
                                out_dtype, total[r, j] + offset(column)
                            )

    @T.inline
    def multiply(first, height, xq, xscale, xsum, qweight, qzeros, scales, offset, out):
        for b in T.parallel(blocks):
            nibbles = T.alloc_buffer((STEPS, 2, width), "int32")
            part = T.alloc_buffer((planes, rows, chains, width), "int32")
            total = T.alloc_buffer((rows, width), "float32")
            zero = T.alloc_buffer((width,), "int32")
            scale = T.alloc_buffer((width,), "float32")
            for tile in range(T.ceildiv(height, rows)):
                r0 = T.meta_var(tile * rows)
                for part_of_block in range(vectors // together):
                    v0 = T.meta_var(part_of_block * together)
                    for r in T.unroll(rows):
                        total[r, T.ramp(0, 1, width)] = T.broadcast(T.float32(0), width)
                    for g in range(groups):
                        multiply_group(g, v0, r0, height, b, xq, qweight, nibbles, part)
                        finish_group(
                            g, v0, r0, height, b,
                            xscale, xsum, qzeros, scales, zero, scale, part, total,
                        )  # fmt: skip
                    store(first, v0, r0, height, b, offset, total, out)

    return multiply
