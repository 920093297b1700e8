"""From logits to probabilities: temperature, penalties, biases, masks. Everything is fp32.

Names, arguments and meaning are those that MLC's engine expects of a library, so that either engine
can run either library. All but the softmax change the logits [batch, vocabulary] in place.
"""

from tir_kernels._tvm import PrimFunc, T, Target
from tir_kernels.gpu.blocks import THREADS, block_max, block_sum
from tir_kernels.memo import memoized

GREEDY = 1e-5  # a temperature below this takes the most probable token
CHUNK = 4096  # logits of one block
_LOWEST = -3.4e38  # beneath every logit, within what WGSL takes as a number
_PER_THREAD = CHUNK // THREADS


@memoized
def softmax_with_temperature(target: Target) -> PrimFunc:
    """(logits [b, V], temperature [b], probabilities [b, V]).

    At a temperature of zero the largest logit gets probability 1; equals share it. Two kernels:
    the first leaves maximum and sum of each chunk of a row, the second puts them together.
    """
    largest_of, sum_of = block_max(THREADS), block_sum(THREADS)

    def weight(logit, largest, temperature):
        """What a logit counts beside the largest one."""
        return T.if_then_else(
            temperature > T.float32(GREEDY),
            T.exp((logit - largest) / T.max(temperature, T.float32(GREEDY))),
            T.Select(logit == largest, T.float32(1), T.float32(0)),
        )

    @T.prim_func(private=True, s_tir=True)
    def softmax(logits_handle: T.handle, temperature_handle: T.handle, out_handle: T.handle):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        batch = T.int32()
        vocab = T.int32()
        logits = T.match_buffer(logits_handle, (batch, vocab), "float32")
        temperature = T.match_buffer(temperature_handle, (batch,), "float32")
        out = T.match_buffer(out_handle, (batch, vocab), "float32")
        chunks = T.meta_var(T.truncdiv(vocab + (CHUNK - 1), CHUNK))
        parts = T.sblock_alloc_buffer((batch, chunks, 2), "float32")
        for b in T.thread_binding(batch, thread="blockIdx.y"):
            for chunk in T.thread_binding(chunks, thread="blockIdx.x"):
                for t in T.thread_binding(THREADS, thread="threadIdx.x"):
                    partial = T.alloc_buffer((THREADS,), "float32", scope="shared")
                    rows = T.alloc_buffer((16,), "float32", scope="shared")
                    largest = T.alloc_buffer((1,), "float32", scope="local")
                    total = T.alloc_buffer((1,), "float32", scope="local")
                    largest[0] = T.float32(_LOWEST)
                    for i in range(_PER_THREAD):
                        v = T.meta_var(chunk * CHUNK + i * THREADS + t)
                        if v < vocab:
                            largest[0] = T.max(largest[0], logits[b, v])
                    largest_of(largest[0], t, partial, rows, largest)
                    total[0] = T.float32(0)
                    for i in range(_PER_THREAD):
                        v = T.meta_var(chunk * CHUNK + i * THREADS + t)
                        if v < vocab:
                            total[0] = total[0] + weight(logits[b, v], largest[0], temperature[b])
                    T.tvm_storage_sync("shared")
                    sum_of(total[0], t, partial, rows, total)
                    if t == 0:
                        parts[b, chunk, 0] = largest[0]
                        parts[b, chunk, 1] = total[0]
        for b in T.thread_binding(batch, thread="blockIdx.y"):
            for chunk in T.thread_binding(chunks, thread="blockIdx.x"):
                for t in T.thread_binding(THREADS, thread="threadIdx.x"):
                    largest = T.alloc_buffer((1,), "float32", scope="local")
                    total = T.alloc_buffer((1,), "float32", scope="local")
                    largest[0] = T.float32(_LOWEST)
                    for c in range(chunks):
                        largest[0] = T.max(largest[0], parts[b, c, 0])
                    total[0] = T.float32(0)
                    for c in range(chunks):
                        total[0] = total[0] + parts[b, c, 1] * weight(
                            parts[b, c, 0], largest[0], temperature[b]
                        )
                    for i in range(_PER_THREAD):
                        v = T.meta_var(chunk * CHUNK + i * THREADS + t)
                        if v < vocab:
                            out[b, v] = weight(logits[b, v], largest[0], temperature[b]) / total[0]

    return softmax


@memoized
def apply_logit_bias_inplace(target: Target) -> PrimFunc:
    """(logits, row int32 [n], token int32 [n], bias fp32 [n]): logits[row, token] += bias."""

    @T.prim_func(s_tir=True)
    def apply(
        logits_handle: T.handle,
        row_handle: T.handle,
        token_handle: T.handle,
        bias_handle: T.handle,
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        batch = T.int32()
        vocab = T.int32()
        count = T.int32()
        logits = T.match_buffer(logits_handle, (batch, vocab), "float32")
        row = T.match_buffer(row_handle, (count,), "int32")
        token = T.match_buffer(token_handle, (count,), "int32")
        bias = T.match_buffer(bias_handle, (count,), "float32")
        for block in T.thread_binding(_blocks(count), thread="blockIdx.x"):
            for t in T.thread_binding(THREADS, thread="threadIdx.x"):
                i: T.let[T.int32] = block * THREADS + t
                if i < count:
                    logits[row[i], token[i]] = logits[row[i], token[i]] + bias[i]

    return apply


@memoized
def apply_penalty_inplace(target: Target) -> PrimFunc:
    """(logits, rows int32 [s], which int32 [n], token int32 [n], times int32 [n], fp32 [s, 3]).

    Entry i says that sequence which[i], whose logits are in row rows[which[i]], has produced
    token[i] times[i] times. The three penalties of a sequence are presence, frequency and
    repetition: the first two are subtracted, the third divides a positive logit and multiplies a
    negative one.
    """

    @T.prim_func(s_tir=True)
    def apply(
        logits_handle: T.handle,
        rows_handle: T.handle,
        which_handle: T.handle,
        token_handle: T.handle,
        times_handle: T.handle,
        penalties_handle: T.handle,
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        batch = T.int32()
        vocab = T.int32()
        count = T.int32()
        sequences = T.int32()
        logits = T.match_buffer(logits_handle, (batch, vocab), "float32")
        rows = T.match_buffer(rows_handle, (sequences,), "int32")
        which = T.match_buffer(which_handle, (count,), "int32")
        token = T.match_buffer(token_handle, (count,), "int32")
        times = T.match_buffer(times_handle, (count,), "int32")
        penalties = T.match_buffer(penalties_handle, (sequences, 3), "float32")
        for block in T.thread_binding(_blocks(count), thread="blockIdx.x"):
            for t in T.thread_binding(THREADS, thread="threadIdx.x"):
                value = T.alloc_buffer((1,), "float32", scope="local")
                i: T.let[T.int32] = block * THREADS + t
                if i < count:
                    value[0] = (
                        logits[rows[which[i]], token[i]]
                        - penalties[which[i], 0]
                        - T.Cast("float32", times[i]) * penalties[which[i], 1]
                    )
                    logits[rows[which[i]], token[i]] = T.Select(
                        value[0] < T.float32(0),
                        value[0] * penalties[which[i], 2],
                        value[0] / penalties[which[i], 2],
                    )

    return apply


@memoized
def apply_bitmask_inplace(target: Target) -> PrimFunc:
    """(logits, rows int32 [s], mask int32 [batch, ceil(V/32)]): a token with bit 0 is ruled out.

    Bit v % 32 of word v // 32 belongs to token v; ruled-out logits become the lowest fp32.
    """

    @T.prim_func(s_tir=True)
    def apply(logits_handle: T.handle, rows_handle: T.handle, mask_handle: T.handle):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        batch = T.int32()
        vocab = T.int32()
        sequences = T.int32()
        logits = T.match_buffer(logits_handle, (batch, vocab), "float32")
        rows = T.match_buffer(rows_handle, (sequences,), "int32")
        mask = T.match_buffer(mask_handle, (batch, T.truncdiv(vocab + 31, 32)), "int32")
        for s in T.thread_binding(sequences, thread="blockIdx.y"):
            for block in T.thread_binding(_blocks(vocab), thread="blockIdx.x"):
                for t in T.thread_binding(THREADS, thread="threadIdx.x"):
                    v: T.let[T.int32] = block * THREADS + t
                    if v < vocab:
                        word = T.meta_var(mask[rows[s], T.truncdiv(v, 32)])
                        if T.bitwise_and(T.shift_right(word, T.truncmod(v, 32)), 1) == 0:
                            logits[rows[s], v] = T.min_value("float32")

    return apply


def _blocks(count):
    return T.truncdiv(count + (THREADS - 1), THREADS)
