"""How rows of activations and each layout's weights come into workgroup memory in stages.

A stage is 16 inputs of a block of rows or outputs, as fp32 in vectors of four inputs. Loading asks
memory for it, into registers of the invocations, and storing makes fp32 of it and puts it into
workgroup memory: a kernel does something useful in between.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tir_kernels._tvm import T
from tir_kernels.layouts import PACK, TILE_K, TILE_N, LinearShape
from tir_kernels.vulkan.reading import Reader
from tir_kernels.vulkan.schedule import COLUMNS, LANES, TEAM
from tir_kernels.vulkan.unpack import magic, magic_zero

STAGE = 16  # inputs
STAGES = TILE_K // STAGE
PITCH = STAGE // 4 + 1  # vectors; odd, so that rows that are read at once lie in different banks


@dataclass(frozen=True)
class RowStage:
    """`rows` rows as a reader sees them, brought by 128 invocations.

    zeros: what is beyond K becomes zero. exact: nothing is.
    """

    reader: Reader
    rows: int
    exact: bool
    zeros: bool = True

    @property
    def row_reads(self) -> int:
        return STAGE // self.reader.width

    @property
    def reads(self) -> int:
        """Of an invocation; four registers each."""
        return -(-self.rows * self.row_reads // TEAM)

    def load(self) -> Any:
        """An inline builder (view, count, first_row, k, thread, registers); count: rows of view."""
        rows, row_reads, reads = self.rows, self.row_reads, self.reads
        stride = 2 if self.reader.tiled else self.reader.width
        fetch = self.reader.fetch(self.exact, self.zeros)

        @T.inline
        def load(view, count, first_row, k, thread, registers):
            for n in T.unroll(reads):
                index = T.meta_var(thread + n * TEAM)
                if index < rows * row_reads:
                    row = T.meta_var(T.min(first_row + index // row_reads, count - 1))
                    fetch(view, row, k + index % row_reads * stride, registers, n)

        return load

    def store(self) -> Any:
        """An inline builder (thread, registers, shared, first): row r goes to shared[first + r *
        PITCH] and the three vectors behind it.
        """
        rows, row_reads, reads = self.rows, self.row_reads, self.reads
        width, fours = self.reader.width, self.reader.fours
        convert = self.reader.convert()

        @T.inline
        def store(thread, registers, shared, first):
            values = T.alloc_buffer((width,), "float32", scope="local")
            for n in T.unroll(reads):
                index = T.meta_var(thread + n * TEAM)
                if index < rows * row_reads:
                    place = T.meta_var(index // row_reads * PITCH + index % row_reads * fours)
                    convert(registers, n, values)
                    for e in T.unroll(fours):
                        shared[first + place + e] = values[T.ramp(4 * e, 1, 4)]

        return store


@dataclass(frozen=True)
class Weights:
    """How 128 invocations bring the weights of 64 outputs.

    unit: outputs of a unit (see `launch`). registers, dtype: what an invocation holds between load
    and store, and `scales` fp32 beside. stages: for which a load brings weights, 1 or 4 (a tile).
    load: an inline builder (operands, count, block, tile, stage, thread, registers, scales).
    store: an inline builder (thread, stage, registers, scales, shared, first): output o goes to
    shared[first + o * PITCH] and the three vectors behind it.
    """

    unit: int
    registers: int
    dtype: str
    scales: int
    stages: int
    load: Any
    store: Any


def tiled_weights(shape: LinearShape) -> Weights:
    """16 bytes of a tile last an invocation for four stages."""
    G, groups = shape.group_size, shape.groups
    tile_groups = max(1, TILE_K // G)

    @T.inline
    def load(operands, count, block, tile, stage, thread, registers, scales):
        words, zeros, scale_pairs = T.meta_var(operands)
        lane = T.meta_var(thread % LANES)
        stripe = T.meta_var(T.min(block * (COLUMNS // TILE_N) + thread // LANES, count - 1))
        # By way of a variable that is nothing but a vector: else four words are loaded singly.
        four = T.alloc_buffer((4,), "int32", scope="local")
        four[T.ramp(0, 1, 4)] = words[stripe, tile, lane]
        for u in T.unroll(4):
            registers[u] = four[u]
        for p in T.unroll(tile_groups):
            group = T.meta_var(T.min(tile * TILE_K // G + p, groups - 1))
            registers[4 + p] = zeros[stripe, group, lane // 16]
            scales[T.ramp(2 * p, 1, 2)] = T.Cast("float32x2", scale_pairs[stripe, group, lane // 4])

    def of_group(stage, values, first, second):
        """What the stage's group has; a tile has one group, or two for stages 0, 1 and 2, 3."""
        if tile_groups == 1:
            return values[first]
        return T.Select(stage < 2, values[first], values[second])

    def weight(lane, stage, registers, scales, h, p):
        """Of output 8h + g and the p-th of four inputs."""
        i = p // 2 * 2 + h
        word = T.shift_right(registers[0], p % 2 * 16)
        zeros = of_group(stage, registers, 4, 5)
        z = T.bitwise_and(T.shift_right(zeros, lane // 4 % 4 * 8 + 4 * h), 15)
        return (magic(word, i) - magic_zero(z, i)) * of_group(stage, scales, h, 2 + h)

    @T.inline
    def store(thread, stage, registers, scales, shared, first):
        four = T.alloc_buffer((4,), "float32", scope="local")
        lane = T.meta_var(thread % LANES)
        for h in T.unroll(2):
            output = T.meta_var(thread // LANES * TILE_N + 8 * h + lane // 4)
            for p in T.unroll(4):
                four[p] = weight(lane, stage, registers, scales, h, p)
            shared[first + output * PITCH + lane % 4] = four[T.ramp(0, 1, 4)]
        # The next stage's word moves up: registers cannot be indexed by a loop.
        for u in T.unroll(3):
            registers[u] = registers[u + 1]

    return Weights(TILE_N, 4 + tile_groups, "int32", 2 * tile_groups, STAGES, load, store)


def stock_weights(shape: LinearShape) -> Weights:
    """An invocation takes two neighbouring outputs of a word at four inputs."""
    K, G, groups = shape.K, shape.group_size, shape.groups

    @T.inline
    def load(operands, count, block, tile, stage, thread, registers, scales):
        qweight, qzeros, scale_pairs = T.meta_var(operands)
        word = T.meta_var(T.min(block * (COLUMNS // PACK) + thread % 8, count - 1))
        k = T.meta_var(tile * TILE_K + stage * STAGE + thread // 32 * 4)
        group = T.meta_var(T.min(k // G, groups - 1))
        for u in T.unroll(4):
            registers[u] = qweight[T.min(k + u, K - 1), word]
        registers[4] = qzeros[group, word]
        scales[T.ramp(0, 1, 2)] = T.Cast(
            "float32x2", scale_pairs[group, word * 4 + thread // 8 % 4]
        )

    @T.inline
    def store(thread, stage, registers, scales, shared, first):
        four = T.alloc_buffer((4,), "float32", scope="local")
        for h in T.unroll(2):
            # Neighbouring outputs lie 16 bits apart in a word.
            shift = T.meta_var(thread // 8 % 4 * 4 + 16 * h)
            output = T.meta_var(thread % 8 * PACK + thread // 8 % 4 * 2 + h)
            z = T.meta_var(T.bitwise_and(T.shift_right(registers[4], shift), 15))
            for u in T.unroll(4):
                four[u] = scales[h] * (
                    magic(T.shift_right(registers[u], shift), 0) - magic_zero(z, 0)
                )
            shared[first + output * PITCH + thread // 32] = four[T.ramp(0, 1, 4)]

    return Weights(PACK, 5, "int32", 2, 1, load, store)


def dense_weights(reader: Reader) -> Weights:
    """Unquantized weights are rows like those of the activations."""
    # Activations beyond K are zero, so it does not matter which weights they meet.
    rows = RowStage(reader, COLUMNS, exact=reader.K % TILE_K == 0, zeros=False)
    load_rows, store_rows = rows.load(), rows.store()

    @T.inline
    def load(operands, count, block, tile, stage, thread, registers, scales):
        k = T.meta_var(tile * TILE_K + stage * STAGE)
        load_rows(operands, count, block * COLUMNS, k, thread, registers)

    @T.inline
    def store(thread, stage, registers, scales, shared, first):
        store_rows(thread, registers, shared, first)

    return Weights(1, rows.reads * 4, reader.register, 1, 1, load, store)
