"""Picking rows of a table: embeddings, the rows whose logits are wanted, drafts of tokens."""

from tir_kernels._tvm import PrimFunc, T, Target
from tir_kernels.memo import memoized


@memoized
def take_rows(target: Target, width: int, dtype: str) -> PrimFunc:
    """(table [n, width], rows int32 [m], out [m, width]); a row out of range is clipped."""

    @T.prim_func(private=True, s_tir=True)
    def take(table_handle: T.handle, rows_handle: T.handle, out_handle: T.handle):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        n = T.int64()
        m = T.int64()
        table = T.match_buffer(table_handle, (n, width), dtype)
        rows = T.match_buffer(rows_handle, (m,), "int32")
        out = T.match_buffer(out_handle, (m, width), dtype)
        for r in range(m):
            row: T.let[T.int64] = T.max(T.min(T.Cast("int64", rows[r]), n - 1), T.int64(0))
            for j in range(width):
                out[r, j] = table[row, j]

    return take


@memoized
def last_row(target: Target, width: int, dtype: str) -> PrimFunc:
    """(x [n, width], out [1, width])."""

    @T.prim_func(private=True, s_tir=True)
    def last(x_handle: T.handle, out: T.Buffer((1, width), dtype)):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        n = T.int64()
        x = T.match_buffer(x_handle, (n, width), dtype)
        for j in range(width):
            out[0, j] = x[n - 1, j]

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
    @T.prim_func(s_tir=True)
    def move(source_handle: T.handle, rows_handle: T.handle, out_handle: T.handle):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        source_count = T.int64()
        out_count = T.int64()
        count = T.int64()
        width = T.int64()
        source = T.match_buffer(source_handle, (source_count, width), dtype)
        rows = T.match_buffer(rows_handle, (count,), "int32")
        out = T.match_buffer(out_handle, (out_count, width), dtype)
        for r in range(count):
            pair = T.meta_var(source_and_destination(rows, r))
            for j in range(width):
                out[pair[1], j] = source[pair[0], j]

    return move
