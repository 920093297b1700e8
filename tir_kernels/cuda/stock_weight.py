"""4-bit weights in the stock AutoAWQ layout as the operand of 16 rows of a kernel for many rows.

A word has eight outputs of one input, while a fragment wants pairs of inputs. So every round all
warps dequantize its words into another part of shared memory, a row of outputs for each input, and
ldmatrix turns rows round on the way into fragments. That costs a barrier a round and a second trip
through shared memory; models built for a GPU have the tiled layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tir_kernels._tvm import T
from tir_kernels.cuda import device, device_gemm
from tir_kernels.cuda.tile import ManyRows, unrolled
from tir_kernels.layouts import PACK, TILE_K, TILE_N, LinearShape


@dataclass(frozen=True)
class StockWeight:
    """A `many_rows.Weight`. Parameters: (qweight, qzeros, scales) in the stock layout.

    A stage has words [inputs, outputs / 8], scales [groups, outputs] and zero points
    [groups, outputs / 8]; what is shared by all stages, dequantized weights [inputs, outputs], with
    chunk c of eight outputs of row r at place c ^ (r % 8).
    """

    shape: LinearShape
    schedule: ManyRows
    act_dtype: str

    cursors = 3  # where copies of words, scales and zero points start

    def __post_init__(self) -> None:
        schedule = self.schedule
        if schedule.outputs % 64:
            raise ValueError(f"{schedule}: outputs are not a multiple of 64")
        if self.rows_at_once > 32 or self.groups * self.row_words > schedule.threads:
            raise ValueError(f"{schedule}: threads do not suit the outputs of the stock layout")

    @property
    def registers(self) -> int:
        """A place in the dequantized weights for each stripe of the warp."""
        return self.schedule.warp_stripes

    @property
    def row_words(self) -> int:
        """Words of an input, in a block."""
        return self.schedule.outputs // PACK

    @property
    def rows_at_once(self) -> int:
        """Inputs that are dequantized at once."""
        return self.schedule.threads // self.row_words

    @property
    def inputs(self) -> int:
        """Of a round."""
        return self.schedule.warps_k * TILE_K

    @property
    def tile_groups(self) -> int:
        """Groups that a tile touches."""
        return max(1, TILE_K // self.shape.group_size)

    @property
    def groups(self) -> int:
        """Groups of a round, each counted once a tile."""
        return self.schedule.warps_k * self.tile_groups

    @property
    def bytes(self) -> int:
        """Of a stage."""
        return self.inputs * self.row_words * 4 + self.groups * self.row_words * (16 + 4)

    @property
    def scratch(self) -> int:
        """Bytes of dequantized weights."""
        return self.inputs * self.row_words * 16

    @property
    def copies(self) -> int:
        """Of a thread and round."""
        return -(-self.inputs * self.row_words // (4 * self.schedule.threads)) + 2

    def start(self) -> Any:
        """See `many_rows.Weight`."""
        row_words, tg = self.row_words, self.tile_groups
        chunks = row_words // 4  # of 16 bytes, in a row of words

        @T.inline
        def start(parameters, cursors, block, thread):
            qweight = T.meta_var(parameters[0])
            qzeros = T.meta_var(parameters[1])
            scales = T.meta_var(parameters[2])
            first = T.meta_var(block * row_words)
            cursors[0] = device.global_cursor(
                T.address_of(qweight[thread // chunks, first + thread % chunks * 4])
            )
            cursors[1] = device.global_cursor(
                T.address_of(scales[thread // row_words % tg, (first + thread % row_words) * PACK])
            )
            cursors[2] = device.global_cursor(
                T.address_of(qzeros[thread // chunks % tg, first + thread % chunks * 4])
            )

        return start

    def copy(self) -> Any:
        """See `many_rows.Weight`."""
        shape, threads, row_words = self.shape, self.schedule.threads, self.row_words
        word_copies, inputs, groups = self.copies - 2, self.inputs, self.groups
        tg = self.tile_groups
        chunks = row_words // 4
        at_once = threads // chunks  # inputs
        scales_at = inputs * row_words * 4
        zeros_at = scales_at + groups * row_words * 16
        aligned = shape.words % 4 == 0

        def how(move):
            return move.sixteen if aligned else move.elements

        def words_left(block, thread):
            return shape.words - block * row_words - thread % chunks * 4

        def size(inside, left):
            """Of 16 bytes of words, or less where they are copied element by element."""
            full = 16 if aligned else T.min(4 * left, 16)
            return full if inside is None else T.if_then_else(inside, full, 0)

        def input_inside(tile, k, last):
            return None if last is None else tile * TILE_K + k < shape.K

        def group_of(tile):
            return tile * TILE_K // shape.group_size

        def group_inside(tile, thread, last):
            group = group_of(tile) + thread % tg
            return None if last is None else group < shape.groups

        @T.inline
        def copy(move, first, buffer, stage, cursors, block, thread, tile, last):
            left = T.meta_var(words_left(block, thread))
            for j in unrolled(word_copies):
                if T.And(left > 0, thread // chunks + j * at_once < inputs):
                    how(move)(
                        first + j, buffer,
                        stage + T.Cast("uint32", thread * 16), j * threads * 16,
                        cursors[0] + T.Cast("uint64", tile) * T.uint64(TILE_K * shape.words * 4),
                        j * at_once * shape.words * 4,
                        size(input_inside(tile, thread // chunks + j * at_once, last), left),
                    )  # fmt: skip
            scale_row = T.meta_var(thread // row_words)
            scale_tile = T.meta_var(tile + scale_row // tg)
            if T.And(scale_row < groups, block * row_words + thread % row_words < shape.words):
                move.sixteen(
                    first + word_copies, buffer,
                    stage + T.Cast("uint32", thread * 16), scales_at,
                    cursors[1] + T.Cast("uint64", group_of(scale_tile) * shape.N * 2), 0,
                    16 if last is None else T.if_then_else(
                        group_inside(scale_tile, scale_row, last), 16, 0
                    ),
                )  # fmt: skip
            zero_row = T.meta_var(thread // chunks)
            zero_tile = T.meta_var(tile + zero_row // tg)
            if T.And(zero_row < groups, left > 0):
                how(move)(
                    first + word_copies + 1, buffer,
                    stage + T.Cast("uint32", thread * 16), zeros_at,
                    cursors[2] + T.Cast("uint64", group_of(zero_tile) * shape.words * 4), 0,
                    size(group_inside(zero_tile, zero_row, last), left),
                )  # fmt: skip

        return copy

    def read(self) -> Any:
        """See `many_rows.Weight`. Ends with all warps having dequantized the round."""
        SN, row_words, tg = self.schedule.warp_stripes, self.row_words, self.tile_groups
        at_once, groups = self.rows_at_once, self.groups
        group_inputs = TILE_K // tg
        scales_at = self.inputs * row_words * 4
        zeros_at = scales_at + groups * row_words * 16
        dequantize = device.dequantize(self.act_dtype)
        zero_points = device.zero_points(self.act_dtype)
        convert = device_gemm.convert_scales(self.act_dtype)
        scale_outputs = device_gemm.scale_outputs(self.act_dtype)

        @T.inline
        def dequantize_group(stage, scratch, thread, g, zeros, scales, d):
            column = T.meta_var(thread % row_words)
            row = T.meta_var(thread // row_words)
            device_gemm.load_shared_at(
                device.registers(scales, 0), stage + T.Cast("uint32", column * 16),
                scales_at + g * row_words * 16,
            )  # fmt: skip
            convert(device.registers(scales, 0))
            zero_points(
                device.registers(zeros, 0),
                device_gemm.load_shared_word_at(
                    stage + T.Cast("uint32", column * 4), zeros_at + g * row_words * 4
                ),
            )
            for i in unrolled(group_inputs // at_once):
                k = T.meta_var(g * group_inputs + i * at_once + row)
                dequantize(
                    device.registers(d, 0),
                    device_gemm.load_shared_word_at(
                        stage + T.Cast("uint32", thread * 4),
                        (g * group_inputs + i * at_once) * row_words * 4,
                    ),
                    device.registers(zeros, 0),
                )
                scale_outputs(device.registers(d, 0), device.registers(scales, 0))
                device_gemm.store_shared_at(
                    scratch
                    + T.Cast("uint32", (k * row_words + T.bitwise_xor(column, k % 8)) * 16),
                    0, device.registers(d, 0),
                )  # fmt: skip

        @T.inline
        def read(registers, stage, scratch, warp_n, warp_k, lane, thread):
            zeros = T.alloc_buffer((4,), "uint32", scope="local")
            scales = T.alloc_buffer((4,), "uint32", scope="local")
            d = T.alloc_buffer((4,), "uint32", scope="local")
            for g in T.unroll(groups):
                dequantize_group(stage, scratch, thread, g, zeros, scales, d)
            T.tvm_storage_sync("shared")
            for s in T.unroll(SN):
                # Matrices of a fragment: outputs 0 to 7 and 8 to 15 of the first eight inputs,
                # then of the other eight.
                k = T.meta_var(warp_k * TILE_K + lane // 16 * 8 + lane % 8)
                chunk = T.meta_var((warp_n * SN + s) * 2 + lane // 8 % 2)
                registers[s] = scratch + T.Cast(
                    "uint32", (k * row_words + T.bitwise_xor(chunk, lane % 8)) * 16
                )

        return read

    def fragment(self) -> Any:
        """See `many_rows.Weight`."""
        row_words = self.row_words

        @T.inline
        def fragment(a, first, registers, stage, warp_n, warp_k, lane, step, s):
            device_gemm.load_matrices_trans_at(
                device.registers(a, first + 4 * s), registers[s], step * TILE_N * row_words * 16
            )

        return fragment
