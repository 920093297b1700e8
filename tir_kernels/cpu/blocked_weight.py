"""What kernels need to know of a weight in blocks of 16 outputs, of 4 bits or of 8.

A word holds several inputs of an output. It is multiplied as one or more vectors of bytes, its
parts, each with four activations:

* 4 bits (`layouts.BLOCKED`): a part of low nibbles and one of high ones, of different inputs;
* 8 bits (`int8_weights`): the bytes as they are, where there are instructions for that, else the
  nibbles of the same inputs, whose sums are put together with their places.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tir_kernels._tvm import T, Target, target_has_features
from tir_kernels.cpu.integer_dot import IntegerDot, integer_dot_of
from tir_kernels.cpu.prefetching import asked_for
from tir_kernels.int8_weights import OFFSET, Int8Shape
from tir_kernels.layouts import BLOCK_N, PACK, LinearShape

_LOW_NIBBLES = 0x0F0F0F0F
_TOP_BITS = -0x7F7F7F80  # of all four bytes


@dataclass(frozen=True)
class BlockedWeight:
    """N outputs, groups of inputs in each of `blocks`, words of an output in a group.

    dot: what multiplies vectors of words, dot.lanes outputs side by side.
    part(words, i): part i of a vector of words. activation(word, i): which four activations belong
    to part i of word `word`, counted in fours. shifts: of the sums of each part, in bits.
    factors: TIR (weights, b, g, first, zero, scale, at): zero points and fp32 scales of the
    dot.lanes outputs from `first` on in block b and group g, to zero[at ...] and scale[at ...].
    prefetch_factors: TIR (weights, b, g): asks for them; weights: qweight and what else there is.
    ahead: words of each output that are on their way from memory to a single row, as measured:
    the more is done with a word, the further.
    """

    N: int
    blocks: int
    groups: int
    words: int
    dot: IntegerDot
    part: Callable[[Any, Any], Any]
    activation: Callable[[Any, Any], Any]
    shifts: tuple[int, ...]
    factors: Any
    prefetch_factors: Any
    ahead: int

    @property
    def parts(self) -> int:
        return len(self.shifts)


def nibbles(words: Any, half: Any, lanes: int) -> Any:
    """The low (half 0) or high nibbles of a vector of words, one to a byte."""
    shifted = T.shift_right(words, T.broadcast(4 * half, lanes))
    return T.bitwise_and(shifted, T.broadcast(T.int32(_LOW_NIBBLES), lanes))


@T.inline
def prefetch(array, b, i):
    """Ask for array[b, i, 0]."""
    T.evaluate(asked_for(array[b, i, 0]))


def four_bit_weight(target: Target, shape: LinearShape) -> BlockedWeight:
    """weights: (qweight, qzeros, scales)."""
    dot = integer_dot_of(target)
    lanes = dot.lanes

    @T.inline
    def factors(weights, b, g, first, zero, scale, at):
        for j in T.vectorized(lanes):
            zero[at + j] = T.bitwise_and(
                T.shift_right(
                    T.Select(first + j < PACK, weights[1][b, g, 0], weights[1][b, g, 1]),
                    T.bitwise_and(first + j, PACK - 1) * 4,
                ),
                15,
            )
            scale[at + j] = T.Cast("float32", weights[2][b, g, first + j])

    @T.inline
    def prefetch_factors(weights, b, g):
        prefetch(weights[1], b, g)
        prefetch(weights[2], b, g)

    return BlockedWeight(
        shape.N,
        shape.blocks,
        shape.groups,
        shape.group_size // PACK,
        dot,
        lambda words, i: nibbles(words, i, lanes),
        lambda word, i: 2 * word + i,
        (0, 0),
        factors,
        prefetch_factors,
        48,
    )


def eight_bit_weight(target: Target, shape: Int8Shape) -> BlockedWeight:
    """weights: (qweight, scales)."""
    dot = integer_dot_of(target)
    lanes = dot.lanes
    offset, shifts = OFFSET, (0,)
    if any(target_has_features(name, target) for name in ("avx512vnni", "avxvnni")):
        part = _as_they_are
    elif target_has_features("dotprod", target):  # of signed bytes
        part, offset = _signed, 0
    else:
        part, shifts = lambda words, i: nibbles(words, i, lanes), (0, 4)

    @T.inline
    def factors(weights, b, g, first, zero, scale, at):
        for j in T.vectorized(lanes):
            zero[at + j] = offset
            scale[at + j] = T.Cast("float32", weights[1][b, g, first + j])

    @T.inline
    def prefetch_factors(weights, b, g):
        prefetch(weights[1], b, g)

    return BlockedWeight(
        shape.N,
        shape.blocks,
        shape.groups,
        shape.group_size // 4,
        dot,
        part,
        lambda word, i: word,
        shifts,
        factors,
        prefetch_factors,
        12,
    )


def _as_they_are(words: Any, i: Any) -> Any:
    return words


def _signed(words: Any, i: Any) -> Any:
    return T.bitwise_xor(words, T.broadcast(T.int32(_TOP_BITS), 4))


def group_product(planes: list[Any], zero: Any, total: Any, lanes: int) -> Any:
    """sum_k v[k] (q[k] - z) of a group in fp32, from the planes' dot products and total = sum v."""
    dots = planes[0]
    for lower in planes[1:]:
        dots = T.shift_left(dots, T.broadcast(T.int32(8), lanes)) + lower
    return T.Cast(f"float32x{lanes}", dots - zero * T.broadcast(total, lanes))


def store_outputs(out_dtype: str, N: int, width: int):
    """TIR: fp32 total[row, at .. at + width - 1] plus offsets into out[r, column ...], as far as N.

    (total, row, at, r, column, offset, out), for `width` outputs of a block; offset: column ->
    fp32.
    """

    @T.inline
    def store(total, row, at, r, column, offset, out):
        if N % BLOCK_N == 0 or column + width <= N:
            for j in T.vectorized(width):
                out[r, column + j] = T.Cast(out_dtype, total[row, at + j] + offset(column + j))
        else:
            for j in range(width):
                if column + j < N:
                    out[r, column + j] = T.Cast(out_dtype, total[row, at + j] + offset(column + j))

    return store
