"""Few rows times 4-bit weights in the stock layout: every weight is read once.

A word of the stock layout has eight outputs of one input, so an invocation keeps eight sums for
each row and walks down K. Neighbouring invocations read neighbouring words; the workgroup's slices
take turns at runs of 32 inputs, which share their scales and zero points.
"""

from __future__ import annotations

from typing import Any

from tir_kernels._tvm import T
from tir_kernels.layouts import PACK, LinearShape, nibble_column
from tir_kernels.vulkan.epilogue import Epilogue, Sums, reduce_and_store
from tir_kernels.vulkan.limits import Limits
from tir_kernels.vulkan.reading import Reader
from tir_kernels.vulkan.schedule import StockFewRows
from tir_kernels.vulkan.unpack import magic, magic_zero

RUN = 32  # inputs that share a scale in any layout


def stock_few_rows(
    shape: LinearShape,
    reader: Reader,
    schedule: StockFewRows,
    epilogue: Epilogue,
    limits: Limits,
) -> Any:
    """A block builder (see `launch`) for m <= schedule.rows and the operands of `launch.stock`."""
    lanes, invocations = schedule.words, schedule.invocations
    workgroup = stock_few_rows_workgroup(shape, reader, schedule, epilogue, limits)

    @T.inline
    def kernel(m, count, first_column, x_view, operands, bias, out):
        for block in T.thread_binding(T.ceildiv(count, lanes), thread="blockIdx.x"):
            for thread in T.thread_binding(invocations, thread="threadIdx.x"):
                place = T.meta_var((block, thread))
                workgroup(place, m, count, first_column, x_view, operands, bias, out)

    return kernel


def stock_few_rows_workgroup(
    shape: LinearShape,
    reader: Reader,
    schedule: StockFewRows,
    epilogue: Epilogue,
    limits: Limits,
) -> Any:
    """One workgroup of them: an inline builder that takes what a block builder takes, and before
    that its place (block, thread).
    """
    K, G = shape.K, shape.group_size
    rows, lanes, slices, depth = schedule.rows, schedule.words, schedule.slices, schedule.depth
    runs = K // RUN
    width = reader.width
    reads = depth * 4 // width
    fetch, convert = reader.fetch(exact=True), reader.convert()
    sums = Sums(
        rows,
        schedule.invocations,
        pairs=PACK // 2,
        members=slices,
        slot=lambda p: p % 4,
        member=lambda p, c: c * lanes + p // 4,
        columns=lambda p: (2 * p, 2 * p + 1),
    )
    finish = reduce_and_store(sums, epilogue, limits.workgroup_bytes)

    @T.inline
    def load_group(operands, group, word, zero, scale):
        _, qzeros, scale_pairs = T.meta_var(operands)
        both = T.alloc_buffer((1,), "int32", scope="local")
        for h in T.unroll(PACK // 2):
            scale[T.ramp(2 * h, 1, 2)] = T.Cast("float32x2", scale_pairs[group, word * 4 + h])
        both[0] = qzeros[group, word]
        for i in T.unroll(PACK):
            zero[i] = magic_zero(T.bitwise_and(T.shift_right(both[0], 4 * i), 15), i % 4)

    @T.inline
    def multiply(operands, m, k, word, x_view, zero, scale, total):
        qweight = T.meta_var(operands[0])
        packed = T.alloc_buffer((depth * 4,), "int32", scope="local")
        registers = T.alloc_buffer((rows * reads * 4,), reader.register, scope="local")
        values = T.alloc_buffer((width,), "float32", scope="local")
        inputs = T.alloc_buffer((rows * depth * 4,), "float32", scope="local")
        weight = T.alloc_buffer((depth * 4,), "float32", scope="local")
        for u in T.unroll(depth * 4):
            packed[u] = qweight[k + u, word]
        for r in T.unroll(rows):
            for n in T.unroll(reads):
                fetch(
                    x_view, T.min(r, m - 1) if rows > 1 else 0, k + n * width,
                    registers, r * reads + n,
                )  # fmt: skip
        for n in T.unroll(rows * reads):
            convert(registers, n, values)
            for i in T.unroll(width):
                inputs[n * width + i] = values[i]
        for i in T.unroll(PACK):
            column = T.meta_var(nibble_column(i))
            for u in T.unroll(depth * 4):
                weight[u] = scale[column] * (
                    magic(T.shift_right(packed[u], i // 4 * 16), i % 4) - zero[i]
                )
            for r in T.unroll(rows):
                for u in T.unroll(depth * 4):
                    total[r * PACK + column] = (
                        total[r * PACK + column] + inputs[r * depth * 4 + u] * weight[u]
                    )

    @T.inline
    def workgroup(place, m, count, first_column, x_view, operands, bias, out):
        block, thread = T.meta_var(place)
        scale = T.alloc_buffer((PACK,), "float32", scope="local")
        zero = T.alloc_buffer((PACK,), "float32", scope="local")
        total = T.alloc_buffer((rows * PACK,), "float32", scope="local")
        word = T.meta_var(T.min(block * lanes + thread % lanes, count - 1))
        for o in T.unroll(rows * PACK):
            total[o] = T.float32(0)
        for turn in range(-(-runs // slices)):
            run = T.meta_var(turn * slices + thread // lanes)
            if run < runs:
                load_group(operands, run * RUN // G, word, zero, scale)
                for part in range(RUN // (depth * 4)):
                    k = T.meta_var(run * RUN + part * depth * 4)
                    multiply(operands, m, k, word, x_view, zero, scale, total)
        finish(m, first_column + block * lanes * PACK, thread, total, bias, out)

    return workgroup
