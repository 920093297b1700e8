"""The two matrix products of attention in fp32, with scores transposed: a row for each key.

A strip is as many rows of queries as two vectors have lanes. With keys down and queries across,
scores = keys [t, d] @ queries^T [d, strip] and mixed^T [d, strip] = values^T @ weights [t, strip]:
the left operand is read as scalars in whatever order it lies, and the softmax over keys needs no
sum across lanes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tir_kernels._tvm import T, Target
from tir_kernels.cpu.lanes import lanes_for, transpose
from tir_kernels.cpu.tiling import tiling_of

TILE = 128  # keys that are scored together
STEP = 8  # keys that are packed together


@dataclass(frozen=True)
class Source:
    """Keys or values of one head, by their number in a tile.

    place(t): where key t lies, which 16 keys from a multiple of 16 on share; read(place, t, first,
    lanes): key t, there, `lanes` elements from `first` on, of any float type.
    """

    place: Callable[[Any], Any]
    read: Callable[[Any, Any, Any, int], Any]


@dataclass(frozen=True)
class Products:
    """How a block of attention multiplies.

    lanes: half of a strip. step: a number of keys that all others are rounded up to.
    queries(strips), keys, values, weights: shape and dtype of the buffers that hold them.

    The rest is TIR. begin(), end(): around a block of work.
    pack_queries(s, c, query, queries): half c of strip s, of which query(i, j) is row i at j.
    pack_keys(t, width, source, keys), pack_values(...): keys t to t + step of a Source, where those
    from `width` on count as zero and are not read.
    score(s, rows, keys, queries, scores): scores [1, TILE, 2 lanes] of the first `rows` keys.
    pack_weights(t, c, pair, weights): those of keys t and t + 1, of half c, as fp32 [2, lanes].
    gather(s, rows, values, weights, mixed): mixed[s] [d, 2 lanes] += of the first `rows` keys.
    """

    lanes: int
    step: int
    queries: Any
    keys: Any
    values: Any
    weights: Any
    begin: Any
    end: Any
    pack_queries: Any
    pack_keys: Any
    pack_values: Any
    score: Any
    pack_weights: Any
    gather: Any


def fp32_products(target: Target, head_dim: int, dtype: str) -> Products:
    """Products with sums in vector registers, for every target and head_dim."""
    d = head_dim
    lanes = lanes_for(target, d)
    every = T.ramp(0, 1, lanes)
    height = _rows_at_once(d, tiling_of(target).registers)
    turn = transpose(lanes)
    half = lanes // 2
    wide = f"float32x{lanes}"

    @T.inline
    def nothing():
        pass

    @T.inline
    def pack_queries(s, c, query, queries):
        for k in range(d // lanes):
            upper = T.alloc_buffer((half, lanes), "float32")
            lower = T.alloc_buffer((half, lanes), "float32")
            for i in T.unroll(half):
                upper[i, every] = T.Cast(wide, query(i, T.ramp(k * lanes, 1, lanes)))
                lower[i, every] = T.Cast(wide, query(half + i, T.ramp(k * lanes, 1, lanes)))
            turn(upper, lower)
            for i in T.unroll(half):
                queries[s, k * lanes + i, T.ramp(c * lanes, 1, lanes)] = upper[i, every]
                queries[s, k * lanes + half + i, T.ramp(c * lanes, 1, lanes)] = lower[i, every]

    @T.inline
    def pack_rows(t, width, source, rows):
        place: T.let[T.int32] = source.place(t)
        for i in range(STEP):
            if t + i < width:
                for k in range(d // lanes):
                    rows[t + i, T.ramp(k * lanes, 1, lanes)] = T.Cast(
                        wide, source.read(place, t + i, k * lanes, lanes)
                    )
            else:
                for k in range(d // lanes):
                    rows[t + i, T.ramp(k * lanes, 1, lanes)] = T.broadcast(T.float32(0), lanes)

    def part(c):
        return T.ramp(c * lanes, 1, lanes)

    def product(left, right, fresh):
        """TIR (first, depth, s, a, b, out, at): rows first to first + height of out[at]."""

        @T.inline
        def multiply(first, depth, s, a, b, out, at):
            total = T.alloc_buffer((height, lanes), "float32")
            other = T.alloc_buffer((height, lanes), "float32")
            for i in T.unroll(height):
                total[i, every] = fresh(out[at, first + i, part(0)])
                other[i, every] = fresh(out[at, first + i, part(1)])
            for k in range(depth):
                for i in T.unroll(height):
                    total[i, every] = total[i, every] + (
                        T.broadcast(left(a, first + i, k), lanes) * right(b, s, k, part(0))
                    )
                    other[i, every] = other[i, every] + (
                        T.broadcast(left(a, first + i, k), lanes) * right(b, s, k, part(1))
                    )
            for i in T.unroll(height):
                out[at, first + i, part(0)] = total[i, every]
                out[at, first + i, part(1)] = other[i, every]

        return multiply

    with_queries = product(
        left=lambda keys, t, j: keys[t, j],
        right=lambda queries, s, j, lane: queries[s, j, lane],
        fresh=lambda old: T.broadcast(T.float32(0), lanes),
    )
    with_weights = product(
        left=lambda values, j, t: values[t, j],
        right=lambda weights, s, t, lane: weights[t, lane],
        fresh=lambda old: old,
    )

    @T.inline
    def score(s, rows, keys, queries, scores):
        for i in range(T.truncdiv(rows, height)):
            with_queries(i * height, d, s, keys, queries, scores, 0)

    @T.inline
    def pack_weights(t, c, pair, weights):
        for i in T.unroll(2):
            weights[t + i, part(c)] = pair[i, every]

    @T.inline
    def gather(s, rows, values, weights, mixed):
        for i in range(d // height):
            with_weights(i * height, rows, s, values, weights, mixed, s)

    return Products(
        lanes=lanes,
        step=STEP,
        queries=lambda strips: ((strips, d, 2 * lanes), "float32"),
        keys=((TILE, d), "float32"),
        values=((TILE, d), "float32"),
        weights=((TILE, 2 * lanes), "float32"),
        begin=nothing,
        end=nothing,
        pack_queries=pack_queries,
        pack_keys=pack_rows,
        pack_values=pack_rows,
        score=score,
        pack_weights=pack_weights,
        gather=gather,
    )


def _rows_at_once(head_dim: int, registers: int) -> int:
    """Rows with two accumulators each: half of the registers, and a divisor of 8 and head_dim."""
    rows = registers // 4
    while head_dim % rows:
        rows //= 2
    return rows
