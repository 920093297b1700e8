"""Attention of many queries, over rows or over a paged KV cache, by plain fp32 arithmetic.

A block has a tile of rows: queries times the heads that share a key head (arXiv 2305.13245), query
by query. It walks the keys in tiles through shared memory with a running softmax (FlashAttention,
arXiv 2205.14135): scores, softmax and weighted values each share the tile out among the threads in
a way of their own, with a barrier between. Tile sizes are the largest that fit shared memory.

Scores are in base 2: `sm_scale` is multiplied by log2(e) once, and what is returned as lse is
log2 of the sum of exponentials, which `merge_state` expects. The rotary arguments are part of the
signatures, which are TVM's, and unused: keys are rotated before they are cached.
"""

from dataclasses import dataclass

from tir_kernels._tvm import PrimFunc, T, Target
from tir_kernels.gpu.attention_parts import (
    HIDDEN,
    LOG2_E,
    NOTHING,
    TINY,
    in_pages,
    in_rows,
)
from tir_kernels.gpu.blocks import SHARED_BYTES, bytes_of, vector_width
from tir_kernels.gpu.pages import PAGE
from tir_kernels.memo import memoized

THREADS = 128
_TILES = ((64, 32), (32, 32), (32, 16), (16, 16), (16, 8), (8, 8), (8, 4))  # rows, keys
_PAD = 8  # elements between rows of a tile: neighbours fall into different banks


@memoized
def attention_prefill_ragged(
    target: Target, q_heads: int, kv_heads: int, head_dim: int, dtype: str
) -> PrimFunc:
    """New queries against the new keys and values of the same sequences, causal if asked.

    q [n, q_heads, d]; k, v [n, kv_heads, d]; sequence b has rows q_indptr[b] to q_indptr[b + 1].
    Raises ValueError for a head that no tile fits shared memory with.
    """
    d, group = head_dim, q_heads // kv_heads
    tile = _tile(d, dtype)
    attend = _attend(target, d, group, dtype, tile)
    find = _find_tile(group, tile.rows)

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
        tiles = T.meta_var(T.truncdiv(q_rows * group, tile.rows) + batch)
        for block in T.thread_binding(tiles, thread="blockIdx.x"):
            for head in T.thread_binding(kv_heads, thread="blockIdx.y"):
                for t in T.thread_binding(THREADS, thread="threadIdx.x"):
                    place = T.alloc_buffer((2,), "int32", scope="local")
                    find(block, batch, q_indptr, place)
                    b: T.let[T.int32] = place[0]
                    begin: T.let[T.int32] = kv_indptr[b]
                    key = T.meta_var(in_rows(k, begin, head))
                    value = T.meta_var(in_rows(v, begin, head))
                    attend(
                        t, q_indptr[b], q_indptr[b + 1] - q_indptr[b], place[1], head,
                        kv_indptr[b + 1] - begin, causal, sm_scale, q, key, value, out, lse,
                    )  # fmt: skip

    return attention


@memoized
def attention_prefill_paged(
    target: Target, q_heads: int, kv_heads: int, head_dim: int, dtype: str
) -> PrimFunc:
    """New queries against the pages that their sequences already have.

    pages [p, 2, kv_heads, PAGE, d]; sequence b owns page_values[page_indptr[b]..], of which the
    last holds last_page_length[b] tokens. Raises ValueError as `attention_prefill_ragged`.
    """
    d, group = head_dim, q_heads // kv_heads
    tile = _tile(d, dtype)
    attend = _attend(target, d, group, dtype, tile)
    find = _find_tile(group, tile.rows)

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
        tiles = T.meta_var(T.truncdiv(q_rows * group, tile.rows) + batch)
        for block in T.thread_binding(tiles, thread="blockIdx.x"):
            for head in T.thread_binding(kv_heads, thread="blockIdx.y"):
                for t in T.thread_binding(THREADS, thread="threadIdx.x"):
                    place = T.alloc_buffer((2,), "int32", scope="local")
                    find(block, batch, q_indptr, place)
                    b: T.let[T.int32] = place[0]
                    begin: T.let[T.int32] = page_indptr[b]
                    count: T.let[T.int32] = page_indptr[b + 1] - begin
                    length: T.let[T.int32] = T.Select(
                        count > 0, (count - 1) * PAGE + last_page_length[b], 0
                    )
                    key = T.meta_var(in_pages(target, pages, page_values, begin, 0, head))
                    value = T.meta_var(in_pages(target, pages, page_values, begin, 1, head))
                    attend(
                        t, q_indptr[b], q_indptr[b + 1] - q_indptr[b], place[1], head,
                        length, causal, sm_scale, q, key, value, out, lse,
                    )  # fmt: skip

    return attention


@dataclass(frozen=True)
class _Tile:
    rows: int
    keys: int


def _tile(d: int, dtype: str) -> _Tile:
    for rows, keys in _TILES:
        loaded = (rows + keys) * (d + _PAD) * bytes_of(dtype)
        scored = rows * (keys + 1 + THREADS // rows) * 4
        if loaded + scored <= SHARED_BYTES:
            return _Tile(rows, keys)
    raise ValueError(f"head_dim {d} in {dtype} does not fit into {SHARED_BYTES} bytes")


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


def _attend(target: Target, d: int, group: int, dtype: str, tile: _Tile):
    """TIR for one block: rows `first_row`... of a sequence, for the heads of one key head."""
    vec = vector_width(target, d, dtype)
    # In shared memory rows are read in shorter vectors than they are written in. Where all accesses
    # are alike, TVM makes the buffer one of vectors, and CUDA has no shared arrays of its half4.
    part = max(1, min(vec // 2, 4)) if bytes_of(dtype) == 2 else vec
    pitch = d + _PAD
    loads = -(-tile.keys * (d // vec) // THREADS)
    # Scores: a thread has every `rows_apart`-th row and every `keys_apart`-th key.
    keys_apart = min(tile.keys, 16)
    rows_apart = THREADS // keys_apart
    score_rows, score_keys = -(-tile.rows // rows_apart), tile.keys // keys_apart
    # Softmax: so many threads share a row, and each has so many keys of it.
    sharers = THREADS // tile.rows
    own = -(-tile.keys // sharers)
    # Values: a thread has `part` elements of every `slots`-th row.
    lanes = d // part
    slots = THREADS // lanes
    out_rows = -(-tile.rows // slots)

    @T.inline
    def load(t, first, last, element, shared):
        """A tile of keys or values; keys past the last repeat it, and get no weight."""
        for i in range(loads):
            e: T.let[T.int32] = i * THREADS + t
            if e < tile.keys * (d // vec):
                for j in T.vectorized(vec):
                    shared[T.truncdiv(e, d // vec) * pitch + T.truncmod(e, d // vec) * vec + j] = (
                        element(
                            T.max(T.min(first + T.truncdiv(e, d // vec), last), 0),
                            T.truncmod(e, d // vec) * vec + j,
                        )
                    )

    @T.inline
    def score(t, sm_scale, q_shared, k_shared, scores):
        q_part = T.alloc_buffer((score_rows, part), dtype, scope="local")
        k_part = T.alloc_buffer((score_keys, part), dtype, scope="local")
        products = T.alloc_buffer((score_rows, score_keys), "float32", scope="local")
        row = T.meta_var(T.truncdiv(t, keys_apart))
        key = T.meta_var(T.truncmod(t, keys_apart))
        for r, c in T.grid(score_rows, score_keys):
            products[r, c] = T.float32(0)
        for s in range(d // part):
            for r in T.unroll(score_rows):
                for j in T.vectorized(part):
                    q_part[r, j] = q_shared[
                        T.min(row + r * rows_apart, tile.rows - 1) * pitch + s * part + j
                    ]
            for c in T.unroll(score_keys):
                for j in T.vectorized(part):
                    k_part[c, j] = k_shared[(key + c * keys_apart) * pitch + s * part + j]
            for j in T.unroll(part):
                for r in T.unroll(score_rows):
                    for c in T.unroll(score_keys):
                        products[r, c] = products[r, c] + T.Cast("float32", q_part[r, j]) * T.Cast(
                            "float32", k_part[c, j]
                        )
        for r in T.unroll(score_rows):
            if row + r * rows_apart < tile.rows:
                for c in T.unroll(score_keys):
                    scores[(row + r * rows_apart) * tile.keys + key + c * keys_apart] = products[
                        r, c
                    ] * (sm_scale * T.float32(LOG2_E))

    @T.inline
    def soften(t, visible, scores, factors, largest, total):
        """Scores become weights; visible: how many keys of the tile this thread's row sees."""
        row = T.meta_var(T.truncdiv(t, sharers))
        sharer = T.meta_var(T.truncmod(t, sharers))
        mine = T.alloc_buffer((own,), "float32", scope="local")
        largest[1] = largest[0]
        for key in range(tile.keys):
            if key < visible:
                largest[1] = T.max(largest[1], scores[row * tile.keys + key])
        for i in T.unroll(own):
            mine[i] = T.float32(HIDDEN)
            if i * sharers + sharer < T.min(visible, tile.keys):
                mine[i] = scores[row * tile.keys + i * sharers + sharer]
        # All of a row's sharers have read before one of them writes.
        T.tvm_storage_sync("shared")
        if sharer == 0:
            factors[row] = T.exp2(largest[0] - largest[1])
        total[0] = total[0] * T.exp2(largest[0] - largest[1])
        largest[0] = largest[1]
        for i in T.unroll(own):
            if i * sharers + sharer < tile.keys:
                mine[i] = T.exp2(mine[i] - largest[1])
                total[0] = total[0] + mine[i]
                scores[row * tile.keys + i * sharers + sharer] = mine[i]

    @T.inline
    def gather(t, scores, factors, v_shared, mixed):
        v_part = T.alloc_buffer((part,), dtype, scope="local")
        slot = T.meta_var(T.truncdiv(t, lanes))
        lane = T.meta_var(T.truncmod(t, lanes))
        for r in T.unroll(out_rows):
            for j in T.unroll(part):
                mixed[r, j] = mixed[r, j] * factors[T.min(slot + r * slots, tile.rows - 1)]
        for key in range(tile.keys):
            for j in T.vectorized(part):
                v_part[j] = v_shared[key * pitch + lane * part + j]
            for r in T.unroll(out_rows):
                for j in T.unroll(part):
                    mixed[r, j] = mixed[r, j] + scores[
                        T.min(slot + r * slots, tile.rows - 1) * tile.keys + key
                    ] * T.Cast("float32", v_part[j])

    @T.inline
    def attend(
        t, q_row, q_length, first_row, head, kv_length, causal, sm_scale, q, key, value, out, lse
    ):
        q_shared = T.alloc_buffer((tile.rows * pitch,), dtype, scope="shared")
        kv_shared = T.alloc_buffer((tile.keys * pitch,), dtype, scope="shared")
        scores = T.alloc_buffer((tile.rows * tile.keys,), "float32", scope="shared")
        factors = T.alloc_buffer((tile.rows,), "float32", scope="shared")
        totals = T.alloc_buffer((THREADS,), "float32", scope="shared")
        largest = T.alloc_buffer((2,), "float32", scope="local")
        total = T.alloc_buffer((1,), "float32", scope="local")
        mixed = T.alloc_buffer((out_rows, part), "float32", scope="local")
        last_row = T.meta_var(q_length * group - 1)
        for i in range(-(-tile.rows * (d // vec) // THREADS)):
            e: T.let[T.int32] = i * THREADS + t
            if e < tile.rows * (d // vec):
                # Rows past the last repeat it, and are not stored.
                row: T.let[T.int32] = T.max(T.min(first_row + T.truncdiv(e, d // vec), last_row), 0)
                for j in T.vectorized(vec):
                    q_shared[
                        T.truncdiv(e, d // vec) * pitch + T.truncmod(e, d // vec) * vec + j
                    ] = q[
                        q_row + T.truncdiv(row, group),
                        head * group + T.truncmod(row, group),
                        T.truncmod(e, d // vec) * vec + j,
                    ]
        for r in T.unroll(out_rows):
            for j in T.unroll(part):
                mixed[r, j] = T.float32(0)
        largest[0] = T.float32(NOTHING)
        total[0] = T.float32(0)
        # A query sees the keys before it: those of the past and its own chunk's.
        past = T.meta_var(kv_length - q_length)
        row_of_thread = T.meta_var(T.min(first_row + T.truncdiv(t, sharers), last_row))
        last_query = T.meta_var(T.truncdiv(T.min(first_row + tile.rows - 1, last_row), group))
        seen: T.let[T.int32] = T.Select(
            first_row > last_row,
            0,
            T.Select(causal != 0, T.min(kv_length, past + last_query + 1), kv_length),
        )
        for step in range(T.truncdiv(seen + (tile.keys - 1), tile.keys)):
            first: T.let[T.int32] = step * tile.keys
            T.tvm_storage_sync("shared")
            load(t, first, kv_length - 1, key, kv_shared)
            T.tvm_storage_sync("shared")
            score(t, sm_scale, q_shared, kv_shared, scores)
            T.tvm_storage_sync("shared")
            load(t, first, kv_length - 1, value, kv_shared)
            soften(
                t,
                T.Select(
                    causal != 0,
                    T.min(kv_length, past + T.truncdiv(row_of_thread, group) + 1),
                    kv_length,
                )
                - first,
                scores,
                factors,
                largest,
                total,
            )
            T.tvm_storage_sync("shared")
            if t < slots * lanes:
                gather(t, scores, factors, kv_shared, mixed)
        totals[t] = total[0]
        T.tvm_storage_sync("shared")
        if t < slots * lanes:
            for r in T.unroll(out_rows):
                row: T.let[T.int32] = T.truncdiv(t, lanes) + r * slots
                if row < tile.rows and first_row + row <= last_row:
                    total[0] = T.float32(TINY)
                    for s in range(sharers):
                        total[0] = total[0] + totals[row * sharers + s]
                    query = T.meta_var(q_row + T.truncdiv(first_row + row, group))
                    at_head = T.meta_var(head * group + T.truncmod(first_row + row, group))
                    for j in T.unroll(part):
                        out[query, at_head, T.truncmod(t, lanes) * part + j] = T.Cast(
                            dtype, mixed[r, j] / total[0]
                        )
        if T.truncmod(t, sharers) == 0:
            row: T.let[T.int32] = first_row + T.truncdiv(t, sharers)
            if row <= last_row:
                total[0] = T.float32(TINY)
                for s in range(sharers):
                    total[0] = total[0] + totals[t + s]
                lse[q_row + T.truncdiv(row, group), head * group + T.truncmod(row, group)] = (
                    largest[0] + T.log2(total[0])
                )

    return attend
