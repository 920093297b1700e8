"""From global memory to shared memory, 16 bytes a thread at a time, in stages.

A row of shared memory is 64 inputs of one token (or one output), 128 bytes, as eight chunks of 16;
chunk c of row r lies at place c ^ (r % 8). So the eight rows of a matrix that ldmatrix reads at one
place meet all 32 banks once, and so do the eight chunks of a row that are written at once. It is
also what Hopper's tensor cores call the 128-byte swizzle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tir_kernels._tvm import T
from tir_kernels.cuda import device, device_gemm
from tir_kernels.cuda.tile import ROW, unrolled
from tir_kernels.layouts import TILE_K

CHUNK = 8  # 16-bit elements in 16 bytes


@dataclass(frozen=True)
class Move:
    """How bytes move: of(index, buffer, shared, shared_offset, source, offset, size) -> a call.

    index numbers a thread's copies in a round and names its part of `buffer` (uint32, local), for
    moves through registers. size is that of the copy, or 0 for zeros; for `elements`, which stores
    16 bytes, any even number up to that, and its source need not be aligned.
    """

    sixteen: Callable[..., Any]
    eight: Callable[..., Any]
    elements: Callable[..., Any]


def _through_registers(function: Callable[..., Any]) -> Callable[..., Any]:
    def move(index, buffer, *address):
        return function(device.registers(buffer, 4 * index), *address)

    return move


def _at_once(_index, _buffer, *address):
    return device_gemm.copy_elements_at(*address)


# Asynchronously, from sm_80 on.
ASYNC = Move(
    lambda _index, _buffer, *address: device_gemm.copy_async_at(*address),
    lambda _index, _buffer, *address: device_gemm.copy_async_8_at(*address),
    _at_once,
)
# Without cp.async, in two halves: before a stage is multiplied, and after it.
LOAD = Move(
    _through_registers(lambda d, _to, _at, *source: device_gemm.load_or_zero_at(d, *source)),
    _through_registers(lambda d, _to, _at, *source: device_gemm.load_or_zero_8_at(d, *source)),
    _at_once,
)
STORE = Move(
    _through_registers(lambda d, to, at, *_source: device_gemm.store_shared_at(to, at, d)),
    _through_registers(lambda d, to, at, *_source: device_gemm.store_shared_8_at(to, at, d)),
    lambda *_: T.evaluate(0),
)


@dataclass(frozen=True)
class Rows:
    """Copies of `rows` rows of 64 inputs, from each of `tiles` consecutive tiles of a row-major
    matrix [.., K] of 16-bit elements.

    threads // 8 rows are copied at once; either this or `rows` divides the other. Where K is not a
    multiple of 8, rows are not aligned, and are copied element by element: slow, for odd models.
    """

    rows: int
    tiles: int
    threads: int
    K: int

    @property
    def bytes(self) -> int:
        """In shared memory: tile by tile, row by row."""
        return self.rows * self.tiles * ROW

    @property
    def copies(self) -> int:
        """Of a thread."""
        return -(-self.rows * self.tiles * 8 // self.threads)

    @property
    def at_once(self) -> int:
        """Rows that are copied at once, counting tiles one after the other."""
        return self.threads // 8

    def row(self, thread: Any) -> Any:
        """The first row of a thread within its tile."""
        return thread // 8 % self.rows

    def column(self, thread: Any) -> Any:
        """The first input of a thread's chunks within the round."""
        return thread // 8 // self.rows * TILE_K + thread % 8 * CHUNK

    def shared_offset(self, thread: Any) -> Any:
        """Where in the stage a thread's first chunk goes: it and the rest have one row % 8."""
        chunk = T.bitwise_xor(thread % 8, thread // 8 % 8)
        return thread // 8 * ROW + chunk * 16

    def step(self, j: Any) -> tuple[Any, Any]:
        """(rows, tiles) from a thread's first chunk to its copy j."""
        if self.at_once >= self.rows:
            return 0, j * (self.at_once // self.rows)
        per_tile = self.rows // self.at_once
        return j % per_tile * self.at_once, j // per_tile

    def copier(self) -> Any:
        """An inline (move, first, buffer, shared, source, thread, rows_left, k, limit).

        first: the number of the thread's first copy. shared, source: cursors of its first chunk in
        the stage and in global memory. rows_left: rows from the thread's first on that exist;
        others are not copied. k: the input of its first chunk; from `limit` on, zeros are stored.
        limit is None where all inputs of every round exist.
        """
        K, threads, chunks = self.K, self.threads, self.rows * self.tiles * 8
        aligned = K % CHUNK == 0

        def is_copied(j, thread, rows_left):
            has_row = self.step(j)[0] < rows_left
            return has_row if chunks % threads == 0 else T.And(has_row, thread < chunks)

        def size(j, k, limit):
            inside = k + self.step(j)[1] * TILE_K
            if limit is None:
                return 16
            if aligned:
                return T.if_then_else(inside < limit, 16, 0)
            return T.max(0, T.min(2 * (limit - inside), 16))

        def how(move):
            return move.sixteen if aligned else move.elements

        def source_offset(j):
            rows, tiles = self.step(j)
            return (rows * K + tiles * TILE_K) * 2

        @T.inline
        def copy(move, first, buffer, shared, source, thread, rows_left, k, limit):
            for j in unrolled(self.copies):
                if is_copied(j, thread, rows_left):
                    how(move)(
                        first + j, buffer, shared, j * self.at_once * ROW,
                        source, source_offset(j), size(j, k, limit),
                    )  # fmt: skip

        return copy
