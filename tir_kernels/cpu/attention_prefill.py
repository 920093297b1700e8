"""Attention of many queries, over new keys or over the pages of a KV cache, by blocks in cache.

The kernels follow FlashAttention (arXiv 2205.14135): keys are walked in tiles, the softmax is kept
as a running maximum and sum, and scores never leave the cache. Query heads that share a key head
(arXiv 2305.13245) are rows of one block, so that a tile of keys is loaded once for all of them; the
rows of a block are worked on in strips of two vectors, and a strip skips what it does not see.

Scores are in base 2: `sm_scale` is multiplied by log2(e) once, and what is returned as lse is log2
of the sum of exponentials, which `merge_state` expects. The rotary arguments are part of the
signatures that TVM's cache calls and unused: keys are rotated before they are cached.
"""

from __future__ import annotations

import math
from typing import Any

from tir_kernels._tvm import PrimFunc, T, Target
from tir_kernels.cpu.attention_decode import NOTHING
from tir_kernels.cpu.attention_products import TILE, Source, fp32_products
from tir_kernels.cpu.attention_tiles import has_tiles, tiled_products
from tir_kernels.cpu.fast_math import exp2
from tir_kernels.cpu.lanes import transpose
from tir_kernels.cpu.slots import PAGE, Slots
from tir_kernels.memo import memoized

ROWS = 256  # rows of a block: queries times the heads that share a key head
_HIDDEN = -1e30  # the score of a key that a query must not see
_LEAST = 1e-30  # a sum of weights that can be divided by
_CHAINS = 4  # maxima that are found side by side
_LOG2_E = math.log2(math.e)


@memoized
def attention_prefill_ragged(
    target: Target,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: str,
    *,
    stored: str | None = None,
) -> PrimFunc:
    """New queries against the new keys and values of the same sequences, causal if asked.

    q [n, q_heads, d]; k, v [n, kv_heads, d]; sequence b has rows q_indptr[b] to q_indptr[b + 1].
    stored: as of `Slots`, which k and v are.
    """
    d, group = head_dim, q_heads // kv_heads
    slots = Slots(d, dtype, stored)
    size, seen = slots.size, slots.heads(q_heads)
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
        seen_q = T.match_buffer(q_handle, (q_rows, seen, size), dtype)
        q_indptr = T.match_buffer(q_indptr_handle, (batch + 1,), "int32", elem_offset=q_indptr_at)
        k = T.match_buffer(k_handle, (kv_rows, kv_heads, size), dtype)
        v = T.match_buffer(v_handle, (kv_rows, kv_heads, size), dtype)
        kv_indptr = T.match_buffer(
            kv_indptr_handle, (batch + 1,), "int32", elem_offset=kv_indptr_at
        )
        T.match_buffer(q_position_handle, (q_rows,), "int32", elem_offset=q_position_at)
        T.match_buffer(k_offset_handle, (batch,), "int32", elem_offset=k_offset_at)
        seen_out = T.match_buffer(out_handle, (q_rows, seen, size), dtype)
        seen_lse = T.match_buffer(lse_handle, (q_rows, seen), "float32")
        q = T.decl_buffer((q_rows, q_heads, d), dtype, data=seen_q.data)
        out = T.decl_buffer((q_rows, q_heads, d), dtype, data=seen_out.data)
        lse = T.decl_buffer((q_rows, q_heads), "float32", data=seen_lse.data)
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
            key = T.meta_var(_in_rows(slots, k, kv_indptr[b], head))
            value = T.meta_var(_in_rows(slots, v, kv_indptr[b], head))
            attend(
                q_indptr[b], q_indptr[b + 1] - q_indptr[b], first, head, kv_length,
                causal, sm_scale, q, key, value, out, lse,
            )  # fmt: skip

    return attention


@memoized
def attention_prefill_paged(
    target: Target,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: str,
    *,
    stored: str | None = None,
) -> PrimFunc:
    """New queries against the pages that their sequences already have.

    pages [p, 2, kv_heads, PAGE, d]; sequence b owns page_values[page_indptr[b]..], of which the
    last holds last_page_length[b] tokens. stored: as of `Slots`, which pages consist of.
    """
    d, group = head_dim, q_heads // kv_heads
    slots = Slots(d, dtype, stored)
    size, seen = slots.size, slots.heads(q_heads)
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
        seen_q = T.match_buffer(q_handle, (q_rows, seen, size), dtype)
        q_indptr = T.match_buffer(q_indptr_handle, (batch + 1,), "int32", elem_offset=q_indptr_at)
        pages = T.match_buffer(
            pages_handle, (num_pages, 2, kv_heads, PAGE, size), dtype, elem_offset=pages_at
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
        seen_out = T.match_buffer(out_handle, (q_rows, seen, size), dtype)
        seen_lse = T.match_buffer(lse_handle, (q_rows, seen), "float32")
        cells = T.decl_buffer(
            (num_pages, 2, kv_heads, PAGE * size), dtype, data=pages.data, elem_offset=pages_at
        )
        q = T.decl_buffer((q_rows, q_heads, d), dtype, data=seen_q.data)
        out = T.decl_buffer((q_rows, q_heads, d), dtype, data=seen_out.data)
        lse = T.decl_buffer((q_rows, q_heads), "float32", data=seen_lse.data)
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
            # A cell, because TVM puts a variable's value wherever that is used and takes minutes
            # to simplify what comes of it.
            length = T.alloc_buffer((1,), "int32")
            length[0] = T.Select(count > 0, (count - 1) * PAGE + last_page_length[b], 0)
            kv_length: T.let[T.int32] = length[0]
            key = T.meta_var(_in_pages(slots, cells, page_values, begin, 0, head))
            value = T.meta_var(_in_pages(slots, cells, page_values, begin, 1, head))
            attend(
                q_indptr[b], q_indptr[b + 1] - q_indptr[b], first, head, kv_length,
                causal, sm_scale, q, key, value, out, lse,
            )  # fmt: skip

    return attention


def _in_rows(slots: Slots, x: Any, first: Any, head: Any) -> Any:
    """A tile's Source in rows of [n, heads, slots] that begin at `first`; begin: of the tile."""

    def tile(begin: Any) -> Source:
        return Source(
            place=lambda t: first + begin,
            read=lambda place, t, j, lanes: slots.read(
                lambda at: x[place + t, head, at], 0, slots.packed, j, lanes
            ),
        )

    return tile


def _in_pages(slots: Slots, cells: Any, page_values: Any, first: Any, which: int, head: Any) -> Any:
    """A tile's Source in the pages of a sequence; which: 0 for keys, 1 for values."""

    def tile(begin: Any) -> Source:
        return Source(
            place=lambda t: page_values[first + T.truncdiv(begin + t, PAGE)],
            read=lambda place, t, j, lanes: slots.read(
                lambda at: cells[place, which, head, at],
                T.truncmod(t, PAGE) * slots.packed,
                slots.scale_in_page(T.truncmod(t, PAGE)),
                j,
                lanes,
            ),
        )

    return tile


def _attend(target: Target, head_dim: int, group: int, queries: int, dtype: str) -> Any:
    """TIR for one block: up to `queries` queries of the heads that share key head `head`."""
    d = head_dim
    tiled = has_tiles(target, d, dtype)
    by = tiled_products(d) if tiled else fp32_products(target, d, dtype)
    lanes = by.lanes
    strip = 2 * lanes
    strips = -(-queries * group // strip)
    half = lanes // 2
    every = T.ramp(0, 1, lanes)
    turn = transpose(lanes)

    def part(c):
        return T.ramp(c * lanes, 1, lanes)

    def query_of(q, q_row, head, last, first_row):
        """Elements `at` of the i-th of `lanes` rows; those past the last row repeat it."""

        def query(i, at):
            row = T.min(first_row + i, last)
            return q[q_row + T.truncdiv(row, group), head * group + T.truncmod(row, group), at]

        return query

    @T.inline
    def hide(rows, begin, limits, s, scores):
        """Keys that a row does not see get no weight."""
        for t in range(rows):
            for j in T.vectorized(strip):
                scores[0, t, j] = T.Select(
                    begin + t < limits[s, j], scores[0, t, j], T.float32(_HIDDEN)
                )

    @T.inline
    def find_top(rows, c, scale, scores, tops):
        """Row 0 of tops: the largest of the first `rows` scores, times scale, and tops[0]."""
        largest = T.alloc_buffer((_CHAINS, lanes), "float32")
        for i in T.unroll(_CHAINS):
            largest[i, every] = scores[0, i, part(c)]
        for t in range(1, T.truncdiv(rows, _CHAINS)):
            for i in T.unroll(_CHAINS):
                largest[i, every] = T.max(largest[i, every], scores[0, t * _CHAINS + i, part(c)])
        for i in T.unroll(_CHAINS - 1):
            largest[0, every] = T.max(largest[0, every], largest[i + 1, every])
        tops[0, every] = T.max(tops[0, every], largest[0, every] * T.broadcast(scale, lanes))

    @T.inline
    def weigh(rows, c, s, scale, scores, weights, top, total, mixed):
        """Scores to weights, for half c of strip s; what is mixed so far gets the new maximum."""
        tops = T.alloc_buffer((2, lanes), "float32")
        sums = T.alloc_buffer((1, lanes), "float32")
        tops[0, every] = top[s, part(c)]
        tops[1, every] = tops[0, every]
        find_top(rows, c, scale, scores, tops)
        for j in T.vectorized(lanes):
            tops[1, j] = exp2(tops[1, j] - tops[0, j])
        top[s, part(c)] = tops[0, every]
        sums[0, every] = total[s, part(c)] * tops[1, every]
        for i in range(T.truncdiv(rows, 2)):
            pair = T.alloc_buffer((2, lanes), "float32")
            for k in T.unroll(2):
                for j in T.vectorized(lanes):
                    pair[k, j] = exp2(scores[0, 2 * i + k, c * lanes + j] * scale - tops[0, j])
            sums[0, every] = sums[0, every] + (pair[0, every] + pair[1, every])
            by.pack_weights(2 * i, c, pair, weights)
        total[s, part(c)] = sums[0, every]
        for j in range(d):
            mixed[s, j, part(c)] = mixed[s, j, part(c)] * tops[1, every]

    @T.inline
    def write_part(at, k, q_row, head, last, x, i, out):
        if at <= last:
            row: T.let[T.int32] = q_row + T.truncdiv(at, group)
            out[row, head * group + T.truncmod(at, group), T.ramp(k * lanes, 1, lanes)] = T.Cast(
                f"{dtype}x{lanes}", x[i, every]
            )

    @T.inline
    def write_rows(s, c, q_row, head, last, top, total, mixed, out, lse):
        first = T.meta_var(s * strip + c * lanes)
        for k in range(d // lanes):
            upper = T.alloc_buffer((half, lanes), "float32")
            lower = T.alloc_buffer((half, lanes), "float32")
            for i in T.unroll(half):
                share = T.meta_var(T.max(total[s, part(c)], T.broadcast(T.float32(_LEAST), lanes)))
                upper[i, every] = mixed[s, k * lanes + i, part(c)] / share
                lower[i, every] = mixed[s, k * lanes + half + i, part(c)] / share
            turn(upper, lower)
            for i in T.unroll(half):
                write_part(first + i, k, q_row, head, last, upper, i, out)
                write_part(first + half + i, k, q_row, head, last, lower, i, out)
        for i in range(lanes):
            if first + i <= last:
                row: T.let[T.int32] = q_row + T.truncdiv(first + i, group)
                lse[row, head * group + T.truncmod(first + i, group)] = top[
                    s, c * lanes + i
                ] + T.log2(T.max(total[s, c * lanes + i], T.float32(_LEAST)))

    @T.inline
    def attend(q_row, q_length, first, head, kv_length, causal, sm_scale, q, key, value, out, lse):
        count: T.let[T.int32] = T.min(q_length - first, queries)
        if count > 0:
            packed = T.alloc_buffer(*by.queries(strips))
            keys = T.alloc_buffer(*by.keys)
            values = T.alloc_buffer(*by.values)
            weights = T.alloc_buffer(*by.weights)
            scores = T.alloc_buffer((1, TILE, strip), "float32")
            mixed = T.alloc_buffer((strips, d, strip), "float32")
            top = T.alloc_buffer((strips, strip), "float32")
            total = T.alloc_buffer((strips, strip), "float32")
            limits = T.alloc_buffer((strips, strip), "int32")
            scale: T.let[T.float32] = sm_scale * T.float32(_LOG2_E)
            last: T.let[T.int32] = count * group - 1
            used: T.let[T.int32] = T.truncdiv(last, strip) + 1
            # A query sees the keys before it: those of the past and its own chunk's.
            past: T.let[T.int32] = kv_length - q_length
            seen: T.let[T.int32] = T.Select(
                causal != 0, T.min(kv_length, past + first + count), kv_length
            )
            by.begin()
            for s in range(used):
                for c in T.unroll(2):
                    by.pack_queries(
                        s, c,
                        query_of(q, q_row + first, head, last, s * strip + c * lanes),
                        packed,
                    )  # fmt: skip
                for j in range(strip):
                    top[s, j] = T.float32(NOTHING)
                    total[s, j] = T.float32(0)
                    limits[s, j] = T.Select(
                        causal != 0,
                        past + first + T.truncdiv(T.min(s * strip + j, last), group) + 1,
                        kv_length,
                    )
                for j in range(d):
                    for c in T.unroll(2):
                        mixed[s, j, part(c)] = T.broadcast(T.float32(0), lanes)
            for tile in range(T.truncdiv(seen + (TILE - 1), TILE)):
                begin: T.let[T.int32] = tile * TILE
                width: T.let[T.int32] = T.min(seen - begin, TILE)
                for i in range(T.truncdiv(width + (by.step - 1), by.step)):
                    by.pack_keys(i * by.step, width, key(begin), keys)
                    by.pack_values(i * by.step, width, value(begin), values)
                for s in range(used):
                    visible: T.let[T.int32] = T.min(limits[s, strip - 1] - begin, width)
                    if visible > 0:
                        rows: T.let[T.int32] = (
                            T.truncdiv(visible + (by.step - 1), by.step) * by.step
                        )
                        by.score(s, rows, keys, packed, scores)
                        if begin + rows > limits[s, 0]:
                            hide(rows, begin, limits, s, scores)
                        for c in T.unroll(2):
                            weigh(rows, c, s, scale, scores, weights, top, total, mixed)
                        by.gather(s, rows, values, weights, mixed)
            by.end()
            for s in range(used):
                for c in T.unroll(2):
                    write_rows(s, c, q_row + first, head, last, top, total, mixed, out, lse)

    return attend
