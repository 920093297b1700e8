"""Counting the tokens that go to each expert, the first step of sorting them by expert."""

from tir_kernels._tvm import PrimFunc, T, Target
from tir_kernels.gpu.blocks import THREADS
from tir_kernels.memo import memoized


@memoized
def expert_sums(target: Target, experts: int, chosen: int) -> PrimFunc:
    """(indices int32 [n, chosen], sums int32 [experts * n]), for n tokens' choices of experts.

    sums[e * n + t] is how many choices are of experts before e, or are e by tokens up to t: one
    more than the row of token t's choice of e, once choices are sorted by expert.

    A block for each expert, whose threads have neighbouring tokens each.
    """

    @T.prim_func(private=True, s_tir=True)
    def count(indices_handle: T.handle, sums_handle: T.handle):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        n = T.int32()
        indices = T.match_buffer(indices_handle, (n, chosen), "int32")
        sums = T.match_buffer(sums_handle, (experts * n,), "int32")
        for e in T.thread_binding(experts, thread="blockIdx.x"):
            for t in T.thread_binding(THREADS, thread="threadIdx.x"):
                here = T.alloc_buffer((THREADS,), "int32", scope="shared")
                before = T.alloc_buffer((THREADS,), "int32", scope="shared")
                number = T.alloc_buffer((2,), "int32", scope="local")
                share = T.meta_var(T.truncdiv(n + (THREADS - 1), THREADS))
                number[0] = 0
                number[1] = 0
                for j in range(share):
                    if t * share + j < n:
                        for c in T.unroll(chosen):
                            index = T.meta_var(indices[t * share + j, c])
                            number[0] = number[0] + T.Cast("int32", index == e)
                            number[1] = number[1] + T.Cast("int32", index < e)
                here[t] = number[0]
                before[t] = number[1]
                T.tvm_storage_sync("shared")
                number[0] = 0
                for other in range(THREADS):
                    number[0] = number[0] + before[other]
                    if other < t:
                        number[0] = number[0] + here[other]
                for j in range(share):
                    if t * share + j < n:
                        for c in T.unroll(chosen):
                            number[0] = number[0] + T.Cast("int32", indices[t * share + j, c] == e)
                        sums[e * n + t * share + j] = number[0]

    return count
