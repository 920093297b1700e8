"""Attention of one query for each sequence over its pages, with the keys split among blocks.

A step of decoding reads every key and value once, and a batch of one has few heads to share them
out by. So the keys of a sequence are dealt out in spans to as many blocks as fill the device, each
keeps a running softmax (FlashAttention, arXiv 2205.14135) over its spans, and a second kernel puts
the parts together ("Flash-Decoding"). Query heads that share a key head (arXiv 2305.13245) are in
one block: what is loaded serves all of them.

In a block, four threads share a key for the scores; sixteen share a head for the softmax; for the
values a thread has some elements of every n-th key. No two threads need each other's results but
through shared memory, four barriers a span.

Scores are in base 2, as `attention_entries` says.
"""

from tir_kernels._tvm import PrimFunc, T, Target
from tir_kernels.gpu.attention_parts import LOG2_E, NOTHING, TINY, in_pages
from tir_kernels.gpu.blocks import SHARED_BYTES, at, vector_view, vector_width
from tir_kernels.gpu.pages import PAGE
from tir_kernels.memo import memoized

THREADS = 128
SPAN = 64  # keys that are scored together
HEADS = 8  # query heads of a block at most
_PARTS = 4  # threads that share a key
_AT_ONCE = THREADS // _PARTS
_ROUNDS = SPAN // _AT_ONCE  # keys of a thread
_SHARERS = 16  # threads that share a head in the softmax
# Blocks that fill the device a few times over.
_BLOCKS = {"cuda": 1024}
_FEWER_BLOCKS = 256


@memoized
def attention_decode_paged(
    target: Target,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: str,
    most_blocks: int | None = None,
) -> PrimFunc:
    """q [batch, q_heads, d] against pages [p, 2, kv_heads, PAGE, d]: out, and lse [batch, q_heads].

    Sequence b owns page_values[page_indptr[b]..], of which the last holds last_page_length[b]
    tokens. most_blocks: that keys are split among, by default what fills the target's devices.
    Raises ValueError for a head_dim that is no multiple of 4.
    """
    d, group = head_dim, q_heads // kv_heads
    if d % _PARTS:
        raise ValueError(f"head_dim {d} is not a multiple of {_PARTS}")
    heads = _heads_of_block(group, d)
    pieces = -(-group // heads)
    units = kv_heads * pieces
    blocks = most_blocks or _BLOCKS.get(target.kind.name, _FEWER_BLOCKS)
    attend = _attend(target, d, heads, dtype)

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
        q = T.match_buffer(q_handle, (batch, q_heads, d), dtype)
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
        T.match_buffer(q_position_handle, (batch,), "int32", elem_offset=q_position_at)
        out = T.match_buffer(out_handle, (batch, q_heads, d), dtype)
        lse = T.match_buffer(lse_handle, (batch, q_heads), "float32")
        splits = T.meta_var(
            T.max(
                T.min(
                    T.truncdiv(used_pages * PAGE + (SPAN - 1), SPAN),
                    T.truncdiv(blocks, batch * units),
                ),
                1,
            )
        )
        sums = T.sblock_alloc_buffer((batch, q_heads, splits, d), "float32")
        stats = T.sblock_alloc_buffer((batch, q_heads, splits, 2), "float32")
        pages_view = vector_view(pages, dtype, _vector(target, d, dtype))
        for unit in T.thread_binding(batch * units, thread="blockIdx.y"):
            for split in T.thread_binding(splits, thread="blockIdx.x"):
                for t in T.thread_binding(THREADS, thread="threadIdx.x"):
                    b: T.let[T.int32] = T.truncdiv(unit, units)
                    head: T.let[T.int32] = T.truncdiv(T.truncmod(unit, units), pieces)
                    piece: T.let[T.int32] = T.truncmod(unit, pieces)
                    begin: T.let[T.int32] = page_indptr[b]
                    count: T.let[T.int32] = page_indptr[b + 1] - begin
                    length: T.let[T.int32] = T.Select(
                        count > 0, (count - 1) * PAGE + last_page_length[b], 0
                    )
                    key = T.meta_var(in_pages(target, pages_view, page_values, begin, 0, head))
                    value = T.meta_var(in_pages(target, pages_view, page_values, begin, 1, head))
                    attend(
                        t, b, head * group + piece * heads, group - piece * heads, length,
                        split, splits, sm_scale, q, key, value, sums, stats,
                    )  # fmt: skip
        for b in T.thread_binding(batch, thread="blockIdx.x"):
            for h in T.thread_binding(q_heads, thread="blockIdx.y"):
                for t in T.thread_binding(THREADS, thread="threadIdx.x"):
                    largest = T.alloc_buffer((1,), "float32", scope="local")
                    total = T.alloc_buffer((1,), "float32", scope="local")
                    mixed = T.alloc_buffer((1,), "float32", scope="local")
                    largest[0] = T.float32(NOTHING)
                    for s in range(splits):
                        largest[0] = T.max(largest[0], stats[b, h, s, 0])
                    total[0] = T.float32(TINY)
                    for s in range(splits):
                        total[0] = total[0] + stats[b, h, s, 1] * T.exp2(
                            stats[b, h, s, 0] - largest[0]
                        )
                    for i in range(-(-d // THREADS)):
                        j: T.let[T.int32] = i * THREADS + t
                        if j < d:
                            mixed[0] = T.float32(0)
                            for s in range(splits):
                                mixed[0] = mixed[0] + sums[b, h, s, j] * T.exp2(
                                    stats[b, h, s, 0] - largest[0]
                                )
                            out[b, h, j] = T.Cast(dtype, mixed[0] / total[0])
                    if t == 0:
                        lse[b, h] = largest[0] + T.log2(total[0])

    return attention


def _vector(target: Target, d: int, dtype: str) -> int:
    """Elements of a load of keys or values: a part of a key is some of them."""
    return vector_width(target, d // _PARTS, dtype)


def _heads_of_block(group: int, d: int) -> int:
    """Query heads of a block: what fits into shared memory, shared out evenly."""
    bytes_of_head = 4 * (d + _PARTS * SPAN + 2 * _SHARERS + 1)
    most = min(HEADS, SHARED_BYTES // bytes_of_head)
    pieces = -(-group // most)
    return -(-group // pieces)


def _attend(target: Target, d: int, heads: int, dtype: str):
    """TIR for one block: `heads` query heads over spans split, split + splits, ... of the keys."""
    vec = _vector(target, d, dtype)
    k_steps = d // (_PARTS * vec)
    lanes = d // vec
    slots = THREADS // lanes
    keys_of_slot = -(-SPAN // slots)
    own = SPAN // _SHARERS
    # Loads that are on their way together. CUDA's compiler takes all of a span; drivers that
    # compile WGSL take long for long straight code.
    on_cuda = target.kind.name == "cuda"
    k_ahead = k_steps if on_cuda else (2 if k_steps % 2 == 0 else 1)
    v_ahead = keys_of_slot if on_cuda else 4

    def vector_of(chunk, s, t):
        """Which vector of its key is a thread's s-th of a chunk: threads of a key sit together."""
        return (chunk * k_ahead + s) * _PARTS + t % _PARTS

    @T.inline
    def score(t, first, last, key, q_shared, scores):
        """Each thread's part of the products of its keys with every head."""
        keys = T.alloc_buffer((_ROUNDS * k_ahead * vec,), dtype, scope="local")
        products = T.alloc_buffer((_ROUNDS, heads), "float32", scope="local")
        for r in T.unroll(_ROUNDS):
            for g in T.unroll(heads):
                products[r, g] = T.float32(0)
        for chunk in range(k_steps // k_ahead):
            for r in T.unroll(_ROUNDS):
                for s in T.unroll(k_ahead):
                    keys[at((r * k_ahead + s) * vec, vec)] = key(
                        T.min(first + r * _AT_ONCE + t // _PARTS, last), vector_of(chunk, s, t)
                    )
            for s in T.unroll(k_ahead):
                for j in T.unroll(vec):
                    for g in T.unroll(heads):
                        for r in T.unroll(_ROUNDS):
                            products[r, g] = (
                                products[r, g]
                                + T.Cast("float32", keys[(r * k_ahead + s) * vec + j])
                                * q_shared[g * d + vector_of(chunk, s, t) * vec + j]
                            )
        for g in T.unroll(heads):
            for r in T.unroll(_ROUNDS):
                scores[((t % _PARTS) * heads + g) * SPAN + r * _AT_ONCE + t // _PARTS] = products[
                    r, g
                ]

    @T.inline
    def gather(t, first, last, value, weights, factors, mixed):
        """Each thread's elements of the values of its keys, weighted for every head."""
        loaded = T.alloc_buffer((v_ahead * vec,), dtype, scope="local")
        for g in T.unroll(heads):
            for j in T.unroll(vec):
                mixed[g, j] = mixed[g, j] * factors[g]
        for chunk in range(-(-keys_of_slot // v_ahead)):
            for i in T.unroll(v_ahead):
                loaded[at(i * vec, vec)] = value(
                    T.min(first + (chunk * v_ahead + i) * slots + t // lanes, last), t % lanes
                )
            for i in T.unroll(v_ahead):
                k: T.let[T.int32] = (chunk * v_ahead + i) * slots + t // lanes
                if k < SPAN:
                    for g in T.unroll(heads):
                        for j in T.unroll(vec):
                            mixed[g, j] = mixed[g, j] + weights[g * SPAN + k] * T.Cast(
                                "float32", loaded[i * vec + j]
                            )

    @T.inline
    def attend(
        t, b, first_head, heads_left, length, split, splits, sm_scale, q, key, value, sums, stats
    ):
        q_shared = T.alloc_buffer((heads * d,), "float32", scope="shared")
        # Parts of scores, then weights in the first part; at the end, sums of values by slot.
        scores = T.alloc_buffer((max(_PARTS * heads * SPAN, slots * d),), "float32", scope="shared")
        maxima = T.alloc_buffer((heads * _SHARERS,), "float32", scope="shared")
        factors = T.alloc_buffer((heads,), "float32", scope="shared")
        own_scores = T.alloc_buffer((own,), "float32", scope="local")
        largest = T.alloc_buffer((2,), "float32", scope="local")
        total = T.alloc_buffer((1,), "float32", scope="local")
        mixed = T.alloc_buffer((heads, vec), "float32", scope="local")
        g = T.meta_var(t // _SHARERS)
        sharer = T.meta_var(t % _SHARERS)
        for i in range(-(-heads * d // THREADS)):
            e: T.let[T.int32] = i * THREADS + t
            if e < heads * d:
                q_shared[e] = T.if_then_else(
                    T.truncdiv(e, d) < heads_left,
                    T.Cast(
                        "float32",
                        q[
                            b,
                            first_head + T.min(T.truncdiv(e, d), heads_left - 1),
                            T.truncmod(e, d),
                        ],
                    )
                    * (sm_scale * T.float32(LOG2_E)),
                    T.float32(0),
                )
        for h in T.unroll(heads):
            for j in T.unroll(vec):
                mixed[h, j] = T.float32(0)
        largest[0] = T.float32(NOTHING)
        total[0] = T.float32(0)
        spans: T.let[T.int32] = T.truncdiv(length + (SPAN - 1), SPAN)
        for step in range(T.truncdiv(spans - split + splits - 1, splits)):
            first: T.let[T.int32] = (step * splits + split) * SPAN
            T.tvm_storage_sync("shared")
            score(t, first, length - 1, key, q_shared, scores)
            T.tvm_storage_sync("shared")
            if g < heads:
                largest[1] = largest[0]
                for i in T.unroll(own):
                    own_scores[i] = T.float32(0)
                    for p in T.unroll(_PARTS):
                        own_scores[i] = (
                            own_scores[i] + scores[(p * heads + g) * SPAN + i * _SHARERS + sharer]
                        )
                    if first + i * _SHARERS + sharer < length:
                        largest[1] = T.max(largest[1], own_scores[i])
                maxima[t] = largest[1]
            T.tvm_storage_sync("shared")
            if g < heads:
                for i in range(_SHARERS):
                    largest[1] = T.max(largest[1], maxima[g * _SHARERS + i])
                if sharer == 0:
                    factors[g] = T.exp2(largest[0] - largest[1])
                total[0] = total[0] * T.exp2(largest[0] - largest[1])
                for i in T.unroll(own):
                    own_scores[i] = T.if_then_else(
                        first + i * _SHARERS + sharer < length,
                        T.exp2(own_scores[i] - largest[1]),
                        T.float32(0),
                    )
                    total[0] = total[0] + own_scores[i]
                    scores[g * SPAN + i * _SHARERS + sharer] = own_scores[i]
                largest[0] = largest[1]
            T.tvm_storage_sync("shared")
            if t < slots * lanes:
                gather(t, first, length - 1, value, scores, factors, mixed)
        T.tvm_storage_sync("shared")
        if g < heads:
            maxima[t] = total[0]
        for h in range(heads):
            if t < slots * lanes:
                for j in T.unroll(vec):
                    scores[t // lanes * d + t % lanes * vec + j] = mixed[h, j]
            T.tvm_storage_sync("shared")
            for i in range(-(-d // THREADS)):
                j: T.let[T.int32] = i * THREADS + t
                if j < d and h < heads_left:
                    own_scores[0] = T.float32(0)
                    for s in range(slots):
                        own_scores[0] = own_scores[0] + scores[s * d + j]
                    sums[b, first_head + h, split, j] = own_scores[0]
            T.tvm_storage_sync("shared")
        if g < heads and g < heads_left and sharer == 0:
            stats[b, first_head + g, split, 0] = largest[0]
            total[0] = T.float32(0)
            for i in range(_SHARERS):
                total[0] = total[0] + maxima[g * _SHARERS + i]
            stats[b, first_head + g, split, 1] = total[0]

    return attend
