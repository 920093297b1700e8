"""The end of a kernel for many rows: offset, activate, round, turn round, store.

Fragments of sums have outputs along the warp's rows, while out [m, N] has them along its rows. So
they go through shared memory, 32 tokens of a warp at a time: written element by element, read and
stored 16 bytes a thread.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tir_kernels._tvm import T
from tir_kernels.cuda.epilogue import Epilogue
from tir_kernels.cuda.tile import ManyRows, unrolled
from tir_kernels.layouts import TILE_N

PASS = 32  # tokens of a warp in shared memory at once


@dataclass(frozen=True)
class TileStore:
    """Stores a block's tile of out [m, N], or [m, N / 2] with silu."""

    schedule: ManyRows
    epilogue: Epilogue

    @property
    def width(self) -> int:
        """Stored outputs of a block."""
        return self.schedule.outputs // (2 if self.epilogue.silu else 1)

    @property
    def element(self) -> int:
        """Bytes of a stored output."""
        return 4 if self.epilogue.out_dtype == "float32" else 2

    @property
    def pitch(self) -> int:
        """Elements from one token to the next in shared memory.

        Lanes that write at once have eight neighbouring outputs of four tokens, each two tokens
        from the next. With 16 bytes more than a multiple of 64, those meet different banks.
        """
        return self.width + 16 // self.element

    @property
    def tokens(self) -> int:
        """Tokens of a warp that are in shared memory at once."""
        return math.gcd(self.schedule.warp_tokens, PASS)

    @property
    def bytes(self) -> int:
        """Of shared memory."""
        return self.schedule.warps_m * self.tokens * self.pitch * self.element

    def store(self) -> Any:
        """An inline (m, sums, staged, bias, out, token_block, block, warp, lane).

        sums [stripes, tokens / 8, 4] of a warp, flat; staged: shared memory, of out's type.
        bias: [N] or None.
        """
        schedule, silu, out_dtype = self.schedule, self.epilogue.silu, self.epilogue.out_dtype
        N = self.epilogue.N
        stored = N // 2 if silu else N
        width, pitch, tokens = self.width, self.pitch, self.tokens
        SN, TM, WN = schedule.warp_stripes, schedule.warp_tokens, schedule.warps_n
        WM, threads = schedule.warps_m, schedule.threads
        eights = TM // 8
        lanes = math.gcd(stored, 16 // self.element)
        row_chunks = width // lanes
        chunks = WM * tokens * row_chunks
        rows_of_stripe = TILE_N // 2 if silu else TILE_N

        def staged_row(warp_m, token):
            return warp_m * tokens + token

        def activated(gate, up):
            return gate / (T.float32(1) + T.exp(-gate)) * up

        @T.inline
        def write(sums, offsets, staged, first, warp_n, warp_m, lane, s, e, i):
            at = T.meta_var(
                staged_row(warp_m, e * 8 + lane % 4 * 2 + i) * pitch
                + (warp_n * SN + s) * rows_of_stripe
                + lane // 4
            )
            low = T.meta_var((s * eights + first + e) * 4 + i)
            if silu:
                staged[at] = T.Cast(
                    out_dtype,
                    activated(sums[low] + offsets[2 * s], sums[low + 2] + offsets[2 * s + 1]),
                )
            else:
                staged[at] = T.Cast(out_dtype, sums[low] + offsets[2 * s])
                staged[at + 8] = T.Cast(out_dtype, sums[low + 2] + offsets[2 * s + 1])

        def bias_row(stripe, h, lane):
            row = stripe * rows_of_stripe + lane // 4
            return row + h * stored if silu else row + 8 * h

        @T.inline
        def store(m, sums, staged, bias, out, token_block, block, warp, lane):
            warp_n = T.meta_var(warp % WN)
            warp_m = T.meta_var(warp // WN % WM)
            offsets = T.alloc_buffer((2 * SN,), "float32", scope="local")
            for s in unrolled(SN):
                for h in unrolled(2):
                    offsets[2 * s + h] = T.float32(0)
                    if bias is not None:
                        row = T.meta_var(
                            bias_row(block * schedule.stripes + warp_n * SN + s, h, lane)
                        )
                        offsets[2 * s + h] = T.Cast("float32", bias[T.min(row, N - 1)])
            for p in T.unroll(TM // tokens):
                T.tvm_storage_sync("shared")
                if warp < WN * WM:
                    for s in unrolled(SN):
                        for e in unrolled(tokens // 8):
                            for i in unrolled(2):
                                write(
                                    sums, offsets, staged, p * tokens // 8, warp_n, warp_m, lane,
                                    s, e, i,
                                )  # fmt: skip
                T.tvm_storage_sync("shared")
                for j in unrolled(-(-chunks // threads)):
                    chunk = T.meta_var(warp * 32 + lane + j * threads)
                    row = T.meta_var(chunk // row_chunks)
                    warp_token = T.meta_var(row // tokens * TM + p * tokens + row % tokens)
                    token = T.meta_var(token_block * schedule.tokens + warp_token)
                    column = T.meta_var(block * width + chunk % row_chunks * lanes)
                    if T.And(chunk < chunks, T.And(token < m, column < stored)):
                        for v in T.vectorized(lanes):
                            out[T.Cast("int64", token), column + v] = staged[
                                row * pitch + chunk % row_chunks * lanes + v
                            ]

        return store
