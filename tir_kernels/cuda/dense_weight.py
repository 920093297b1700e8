"""16-bit weights [N, K] as the operand of 16 rows of a kernel for many rows.

They go through shared memory as activations do, and ldmatrix makes fragments of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tir_kernels._tvm import T
from tir_kernels.cuda import device
from tir_kernels.cuda.staging import Rows
from tir_kernels.cuda.tile import ROW, ManyRows
from tir_kernels.layouts import TILE_K, TILE_N


@dataclass(frozen=True)
class DenseWeight:
    """A `many_rows.Weight`. Parameters: (weight [N, K],)."""

    K: int
    N: int
    schedule: ManyRows

    # Where its copies start; where the warp's first fragment lies in the stage.
    cursors = 1
    scratch = 0
    registers = 1

    def __post_init__(self) -> None:
        if max(self.rows.at_once, self.rows.rows) % min(self.rows.at_once, self.rows.rows):
            raise ValueError(f"{self.schedule}: outputs are not copied evenly")

    @property
    def rows(self) -> Rows:
        """How they are copied."""
        schedule = self.schedule
        return Rows(schedule.outputs, schedule.warps_k, schedule.threads, self.K)

    @property
    def bytes(self) -> int:
        """Of a stage."""
        return self.rows.bytes

    @property
    def copies(self) -> int:
        """Of a thread and round."""
        return self.rows.copies

    def start(self) -> Any:
        """See `many_rows.Weight`."""
        rows, outputs = self.rows, self.schedule.outputs

        @T.inline
        def start(parameters, cursors, block, thread):
            weight = T.meta_var(parameters[0])
            cursors[0] = device.global_cursor(
                T.address_of(
                    weight[T.Cast("int64", block * outputs + rows.row(thread)), rows.column(thread)]
                )
            )

        return start

    def copy(self) -> Any:
        """See `many_rows.Weight`."""
        rows, outputs, N, K = self.rows, self.schedule.outputs, self.N, self.K
        copy_rows = rows.copier()

        @T.inline
        def copy(move, first, buffer, stage, cursors, block, thread, tile, last):
            copy_rows(
                move, first, buffer, stage + T.Cast("uint32", rows.shared_offset(thread)),
                cursors[0] + T.Cast("uint64", tile * ROW), thread,
                N - block * outputs - rows.row(thread), rows.column(thread) + tile * TILE_K,
                None if last is None else K,
            )  # fmt: skip

        return copy

    def read(self) -> Any:
        """See `many_rows.Weight`."""
        outputs, SN = self.schedule.outputs, self.schedule.warp_stripes

        @T.inline
        def read(registers, stage, scratch, warp_n, warp_k, lane, thread):
            # Matrices of a fragment: rows 0 to 7 and 8 to 15 of the first eight inputs, then of
            # the other eight.
            row = T.meta_var(warp_k * outputs + warp_n * SN * TILE_N + lane % 16)
            chunk = T.meta_var(T.bitwise_xor(lane // 16, lane % 8))
            registers[0] = stage + T.Cast("uint32", row * ROW + chunk * 16)

        return read

    def fragment(self) -> Any:
        """See `many_rows.Weight`."""

        @T.inline
        def fragment(a, first, registers, stage, warp_n, warp_k, lane, step, s):
            device.load_matrices_at(
                device.registers(a, first + 4 * s),
                T.bitwise_xor(registers[0], T.uint32(32 * step)),
                s * TILE_N * ROW,
            )

        return fragment
