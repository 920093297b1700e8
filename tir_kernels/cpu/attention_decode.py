"""Attention of one query for each sequence over the pages of a KV cache: bound by reading them.

A sequence's keys are cut into spans (Flash-Decoding, https://pytorch.org/blog/flash-decoding), and
a span under one key head is one unit of work for all query heads that share that head: its keys
are read once, then its values, each converted to fp32 in registers. So there are units enough for
every thread where key heads are few, and a span's scores stay in the first-level cache. What the
spans found is merged at the end.
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
NOTHING = -5e4  # the maximum of no scores, as in TVM's own kernels
_HIDDEN = -1e30  # the score of a place in the last page that holds no key
_SERIAL = 64  # units of work whose results one thread merges sooner than others wake up
_TOGETHER = 8  # heads for which converted keys are kept
_TOPS = SPAN + PAGE // PART * 16  # where a head's maxima lie, behind its scores and sums
_QUERY = _TOPS + 16  # where its query lies
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
                page_indptr[b + 1] - page_indptr[b] + (SPAN // PAGE - 1), SPAN // PAGE
            )
        count: T.let[T.int32] = spans[batch]
        most = T.meta_var(T.truncdiv(used_pages, SPAN // PAGE) + batch)
        mixed = T.alloc_buffer((most, kv_heads, group, d), "float32")
        top = T.alloc_buffer((most, kv_heads, group), "float32")
        total = T.alloc_buffer((most, kv_heads, group), "float32")
        for unit in T.parallel(count * kv_heads):
            # In one buffer with what outlives it, because TVM would put sums that belong into
            # registers in the place of one that is no longer used. Of each head: scores, sums over
            # parts of a page's products, maxima of the scores, the query.
            work = T.alloc_buffer((group, _QUERY + d), "float32")
            b = T.alloc_buffer((1,), "int32")
            span: T.let[T.int32] = T.truncdiv(unit, kv_heads)
            head: T.let[T.int32] = T.truncmod(unit, kv_heads)
            b[0] = 0
            for other in range(batch):
                b[0] = b[0] + T.Select(spans[other + 1] <= span, 1, 0)
            first: T.let[T.int32] = page_indptr[b[0]] + (span - spans[b[0]]) * (SPAN // PAGE)
            keys: T.let[T.int32] = T.min(
                (page_indptr[b[0] + 1] - 1 - first) * PAGE + last_page_length[b[0]], SPAN
            )
            for g in range(group):
                for j in T.vectorized(d):
                    work[g, _QUERY + j] = T.Cast("float32", q[b[0], head * group + g, j]) * (
                        sm_scale * T.float32(_LOG2_E)
                    )
            page = T.meta_var(_from(page_values, first))
            attend(keys, page, span, head, work, cells, mixed, top, total)
        if count * kv_heads <= _SERIAL:
            for b, h in T.grid(batch, q_heads):
                merge(b, h, spans, mixed, top, total, out, lse)
        else:
            for row in T.parallel(batch * q_heads):
                b1: T.let[T.int32] = T.truncdiv(row, q_heads)
                merge(b1, T.truncmod(row, q_heads), spans, mixed, top, total, out, lse)

    return attention


def _from(values: Any, first: Any) -> Any:
    return lambda i: values[first + i]


def _in(cells: Any, page: Any, which: Any, head: Any) -> Any:
    """The elements of a page of one head."""
    return lambda at: cells[page, which, head, at]


def decode_unit(target: Target, group: int, slots: Slots) -> Any:
    """TIR (count, page, span, head, work, cells, mixed, top, total) for a span of one key head.

    The span has `count` keys; page(i): the number of its i-th page; cells: the pages [p, 2,
    kv_heads, PAGE * slot]; work [group, _QUERY + d]: the queries, multiplied by log2(e) and the
    softmax's scale, behind scratch space. For each query head g, mixed[span, head, g, :] becomes
    the values weighted by 2^(score - top[span, head, g]), and total[span, head, g] the sum of these
    weights. Scales of slots are applied to scores and to weights, not to every number.
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

    def chunk(c):
        return T.ramp(c * lanes, 1, lanes)

    @T.inline
    def prefetch(cells, page, which, head, slot):
        for i in T.unroll(-(-packed // line)):
            T.evaluate(asked_for(cells[page, which, head, slot * packed + i * line]))

    @T.inline
    def prefetch_scales(cells, page, which, head):
        if rounded:
            T.evaluate(asked_for(cells[page, which, head, slots.scale_in_page(0)]))

    def query(work, g, c):
        return work[g, T.ramp(_QUERY + c * lanes, 1, lanes)]

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
    def score_page(page, following, which, head, work, cells):
        """Sums over 128-bit parts of the products with `part` keys at a time. Keys are converted
        once for all `together` heads: LLVM keeps what is written here again and again.
        """
        prefetch_scales(cells, following, which, head)
        prefetch_scales(cells, page, 1, head)
        for t0 in range(PAGE // part):
            for i in T.unroll(part):
                prefetch(cells, following, which, head, t0 * part + i)
            for h in range(group // together):
                for g in T.unroll(together):
                    sums = T.alloc_buffer((part, lanes), "float32")
                    for i in T.unroll(part):
                        slot = T.meta_var(t0 * part + i)
                        sums[i, every] = read(cells, page, 0, head, slot, 0) * query(
                            work, h * together + g, 0
                        )
                        for c in T.unroll(chunks - 1):
                            sums[i, every] = sums[i, every] + (
                                read(cells, page, 0, head, slot, c + 1)
                                * query(work, h * together + g, c + 1)
                            )
                    sum_first(sums)
                    work[h * together + g, T.ramp(SPAN + t0 * lanes, 1, lanes)] = sums[0, every]

    @T.inline
    def weigh_values(count, page, span, head, h0, c0, work, cells, mixed):
        """The weighted sums of `columns` vectors of each value, for `heads` query heads."""
        acc = T.alloc_buffer((heads * columns, lanes), "float32")
        for g in T.unroll(heads):
            for c in T.unroll(columns):
                acc[g * columns + c, every] = T.broadcast(T.float32(0), lanes)
        for i in range(T.truncdiv(count + (PAGE - 1), PAGE)):
            number: T.let[T.int32] = page(i)
            following: T.let[T.int32] = page(T.min(i + 1, T.truncdiv(count - 1, PAGE)))
            for slot in range(T.min(PAGE, count - i * PAGE)):
                prefetch(cells, following, 1, head, slot)
                for g in T.unroll(heads):
                    for c in T.unroll(columns):
                        acc[g * columns + c, every] = acc[g * columns + c, every] + (
                            T.broadcast(work[h0 + g, i * PAGE + slot], lanes)
                            * read(cells, number, 1, head, slot, c0 + c)
                        )
        for g in T.unroll(heads):
            for c in T.unroll(columns):
                mixed[span, head, h0 + g, chunk(c0 + c)] = acc[g * columns + c, every]

    @T.inline
    def unit(count, page, span, head, work, cells, mixed, top, total):
        for g in range(group):
            for j in T.vectorized(lanes):
                work[g, _TOPS + j] = T.float32(NOTHING)
        last: T.let[T.int32] = T.truncdiv(count - 1, PAGE)
        for i in range(last + 1):
            number: T.let[T.int32] = page(i)
            # After the last page of keys come the values of the first.
            following: T.let[T.int32] = page(T.Select(i < last, i + 1, 0))
            which: T.let[T.int32] = T.Select(i < last, 0, 1)
            score_page(number, following, which, head, work, cells)
            for g in range(group):
                for v in T.unroll(PAGE // lanes):
                    sums = T.alloc_buffer((parts, lanes), "float32")
                    for n in T.unroll(parts):
                        sums[n, every] = work[g, T.ramp(SPAN + (v * parts + n) * lanes, 1, lanes)]
                    sum_rest(sums)
                    apply_scales(sums, 0, 0, cells, number, 0, head, v)
                    first = T.meta_var(i * PAGE + v * lanes)
                    for j in T.vectorized(lanes):
                        work[g, first + j] = T.Select(
                            first + j < count, sums[0, j], T.float32(_HIDDEN)
                        )
                        work[g, _TOPS + j] = T.max(work[g, _TOPS + j], work[g, first + j])
        for g in range(group):
            tops = T.alloc_buffer((1, lanes), "float32")
            weights = T.alloc_buffer((1, lanes), "float32")
            tops[0, every] = work[g, T.ramp(_TOPS, 1, lanes)]
            largest(tops, 0)
            top[span, head, g] = tops[0, 0]
            weights[0, every] = T.broadcast(T.float32(0), lanes)
            for t in range((last + 1) * (PAGE // lanes)):
                for j in T.vectorized(lanes):
                    work[g, t * lanes + j] = exp2(work[g, t * lanes + j] - tops[0, j])
                    weights[0, j] = weights[0, j] + work[g, t * lanes + j]
            added(weights, 0)
            total[span, head, g] = weights[0, 0]
            if rounded:
                for i in range(last + 1):
                    used: T.let[T.int32] = page(i)
                    for v in T.unroll(PAGE // lanes):
                        apply_scales(work, g, i * PAGE + v * lanes, cells, used, 1, head, v)
        for h in range(group // heads):
            for c in range(chunks // columns):
                weigh_values(count, page, span, head, h * heads, c * columns, work, cells, mixed)

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
