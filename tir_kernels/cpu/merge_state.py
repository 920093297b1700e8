"""Merging attention over two sets of keys, each with its log-sum-exp."""

from __future__ import annotations

from tir_kernels._tvm import PrimFunc, T, Target
from tir_kernels.cpu.fast_math import exp2
from tir_kernels.memo import memoized


@memoized
def merge_state(target: Target, heads: int, head_dim: int, dtype: str) -> PrimFunc:
    """(out [n, h, d], lse [n, h], other_out, other_lse): the first pair becomes the attention over
    both sets of keys, given the attention over each.
    """
    d = head_dim

    @T.prim_func(private=True, s_tir=True)
    def merge(
        out_handle: T.handle,
        lse_handle: T.handle,
        other_out_handle: T.handle,
        other_lse_handle: T.handle,
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        n = T.int32()
        out = T.match_buffer(out_handle, (n, heads, d), dtype)
        lse = T.match_buffer(lse_handle, (n, heads), "float32")
        other_out = T.match_buffer(other_out_handle, (n, heads, d), dtype)
        other_lse = T.match_buffer(other_lse_handle, (n, heads), "float32")
        for r in T.parallel(n):
            weights = T.alloc_buffer((3,), "float32", scope="local")
            for h in range(heads):
                largest: T.let[T.float32] = T.max(lse[r, h], other_lse[r, h])
                weights[0] = exp2(lse[r, h] - largest)
                weights[1] = exp2(other_lse[r, h] - largest)
                weights[2] = weights[0] + weights[1]
                for j in T.vectorized(d):
                    out[r, h, j] = T.Cast(
                        dtype,
                        (
                            T.Cast("float32", out[r, h, j]) * weights[0]
                            + T.Cast("float32", other_out[r, h, j]) * weights[1]
                        )
                        / weights[2],
                    )
                lse[r, h] = largest + T.log2(weights[2])

    return merge
