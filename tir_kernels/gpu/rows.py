"""Picking rows of a table: embeddings, the rows whose logits are wanted, drafts of tokens."""

from tir_kernels._tvm import PrimFunc, T, Target
from tir_kernels.gpu.blocks import THREADS, threads_for, vector_view, vector_width
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


@memoized
def gather_rows(target: Target, dtype: str) -> PrimFunc:
    """(table [n, width], rows int32 [m], out [m, width]): row rows[r] of the table to row r."""
    return _move_rows(dtype, lambda rows, r: (rows[r], r))


@memoized
def scatter_rows(target: Target, dtype: str) -> PrimFunc:
    """(x [m, width], rows int32 [m], out [n, width]): row r of x to row rows[r]; others stay."""
    return _move_rows(dtype, lambda rows, r: (r, rows[r]))


def _move_rows(dtype: str, source_and_destination) -> PrimFunc:
    """One element a thread: widths are known at run time only."""

    @T.prim_func(s_tir=True)
    def move(source_handle: T.handle, rows_handle: T.handle, out_handle: T.handle):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        source_count = T.int32()
        out_count = T.int32()
        count = T.int32()
        width = T.int32()
        source = T.match_buffer(source_handle, (source_count, width), dtype)
        rows = T.match_buffer(rows_handle, (count,), "int32")
        out = T.match_buffer(out_handle, (out_count, width), dtype)
        blocks = T.meta_var(T.truncdiv(width + (THREADS - 1), THREADS))
        for r in T.thread_binding(count, thread="blockIdx.x"):
            for block in T.thread_binding(blocks, thread="blockIdx.y"):
                for t in T.thread_binding(THREADS, thread="threadIdx.x"):
                    j: T.let[T.int32] = block * THREADS + t
                    pair = T.meta_var(source_and_destination(rows, r))
                    if j < width:
                        out[pair[1], j] = source[pair[0], j]

    return move


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
