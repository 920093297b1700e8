"""Picking rows of a table: embeddings, and the rows whose logits are wanted."""

from tir_kernels._tvm import PrimFunc, T, Target
from tir_kernels.gpu.blocks import threads_for, vector_view, vector_width
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
        table_view = vector_view(table, dtype, vector_width(target, width, dtype))
        out_view = vector_view(out, dtype, vector_width(target, width, dtype))
        for r in T.thread_binding(m, thread="blockIdx.x"):
            for block in T.thread_binding(blocks, thread="blockIdx.y"):
                for t in T.thread_binding(threads, thread="threadIdx.x"):
                    copy(table_view, T.max(T.min(rows[r], n - 1), 0), out_view, r, block, t)

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
        x_view = vector_view(x, dtype, vector_width(target, width, dtype))
        out_view = vector_view(out, dtype, vector_width(target, width, dtype))
        for block in T.thread_binding(blocks, thread="blockIdx.x"):
            for t in T.thread_binding(threads, thread="threadIdx.x"):
                copy(x_view, n - 1, out_view, 0, block, t)

    return last


def copy_row(target: Target, width: int, dtype: str):
    """TIR that copies one row between views of `vector_width` elements, the blocks it takes, and
    their threads.
    """
    vectors = width // vector_width(target, width, dtype)
    threads = threads_for(vectors)

    @T.inline
    def copy(source, source_row, out, out_row, block, t):
        v = T.meta_var(block * threads + t)
        if v < vectors:
            out[out_row, v] = source[source_row, v]

    return copy, -(-vectors // threads), threads
