"""Picking rows of tables that may be larger than a storage binding: embeddings."""

from tir_kernels._tvm import PrimFunc, T, Target
from tir_kernels.gpu.blocks import bytes_of, vector_type, vector_view, vector_width
from tir_kernels.gpu.rows import copy_row
from tir_kernels.gpu.rows import take_rows as take_rows_at_once
from tir_kernels.memo import memoized
from tir_kernels.vulkan.limits import limits_of, window_address


@memoized
def take_rows(target: Target, width: int, dtype: str) -> PrimFunc:
    """(table [n, width], rows int32 [m], out [m, width]); a row out of range is clipped.

    One launch for each part of the table that fits into a binding, in which the rows of that part
    are copied. TVM's own Vulkan hands kernels whole buffers only, and takes all at once.
    """
    # A multiple of 32 rows puts every part at a multiple of 256 bytes, as bindings want.
    part = limits_of(target).binding_bytes // (width * bytes_of(dtype)) // 32 * 32
    if target.kind.name == "vulkan" or not part or width * bytes_of(dtype) % 8:
        return take_rows_at_once(target, width, dtype)
    copy, blocks, threads = copy_row(target, width, dtype)
    vec = vector_width(target, width, dtype)

    @T.prim_func(private=True, s_tir=True)
    def take(table_handle: T.handle, rows_handle: T.handle, out_handle: T.handle):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        n = T.int32()
        m = T.int32()
        table = T.match_buffer(table_handle, (n, width), dtype)
        rows = T.match_buffer(rows_handle, (m,), "int32")
        out = T.match_buffer(out_handle, (m, width), dtype)
        out_view = vector_view(out, dtype, vec)
        for launch in T.serial((n + part - 1) // part):
            start = T.meta_var(launch * part)
            window = T.decl_buffer(
                (part, width // vec), vector_type(dtype, vec), data=window_address(table[start, 0])
            )
            for r in T.thread_binding(m, thread="blockIdx.x"):
                for block in T.thread_binding(blocks, thread="blockIdx.y"):
                    for t in T.thread_binding(threads, thread="threadIdx.x"):
                        row = T.meta_var(T.max(T.min(rows[r], n - 1), 0))
                        if T.floordiv(row, part) == launch:
                            copy(window, T.floormod(row, part), out_view, r, block, t)

    return take
