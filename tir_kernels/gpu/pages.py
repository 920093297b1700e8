"""The paged KV cache's memory: writing into pages, copying and reading them.

Pages of a layer are [p, 2, kv_heads, PAGE, d], keys before values; a slot is a token's place,
counted through pages. Signatures are those that TVM's paged KV cache calls.
"""

from tir_kernels._tvm import PrimFunc, T, Target
from tir_kernels.gpu.blocks import THREADS, threads_for, vector_type, vector_view, vector_width
from tir_kernels.memo import memoized

PAGE = 16  # tokens in a page of the cache


@memoized
def append_to_pages(target: Target, kv_heads: int, head_dim: int, dtype: str) -> PrimFunc:
    """(pages, k [n, kv_heads, d], v, positions int32 [n]): write row i into slot positions[i].

    -1 leaves a row out.
    """
    d = head_dim
    vec = vector_width(target, d, dtype)
    lanes = d // vec
    threads = threads_for(kv_heads * lanes)
    blocks = -(-kv_heads * lanes // threads)

    @T.prim_func(private=True, s_tir=True)
    def append(
        pages_handle: T.handle, k_handle: T.handle, v_handle: T.handle, positions_handle: T.handle
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        n = T.int32()
        num_pages = T.int32()
        positions_at = T.int32()
        pages = T.match_buffer(pages_handle, (num_pages, 2, kv_heads, PAGE, d), dtype)
        k = T.match_buffer(k_handle, (n, kv_heads, d), dtype)
        v = T.match_buffer(v_handle, (n, kv_heads, d), dtype)
        positions = T.match_buffer(positions_handle, (n,), "int32", elem_offset=positions_at)
        pages_view = vector_view(pages, dtype, vec)
        k_view = vector_view(k, dtype, vec)
        v_view = vector_view(v, dtype, vec)
        for i in T.thread_binding(n, thread="blockIdx.x"):
            for block in T.thread_binding(blocks, thread="blockIdx.y"):
                for t in T.thread_binding(threads, thread="threadIdx.x"):
                    position: T.let[T.int32] = positions[i]
                    work: T.let[T.int32] = block * threads + t
                    if position >= 0 and work < kv_heads * lanes:
                        page = T.meta_var(T.truncdiv(position, PAGE))
                        slot = T.meta_var(T.truncmod(position, PAGE))
                        head = T.meta_var(T.truncdiv(work, lanes))
                        lane = T.meta_var(T.truncmod(work, lanes))
                        pages_view[page, 0, head, slot, lane] = k_view[i, head, lane]
                        pages_view[page, 1, head, slot, lane] = v_view[i, head, lane]

    return append


@memoized
def copy_page(target: Target, kv_heads: int, head_dim: int, dtype: str) -> PrimFunc:
    """(pages, source int64, destination int64, tokens int64): a fork gets its own last page.

    All of the page is copied, whatever `tokens` are of use.
    """
    size = 2 * kv_heads * PAGE * head_dim
    vec = vector_width(target, size, dtype)
    blocks = -(-size // (THREADS * vec))

    @T.prim_func(private=True, s_tir=True)
    def copy(pages_handle: T.handle, source: T.int64, destination: T.int64, tokens: T.int64):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        num_pages = T.int32()
        pages = T.match_buffer(pages_handle, (num_pages, 2, kv_heads, PAGE, head_dim), dtype)
        flat = T.decl_buffer(
            (num_pages, size // vec),
            vector_type(dtype, vec),
            data=T.address_of(pages[0, 0, 0, 0, 0]),
        )
        for block in T.thread_binding(blocks, thread="blockIdx.x"):
            for t in T.thread_binding(THREADS, thread="threadIdx.x"):
                v = T.meta_var(block * THREADS + t)
                if v < size // vec:
                    flat[T.Cast("int32", destination), v] = flat[T.Cast("int32", source), v]

    return copy


@memoized
def move_slots(target: Target, kv_heads: int, head_dim: int, dtype: str) -> PrimFunc:
    """(pages, indptr int32 [batch + 1], slots int32 [2, n], batch int32): move tokens together.

    Moves indptr[b] to indptr[b + 1] are sequence b's, from slots[0] to slots[1], one after the
    other: a destination may be a later move's source no more.
    """
    d = head_dim
    vec = vector_width(target, d, dtype)
    lanes = d // vec
    threads = threads_for(kv_heads * lanes)
    blocks = -(-kv_heads * lanes // threads)

    @T.prim_func(private=True, s_tir=True)
    def move(
        pages_handle: T.handle, indptr_handle: T.handle, slots_handle: T.handle, batch: T.int32
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        n = T.int32()
        num_pages = T.int32()
        indptr_at = T.int32()
        slots_at = T.int32()
        pages = T.match_buffer(pages_handle, (num_pages, 2, kv_heads, PAGE, d), dtype)
        indptr = T.match_buffer(indptr_handle, (batch + 1,), "int32", elem_offset=indptr_at)
        slots = T.match_buffer(slots_handle, (2, n), "int32", elem_offset=slots_at)
        pages_view = vector_view(pages, dtype, vec)
        for b in T.thread_binding(batch, thread="blockIdx.x"):
            for block in T.thread_binding(blocks, thread="blockIdx.y"):
                for t in T.thread_binding(threads, thread="threadIdx.x"):
                    work: T.let[T.int32] = block * threads + t
                    if work < kv_heads * lanes:
                        head = T.meta_var(T.truncdiv(work, lanes))
                        lane = T.meta_var(T.truncmod(work, lanes))
                        for i in range(indptr[b + 1] - indptr[b]):
                            source: T.let[T.int32] = slots[0, indptr[b] + i]
                            goal: T.let[T.int32] = slots[1, indptr[b] + i]
                            for which in T.unroll(2):
                                pages_view[
                                    T.truncdiv(goal, PAGE),
                                    which,
                                    head,
                                    T.truncmod(goal, PAGE),
                                    lane,
                                ] = pages_view[
                                    T.truncdiv(source, PAGE),
                                    which,
                                    head,
                                    T.truncmod(source, PAGE),
                                    lane,
                                ]

    return move


@memoized
def read_slots(target: Target, layers: int, kv_heads: int, head_dim: int, dtype: str) -> PrimFunc:
    """(pages, slots int32 [n], k [layers, n, kv_heads, d], v, layer int64): what is cached."""
    d = head_dim
    blocks = -(-kv_heads * d // THREADS)

    @T.prim_func(private=True, s_tir=True)
    def read(
        pages_handle: T.handle,
        slots_handle: T.handle,
        k_handle: T.handle,
        v_handle: T.handle,
        layer: T.int64,
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        n = T.int32()
        num_pages = T.int32()
        slots_at = T.int32()
        pages = T.match_buffer(pages_handle, (num_pages, 2, kv_heads, PAGE, d), dtype)
        slots = T.match_buffer(slots_handle, (n,), "int32", elem_offset=slots_at)
        k = T.match_buffer(k_handle, (layers, n, kv_heads, d), dtype)
        v = T.match_buffer(v_handle, (layers, n, kv_heads, d), dtype)
        for i in T.thread_binding(n, thread="blockIdx.x"):
            for block in T.thread_binding(blocks, thread="blockIdx.y"):
                for t in T.thread_binding(THREADS, thread="threadIdx.x"):
                    work: T.let[T.int32] = block * THREADS + t
                    if work < kv_heads * d:
                        page = T.meta_var(T.truncdiv(slots[i], PAGE))
                        slot = T.meta_var(T.truncmod(slots[i], PAGE))
                        head = T.meta_var(T.truncdiv(work, d))
                        j = T.meta_var(T.truncmod(work, d))
                        here = T.meta_var(T.Cast("int32", layer))
                        k[here, i, head, j] = pages[page, 0, head, slot, j]
                        v[here, i, head, j] = pages[page, 1, head, slot, j]

    return read
