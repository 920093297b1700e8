"""Picking rows of a table: embeddings, and the rows whose logits are wanted."""

from tir_kernels._tvm import PrimFunc, T, Target
from tir_kernels.gpu.blocks import threads_for, vector_width
from tir_kernels.memo import memoized


@memoized
def take_rows(target: Target, width: int, dtype: str) -> PrimFunc:
    """(table [n, width], rows int32 [m], out [m, width]); a row out of range is clipped."""
    copy, blocks, threads = copy_row(target, width, dtype)

    @T.prim_func(private=True, s_tir=True)
    def take(table_handle: T.handle, rows_handle: T.handle, out_handle: T.handle):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        n = T.int32()
        m = T.int32()
        table = T.match_buffer(table_handle, (n, width), dtype)
        rows = T.match_buffer(rows_handle, (m,), "int32")
        out = T.match_buffer(out_handle, (m, width), dtype)
        for r in T.thread_binding(m, thread="blockIdx.x"):
            for block in T.thread_binding(blocks, thread="blockIdx.y"):
                for t in T.thread_binding(threads, thread="threadIdx.x"):
                    copy(table, T.max(T.min(rows[r], n - 1), 0), out, r, block, t)

    return take


@memoized
def last_row(target: Target, width: int, dtype: str) -> PrimFunc:
    """(x [n, width], out [1, width])."""
    copy, blocks, threads = copy_row(target, width, dtype)

    @T.prim_func(private=True, s_tir=True)
    def last(x_handle: T.handle, out: T.Buffer((1, width), dtype)):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        n = T.int32()
        x = T.match_buffer(x_handle, (n, width), dtype)
        for block in T.thread_binding(blocks, thread="blockIdx.x"):
            for t in T.thread_binding(threads, thread="threadIdx.x"):
                # TVM would spread n - 1 over the lanes of an index, and load them one by one.
                copy(x, T.max(n - 1, 0), out, 0, block, t)

    return last


def copy_row(target: Target, width: int, dtype: str):
    """TIR that copies one row, the blocks it takes, and their threads."""
    vec = vector_width(target, width, dtype)
    threads = threads_for(width // vec)

    @T.inline
    def copy(source, source_row, out, out_row, block, t):
        first = T.meta_var((block * threads + t) * vec)
        if first < width:
            for j in T.vectorized(vec):
                out[out_row, first + j] = source[source_row, first + j]

    return copy, -(-width // (threads * vec)), threads
