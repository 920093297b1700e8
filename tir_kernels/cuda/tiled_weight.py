"""4-bit weights in the tiled layout as the operand of 16 rows of a kernel for many rows.

Words go to shared memory as they are. A lane reads the 16 bytes of a tile that are its part of four
steps of mma, and dequantizes a word right before its step: q - z, exactly, times the scale, rounded
to the activations' type. That is thirteen instructions for the eight weights of a lane's fragment,
which the warp then multiplies with all its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tir_kernels._tvm import T
from tir_kernels.cuda import device, device_gemm
from tir_kernels.cuda.tile import ManyRows
from tir_kernels.layouts import TILE_K, TILE_N, TILE_WORDS, LinearShape

TILE_BYTES = 4 * TILE_WORDS
SCALE_BYTES = 2 * TILE_N  # of a stripe and group
ZERO_BYTES = 8


@dataclass(frozen=True)
class TiledWeight:
    """A `many_rows.Weight`. Parameters: (qweight, qzeros, scales) in the tiled layout.

    A stage has words, then scales, then zero points, each of them tile by tile, stripe by stripe.
    """

    shape: LinearShape
    schedule: ManyRows
    act_dtype: str

    def __post_init__(self) -> None:
        if 4 * self.blobs > self.schedule.threads:
            raise ValueError(f"{self.schedule}: too few threads to copy scales and zeros at once")

    @property
    def units(self) -> int:
        """Tiles of words in a stage."""
        return self.schedule.stripes * self.schedule.warps_k

    @property
    def tile_groups(self) -> int:
        """Groups that a tile touches."""
        return max(1, TILE_K // self.shape.group_size)

    @property
    def blobs(self) -> int:
        """Scales of 16 outputs in a stage, and as many zero points."""
        return self.units * self.tile_groups

    @property
    def bytes(self) -> int:
        """Of a stage."""
        return self.units * TILE_BYTES + self.blobs * (SCALE_BYTES + ZERO_BYTES)

    @property
    def copies(self) -> int:
        """Of a thread and round."""
        return -(-self.units // self.schedule.warps) + 1

    # Where a thread's copies of words start, and that of scales (the first half of the threads) or
    # zero points (the other half).
    cursors = 2
    scratch = 0

    @property
    def registers(self) -> int:
        """uint32 variables of a thread: words, zero points and scales of the warp's stripes."""
        return self.schedule.warp_stripes * (4 + 4 + 2)

    def start(self) -> Any:
        """See `many_rows.Weight`."""
        W, S, tg = self.schedule.warps, self.schedule.stripes, self.tile_groups

        @T.inline
        def start(parameters, cursors, block, thread):
            qweight = T.meta_var(parameters[0])
            qzeros = T.meta_var(parameters[1])
            scales = T.meta_var(parameters[2])
            first = T.meta_var(block * S)
            scale = T.meta_var(thread // 2)
            zero = T.meta_var(thread % (16 * W))
            cursors[0] = device.global_cursor(
                T.address_of(qweight[first + thread // 32 % S, 0, thread % 32 * 4])
            )
            if thread < 16 * W:
                cursors[1] = device.global_cursor(
                    T.address_of(scales[first + scale // tg % S, scale % tg, thread % 2 * 8])
                )
            else:
                cursors[1] = device.global_cursor(
                    T.address_of(qzeros[first + zero // tg % S, zero % tg, 0])
                )

        return start

    def copy(self) -> Any:
        """See `many_rows.Weight`."""
        shape, W, S = self.shape, self.schedule.warps, self.schedule.stripes
        units, blobs, tg, tiles = self.units, self.blobs, self.tile_groups, shape.tile_columns
        word_copies = self.copies - 1
        exact_rows = shape.tile_rows % S == 0

        def step(j):
            """(stripes, tiles) from a warp's first unit to its unit j."""
            return (0, j * (W // S)) if W >= S else (j % (S // W) * W, j // (S // W))

        def is_copied(unit, stripe):
            inside = True if units % W == 0 else unit < units
            return inside if exact_rows else T.And(inside, stripe < shape.tile_rows)

        def size(full, tile, last):
            return full if last is None else T.if_then_else(tile < last, full, 0)

        def group_bytes(tile, each):
            """From the first group to that of a tile; its further groups are the thread's own."""
            return T.Cast("uint64", tile * TILE_K // shape.group_size * each)

        def has_group(tile, blob, last):
            # The last group may lie in the first half of its tile.
            group = tile * TILE_K // shape.group_size + blob % tg
            if last is None or tg == 1:
                return last
            return T.if_then_else(group < shape.groups, last, 0)

        def tile_of(blob, tile):
            return tile + blob // tg // S

        def is_blob_copied(blob, block):
            inside = blob < blobs
            stripe = block * S + blob // tg % S
            return inside if exact_rows else T.And(inside, stripe < shape.tile_rows)

        @T.inline
        def copy(move, first, buffer, stage, cursors, block, thread, tile, last):
            unit = T.meta_var(thread // 32)
            for j in T.unroll(word_copies):
                if is_copied(unit + j * W, block * S + unit % S + step(j)[0]):
                    move.sixteen(
                        first + j, buffer,
                        stage + T.Cast("uint32", thread * 16), j * W * TILE_BYTES,
                        cursors[0] + T.Cast("uint64", (tile + unit // S) * TILE_BYTES),
                        (step(j)[0] * tiles + step(j)[1]) * TILE_BYTES,
                        size(16, tile + unit // S + step(j)[1], last),
                    )  # fmt: skip
            if thread < 16 * W:
                scale = T.meta_var(thread // 2)
                scale_tile = T.meta_var(tile_of(scale, tile))
                if is_blob_copied(scale, block):
                    move.sixteen(
                        first + word_copies, buffer,
                        stage + T.Cast("uint32", thread * 16), units * TILE_BYTES,
                        cursors[1] + group_bytes(scale_tile, SCALE_BYTES), 0,
                        size(16, scale_tile, has_group(scale_tile, scale, last)),
                    )  # fmt: skip
            else:
                zero = T.meta_var(thread % (16 * W))
                zero_tile = T.meta_var(tile_of(zero, tile))
                if is_blob_copied(zero, block):
                    move.eight(
                        first + word_copies, buffer,
                        stage + T.Cast("uint32", zero * ZERO_BYTES),
                        units * TILE_BYTES + blobs * SCALE_BYTES,
                        cursors[1] + group_bytes(zero_tile, ZERO_BYTES), 0,
                        size(8, zero_tile, has_group(zero_tile, zero, last)),
                    )  # fmt: skip

        return copy

    def read(self) -> Any:
        """See `many_rows.Weight`."""
        S, SN = self.schedule.stripes, self.schedule.warp_stripes

        @T.inline
        def read(registers, stage, scratch, warp_n, warp_k, lane, thread):
            for s in T.unroll(SN):
                device_gemm.load_shared_at(
                    device.registers(registers, 4 * s),
                    stage + T.Cast("uint32", (warp_k * S + warp_n * SN) * TILE_BYTES + lane * 16),
                    s * TILE_BYTES,
                )

        return read

    def fragment(self) -> Any:
        """See `many_rows.Weight`."""
        S, SN = self.schedule.stripes, self.schedule.warp_stripes
        tg, G = self.tile_groups, self.shape.group_size
        scales_at = self.units * TILE_BYTES
        zeros_at = scales_at + self.blobs * SCALE_BYTES
        dequantize = device.dequantize(self.act_dtype)
        zero_points = device.zero_points(self.act_dtype)
        scale_pairs = device_gemm.scale_pairs(self.act_dtype)
        scale_fragment = device_gemm.scale_fragment(self.act_dtype)

        @T.inline
        def fragment(a, first, registers, stage, warp_n, warp_k, lane, step, s):
            zeros = T.meta_var(4 * SN + 4 * s)
            scales = T.meta_var(8 * SN + 2 * s)
            if step * 16 % G == 0 or step == 0:
                blob = T.meta_var((warp_k * S + warp_n * SN) * tg)
                blob_step = T.meta_var(s * tg + step * 16 // G)
                scale_pairs(
                    device.registers(registers, scales),
                    device_gemm.load_shared_word_at(
                        stage + T.Cast("uint32", blob * SCALE_BYTES + lane // 4 * 4),
                        scales_at + blob_step * SCALE_BYTES,
                    ),
                )
                zero_points(
                    device.registers(registers, zeros),
                    device_gemm.load_shared_byte_at(
                        stage + T.Cast("uint32", blob * ZERO_BYTES + lane // 4),
                        zeros_at + blob_step * ZERO_BYTES,
                    )
                    * T.uint32(0x00010001),
                )
                registers[zeros + 2] = registers[zeros]
                registers[zeros + 3] = registers[zeros + 1]
            dequantize(
                device.registers(a, first + 4 * s),
                registers[4 * s + step],
                device.registers(registers, zeros),
            )
            scale_fragment(device.registers(a, first + 4 * s), device.registers(registers, scales))

        return fragment
