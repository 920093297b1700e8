"""Many rows: blocks of the weight go through workgroup memory as fp32, registers hold the sums.

A workgroup computes a block of rows by 64 outputs. Its slices, 128 invocations each, take turns at
tiles of 64 inputs and are added up at the end. In a stage, 16 inputs of the activations and of the
weights lie in workgroup memory, in vectors of four inputs, so that neither is transposed on its way
there. What the next stage wants is on its way from memory while a stage is multiplied.
"""

from __future__ import annotations

from typing import Any

from tir_kernels._tvm import T
from tir_kernels.layouts import TILE_K
from tir_kernels.vulkan.epilogue import Epilogue
from tir_kernels.vulkan.reading import Reader
from tir_kernels.vulkan.schedule import COLUMNS, TEAM, ManyRows
from tir_kernels.vulkan.stages import PITCH, STAGE, STAGES, RowStage, Weights


def many_rows(reader: Reader, weights: Weights, schedule: ManyRows, epilogue: Epilogue) -> Any:
    """A block builder (see `launch`) for any m. reader: of activations."""
    workgroup = many_rows_workgroup(reader, weights, schedule, epilogue)

    @T.inline
    def kernel(m, count, first_column, x_view, operands, bias, out):
        for block in T.thread_binding(
            T.ceildiv(count * weights.unit, COLUMNS), thread="blockIdx.x"
        ):
            for block_row in T.thread_binding(T.ceildiv(m, schedule.rows), thread="blockIdx.y"):
                for slice_ in T.thread_binding(schedule.slices, thread="threadIdx.y"):
                    for thread in T.thread_binding(TEAM, thread="threadIdx.x"):
                        place = T.meta_var((block, block_row, slice_, thread))
                        workgroup(place, m, count, first_column, x_view, operands, bias, out)

    return kernel


def many_rows_workgroup(
    reader: Reader, weights: Weights, schedule: ManyRows, epilogue: Epilogue
) -> Any:
    """One workgroup of them: an inline builder that takes what a block builder takes, and before
    that its place (block, block_row, slice, thread).
    """
    rows, tall, wide, slices = schedule.rows, schedule.tall, schedule.wide, schedule.slices
    across, down = schedule.across, schedule.down
    tiles = -(-reader.K // TILE_K)
    turns = -(-tiles // slices)
    row_stage = RowStage(reader, rows, exact=turns * slices * TILE_K == reader.K)
    load_rows, store_rows = row_stage.load(), row_stage.store()
    sum_vectors = tall * wide // 4
    width = epilogue.width

    def column(thread, j):
        """Of an invocation's j-th output; even ones and the next are 8 apart, as silu wants it."""
        return (thread % across % 8 + j % 2 * 8) + (
            thread % across // 8 + j // 2 * (across // 8)
        ) * 16

    @T.inline
    def multiply(thread, slice_, xs, ws, total):
        x4 = T.alloc_buffer((4,), "float32", scope="local")
        w4 = T.alloc_buffer((wide * 4,), "float32", scope="local")
        for v in range(STAGE // 4):
            for j in T.unroll(wide):
                w4[T.ramp(4 * j, 1, 4)] = ws[(slice_ * COLUMNS + column(thread, j)) * PITCH + v]
            for i in T.unroll(tall):
                x4[T.ramp(0, 1, 4)] = xs[(slice_ * rows + thread // across + i * down) * PITCH + v]
                for e in T.unroll(4):
                    for j in T.unroll(wide):
                        total[i * wide + j] = total[i * wide + j] + x4[e] * w4[4 * j + e]

    @T.inline
    def add_slices(thread, slice_, ws, total):
        if slice_ > 0:
            for n in T.unroll(sum_vectors):
                ws[((slice_ - 1) * sum_vectors + n) * TEAM + thread] = total[T.ramp(4 * n, 1, 4)]
        T.tvm_storage_sync("shared")
        if slice_ == 0:
            for s in T.unroll(slices - 1):
                for n in T.unroll(sum_vectors):
                    total[T.ramp(4 * n, 1, 4)] = (
                        total[T.ramp(4 * n, 1, 4)] + ws[(s * sum_vectors + n) * TEAM + thread]
                    )

    @T.inline
    def store(m, row, first_column, thread, total, bias, out):
        for i in T.unroll(tall):
            if row + i * down < m:
                for j in T.unroll(wide):
                    place = T.meta_var(first_column + column(thread, j))
                    if place < width:
                        out[row + i * down, place] = epilogue.linear(
                            bias, place, total[i * wide + j]
                        )

    @T.inline
    def store_silu(m, row, first_column, thread, total, bias, out):
        for i in T.unroll(tall):
            if row + i * down < m:
                for j in T.unroll(wide // 2):
                    gate = T.meta_var(column(thread, 2 * j))
                    place = T.meta_var(first_column + gate // 16 * 8 + gate % 8)
                    if place < width:
                        out[row + i * down, place] = epilogue.silu_multiply(
                            bias, place, total[i * wide + 2 * j], total[i * wide + 2 * j + 1]
                        )

    finish = store_silu if epilogue.silu else store

    @T.inline
    def workgroup(place, m, count, first_column, x_view, operands, bias, out):
        block, block_row, slice_, thread = T.meta_var(place)
        xs = T.alloc_buffer((slices * rows * PITCH,), "float32x4", scope="shared")
        ws = T.alloc_buffer((slices * COLUMNS * PITCH,), "float32x4", scope="shared")
        x = T.alloc_buffer((row_stage.reads * 4,), reader.register, scope="local")
        w = T.alloc_buffer((weights.registers,), weights.dtype, scope="local")
        scales = T.alloc_buffer((weights.scales,), "float32", scope="local")
        total = T.alloc_buffer((tall * wide,), "float32", scope="local")
        first_row = T.meta_var(block_row * rows)
        for o in T.unroll(tall * wide):
            total[o] = T.float32(0)
        load_rows(x_view, m, first_row, slice_ * TILE_K, thread, x)
        weights.load(operands, count, block, T.min(slice_, tiles - 1), 0, thread, w, scales)
        for stage in range(turns * STAGES):
            store_rows(thread, x, xs, slice_ * rows * PITCH)
            weights.store(thread, stage % STAGES, w, scales, ws, slice_ * COLUMNS * PITCH)
            T.tvm_storage_sync("shared")
            tile = T.meta_var((stage + 1) // STAGES * slices + slice_)
            following = T.meta_var((stage + 1) % STAGES)
            if stage + 1 < turns * STAGES:
                k = T.meta_var(tile * TILE_K + following * STAGE)
                load_rows(x_view, m, first_row, k, thread, x)
                if following % weights.stages == 0:
                    weights.load(
                        operands, count, block, T.min(tile, tiles - 1), following, thread, w, scales
                    )
            multiply(thread, slice_, xs, ws, total)
            T.tvm_storage_sync("shared")
        if slices > 1:
            add_slices(thread, slice_, ws, total)
        if slice_ == 0:
            finish(
                m, first_row + thread // across, first_column + block * epilogue.columns(COLUMNS),
                thread, total, bias, out,
            )  # fmt: skip

    return workgroup
