"""From logits to probabilities: temperature, penalties, biases, masks. Everything is fp32.

Names, arguments and meaning are those that MLC's engine expects of a library, so that either engine
can run either library. All but the softmax change the logits [batch, vocabulary] in place.
"""

from tir_kernels._tvm import PrimFunc, T, Target
from tir_kernels.cpu.fast_math import exp
from tir_kernels.cpu.lanes import fold
from tir_kernels.cpu.tiling import tiling_of
from tir_kernels.memo import memoized

GREEDY = 1e-5  # a temperature below this takes the most probable token


@memoized
def softmax_with_temperature(target: Target) -> PrimFunc:
    """(logits [b, V], temperature [b], probabilities [b, V]).

    At a temperature of zero the largest logit gets probability 1; equals share it.
    """
    lanes = tiling_of(target).lanes
    find_largest, add_up = fold(lanes, T.max), fold(lanes, lambda a, b: a + b)

    @T.prim_func(private=True, s_tir=True)
    def softmax(logits_handle: T.handle, temperature_handle: T.handle, out_handle: T.handle):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        batch = T.int64()
        vocab = T.int64()
        logits = T.match_buffer(logits_handle, (batch, vocab), "float32")
        temperature = T.match_buffer(temperature_handle, (batch,), "float32")
        out = T.match_buffer(out_handle, (batch, vocab), "float32")
        for b in T.parallel(batch):
            largest = T.alloc_buffer((1, lanes), "float32")
            total = T.alloc_buffer((1, lanes), "float32")
            inverse = T.alloc_buffer((1,), "float32")
            for j in T.vectorized(lanes):
                largest[0, j] = T.min_value("float32")
                total[0, j] = T.float32(0)
            for v in range(vocab // lanes):
                for j in T.vectorized(lanes):
                    largest[0, j] = T.max(largest[0, j], logits[b, v * lanes + j])
            for v in range(vocab % lanes):
                largest[0, 0] = T.max(largest[0, 0], logits[b, vocab - 1 - v])
            find_largest(largest, 0)
            if temperature[b] > T.float32(GREEDY):
                inverse[0] = T.float32(1) / temperature[b]
                for v in range(vocab // lanes):
                    for j in T.vectorized(lanes):
                        out[b, v * lanes + j] = exp(
                            (logits[b, v * lanes + j] - largest[0, j]) * inverse[0]
                        )
                        total[0, j] = total[0, j] + out[b, v * lanes + j]
                for v in range(vocab % lanes):
                    out[b, vocab - 1 - v] = exp(
                        (logits[b, vocab - 1 - v] - largest[0, 0]) * inverse[0]
                    )
                    total[0, 0] = total[0, 0] + out[b, vocab - 1 - v]
            else:
                for v in range(vocab // lanes):
                    for j in T.vectorized(lanes):
                        out[b, v * lanes + j] = T.Select(
                            logits[b, v * lanes + j] == largest[0, j], T.float32(1), T.float32(0)
                        )
                        total[0, j] = total[0, j] + out[b, v * lanes + j]
                for v in range(vocab % lanes):
                    out[b, vocab - 1 - v] = T.Select(
                        logits[b, vocab - 1 - v] == largest[0, 0], T.float32(1), T.float32(0)
                    )
                    total[0, 0] = total[0, 0] + out[b, vocab - 1 - v]
            add_up(total, 0)
            for v in range(vocab // lanes):
                for j in T.vectorized(lanes):
                    out[b, v * lanes + j] = out[b, v * lanes + j] / total[0, j]
            for v in range(vocab % lanes):
                out[b, vocab - 1 - v] = out[b, vocab - 1 - v] / total[0, 0]

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
        for i in range(count):
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
        for i in range(count):
            value = T.alloc_buffer((1,), "float32", scope="local")
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
        mask = T.match_buffer(mask_handle, (batch, (vocab + 31) // 32), "int32")
        for s in range(sequences):
            for v in range(vocab):
                if T.bitwise_and(T.shift_right(mask[rows[s], v // 32], v % 32), 1) == 0:
                    logits[rows[s], v] = T.min_value("float32")

    return apply
