"""Attention of many queries, over rows or over a paged KV cache, by plain fp32 arithmetic.

A block has a tile of rows (`attention_entries`) and walks the keys in tiles through shared memory,
with a running softmax (FlashAttention, arXiv 2205.14135): scores, softmax and weighted values each
share the tile out among the threads in a way of their own, with a barrier between. Tile sizes are
the largest that fit shared memory.
"""

from dataclasses import dataclass

from tir_kernels._tvm import PrimFunc, T, Target
from tir_kernels.gpu.attention_entries import paged_prefill, ragged_prefill
from tir_kernels.gpu.attention_parts import HIDDEN, LOG2_E, NOTHING, TINY
from tir_kernels.gpu.blocks import SHARED_BYTES, at, bytes_of, vector_width
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
    tile = _tile(head_dim, dtype)
    attend = _attend(target, head_dim, q_heads // kv_heads, dtype, tile)
    return ragged_prefill(target, q_heads, kv_heads, head_dim, dtype, tile.rows, THREADS, attend)


@memoized
def attention_prefill_paged(
    target: Target, q_heads: int, kv_heads: int, head_dim: int, dtype: str
) -> PrimFunc:
    """New queries against the pages that their sequences already have.

    pages [p, 2, kv_heads, PAGE, d]; sequence b owns page_values[page_indptr[b]..], of which the
    last holds last_page_length[b] tokens. Raises ValueError as `attention_prefill_ragged`.
    """
    tile = _tile(head_dim, dtype)
    attend = _attend(target, head_dim, q_heads // kv_heads, dtype, tile)
    return paged_prefill(target, q_heads, kv_heads, head_dim, dtype, tile.rows, THREADS, attend)


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
    def load(t, first, last, vector, shared):
        """A tile of keys or values; keys past the last repeat it, and get no weight."""
        for i in range(loads):
            e: T.let[T.int32] = i * THREADS + t
            if e < tile.keys * (d // vec):
                row = T.meta_var(T.truncdiv(e, d // vec))
                v = T.meta_var(T.truncmod(e, d // vec))
                shared[at(row * pitch + v * vec, vec)] = vector(
                    T.max(T.min(first + row, last), 0), v
                )

    @T.inline
    def score(t, sm_scale, q_shared, k_shared, scores):
        q_part = T.alloc_buffer((score_rows * part,), dtype, scope="local")
        k_part = T.alloc_buffer((score_keys * part,), dtype, scope="local")
        products = T.alloc_buffer((score_rows, score_keys), "float32", scope="local")
        row = T.meta_var(T.truncdiv(t, keys_apart))
        key = T.meta_var(T.truncmod(t, keys_apart))
        for r, c in T.grid(score_rows, score_keys):
            products[r, c] = T.float32(0)
        for s in range(d // part):
            for r in T.unroll(score_rows):
                q_part[at(r * part, part)] = q_shared[
                    at(T.min(row + r * rows_apart, tile.rows - 1) * pitch + s * part, part)
                ]
            for c in T.unroll(score_keys):
                k_part[at(c * part, part)] = k_shared[
                    at((key + c * keys_apart) * pitch + s * part, part)
                ]
            for j in T.unroll(part):
                for r in T.unroll(score_rows):
                    for c in T.unroll(score_keys):
                        products[r, c] = products[r, c] + T.Cast(
                            "float32", q_part[r * part + j]
                        ) * T.Cast("float32", k_part[c * part + j])
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
            v_part[at(0, part)] = v_shared[at(key * pitch + lane * part, part)]
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
                v = T.meta_var(T.truncmod(e, d // vec))
                q_shared[at(T.truncdiv(e, d // vec) * pitch + v * vec, vec)] = q[
                    q_row + T.truncdiv(row, group), head * group + T.truncmod(row, group), v
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
                    total[0] = T.float32(1) / total[0]
                    query = T.meta_var(q_row + T.truncdiv(first_row + row, group))
                    at_head = T.meta_var(head * group + T.truncmod(first_row + row, group))
                    for j in T.unroll(part):
                        out[query, at_head, T.truncmod(t, lanes) * part + j] = T.Cast(
                            dtype, mixed[r, j] * total[0]
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
