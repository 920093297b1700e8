"""Work across the lanes of vectors, by shuffles that every instruction set has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tir_kernels._tvm import T, Target
from tir_kernels.cpu.tiling import tiling_of

PART = 4  # fp32 lanes of a 128-bit part: x86's cheap shuffles stay within these


def lanes_for(target: Target, size: int) -> int:
    """The widest fp32 vector of the target that walks `size` values without a tail."""
    lanes = tiling_of(target).lanes
    while size % lanes:
        lanes //= 2
    return lanes


def fold(lanes: int, combine: Callable[[Any, Any], Any]) -> Any:
    """TIR (vectors, i): row i of vectors [., lanes] becomes its lanes, combined, in every lane."""
    every = T.ramp(0, 1, lanes)

    def turn_by(shift: int) -> Any:
        turned = [(j + shift) % lanes for j in range(lanes)]

        @T.inline
        def step(vectors, i):
            vectors[i, every] = combine(vectors[i, every], T.Shuffle([vectors[i, every]], turned))

        return step

    return _in_turn([turn_by(1 << k) for k in reversed(range(lanes.bit_length() - 1))])


def sum_parts(lanes: int) -> Any:
    """TIR (vectors [min(PART, lanes), lanes]): each 128-bit part of row 0 becomes the sums of that
    part of all rows, in their order.
    """
    part = min(PART, lanes)
    even = [j + 2 * i for j in range(0, lanes, part) for i in range(part // 2)]
    # A part of the result: the sums of pairs in the first vector's part, then in the second's.
    index = [
        lane + lanes * which
        for j in range(0, lanes, part)
        for which in range(2)
        for lane in even
        if j <= lane < j + part
    ]
    return _in_turn([_add_pairs(lanes, rows, index, 1) for rows in _halves(part)])


def sum_whole(lanes: int) -> Any:
    """TIR (vectors [lanes / PART, lanes]): the sums over the parts of each vector, in row 0.

    After `sum_parts` of `lanes` vectors, PART at a time, row 0 holds the sum of each of them.
    """
    parts = max(lanes // PART, 1)
    index = [PART * 2 * (j // PART) + j % PART for j in range(lanes)]
    return _in_turn([_add_pairs(lanes, rows, index, PART) for rows in _halves(parts)])


def transpose(lanes: int) -> Any:
    """TIR (upper, lower), each [lanes / 2, lanes]: the square matrix that they are the halves of
    becomes its transpose. In halves, because TVM keeps only less than a kilobyte in registers.
    """
    half = lanes // 2
    every = T.ramp(0, 1, lanes)

    def exchange(step: int) -> Any:
        """Blocks of `step` off the diagonal change places, in rows that are `step` apart."""
        stay = [j if not j & step else lanes + j - step for j in range(lanes)]
        move = [j + step if not j & step else lanes + j for j in range(lanes)]

        @T.inline
        def rows(x, i, y, k):
            kept = T.alloc_buffer((lanes,), "float32")
            kept[every] = x[i, every]
            x[i, every] = T.Shuffle([kept[every], y[k, every]], stay)
            y[k, every] = T.Shuffle([kept[every], y[k, every]], move)

        @T.inline
        def halves(upper, lower):
            for i in T.unroll(half):
                rows(upper, i, lower, i)

        @T.inline
        def within(upper, lower):
            for i in T.unroll(half // 2):
                first = T.meta_var(i // step * (2 * step) + i % step)
                rows(upper, first, upper, first + step)
                rows(lower, first, lower, first + step)

        return halves if step == half else within

    return _in_turn([exchange(1 << k) for k in reversed(range(lanes.bit_length() - 1))])


def _halves(count: int) -> list[int]:
    """4 -> [2, 1]: what is left after each step of adding neighbours."""
    return [count >> step for step in range(1, count.bit_length())]


def _add_pairs(lanes: int, rows: int, first: Sequence[int], step: int) -> Any:
    """TIR: row i becomes rows 2i and 2i + 1, taken at `first`, plus the same `step` lanes on."""
    every = T.ramp(0, 1, lanes)
    second = [j + step for j in first]

    @T.inline
    def add(vectors):
        for i in T.unroll(rows):
            pair = T.meta_var([vectors[2 * i, every], vectors[2 * i + 1, every]])
            vectors[i, every] = T.Shuffle(pair, first) + T.Shuffle(pair, second)

    return add


def _in_turn(steps: Sequence[Any]) -> Any:
    """One TIR function that runs all of them with its arguments."""
    if not steps:

        @T.inline
        def nothing(*arguments):
            pass

        return nothing
    if len(steps) == 1:
        return steps[0]
    head, tail = steps[0], _in_turn(steps[1:])

    @T.inline
    def both(*arguments):
        head(*arguments)
        tail(*arguments)

    return both
