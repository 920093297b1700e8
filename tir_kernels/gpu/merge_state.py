"""Putting together attention over two sets of keys."""

from tir_kernels._tvm import PrimFunc, T, Target
from tir_kernels.gpu.blocks import THREADS, at, vector_view, vector_width
from tir_kernels.memo import memoized


@memoized
def merge_state(target: Target, heads: int, head_dim: int, dtype: str) -> PrimFunc:
    """(out [n, h, d], lse [n, h], other_out, other_lse): the first pair becomes the attention over
    both sets of keys, given the attention over each.
    """
    d = head_dim
    vec = vector_width(target, d, dtype)
    lanes = d // vec
    slots = min(heads, max(1, THREADS // lanes))

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
        out_view = vector_view(out, dtype, vec)
        other_view = vector_view(other_out, dtype, vec)
        for r in T.thread_binding(n, thread="blockIdx.x"):
            for group in T.thread_binding(-(-heads // slots), thread="blockIdx.y"):
                for t in T.thread_binding(lanes * slots, thread="threadIdx.x"):
                    before = T.alloc_buffer((2,), "float32", scope="local")
                    one = T.alloc_buffer((vec,), dtype, scope="local")
                    other = T.alloc_buffer((vec,), dtype, scope="local")
                    result = T.alloc_buffer((vec,), dtype, scope="local")
                    h = T.meta_var(group * slots + T.truncdiv(t, lanes))
                    lane = T.meta_var(T.truncmod(t, lanes))
                    before[0] = lse[r, T.min(h, heads - 1)]
                    before[1] = other_lse[r, T.min(h, heads - 1)]
                    # All threads of a head have read its lse before one of them writes it.
                    T.tvm_storage_sync("shared")
                    largest: T.let[T.float32] = T.max(before[0], before[1])
                    first: T.let[T.float32] = T.exp2(before[0] - largest)
                    second: T.let[T.float32] = T.exp2(before[1] - largest)
                    if h < heads:
                        one[at(0, vec)] = out_view[r, h, lane]
                        other[at(0, vec)] = other_view[r, h, lane]
                        for j in T.unroll(vec):
                            result[j] = T.Cast(
                                dtype,
                                (
                                    T.Cast("float32", one[j]) * first
                                    + T.Cast("float32", other[j]) * second
                                )
                                / (first + second),
                            )
                        out_view[r, h, lane] = result[at(0, vec)]
                        if lane == 0:
                            lse[r, h] = largest + T.log2(first + second)

    return merge
