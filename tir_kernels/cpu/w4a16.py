"""4-bit weights times 16- or 32-bit activations, on the stock AutoAWQ layout here.

The blocked layout, which is faster, has kernels of its own (`blocked`). Here one function serves
any number of rows m, by two ways through the weights:

*Few rows* (decoding) are bound by reading the weights, so each word is read once. A vector holds
words of neighbouring columns; masking nibble i of it gives columns 8j + ORDER[i] for all its words
j at once, so nothing is shuffled in the inner loop. The mask leaves the value at bits 4i, that is
times 16^i; this factor, the scale and the zero point are applied once a group:
sum_k x[k] (q[k] - z) s = s (16^-i sum_k x[k] q[k] 16^i - z sum_k x[k]).

*Many rows* (prefill) are bound by arithmetic: a block of the weight is dequantized into a scratch
buffer that stays in cache and is multiplied with a panel of rows, accumulators in registers.
"""

from tir_kernels._tvm import PrimFunc, T, Target
from tir_kernels.cpu.blocked import blocked_linear
from tir_kernels.cpu.matmul import micro_kernel
from tir_kernels.cpu.prefetching import asked_for
from tir_kernels.cpu.tiling import largest_fitting, tiling_of
from tir_kernels.layouts import AUTOAWQ, BLOCKED, PACK, LinearShape, column_shift, nibble_column
from tir_kernels.memo import memoized

FEW_ROWS = 8  # up to here, weights are read once and never stored dequantized
PANEL = 96  # rows that share one dequantized block
UNROLLED = 8  # rows of the weight between two touches of an accumulator
LINE = 16  # words in a cache line
AHEAD = 16  # rows of the weight that are on their way from memory


@memoized
def w4a16_linear(
    target: Target,
    shape: LinearShape,
    act_dtype: str,
    out_dtype: str,
    bias: bool,
    *,
    layout: str = AUTOAWQ,
    silu: bool = False,
    scale_dtype: str = "float16",
    act_bits: int = 16,
) -> PrimFunc:
    """(x [m, K], qweight, qzeros, scales[, bias [N]], out [m, N]) for symbolic m.

    x and bias are of `act_dtype`; sums are fp32 and rounded once, to `out_dtype`. act_bits: as for
    `blocked_linear`, for its layout alone. Raises ValueError for what only GPU kernels have: their
    layout, and silu.
    """
    if layout not in (AUTOAWQ, BLOCKED) or silu:
        raise ValueError(
            f"the CPU has kernels for the layouts {AUTOAWQ} and {BLOCKED} without silu only"
        )
    if layout == BLOCKED:
        return blocked_linear(
            target, shape, act_dtype, out_dtype, bias, scale_dtype=scale_dtype, act_bits=act_bits
        )
    K, N, words, groups = shape.K, shape.N, shape.words, shape.groups
    few_rows = few_rows_linear(target, shape, out_dtype)
    many_rows = many_rows_linear(target, shape, out_dtype)

    @T.prim_func(private=True, s_tir=True)
    def linear(
        x_handle: T.handle,
        qweight: T.Buffer((K, words), "int32"),
        qzeros: T.Buffer((groups, words), "int32"),
        scales: T.Buffer((groups, N), scale_dtype),
        out_handle: T.handle,
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        m = T.int64()
        x = T.match_buffer(x_handle, (m, K), act_dtype)
        out = T.match_buffer(out_handle, (m, N), out_dtype)
        no_offset = T.meta_var(lambda column: T.float32(0))
        if m <= FEW_ROWS:
            few_rows(m, x, qweight, qzeros, scales, no_offset, out)
        else:
            many_rows(m, x, qweight, qzeros, scales, no_offset, out)

    @T.prim_func(private=True, s_tir=True)
    def linear_bias(
        x_handle: T.handle,
        qweight: T.Buffer((K, words), "int32"),
        qzeros: T.Buffer((groups, words), "int32"),
        scales: T.Buffer((groups, N), scale_dtype),
        bias_vector: T.Buffer((N,), act_dtype),
        out_handle: T.handle,
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        m = T.int64()
        x = T.match_buffer(x_handle, (m, K), act_dtype)
        out = T.match_buffer(out_handle, (m, N), out_dtype)
        offset = T.meta_var(lambda column: T.Cast("float32", bias_vector[column]))
        if m <= FEW_ROWS:
            few_rows(m, x, qweight, qzeros, scales, offset, out)
        else:
            many_rows(m, x, qweight, qzeros, scales, offset, out)

    return linear_bias if bias else linear


def few_rows_linear(target: Target, shape: LinearShape, out_dtype: str):
    """An inline builder (m, x, qweight, qzeros, scales, offset, out) for m <= FEW_ROWS.

    offset: column -> fp32, what is added to a sum.
    """
    K, G, words, groups = shape.K, shape.group_size, shape.words, shape.groups
    block = largest_fitting(words, (64, 48, 32, 16, 8, 4))
    lanes = largest_fitting(block, (tiling_of(target).lanes, 8, 4))
    vectors = block // lanes
    blocks = -(-words // block)

    def in_place(word, i):
        """Nibble i of each word, times 16^i: exact in fp32, and one operation less than a shift."""
        return T.Cast("float32", T.bitwise_and(word, T.shift_left(T.int32(15), 4 * i)))

    def shifted(word, i):
        return T.Cast("float32", T.bitwise_and(T.shift_right(word, 4 * i), T.int32(15)))

    def power_of_16(exponent):
        """The fp32 with that power of 16, from its bits: a loop variable goes in."""
        return T.reinterpret("float32", T.shift_left(127 + 4 * exponent, 23))

    def dot(start, x32, row, k, value, j):
        for u in range(UNROLLED):
            start = start + x32[row, k + u] * value[u, j]
        return start

    @T.inline
    def prefetch(qweight, row, word):
        """Ask for a cache line: rows lie pages apart, which hardware prefetchers do not follow."""
        T.evaluate(asked_for(qweight[T.min(row, K - 1), word]))

    @T.inline
    def accumulate(m, k, w, v, i, extract, x32, qweight, value, part):
        for u in T.unroll(UNROLLED):
            for j in T.vectorized(lanes):
                value[u, j] = extract(qweight[k + u, w + j], i)
        for r in range(m):
            for j in T.vectorized(lanes):
                part[r, i, v * lanes + j] = dot(part[r, i, v * lanes + j], x32, r, k, value, j)

    @T.inline
    def finish_group(m, g, w, v, i, weight, scales, qzeros, xsum, part, total, scale, zero):
        for j in T.vectorized(lanes):
            scale[j] = T.Cast("float32", scales[g, (w + j) * PACK + nibble_column(i)])
            zero[j] = shifted(qzeros[g, w + j], i)
        for r in range(m):
            for j in T.vectorized(lanes):
                total[r, i, v * lanes + j] = total[r, i, v * lanes + j] + scale[j] * (
                    part[r, i, v * lanes + j] * weight - zero[j] * xsum[r, g]
                )
                part[r, i, v * lanes + j] = T.float32(0)

    @T.inline
    def few_rows(m, x, qweight, qzeros, scales, offset, out):
        x32 = T.sblock_alloc_buffer((FEW_ROWS, K), "float32")
        xsum = T.sblock_alloc_buffer((FEW_ROWS, groups), "float32")
        for r in range(m):
            for k0 in range(K // 32):
                for k1 in T.vectorized(32):
                    x32[r, k0 * 32 + k1] = T.Cast("float32", x[r, k0 * 32 + k1])
            for g in range(groups):
                xsum[r, g] = T.float32(0)
                for k in range(G):
                    xsum[r, g] = xsum[r, g] + x32[r, g * G + k]
        for b in T.parallel(blocks):
            w0 = T.meta_var(T.min(b * block, words - block))
            part = T.alloc_buffer((FEW_ROWS, PACK, block), "float32", scope="local")
            total = T.alloc_buffer((FEW_ROWS, PACK, block), "float32", scope="local")
            value = T.alloc_buffer((UNROLLED, lanes), "float32", scope="local")
            scale = T.alloc_buffer((lanes,), "float32", scope="local")
            zero = T.alloc_buffer((lanes,), "float32", scope="local")
            for r in range(m):
                for i in range(PACK):
                    for v in range(vectors):
                        for j in T.vectorized(lanes):
                            part[r, i, v * lanes + j] = T.float32(0)
                            total[r, i, v * lanes + j] = T.float32(0)
            for g in range(groups):
                for k0 in range(G // UNROLLED):
                    k = T.meta_var(g * G + k0 * UNROLLED)
                    for u in T.unroll(UNROLLED):
                        for line in T.unroll(-(-block // LINE)):
                            prefetch(qweight, k + u + AHEAD, w0 + line * LINE)
                    for v in range(vectors):
                        w = T.meta_var(w0 + v * lanes)
                        for i in T.unroll(PACK - 1):
                            accumulate(m, k, w, v, i, in_place, x32, qweight, value, part)
                        # The top nibble in place would be negative.
                        accumulate(m, k, w, v, 7, shifted, x32, qweight, value, part)
                for v in range(vectors):
                    w = T.meta_var(w0 + v * lanes)
                    for i in T.unroll(PACK - 1):
                        finish_group(
                            m, g, w, v, i, power_of_16(-i),
                            scales, qzeros, xsum, part, total, scale, zero,
                        )  # fmt: skip
                    finish_group(
                        m, g, w, v, 7, T.float32(1),
                        scales, qzeros, xsum, part, total, scale, zero,
                    )  # fmt: skip
            for r in range(m):
                for i in T.unroll(PACK):
                    for j in range(block):
                        column = T.meta_var((w0 + j) * PACK + nibble_column(i))
                        out[r, column] = T.Cast(out_dtype, total[r, i, j] + offset(column))

    return few_rows


def many_rows_linear(target: Target, shape: LinearShape, out_dtype: str):
    """As `few_rows_linear`, for any m."""
    N, G, groups = shape.N, shape.group_size, shape.groups
    tiling = tiling_of(target)
    MR = tiling.micro_rows
    NR = largest_fitting(N, (tiling.micro_columns, 16, 8))
    NB = largest_fitting(N, (NR * max(1, 64 // NR), NR))
    blocks = -(-N // NB)
    multiply = micro_kernel(MR, NR, NB, G)

    @T.inline
    def many_rows(m, x, qweight, qzeros, scales, offset, out):
        for b in T.parallel(blocks):
            n0 = T.meta_var(T.min(b * NB, N - NB))
            weight = T.alloc_buffer((G, NB), "float32", scope="local")
            rows = T.alloc_buffer((PANEL, G), "float32", scope="local")
            total = T.alloc_buffer((PANEL, NB), "float32", scope="local")
            scale = T.alloc_buffer((NB,), "float32", scope="local")
            zero = T.alloc_buffer((NB,), "float32", scope="local")
            for panel in range(T.ceildiv(m, PANEL)):
                first = T.meta_var(panel * PANEL)
                height = T.meta_var(T.min(m - panel * PANEL, PANEL))
                for r in range(PANEL):
                    for n in T.vectorized(NB):
                        total[r, n] = offset(n0 + n)
                for g in range(groups):
                    for w in range(NB // PACK):
                        for c in T.vectorized(PACK):
                            scale[w * PACK + c] = T.Cast("float32", scales[g, n0 + w * PACK + c])
                            zero[w * PACK + c] = T.Cast(
                                "float32",
                                T.bitwise_and(
                                    T.shift_right(qzeros[g, n0 // PACK + w], column_shift(c)), 15
                                ),
                            )
                    for k in range(G):
                        for w in T.unroll(NB // PACK):
                            for c in T.vectorized(PACK):
                                weight[k, w * PACK + c] = scale[w * PACK + c] * (
                                    T.Cast(
                                        "float32",
                                        T.bitwise_and(
                                            T.shift_right(
                                                qweight[g * G + k, n0 // PACK + w],
                                                column_shift(c),
                                            ),
                                            15,
                                        ),
                                    )
                                    - zero[w * PACK + c]
                                )
                    for r in range(height):
                        for k in T.vectorized(G):
                            rows[r, k] = T.Cast("float32", x[first + r, g * G + k])
                    multiply(height, rows, weight, total)
                for r in range(height):
                    for n in T.vectorized(NB):
                        out[first + r, n0 + n] = T.Cast(out_dtype, total[r, n])

    return many_rows
