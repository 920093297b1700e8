"""Unquantized linears, weight [N, K] as Hugging Face stores it, with fp32 sums.

Each output is a dot product of two contiguous rows, so vectors run along K and a block of MR rows
by NR outputs shares what it loads. The lanes of an accumulator are summed once, at the end.
"""

from tir_kernels._tvm import PrimFunc, T, Target
from tir_kernels.cpu.tiling import largest_fitting, tiling_of
from tir_kernels.memo import memoized


@memoized
def dense_linear(
    target: Target, K: int, N: int, act_dtype: str, out_dtype: str, bias: bool
) -> PrimFunc:
    """(x [m, K], weight [N, K][, bias [N]], out [m, N]) for symbolic m.

    x, weight and bias are of `act_dtype`; sums are fp32 and rounded once, to `out_dtype`.
    """
    lanes = largest_fitting(K, (tiling_of(target).lanes, 4))
    body = K - K % lanes
    block = largest_fitting(N, (32, 16, 8, 4, 2, 1))
    blocks = -(-N // block)

    @T.inline
    def rows_by_outputs(MR, NR, r0, n0, m, x, weight, offset, out):
        acc = T.alloc_buffer((MR, NR, lanes), "float32", scope="local")
        total = T.alloc_buffer((MR, NR), "float32", scope="local")
        for r, n in T.grid(MR, NR):
            total[r, n] = offset(n0 + n)
        for r in T.unroll(MR):
            for n in T.unroll(NR):
                for j in T.vectorized(lanes):
                    acc[r, n, j] = T.float32(0)
        for k in range(body // lanes):
            for r in T.unroll(MR):
                for n in T.unroll(NR):
                    for j in T.vectorized(lanes):
                        # Rows past the last repeat it; they are not stored.
                        acc[r, n, j] = acc[r, n, j] + T.Cast(
                            "float32", x[T.min(r0 + r, m - 1), k * lanes + j]
                        ) * T.Cast("float32", weight[n0 + n, k * lanes + j])
        for r, n in T.grid(MR, NR):
            for k in range(K - body):
                total[r, n] = total[r, n] + T.Cast(
                    "float32", x[T.min(r0 + r, m - 1), body + k]
                ) * T.Cast("float32", weight[n0 + n, body + k])
        for r in T.unroll(MR):
            for n in T.unroll(NR):
                for j in T.unroll(lanes):
                    total[r, n] = total[r, n] + acc[r, n, j]
        for r, n in T.grid(MR, NR):
            if r0 + r < m:
                out[r0 + r, n0 + n] = T.Cast(out_dtype, total[r, n])

    @T.inline
    def multiply(m, x, weight, offset, out):
        for b in T.parallel(blocks):
            first = T.meta_var(T.min(T.Cast("int64", b) * block, T.int64(N - block)))
            if m <= 2:
                for r in range(m):
                    for n in range(block // min(8, block)):
                        rows_by_outputs(
                            1, min(8, block), r, first + n * min(8, block),
                            m, x, weight, offset, out,
                        )  # fmt: skip
            else:
                for r in range(T.ceildiv(m, 4)):
                    for n in range(block // min(4, block)):
                        rows_by_outputs(
                            4, min(4, block), r * 4, first + n * min(4, block),
                            m, x, weight, offset, out,
                        )  # fmt: skip

    @T.prim_func(private=True, s_tir=True)
    def linear(x_handle: T.handle, weight: T.Buffer((N, K), act_dtype), out_handle: T.handle):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        m = T.int64()
        x = T.match_buffer(x_handle, (m, K), act_dtype)
        out = T.match_buffer(out_handle, (m, N), out_dtype)
        no_offset = T.meta_var(lambda n: T.float32(0))
        multiply(m, x, weight, no_offset, out)

    @T.prim_func(private=True, s_tir=True)
    def linear_bias(
        x_handle: T.handle,
        weight: T.Buffer((N, K), act_dtype),
        bias_vector: T.Buffer((N,), act_dtype),
        out_handle: T.handle,
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        m = T.int64()
        x = T.match_buffer(x_handle, (m, K), act_dtype)
        out = T.match_buffer(out_handle, (m, N), out_dtype)
        offset = T.meta_var(lambda n: T.Cast("float32", bias_vector[n]))
        multiply(m, x, weight, offset, out)

    return linear_bias if bias else linear
