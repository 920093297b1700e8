"""What kernels for a mixture of experts have in common: whose rows, which expert.

The weights of E experts with one shape lie one after the other: every array of a linear in the
stock layout (`tir_kernels.layouts`) with E in front,

    qweight  int32   [E, K, N/8]
    qzeros   int32   [E, K/G, N/8]
    scales   float16 [E, K/G, N]

and kernels for a linear are pointed at one of them (`part`). Rows come in two ways:

*Decoding* one token, its k experts are known by number: experts int32 [1, k].

*Grouped* rows are sorted by expert, and rows indptr[e] .. indptr[e + 1] - 1 belong to expert e:
indptr int32 [E + 1], beginning with 0 and ending with the number of rows m. It is the device that
knows indptr, while it is the host that says how many blocks there are, for it knows m alone. Blocks
of `tile` rows each belong to one expert, so expert e needs ceil((indptr[e + 1] - indptr[e]) / tile)
of them. It is given the numbers from

    indptr[e] // tile + e

on, which are enough up to those of expert e + 1 and rise with e: m // tile + E numbers in all, at
most E of which have no rows, and the expert of a number is found by bisection.
"""

from __future__ import annotations

from typing import Any

from tir_kernels._tvm import T


def part(buffer: Any, first: Any, shape: tuple[Any, ...]) -> Any:
    """What lies in a buffer from its element number `first` on, as a buffer of `shape`."""
    return T.decl_buffer(shape, buffer.dtype, data=buffer.data, elem_offset=first)


def clipped(expert: Any, experts: int) -> Any:
    """A number of one of `experts` experts, whatever a router makes of values that are NaN."""
    return T.max(T.min(expert, experts - 1), 0)


def row_number(indptr: Any, expert: Any) -> Any:
    """The first row of an expert."""
    return indptr[expert]


def tile_number(tile: int) -> Any:
    """A function (indptr, expert): the first number of an expert's blocks of `tile` rows."""
    return lambda indptr, expert: indptr[expert] // tile + expert


def tiles_of(rows: Any, experts: int, tile: int) -> Any:
    """How many numbers of blocks there are."""
    return rows // tile + experts


def find_expert(experts: int, first_number: Any) -> Any:
    """An inline builder (number, indptr, found): whose row or block that is, to found [0].

    first_number: (indptr, expert) -> the first that an expert has, rising with the expert.
    found: int32 [1], local.
    """
    bits = (experts - 1).bit_length()

    @T.inline
    def find(number, indptr, found):
        found[0] = 0
        for bit in T.unroll(bits):
            # The largest expert whose first number is not above this one, bit by bit.
            other = T.meta_var(found[0] + T.shift_left(1, bits - 1 - bit))
            own = T.meta_var(first_number(indptr, T.min(other, experts)))
            if T.And(other < experts, own <= number):
                found[0] = other

    return find
