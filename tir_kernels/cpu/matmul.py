"""The inner loop of the matrix kernels: a block of accumulators held in vector registers."""

from tir_kernels._tvm import T


def micro_kernel(MR: int, NR: int, NB: int, depth: int):
    """total [., NB] += rows [., depth] @ weight [depth, NB], all fp32, for the first `height` rows.

    Rows are taken MR at a time, and the last MR may reach past `height`: the buffers hold a
    multiple of MR rows, and what lies beyond `height` is computed and not read by anyone.
    """

    @T.inline
    def multiply(height, rows, weight, total):
        for r0 in range(T.truncdiv(height + (MR - 1), MR)):
            for n0 in range(NB // NR):
                acc = T.alloc_buffer((MR, NR), "float32", scope="local")
                for r in T.unroll(MR):
                    for n in T.vectorized(NR):
                        acc[r, n] = total[r0 * MR + r, n0 * NR + n]
                for k in range(depth):
                    for r in T.unroll(MR):
                        for n in T.vectorized(NR):
                            acc[r, n] = acc[r, n] + rows[r0 * MR + r, k] * weight[k, n0 * NR + n]
                for r in T.unroll(MR):
                    for n in T.vectorized(NR):
                        total[r0 * MR + r, n0 * NR + n] = acc[r, n]

    return multiply
