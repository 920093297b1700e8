"""The paged KV cache's memory: writing into pages, copying and reading them.

Pages of a layer are [p, 2, kv_heads, PAGE, d], keys before values; a slot is a token's place,
counted through pages. Signatures are those that TVM's paged KV cache calls.
"""

from tir_kernels._tvm import PrimFunc, T, Target
from tir_kernels.memo import memoized

PAGE = 16  # tokens in a page of the cache


@memoized
def append_to_pages(target: Target, kv_heads: int, head_dim: int, dtype: str) -> PrimFunc:
    """(pages, k [n, kv_heads, d], v, positions int32 [n]): write row i into slot positions[i].

    -1 leaves a row out.
    """
    d = head_dim

    @T.prim_func(private=True, s_tir=True)
    def append(
        pages_handle: T.handle, k_handle: T.handle, v_handle: T.handle, positions_handle: T.handle
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        n = T.int64()
        num_pages = T.int64()
        pages_at = T.int64()
        positions_at = T.int64()
        pages = T.match_buffer(
            pages_handle, (num_pages, 2, kv_heads, PAGE, d), dtype, elem_offset=pages_at
        )
        k = T.match_buffer(k_handle, (n, kv_heads, d), dtype)
        v = T.match_buffer(v_handle, (n, kv_heads, d), dtype)
        positions = T.match_buffer(positions_handle, (n,), "int32", elem_offset=positions_at)
        for i in range(n):
            if positions[i] != -1:
                page: T.let[T.int32] = positions[i] // PAGE
                slot: T.let[T.int32] = positions[i] % PAGE
                for h in range(kv_heads):
                    for j in T.vectorized(d):
                        pages[page, 0, h, slot, j] = k[i, h, j]
                    for j in T.vectorized(d):
                        pages[page, 1, h, slot, j] = v[i, h, j]

    return append


@memoized
def copy_page(target: Target, kv_heads: int, head_dim: int, dtype: str) -> PrimFunc:
    """(pages, source int64, destination int64, tokens int64): a fork gets its own last page.

    Only the first `tokens` slots are copied.
    """
    d = head_dim

    @T.prim_func(private=True, s_tir=True)
    def copy(pages_handle: T.handle, source: T.int64, destination: T.int64, tokens: T.int64):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        num_pages = T.int64()
        pages_at = T.int64()
        pages = T.match_buffer(
            pages_handle, (num_pages, 2, kv_heads, PAGE, d), dtype, elem_offset=pages_at
        )
        for which, h in T.grid(2, kv_heads):
            for slot in range(tokens):
                for j in range(d):
                    pages[destination, which, h, slot, j] = pages[source, which, h, slot, j]

    return copy


@memoized
def read_slots(target: Target, layers: int, kv_heads: int, head_dim: int, dtype: str) -> PrimFunc:
    """(pages, slots int32 [n], k [layers, n, kv_heads, d], v, layer int64): what is cached."""
    d = head_dim

    @T.prim_func(private=True, s_tir=True)
    def read(
        pages_handle: T.handle,
        slots_handle: T.handle,
        k_handle: T.handle,
        v_handle: T.handle,
        layer: T.int64,
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        n = T.int64()
        num_pages = T.int64()
        pages_at = T.int64()
        slots_at = T.int64()
        pages = T.match_buffer(
            pages_handle, (num_pages, 2, kv_heads, PAGE, d), dtype, elem_offset=pages_at
        )
        slots = T.match_buffer(slots_handle, (n,), "int32", elem_offset=slots_at)
        k = T.match_buffer(k_handle, (layers, n, kv_heads, d), dtype)
        v = T.match_buffer(v_handle, (layers, n, kv_heads, d), dtype)
        for i in range(n):
            page: T.let[T.int32] = slots[i] // PAGE
            slot: T.let[T.int32] = slots[i] % PAGE
            for h, j in T.grid(kv_heads, d):
                k[layer, i, h, j] = pages[page, 0, h, slot, j]
                v[layer, i, h, j] = pages[page, 1, h, slot, j]

    return read
