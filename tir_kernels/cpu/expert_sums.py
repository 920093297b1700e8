"""Counting the tokens that go to each expert, the first step of sorting them by expert."""

from tir_kernels._tvm import PrimFunc, T, Target
from tir_kernels.memo import memoized


@memoized
def expert_sums(target: Target, experts: int, chosen: int) -> PrimFunc:
    """(indices int32 [n, chosen], sums int32 [experts * n]), for n tokens' choices of experts.

    sums[e * n + t] is how many choices are of experts before e, or are e by tokens up to t: one
    more than the row of token t's choice of e, once choices are sorted by expert.
    """

    @T.prim_func(private=True, s_tir=True)
    def count(indices_handle: T.handle, sums_handle: T.handle):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        n = T.int32()
        indices = T.match_buffer(indices_handle, (n, chosen), "int32")
        sums = T.match_buffer(sums_handle, (experts * n,), "int32")
        number = T.sblock_alloc_buffer((1,), "int32")
        number[0] = 0
        for e in range(experts):
            for t in range(n):
                for c in T.unroll(chosen):
                    number[0] = number[0] + T.Cast("int32", indices[t, c] == e)
                sums[e * n + t] = number[0]

    return count
