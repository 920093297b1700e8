"""Attention over a paged KV cache, with the signatures that TVM's cache calls.

All kernels follow FlashAttention (arXiv 2205.14135): keys are walked in tiles, the softmax is kept
as a running maximum and sum, and scores never leave the cache. Query heads that share a key head
(arXiv 2305.13245) are rows of one block, so that a tile of keys is loaded once for all of them.

Scores are in base 2: `sm_scale` is multiplied by log2(e) once, and what is returned as lse is
log2 of the sum of exponentials, which `merge_state` expects. The rotary arguments are part of the
signatures and unused: keys are rotated before they are cached.
"""

import math

from tir_kernels._tvm import PrimFunc, T, Target
from tir_kernels.cpu.fast_math import exp2
from tir_kernels.cpu.matmul import micro_kernel
from tir_kernels.cpu.pages import PAGE
from tir_kernels.cpu.tiling import largest_divisor, tiling_of
from tir_kernels.memo import memoized

TILE = 64  # keys that are scored together
ROWS = 96  # rows of a block: queries times the heads that share a key head
_NOTHING = -5e4  # the running maximum before any key, as in TVM's own kernels
_HIDDEN = -1e30  # the score of a key that a query must not see
_LOG2_E = math.log2(math.e)


@memoized
def attention_prefill_ragged(
    target: Target, q_heads: int, kv_heads: int, head_dim: int, dtype: str
) -> PrimFunc:
    """New queries against the new keys and values of the same sequences, causal if asked.

    q [n, q_heads, d]; k, v [n, kv_heads, d]; sequence b has rows q_indptr[b] to q_indptr[b + 1].
    """
    d, group = head_dim, q_heads // kv_heads
    queries = max(1, ROWS // group)
    attend = _attend(target, d, group, queries, dtype)

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
        longest = T.alloc_buffer((1,), "int32", scope="local")
        longest[0] = 0
        for b in range(batch):
            longest[0] = T.max(longest[0], q_indptr[b + 1] - q_indptr[b])
        blocks: T.let[T.int32] = T.truncdiv(longest[0] + (queries - 1), queries)
        for unit in T.parallel(kv_heads * batch * blocks):
            head: T.let[T.int32] = T.truncdiv(unit, batch * blocks)
            b: T.let[T.int32] = T.truncmod(T.truncdiv(unit, blocks), batch)
            first: T.let[T.int32] = T.truncmod(unit, blocks) * queries
            kv_length: T.let[T.int32] = kv_indptr[b + 1] - kv_indptr[b]
            key = T.meta_var(_in_rows(k, kv_indptr[b], head))
            value = T.meta_var(_in_rows(v, kv_indptr[b], head))
            attend(
                q_indptr[b], q_indptr[b + 1] - q_indptr[b], first, head, kv_length,
                causal, sm_scale, q, key, value, out, lse,
            )  # fmt: skip

    return attention


@memoized
def attention_prefill_paged(
    target: Target, q_heads: int, kv_heads: int, head_dim: int, dtype: str
) -> PrimFunc:
    """New queries against the pages that their sequences already have.

    pages [p, 2, kv_heads, PAGE, d]; sequence b owns page_values[page_indptr[b]..], of which the
    last holds last_page_length[b] tokens.
    """
    d, group = head_dim, q_heads // kv_heads
    queries = max(1, ROWS // group)
    attend = _attend(target, d, group, queries, dtype)

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
        pages_at = T.int64()
        q = T.match_buffer(q_handle, (q_rows, q_heads, d), dtype)
        q_indptr = T.match_buffer(q_indptr_handle, (batch + 1,), "int32", elem_offset=q_indptr_at)
        pages = T.match_buffer(
            pages_handle, (num_pages, 2, kv_heads, PAGE, d), dtype, elem_offset=pages_at
        )
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
        longest = T.alloc_buffer((1,), "int32", scope="local")
        longest[0] = 0
        for b in range(batch):
            longest[0] = T.max(longest[0], q_indptr[b + 1] - q_indptr[b])
        blocks: T.let[T.int32] = T.truncdiv(longest[0] + (queries - 1), queries)
        for unit in T.parallel(kv_heads * batch * blocks):
            head: T.let[T.int32] = T.truncdiv(unit, batch * blocks)
            b: T.let[T.int32] = T.truncmod(T.truncdiv(unit, blocks), batch)
            first: T.let[T.int32] = T.truncmod(unit, blocks) * queries
            begin: T.let[T.int32] = page_indptr[b]
            count: T.let[T.int32] = page_indptr[b + 1] - begin
            kv_length: T.let[T.int32] = T.Select(
                count > 0, (count - 1) * PAGE + last_page_length[b], 0
            )
            key = T.meta_var(_in_pages(pages, page_values, begin, 0, head))
            value = T.meta_var(_in_pages(pages, page_values, begin, 1, head))
            attend(
                q_indptr[b], q_indptr[b + 1] - q_indptr[b], first, head, kv_length,
                causal, sm_scale, q, key, value, out, lse,
            )  # fmt: skip

    return attention


@memoized
def merge_state(target: Target, heads: int, head_dim: int, dtype: str) -> PrimFunc:
    """(out [n, h, d], lse [n, h], other_out, other_lse): the first pair becomes the attention over
    both sets of keys, given the attention over each.
    """
    d = head_dim

    @T.prim_func(private=True, s_tir=True)
    def merge(
        out_handle: T.handle,
        lse_handle: T.handle,
        other_out_handle: T.handle,
        other_lse_handle: T.handle,
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        n = T.int32()
        out = T.match_buffer(out_handle, (n, heads, d), dtype)
        lse = T.match_buffer(lse_handle, (n, heads), "float32")
        other_out = T.match_buffer(other_out_handle, (n, heads, d), dtype)
        other_lse = T.match_buffer(other_lse_handle, (n, heads), "float32")
        for r in T.parallel(n):
            weights = T.alloc_buffer((3,), "float32", scope="local")
            for h in range(heads):
                largest: T.let[T.float32] = T.max(lse[r, h], other_lse[r, h])
                weights[0] = exp2(lse[r, h] - largest)
                weights[1] = exp2(other_lse[r, h] - largest)
                weights[2] = weights[0] + weights[1]
                for j in T.vectorized(d):
                    out[r, h, j] = T.Cast(
                        dtype,
                        (
                            T.Cast("float32", out[r, h, j]) * weights[0]
                            + T.Cast("float32", other_out[r, h, j]) * weights[1]
                        )
                        / weights[2],
                    )
                lse[r, h] = largest + T.log2(weights[2])

    return merge


def _in_rows(x, first, head):
    """Element j of token t in rows of [n, heads, d] that begin at `first`."""
    return lambda t, j: x[first + t, head, j]


def _in_pages(pages, page_values, begin, which, head):
    """Element j of token t in the pages of a sequence; which: 0 for keys, 1 for values."""
    return lambda t, j: pages[
        page_values[begin + T.truncdiv(t, PAGE)], which, head, T.truncmod(t, PAGE), j
    ]


def _attend(target: Target, head_dim: int, group: int, queries: int, dtype: str):
    """TIR for one block: up to `queries` queries of the heads that share key head `head`."""
    tiling = tiling_of(target)
    d = head_dim
    MR = tiling.micro_rows
    rows = -(-queries * group // MR) * MR
    score = micro_kernel(MR, min(TILE, tiling.micro_columns), TILE, d)
    gather = micro_kernel(MR, largest_divisor(d, tiling.micro_columns), d, TILE)

    @T.inline
    def load_tile(begin, width, key, value, keys, values):
        """Keys transposed, so that vectors run along them; what lies past `width` is zero."""
        for t in range(TILE):
            if t < width:
                for j in range(d):
                    keys[j, t] = T.Cast("float32", key(begin + t, j))
                for j in T.vectorized(d):
                    values[t, j] = T.Cast("float32", value(begin + t, j))
            else:
                for j in range(d):
                    keys[j, t] = T.float32(0)
                for j in T.vectorized(d):
                    values[t, j] = T.float32(0)

    @T.inline
    def largest_of(scores, r, halves, result):
        for t in T.vectorized(TILE // 2):
            halves[t] = T.max(scores[r, t], scores[r, TILE // 2 + t])
        for t in T.vectorized(TILE // 4):
            halves[t] = T.max(halves[t], halves[TILE // 4 + t])
        for t in T.vectorized(TILE // 8):
            halves[t] = T.max(halves[t], halves[TILE // 8 + t])
        for t in T.unroll(TILE // 8):
            result[r] = T.max(result[r], halves[t])

    @T.inline
    def sum_of(scores, r, halves, result):
        for t in T.vectorized(TILE // 2):
            halves[t] = scores[r, t] + scores[r, TILE // 2 + t]
        for t in T.vectorized(TILE // 4):
            halves[t] = halves[t] + halves[TILE // 4 + t]
        for t in T.vectorized(TILE // 8):
            halves[t] = halves[t] + halves[TILE // 8 + t]
        for t in T.unroll(TILE // 8):
            result[r] = result[r] + halves[t]

    @T.inline
    def attend(q_row, q_length, first, head, kv_length, causal, sm_scale, q, key, value, out, lse):
        count: T.let[T.int32] = T.min(q_length - first, queries)
        if count > 0:
            q32 = T.alloc_buffer((rows, d), "float32", scope="local")
            keys = T.alloc_buffer((d, TILE), "float32", scope="local")
            values = T.alloc_buffer((TILE, d), "float32", scope="local")
            scores = T.alloc_buffer((rows, TILE), "float32", scope="local")
            mixed = T.alloc_buffer((rows, d), "float32", scope="local")
            largest = T.alloc_buffer((rows,), "float32", scope="local")
            total = T.alloc_buffer((rows,), "float32", scope="local")
            scale = T.alloc_buffer((1,), "float32", scope="local")
            halves = T.alloc_buffer((TILE // 2,), "float32", scope="local")
            # A query sees the keys before it: those of the past and its own chunk's.
            past: T.let[T.int32] = kv_length - q_length
            seen: T.let[T.int32] = T.Select(
                causal != 0, T.min(kv_length, past + first + count), kv_length
            )
            for i, g in T.grid(count, group):
                for j in T.vectorized(d):
                    q32[i * group + g, j] = T.Cast(
                        "float32", q[q_row + first + i, head * group + g, j]
                    ) * (sm_scale * T.float32(_LOG2_E))
            for r in range(count * group, rows):
                for j in T.vectorized(d):
                    q32[r, j] = T.float32(0)
            for r in range(rows):
                largest[r] = T.float32(_NOTHING)
                total[r] = T.float32(0)
                for j in T.vectorized(d):
                    mixed[r, j] = T.float32(0)
            for tile in range(T.truncdiv(seen + (TILE - 1), TILE)):
                width: T.let[T.int32] = T.min(seen - tile * TILE, TILE)
                load_tile(tile * TILE, width, key, value, keys, values)
                for r in range(rows):
                    for t in T.vectorized(TILE):
                        scores[r, t] = T.float32(0)
                score(count * group, q32, keys, scores)
                for r in range(count * group):
                    visible: T.let[T.int32] = T.Select(
                        causal != 0,
                        T.min(width, past + first + T.truncdiv(r, group) + 1 - tile * TILE),
                        width,
                    )
                    for t in T.vectorized(TILE):
                        scores[r, t] = T.Select(t < visible, scores[r, t], T.float32(_HIDDEN))
                    scale[0] = largest[r]
                    largest_of(scores, r, halves, largest)
                    scale[0] = exp2(scale[0] - largest[r])
                    for t in T.vectorized(TILE):
                        scores[r, t] = exp2(scores[r, t] - largest[r])
                    total[r] = total[r] * scale[0]
                    sum_of(scores, r, halves, total)
                    for j in T.vectorized(d):
                        mixed[r, j] = mixed[r, j] * scale[0]
                gather(count * group, scores, values, mixed)
            for i, g in T.grid(count, group):
                row: T.let[T.int32] = q_row + first + i
                for j in T.vectorized(d):
                    out[row, head * group + g, j] = T.Cast(
                        dtype,
                        mixed[i * group + g, j] / T.max(total[i * group + g], T.float32(1e-30)),
                    )
                lse[row, head * group + g] = largest[i * group + g] + T.log2(
                    T.max(total[i * group + g], T.float32(1e-30))
                )

    return attend
