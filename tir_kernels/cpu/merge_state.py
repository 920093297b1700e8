"""Merging attention over two sets of keys, each with its log-sum-exp."""

from __future__ import annotations

from tir_kernels._tvm import PrimFunc, T, Target
from tir_kernels.cpu.fast_math import exp2
from tir_kernels.cpu.slots import Slots
from tir_kernels.memo import memoized


@memoized
def merge_state(
    target: Target, heads: int, head_dim: int, dtype: str, *, stored: str | None = None
) -> PrimFunc:
    """(out [n, h, d], lse [n, h], other_out, other_lse): the first pair becomes the attention over
    both sets of keys, given the attention over each. stored: as of `Slots`.
    """
    d, slots = head_dim, Slots(head_dim, dtype, stored)
    size, seen = slots.size, slots.heads(heads)

    @T.prim_func(private=True, s_tir=True)
    def merge(
        out_handle: T.handle,
        lse_handle: T.handle,
        other_out_handle: T.handle,
        other_lse_handle: T.handle,
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        n = T.int32()
        seen_out = T.match_buffer(out_handle, (n, seen, size), dtype)
        seen_lse = T.match_buffer(lse_handle, (n, seen), "float32")
        seen_other_out = T.match_buffer(other_out_handle, (n, seen, size), dtype)
        seen_other_lse = T.match_buffer(other_lse_handle, (n, seen), "float32")
        out = T.decl_buffer((n, heads, d), dtype, data=seen_out.data)
        lse = T.decl_buffer((n, heads), "float32", data=seen_lse.data)
        other_out = T.decl_buffer((n, heads, d), dtype, data=seen_other_out.data)
        other_lse = T.decl_buffer((n, heads), "float32", data=seen_other_lse.data)
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
