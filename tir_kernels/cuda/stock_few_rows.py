"""Decoding with 4-bit weights in the stock AutoAWQ layout.

A word has eight outputs of one input, while a register of an `mma` operand has two inputs of one
output. A lane therefore reads words of the four inputs that are its share of a step of 16, `words`
neighbouring ones of each, and exchanges the halves of two words: then the nibbles of outputs 2i, or
2i + 1, of two inputs lie 16 bits apart, as in the tiled layout. With eight lanes side by side, a
step covers 64 outputs for each word, and a lane's outputs 2i and 2i + 1 are the two rows that it
has in the i-th of four products.

What a warp reads at once are 32 bytes (times `words`) of each of four rows of the weight, and a
block has few neighbours: this is what the tiled layout is better at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tir_kernels._tvm import T
from tir_kernels.cuda import device
from tir_kernels.cuda.activations import Activations
from tir_kernels.cuda.epilogue import Epilogue, Sums, reduce_and_store
from tir_kernels.cuda.few_rows_schedule import StockFewRows
from tir_kernels.layouts import PACK, LinearShape

ROUND = 64  # inputs
STEPS = ROUND // 16
PRODUCTS = PACK // 2  # of two outputs a lane
LOW_HALVES, HIGH_HALVES = 0x5410, 0x7632  # of two words, selected from the bytes of both


@dataclass(frozen=True)
class _StockSums(Sums):
    """Stripe PRODUCTS * v + i has outputs 2i and 2i + 1 of word v of each of eight lanes."""

    def find(self, output: Any) -> tuple[Any, Any]:
        words = self.stripes // PRODUCTS
        lane, column = output // (PACK * words), output % PACK
        return output // PACK % words * PRODUCTS + column // 2, lane + column % 2 * 8


def stock_few_rows(
    shape: LinearShape, act_dtype: str, schedule: StockFewRows, epilogue: Epilogue
) -> Any:
    """An inline builder (m, x, (qweight, qzeros, scales), bias, out) for m <= schedule.rows."""
    body = stock_few_rows_block(shape, act_dtype, schedule, epilogue)

    @T.inline
    def kernel(m, x, parameters, bias, out):
        for block in T.thread_binding(schedule.blocks(shape), thread="blockIdx.x"):
            for warp in T.thread_binding(schedule.warps, thread="threadIdx.y"):
                for lane in T.thread_binding(32, thread="threadIdx.x"):
                    body(T.Cast("int32", m), x, parameters, bias, out, block, warp, lane)

    return kernel


def stock_few_rows_block(
    shape: LinearShape, act_dtype: str, schedule: StockFewRows, epilogue: Epilogue
) -> Any:
    """One block of it: (m, x, (qweight, qzeros, scales), bias, out, block, warp, lane)."""
    K, G = shape.K, shape.group_size
    W, V = schedule.warps, schedule.words
    rounds = schedule.rounds(shape)
    exact = rounds * W * ROUND == K
    row_bytes = shape.words * 4
    group_steps = min(STEPS, G // 16)  # a group is scaled once a round, if not more often
    round_groups = STEPS // group_steps
    stripes = PRODUCTS * V

    activations = Activations(K, schedule.rows, ROUND, 2, exact)
    eights = activations.eights
    seek_activations, copy_round = activations.seek(), activations.copy()
    load_activations = activations.load()
    sums = _StockSums(schedule.rows, W, stripes)
    shared_floats = schedule.shared(shape) // 4

    multiply, dequantize = device.mma(act_dtype), device.dequantize(act_dtype)
    zero_points, load_words = device.zero_points(act_dtype), device.load_words_at(V)

    def inside(r, step, first):
        if exact:
            return r < rounds
        return T.And(r < rounds, first + r * ROUND + step * 16 < K)

    @T.inline
    def load_step(valid, cursor, words, step):
        if valid:
            for i in T.unroll(4):
                load_words(
                    device.registers(words, step, i, 0),
                    cursor[0],
                    (step * 16 + i // 2 * 8 + i % 2) * row_bytes,
                )

    @T.inline
    def load_group(valid, k, word, qzeros, scales, scale, zero, p):
        if valid:
            for v in T.unroll(V):
                device.load_cached(
                    device.registers(scale, p, v, 0),
                    T.address_of(scales[k // G, (word + v) * PACK]),
                )
                zero[p, v, 0] = T.Cast("uint32", qzeros[k // G, word + v])

    @T.inline
    def multiply_round(r, first, word, parameters, cursor, activation, weight, part, total):
        """Multiply a round's inputs, and ask for those of the next in their place."""
        qzeros, scales = parameters[1:]
        words, scale, zero = weight
        zeros = T.alloc_buffer((V, 2, 4), "uint32", scope="local")
        pairs = T.alloc_buffer((2, 2, 4), "uint32", scope="local")
        a = T.alloc_buffer((4,), "uint32", scope="local")
        b = T.alloc_buffer((eights, 4), "uint32", scope="local")
        factor = T.alloc_buffer((2,), "float32", scope="local")
        for step in T.unroll(STEPS):
            p = T.meta_var(step // group_steps)
            if step % group_steps == 0:
                device.clear(part)
                for v in T.unroll(V):
                    for h in T.unroll(2):
                        # Both halves of the word are the half that has these outputs.
                        zero_points(
                            device.registers(zeros, v, h, 0),
                            device.permute_bytes(zero[p, v, 0], zero[p, v, 0], 0x1010 + h * 0x2222),
                        )
            if step % 2 == 0:
                load_activations(activation, b, r % 2, step)
            for v in T.unroll(V):
                for j in T.unroll(2):
                    for h in T.unroll(2):
                        dequantize(
                            device.registers(pairs, j, h, 0),
                            device.permute_bytes(
                                words[step, 2 * j, v],
                                words[step, 2 * j + 1, v],
                                LOW_HALVES + h * (HIGH_HALVES - LOW_HALVES),
                            ),
                            device.registers(zeros, v, h, 0),
                        )
                for i in T.unroll(PRODUCTS):
                    for j in T.unroll(4):
                        a[j] = pairs[j // 2, j % 2, i]
                    for e in T.unroll(eights):
                        multiply(
                            device.registers(part, v * PRODUCTS + i, e, 0),
                            device.registers(a, 0),
                            device.registers(b, e, step % 2 * 2),
                        )
            load_step(inside(r + 1, step, first), cursor, words, step)
            if step % group_steps == group_steps - 1:
                for v in T.unroll(V):
                    for i in T.unroll(PRODUCTS):
                        device.unpack_f16(device.registers(factor, 0), scale[p, v, i])
                        s = T.meta_var(v * PRODUCTS + i)
                        for e in T.unroll(eights):
                            for c in T.unroll(4):
                                total[s, e, c] = total[s, e, c] + factor[c // 2] * part[s, e, c]
                load_group(
                    inside(r + 1, p * group_steps, first),
                    first + (r + 1) * ROUND + p * group_steps * 16,
                    word, qzeros, scales, scale, zero, p,
                )  # fmt: skip

    @T.inline
    def body(m, x, parameters, bias, out, block, warp, lane):
        qweight, qzeros, scales = parameters
        shared = T.meta_var(device.dynamic_shared(shared_floats, "float32"))
        words = T.alloc_buffer((STEPS, 4, V), "uint32", scope="local")
        scale = T.alloc_buffer((round_groups, V, 4), "uint32", scope="local")
        zero = T.alloc_buffer((round_groups, V, 1), "uint32", scope="local")
        part = T.alloc_buffer((stripes, eights, 4), "float32", scope="local")
        total = T.alloc_buffer((stripes, eights, 4), "float32", scope="local")
        cursor = T.alloc_buffer((1,), "uint64", scope="local")
        source = T.alloc_buffer((1,), "uint64", scope="local")
        k = T.alloc_buffer((2,), "int32", scope="local")
        place = T.alloc_buffer((1,), "uint32", scope="local")
        matrices = T.alloc_buffer((eights,), "uint32", scope="local")
        activation = T.meta_var((source, k, place, matrices))
        first = T.meta_var(warp * rounds * ROUND)
        # Lanes beyond the last word read it again; nobody stores what comes of it.
        word = T.meta_var(T.min((block * 8 + lane // 4) * V, shape.words - V))

        device.clear(words)
        device.clear(scale)
        device.clear(zero)
        device.clear(total)
        cursor[0] = device.global_cursor(T.address_of(qweight[first + lane % 4 * 2, word]))
        for step in T.unroll(STEPS):
            load_step(inside(0, step, first), cursor, words, step)
        for p in T.unroll(round_groups):
            load_group(
                inside(0, p * group_steps, first), first + p * group_steps * 16,
                word, qzeros, scales, scale, zero, p,
            )  # fmt: skip
        seek_activations(
            activation, m, x, shared, warp, lane, first, T.min(first + rounds * ROUND, K)
        )
        copy_round(activation, m, lane, 0)
        for r in T.serial(rounds, annotations={"disable_unroll": True}):
            device.wait_copies(0)()
            device.sync_warp()
            if r + 1 < rounds:
                copy_round(activation, m, lane, (r + 1) % 2)
            cursor[0] = cursor[0] + T.uint64(ROUND * row_bytes)
            multiply_round(
                r, first, word, parameters, cursor, activation, (words, scale, zero), part, total
            )
        T.tvm_storage_sync("shared")
        reduce_and_store(
            epilogue, sums, m, block * (8 * V * PACK), warp, lane, shared, total, bias, out
        )

    return body
