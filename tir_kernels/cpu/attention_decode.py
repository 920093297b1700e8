"""Attention of one query for each sequence over the pages of a KV cache: bound by reading them.

A sequence's keys are cut into spans (Flash-Decoding, https://pytorch.org/blog/flash-decoding), and
a span under one key head is one unit of work for all query heads that share that head. Each thread
gets units that follow each other in memory, with as many pages as anybody's up to a unit, and what
the spans found is merged at the end.

Pages are read in the order in which they lie, all heads of a few pages' keys and then of their
values, with a softmax that is corrected when a larger score turns up (arXiv 1805.02867). A pass
over all keys of a span and one over all its values would touch the same memory twice, half of it at
a time, which processors do not foresee; with two key heads it took an eighth more time than this.
Numbers are converted to fp32 in registers.
"""

from __future__ import annotations

import math
from typing import Any

from tir_kernels._tvm import PrimFunc, T, Target
from tir_kernels.cpu.fast_math import exp2
from tir_kernels.cpu.lanes import PART, fold, lanes_for, sum_parts, sum_whole
from tir_kernels.cpu.prefetching import asked_for
from tir_kernels.cpu.slots import PAGE, Slots
from tir_kernels.cpu.tiling import Tiling, tiling_of
from tir_kernels.memo import memoized

SPAN = 16 * PAGE  # keys of one unit of work
_STRIP = 2  # pages whose keys are read, and then their values
_AHEAD = 2  # heads of a page that are on their way from memory: 4 KB where they have 64 elements
_CACHE = 2  # the level they are brought to: the first has room for few requests
NOTHING = -5e4  # the maximum of no scores, as in TVM's own kernels
_HIDDEN = -1e30  # the score of a place in the last page that holds no key
_TOGETHER = 8  # heads for which converted keys are kept
# Where in a query head's row of scratch memory its things are: the scores of a strip, the sums over
# parts of a page's products, the largest score and the sum of weights so far, the query, and behind
# it the weighted values.
_SUMS = _STRIP * PAGE
_TOP = _SUMS + PAGE // PART * 16
_TOTAL = _TOP + 16
_QUERY = _TOTAL + 16
_LEAST = 1e-30  # a sum of weights that can be divided by
_LINE = 64  # bytes of a cache line
_LOG2_E = math.log2(math.e)


@memoized
def attention_decode_paged(
    target: Target,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: str,
    *,
    stored: str | None = None,
) -> PrimFunc:
    """One query for each sequence, q [batch, q_heads, d], against its pages.

    The signature is the one that TVM's paged KV cache calls. lse is log2 of the sum of the scores'
    exponentials; of a sequence without keys, out is 0 and lse about NOTHING. The rotary arguments
    are unused: keys are rotated before they are cached. stored: as of `Slots`, which pages consist
    of.
    """
    d, group = head_dim, q_heads // kv_heads
    slots = Slots(d, dtype, stored)
    size, seen = slots.size, slots.heads(q_heads)
    attend = decode_unit(target, group, slots)
    merge = _merge_spans(target, group, d, dtype)
    span_pages = SPAN // PAGE

    @T.inline
    def unit_at(piece, batch, page_indptr, spans, b, out, i):
        """out[i]: the unit that holds piece number `piece`, a piece being a head of a page; behind
        the last piece, the number of units. A sequence's last span may have fewer pages.
        """
        b[0] = 0
        for other in range(batch):
            b[0] = b[0] + T.Select(page_indptr[other + 1] * kv_heads <= piece, 1, 0)
        out[i] = spans[batch] * kv_heads
        if b[0] < batch:
            rest: T.let[T.int32] = piece - page_indptr[b[0]] * kv_heads
            before: T.let[T.int32] = T.truncdiv(rest, span_pages * kv_heads)
            left: T.let[T.int32] = page_indptr[b[0] + 1] - page_indptr[b[0]] - before * span_pages
            within: T.let[T.int32] = rest - before * (span_pages * kv_heads)
            out[i] = (spans[b[0]] + before) * kv_heads + T.truncdiv(within, T.min(left, span_pages))

    @T.prim_func(private=True, s_tir=True)
    def attention(
        q_handle: T.handle,
        pages_handle: T.handle,
        page_indptr_handle: T.handle,
        page_values_handle: T.handle,
        last_page_length_handle: T.handle,
        k_offset_handle: T.handle,
        q_position_handle: T.handle,
        out_handle: T.handle,
        lse_handle: T.handle,
        rotary_mode: T.int32,
        rope_scale: T.float32,
        rope_theta: T.float32,
        sm_scale: T.float32,
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        batch = T.int32()
        num_pages = T.int32()
        used_pages = T.int32()
        page_indptr_at = T.int32()
        page_values_at = T.int32()
        last_page_length_at = T.int32()
        k_offset_at = T.int32()
        q_position_at = T.int32()
        pages_at = T.int64()
        seen_q = T.match_buffer(q_handle, (batch, seen, size), dtype)
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
        T.match_buffer(q_position_handle, (batch,), "int32", elem_offset=q_position_at)
        seen_out = T.match_buffer(out_handle, (batch, seen, size), dtype)
        seen_lse = T.match_buffer(lse_handle, (batch, seen), "float32")
        cells = T.decl_buffer(
            (num_pages, 2, kv_heads, PAGE * size), dtype, data=pages.data, elem_offset=pages_at
        )
        q = T.decl_buffer((batch, q_heads, d), dtype, data=seen_q.data)
        out = T.decl_buffer((batch, q_heads, d), dtype, data=seen_out.data)
        lse = T.decl_buffer((batch, q_heads), "float32", data=seen_lse.data)
        # Spans are numbered through all sequences; sequence b has those from spans[b] on.
        spans = T.alloc_buffer((batch + 1,), "int32")
        spans[0] = 0
        for b in range(batch):
            spans[b + 1] = spans[b] + T.truncdiv(
                page_indptr[b + 1] - page_indptr[b] + (span_pages - 1), span_pages
            )
        pieces: T.let[T.int32] = page_indptr[batch] * kv_heads
        most = T.meta_var(T.truncdiv(used_pages, span_pages) + batch)
        mixed = T.alloc_buffer((most, kv_heads, group, d), "float32")
        top = T.alloc_buffer((most, kv_heads, group), "float32")
        total = T.alloc_buffer((most, kv_heads, group), "float32")
        rows: T.let[T.int32] = batch * q_heads
        shares: T.let[T.int32] = T.call_packed("runtime.NumThreads")
        with T.attr(T.int32(0), "pragma_parallel_launch_point", 1):
            with T.attr(T.int32(0), "pragma_parallel_barrier_when_finish", 1):
                for share in T.parallel(shares):
                    # In one buffer, because TVM would put sums that belong into registers in the
                    # place of one that is no longer used.
                    work = T.alloc_buffer((q_heads, _QUERY + 2 * d), "float32")
                    b = T.alloc_buffer((1,), "int32")
                    ends = T.alloc_buffer((2,), "int32")
                    for i in T.unroll(2):
                        first_piece = T.meta_var((share + i) * pieces // shares)
                        unit_at(first_piece, batch, page_indptr, spans, b, ends, i)
                    begin: T.let[T.int32] = ends[0]
                    end: T.let[T.int32] = ends[1]
                    for span in range(
                        T.truncdiv(begin, kv_heads), T.truncdiv(end + (kv_heads - 1), kv_heads)
                    ):
                        b[0] = 0
                        for other in range(batch):
                            b[0] = b[0] + T.Select(spans[other + 1] <= span, 1, 0)
                        nth = T.meta_var(span - spans[b[0]])
                        first: T.let[T.int32] = page_indptr[b[0]] + nth * span_pages
                        left: T.let[T.int32] = page_indptr[b[0] + 1] - first
                        keys: T.let[T.int32] = T.min(
                            (left - 1) * PAGE + last_page_length[b[0]], SPAN
                        )
                        h0: T.let[T.int32] = T.max(begin - span * kv_heads, 0)
                        h1: T.let[T.int32] = T.min(end - span * kv_heads, kv_heads)
                        for h in range(h0 * group, h1 * group):
                            for j in T.vectorized(d):
                                work[h, _QUERY + j] = T.Cast("float32", q[b[0], h, j]) * (
                                    sm_scale * T.float32(_LOG2_E)
                                )
                        page = T.meta_var(_from(page_values, first))
                        attend(keys, left, page, span, h0, h1, work, cells, mixed, top, total)
            for share in T.parallel(shares):
                for row in range(share * rows // shares, (share + 1) * rows // shares):
                    b1: T.let[T.int32] = T.truncdiv(row, q_heads)
                    merge(b1, T.truncmod(row, q_heads), spans, mixed, top, total, out, lse)

    return attention


def _from(values: Any, first: Any) -> Any:
    return lambda i: values[first + i]


def _in(cells: Any, page: Any, which: Any, head: Any) -> Any:
    """The elements of a page of one head."""
    return lambda at: cells[page, which, head, at]


def decode_unit(target: Target, group: int, slots: Slots) -> Any:
    """TIR (count, left, page, span, h0, h1, work, cells, mixed, top, total) for a span under the
    key heads from h0 to h1.

    The span has `count` keys; page(i): the number of its i-th page, of which there are `left` until
    the sequence ends; cells: the pages [p, 2, kv_heads, PAGE * slot]; work [q_heads, _QUERY + 2 d]:
    the queries, multiplied by log2(e) and the softmax's scale, in scratch space. For each query
    head g of a key head, mixed[span, head, g, :] becomes the values weighted by 2^(score -
    top[span, head, g]), and total[span, head, g] the sum of these weights. Scales of slots are
    applied to scores and to weights, not to every number.
    """
    d = slots.head_dim
    lanes = lanes_for(target, d)
    every = T.ramp(0, 1, lanes)
    chunks = d // lanes
    part = min(PART, lanes)
    parts = lanes // part
    sum_first, sum_rest = sum_parts(lanes), sum_whole(lanes)
    largest, added = fold(lanes, T.max), fold(lanes, lambda a, b: a + b)
    together = max(n for n in range(1, _TOGETHER + 1) if group % n == 0)
    heads, columns = _accumulators(tiling_of(target), group, chunks)
    line = _LINE * 8 // int(slots.dtype[-2:])
    packed, rounded = slots.packed, slots.stored is not None
    slot_lines = -(-packed // line)
    turns = (group // heads) * (chunks // columns)
    # Cache lines that are asked for while `together` heads meet `part` keys, and while a turn's
    # meet a value.
    key_lines = -(-(part * packed) // (line * (group // together)))
    value_lines = -(-slot_lines // turns)

    def chunk(c):
        return T.ramp(c * lanes, 1, lanes)

    def ahead_of(n, width):
        """Of the piece _AHEAD pieces further on, a piece being one of `width` heads of a page: the
        pages until there, one at most, and its number in its page.
        """
        beyond = n + _AHEAD - width
        there = T.min(T.max(beyond, 0), width - 1)
        return T.Select(beyond < 0, 0, 1), T.Select(beyond < 0, n + _AHEAD, there)

    @T.inline
    def prefetch(piece, first, n):
        T.evaluate(asked_for(piece(first + n * line), _CACHE))

    @T.inline
    def prefetch_scales(piece):
        if rounded:
            T.evaluate(asked_for(piece(slots.scale_in_page(0)), _CACHE))

    def query(work, row, c):
        return work[row, T.ramp(_QUERY + c * lanes, 1, lanes)]

    def mixture(c):
        return T.ramp(_QUERY + d + c * lanes, 1, lanes)

    def read(cells, page, which, head, slot, c):
        return slots.unscaled(_in(cells, page, which, head), slot * packed, c * lanes, lanes)

    @T.inline
    def apply_scales(x, g, first, cells, page, which, head, v):
        """x[g, first ..] times the scales of the v-th `lanes` slots of a page."""
        if rounded:
            cell = T.meta_var(_in(cells, page, which, head))
            x[g, T.ramp(first, 1, lanes)] = x[g, T.ramp(first, 1, lanes)] * slots.scales(
                cell, slots.scale_in_page(v * lanes), lanes
            )

    @T.inline
    def multiply_keys(page, following, head, work, cells):
        """Sums over 128-bit parts of the products with `part` keys at a time. Keys are converted
        once for all `together` heads: LLVM keeps what is written here again and again.

        What follows is asked for line by line between products, because many requests at once
        would keep these waiting.
        """
        for t0 in range(PAGE // part):
            for h in range(group // together):
                for g in T.unroll(together):
                    sums = T.alloc_buffer((part, lanes), "float32")
                    row = T.meta_var(head * group + h * together + g)
                    for i in T.unroll(part):
                        for n in T.unroll(key_lines):
                            if n * (together * part) // key_lines == g * part + i:
                                prefetch(following, t0 * part * packed, h * key_lines + n)
                        slot = T.meta_var(t0 * part + i)
                        sums[i, every] = read(cells, page, 0, head, slot, 0) * query(work, row, 0)
                        for c in T.unroll(chunks - 1):
                            sums[i, every] = sums[i, every] + (
                                read(cells, page, 0, head, slot, c + 1) * query(work, row, c + 1)
                            )
                    sum_first(sums)
                    work[h * together + g, T.ramp(_SUMS + t0 * lanes, 1, lanes)] = sums[0, every]

    @T.inline
    def put_scores(page, head, first, seen, work, cells):
        """The page's scores, from `first` on; it has `seen` keys."""
        for g in range(group):
            for v in T.unroll(PAGE // lanes):
                sums = T.alloc_buffer((parts, lanes), "float32")
                for n in T.unroll(parts):
                    sums[n, every] = work[g, T.ramp(_SUMS + (v * parts + n) * lanes, 1, lanes)]
                sum_rest(sums)
                apply_scales(sums, 0, 0, cells, page, 0, head, v)
                for j in T.vectorized(lanes):
                    work[head * group + g, first + v * lanes + j] = T.Select(
                        v * lanes + j < seen, sums[0, j], T.float32(_HIDDEN)
                    )

    @T.inline
    def weigh(row, pages, work):
        """Scores of a strip become weights, relative to the largest score so far."""
        tops = T.alloc_buffer((1, lanes), "float32")
        tops[0, every] = work[row, T.ramp(_TOP, 1, lanes)]
        for t in range(pages * (PAGE // lanes)):
            for j in T.vectorized(lanes):
                tops[0, j] = T.max(tops[0, j], work[row, t * lanes + j])
        largest(tops, 0)
        if tops[0, 0] > work[row, _TOP]:
            less = T.alloc_buffer((lanes,), "float32")
            for j in T.vectorized(lanes):
                less[j] = exp2(work[row, _TOP + j] - tops[0, j])
            for j in T.vectorized(lanes):
                work[row, _TOTAL + j] = work[row, _TOTAL + j] * less[j]
            for c in T.unroll(chunks):
                work[row, mixture(c)] = work[row, mixture(c)] * less[every]
            work[row, T.ramp(_TOP, 1, lanes)] = tops[0, every]
        for t in range(pages * (PAGE // lanes)):
            for j in T.vectorized(lanes):
                work[row, t * lanes + j] = exp2(work[row, t * lanes + j] - tops[0, j])
                work[row, _TOTAL + j] = work[row, _TOTAL + j] + work[row, t * lanes + j]

    @T.inline
    def add_values(page, following, head, first, seen, turn, work, cells):
        """The weighted values of a page, `columns` vectors of each, for `heads` query heads: one of
        `turns` that make up the whole.
        """
        acc = T.alloc_buffer((heads * columns, lanes), "float32")
        row: T.let[T.int32] = head * group + T.truncdiv(turn, chunks // columns) * heads
        c0: T.let[T.int32] = T.truncmod(turn, chunks // columns) * columns
        for g in T.unroll(heads):
            for c in T.unroll(columns):
                acc[g * columns + c, every] = work[row + g, mixture(c0 + c)]
        for slot in range(seen):
            for n in T.unroll(value_lines):
                prefetch(following, slot * packed, T.min(turn * value_lines + n, slot_lines - 1))
            for g in T.unroll(heads):
                for c in T.unroll(columns):
                    acc[g * columns + c, every] = acc[g * columns + c, every] + (
                        T.broadcast(work[row + g, first + slot], lanes)
                        * read(cells, page, 1, head, slot, c0 + c)
                    )
        for g in T.unroll(heads):
            for c in T.unroll(columns):
                work[row + g, mixture(c0 + c)] = acc[g * columns + c, every]

    @T.inline
    def strip(start, pages, count, left, page, h0, h1, work, cells):
        for i, n in T.grid(pages, h1 - h0):
            number: T.let[T.int32] = page(start + i)
            head: T.let[T.int32] = h0 + n
            up: T.let[T.int32] = ahead_of(n, h1 - h0)[0]
            ahead: T.let[T.int32] = h0 + ahead_of(n, h1 - h0)[1]
            # After the last page of keys come the values of the first.
            which: T.let[T.int32] = T.Select(i + up < pages, 0, 1)
            next_page: T.let[T.int32] = page(start + T.Select(i + up < pages, i + up, 0))
            following = T.meta_var(_in(cells, next_page, which, ahead))
            prefetch_scales(following)
            prefetch_scales(_in(cells, number, 1, head))
            multiply_keys(number, following, head, work, cells)
            put_scores(number, head, i * PAGE, count - (start + i) * PAGE, work, cells)
        for row in range(h0 * group, h1 * group):
            weigh(row, pages, work)
            if rounded:
                for i in range(pages):
                    used: T.let[T.int32] = page(start + i)
                    for v in T.unroll(PAGE // lanes):
                        head = T.meta_var(T.truncdiv(row, group))
                        apply_scales(work, row, i * PAGE + v * lanes, cells, used, 1, head, v)
        for i, n in T.grid(pages, h1 - h0):
            number: T.let[T.int32] = page(start + i)
            up: T.let[T.int32] = ahead_of(n, h1 - h0)[0]
            ahead: T.let[T.int32] = h0 + ahead_of(n, h1 - h0)[1]
            which: T.let[T.int32] = T.Select(i + up < pages, 1, 0)
            next_page: T.let[T.int32] = page(T.min(start + i + up, left - 1))
            following = T.meta_var(_in(cells, next_page, which, ahead))
            seen = T.meta_var(T.min(PAGE, count - (start + i) * PAGE))
            prefetch_scales(following)
            for turn in range(turns):
                add_values(number, following, h0 + n, i * PAGE, seen, turn, work, cells)

    @T.inline
    def unit(count, left, page, span, h0, h1, work, cells, mixed, top, total):
        for row in range(h0 * group, h1 * group):
            work[row, T.ramp(_TOP, 1, lanes)] = T.broadcast(T.float32(NOTHING), lanes)
            work[row, T.ramp(_TOTAL, 1, lanes)] = T.broadcast(T.float32(0), lanes)
            for c in T.unroll(chunks):
                work[row, mixture(c)] = T.broadcast(T.float32(0), lanes)
        pages: T.let[T.int32] = T.truncdiv(count + (PAGE - 1), PAGE)
        for s in range(T.truncdiv(pages + (_STRIP - 1), _STRIP)):
            start = T.meta_var(s * _STRIP)
            strip(start, T.min(pages - start, _STRIP), count, left, page, h0, h1, work, cells)
        for row in range(h0 * group, h1 * group):
            weights = T.alloc_buffer((1, lanes), "float32")
            head: T.let[T.int32] = T.truncdiv(row, group)
            g: T.let[T.int32] = T.truncmod(row, group)
            weights[0, every] = work[row, T.ramp(_TOTAL, 1, lanes)]
            added(weights, 0)
            top[span, head, g] = work[row, _TOP]
            total[span, head, g] = weights[0, 0]
            for c in T.unroll(chunks):
                mixed[span, head, g, chunk(c)] = work[row, mixture(c)]

    return unit


def _accumulators(tiling: Tiling, group: int, chunks: int) -> tuple[int, int]:
    """Heads and vectors of a value that are summed at a time: a quarter of the registers is left
    for what is multiplied, and TVM keeps only less than a kilobyte out of memory.
    """
    most = min(tiling.registers * 3 // 4, 1023 // (4 * tiling.lanes))
    heads = max(n for n in range(1, most + 1) if group % n == 0)
    columns = max(n for n in range(1, most // heads + 1) if chunks % n == 0)
    return heads, columns


def _merge_spans(target: Target, group: int, head_dim: int, dtype: str) -> Any:
    """TIR (b, h, spans, mixed, top, total, out, lse): query head h of sequence b, of its spans."""
    d = head_dim
    lanes = lanes_for(target, d)

    @T.inline
    def merge(b, h, spans, mixed, top, total, out, lse):
        acc = T.alloc_buffer((d // lanes, lanes), "float32")
        # The largest score, the sum of weights, a span's weight.
        cells = T.alloc_buffer((3,), "float32")
        head = T.meta_var(T.truncdiv(h, group))
        g = T.meta_var(T.truncmod(h, group))
        cells[0] = T.float32(NOTHING)
        for s in range(spans[b], spans[b + 1]):
            cells[0] = T.max(cells[0], top[s, head, g])
        cells[1] = T.float32(0)
        for c in T.unroll(d // lanes):
            for j in T.vectorized(lanes):
                acc[c, j] = T.float32(0)
        for s in range(spans[b], spans[b + 1]):
            cells[2] = exp2(top[s, head, g] - cells[0])
            cells[1] = cells[1] + cells[2] * total[s, head, g]
            for c in T.unroll(d // lanes):
                for j in T.vectorized(lanes):
                    acc[c, j] = acc[c, j] + cells[2] * mixed[s, head, g, c * lanes + j]
        cells[1] = T.max(cells[1], T.float32(_LEAST))
        lse[b, h] = cells[0] + T.log2(cells[1])
        for c in T.unroll(d // lanes):
            for j in T.vectorized(lanes):
                out[b, h, c * lanes + j] = T.Cast(dtype, acc[c, j] / cells[1])

    return merge
