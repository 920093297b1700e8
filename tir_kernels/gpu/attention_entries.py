"""The functions that TVM's paged KV cache calls for prefill, around any kernel for one tile.

A tile has rows of one sequence: queries times the heads that share a key head (arXiv 2305.13245),
query by query. Whoever brings an `attend` says how many rows a block takes, and with how many
threads; it is an inline builder of

    t, q_row, q_length, first_row, head, kv_length, causal, sm_scale, q, key, value, out, lse

where the sequence has queries q_row to q_row + q_length, the tile begins at row first_row of them
(beyond the last where there is none for the block), head is the key head, key(i, v) and value(i, v)
are vector v of key i of kv_length, and q is a view as vectors, all of `vector_width` elements.

Scores are in base 2: what is returned as lse is log2 of the sum of exponentials, which
`merge_state` expects. The rotary arguments are part of the signatures and unused: keys are rotated
before they are cached.
"""

from __future__ import annotations

from typing import Any

from tir_kernels._tvm import PrimFunc, T, Target
from tir_kernels.gpu.attention_parts import in_pages, in_rows
from tir_kernels.gpu.blocks import vector_view, vector_width
from tir_kernels.gpu.pages import PAGE


def ragged_prefill(
    target: Target,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: str,
    rows: int,
    threads: int,
    attend: Any,
) -> PrimFunc:
    """New queries against the new keys and values of the same sequences, causal if asked.

    q [n, q_heads, d]; k, v [n, kv_heads, d]; sequence b has rows q_indptr[b] to q_indptr[b + 1].
    """
    d, group = head_dim, q_heads // kv_heads
    find = _find_tile(group, rows)
    vec = vector_width(target, d, dtype)

    @T.prim_func(private=True, s_tir=True)
    def attention(
        q_handle: T.handle,
        q_indptr_handle: T.handle,
        k_handle: T.handle,
        v_handle: T.handle,
        kv_indptr_handle: T.handle,
        q_position_handle: T.handle,
        k_offset_handle: T.handle,
        out_handle: T.handle,
        lse_handle: T.handle,
        causal: T.int32,
        rotary_mode: T.int32,
        rope_scale: T.float32,
        rope_theta: T.float32,
        sm_scale: T.float32,
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        batch = T.int32()
        q_rows = T.int32()
        kv_rows = T.int32()
        q_indptr_at = T.int32()
        kv_indptr_at = T.int32()
        q_position_at = T.int32()
        k_offset_at = T.int32()
        q = T.match_buffer(q_handle, (q_rows, q_heads, d), dtype)
        q_indptr = T.match_buffer(q_indptr_handle, (batch + 1,), "int32", elem_offset=q_indptr_at)
        k = T.match_buffer(k_handle, (kv_rows, kv_heads, d), dtype)
        v = T.match_buffer(v_handle, (kv_rows, kv_heads, d), dtype)
        kv_indptr = T.match_buffer(
            kv_indptr_handle, (batch + 1,), "int32", elem_offset=kv_indptr_at
        )
        T.match_buffer(q_position_handle, (q_rows,), "int32", elem_offset=q_position_at)
        T.match_buffer(k_offset_handle, (batch,), "int32", elem_offset=k_offset_at)
        out = T.match_buffer(out_handle, (q_rows, q_heads, d), dtype)
        lse = T.match_buffer(lse_handle, (q_rows, q_heads), "float32")
        tiles = T.meta_var(T.truncdiv(q_rows * group, rows) + batch)
        q_view = vector_view(q, dtype, vec)
        k_view = vector_view(k, dtype, vec)
        v_view = vector_view(v, dtype, vec)
        for block in T.thread_binding(tiles, thread="blockIdx.x"):
            for head in T.thread_binding(kv_heads, thread="blockIdx.y"):
                for t in T.thread_binding(threads, thread="threadIdx.x"):
                    place = T.alloc_buffer((2,), "int32", scope="local")
                    find(block, batch, q_indptr, place)
                    b: T.let[T.int32] = place[0]
                    begin: T.let[T.int32] = kv_indptr[b]
                    key = T.meta_var(in_rows(k_view, begin, head))
                    value = T.meta_var(in_rows(v_view, begin, head))
                    attend(
                        t, q_indptr[b], q_indptr[b + 1] - q_indptr[b], place[1], head,
                        kv_indptr[b + 1] - begin, causal, sm_scale, q_view, key, value, out, lse,
                    )  # fmt: skip

    return attention


def paged_prefill(
    target: Target,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: str,
    rows: int,
    threads: int,
    attend: Any,
) -> PrimFunc:
    """New queries against the pages that their sequences already have.

    pages [p, 2, kv_heads, PAGE, d]; sequence b owns page_values[page_indptr[b]..], of which the
    last holds last_page_length[b] tokens.
    """
    d, group = head_dim, q_heads // kv_heads
    find = _find_tile(group, rows)
    vec = vector_width(target, d, dtype)

    @T.prim_func(private=True, s_tir=True)
    def attention(
        q_handle: T.handle,
        q_indptr_handle: T.handle,
        pages_handle: T.handle,
        page_indptr_handle: T.handle,
        page_values_handle: T.handle,
        last_page_length_handle: T.handle,
        k_offset_handle: T.handle,
        q_position_handle: T.handle,
        out_handle: T.handle,
        lse_handle: T.handle,
        causal: T.int32,
        rotary_mode: T.int32,
        rope_scale: T.float32,
        rope_theta: T.float32,
        sm_scale: T.float32,
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        batch = T.int32()
        q_rows = T.int32()
        num_pages = T.int32()
        used_pages = T.int32()
        q_indptr_at = T.int32()
        page_indptr_at = T.int32()
        page_values_at = T.int32()
        last_page_length_at = T.int32()
        k_offset_at = T.int32()
        q_position_at = T.int32()
        q = T.match_buffer(q_handle, (q_rows, q_heads, d), dtype)
        q_indptr = T.match_buffer(q_indptr_handle, (batch + 1,), "int32", elem_offset=q_indptr_at)
        pages = T.match_buffer(pages_handle, (num_pages, 2, kv_heads, PAGE, d), dtype)
        page_indptr = T.match_buffer(
            page_indptr_handle, (batch + 1,), "int32", elem_offset=page_indptr_at
        )
        page_values = T.match_buffer(
            page_values_handle, (used_pages,), "int32", elem_offset=page_values_at
        )
        last_page_length = T.match_buffer(
            last_page_length_handle, (batch,), "int32", elem_offset=last_page_length_at
        )
        T.match_buffer(k_offset_handle, (batch,), "int32", elem_offset=k_offset_at)
        T.match_buffer(q_position_handle, (q_rows,), "int32", elem_offset=q_position_at)
        out = T.match_buffer(out_handle, (q_rows, q_heads, d), dtype)
        lse = T.match_buffer(lse_handle, (q_rows, q_heads), "float32")
        tiles = T.meta_var(T.truncdiv(q_rows * group, rows) + batch)
        q_view = vector_view(q, dtype, vec)
        pages_view = vector_view(pages, dtype, vec)
        for block in T.thread_binding(tiles, thread="blockIdx.x"):
            for head in T.thread_binding(kv_heads, thread="blockIdx.y"):
                for t in T.thread_binding(threads, thread="threadIdx.x"):
                    place = T.alloc_buffer((2,), "int32", scope="local")
                    find(block, batch, q_indptr, place)
                    b: T.let[T.int32] = place[0]
                    begin: T.let[T.int32] = page_indptr[b]
                    count: T.let[T.int32] = page_indptr[b + 1] - begin
                    length: T.let[T.int32] = T.Select(
                        count > 0, (count - 1) * PAGE + last_page_length[b], 0
                    )
                    key = T.meta_var(in_pages(target, pages_view, page_values, begin, 0, head))
                    value = T.meta_var(in_pages(target, pages_view, page_values, begin, 1, head))
                    attend(
                        t, q_indptr[b], q_indptr[b + 1] - q_indptr[b], place[1], head,
                        length, causal, sm_scale, q_view, key, value, out, lse,
                    )  # fmt: skip

    return attention


def _find_tile(group: int, rows: int):
    """TIR that leaves the sequence of a block, and its first row there, in a buffer of two.

    A block beyond the last tile gets a row beyond the last row of the last sequence.
    """

    @T.inline
    def find(block, batch, q_indptr, place):
        place[0] = 0
        place[1] = block
        for b in range(batch - 1):
            tiles: T.let[T.int32] = T.truncdiv(
                (q_indptr[b + 1] - q_indptr[b]) * group + (rows - 1), rows
            )
            if place[0] == b and place[1] >= tiles:
                place[0] = b + 1
                place[1] = place[1] - tiles
        place[1] = place[1] * rows

    return find
