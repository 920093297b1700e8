"""What a block of a kernel for many rows computes, and how its warps share it out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tir_kernels._tvm import T
from tir_kernels.layouts import TILE_K, TILE_N

STEPS = TILE_K // 16  # of mma in a tile of inputs
ROW = 2 * TILE_K  # bytes of a token's or an output's 64 inputs in shared memory
WORKSPACE_FLOATS = 5 << 20  # where blocks that share a tile of outputs put their sums
SPLIT_ROUNDS = 4  # a block has no less to do, or filling its stages would take most of its time


def unrolled(count: int) -> Any:
    """A loop that the device compiler unrolls: TVM's T.unroll would write every turn of it."""
    return T.serial(count, annotations={"pragma_unroll": 1})


@dataclass(frozen=True)
class ManyRows:
    """Schedule of a kernel for many rows, on tensor cores.

    A block computes `outputs` times `tokens`. Its warps are warps_n along the outputs times warps_m
    along the tokens, and that warps_k times, each of these on a tile of 64 inputs of its own.
    `stages` rounds of warps_k tiles are in shared memory or on their way to it. Where that makes at
    most `blocks` / 2 blocks, the inputs are split among up to `blocks` in all.

    Warps along the outputs come first: each of warps_m dequantizes the same weights again, while
    warps along the outputs only read the same activations from shared memory. A warp of 32 outputs
    by 128 tokens, or 64 by 64, has 128 sums in registers, so two blocks of four such warps fill a
    multiprocessor. A step of 32 mma (256 clocks on sm_80) then takes 4 or 2 KiB from shared memory
    (32 or 16 clocks) and 26 or 52 instructions to dequantize. Halve both sides, and the path from
    shared memory is as busy as the tensor cores.

    wgmma: by Hopper's products of a warpgroup instead of mma.sync. Groups of four warps along the
    outputs multiply with all tokens of the block; of the stages, one is still being read while the
    next is. Tensor cores that are twice as fast are fed by larger blocks: 256 outputs by 128 tokens
    bring 24 KiB from the second-level cache for 1024 clocks of products, 128 by 128 bring 20 KiB
    for 512, about what the cache can give to all multiprocessors at once.
    """

    tokens: int
    outputs: int
    warps_n: int
    warps_m: int = 1
    warps_k: int = 1
    stages: int = 4
    blocks: int = 0
    wgmma: bool = False

    def __post_init__(self) -> None:
        if self.outputs % (TILE_N * self.warps_n) or self.tokens % (16 * self.warps_m):
            raise ValueError(f"{self}: a warp's outputs and tokens are not multiples of 16")
        if not 2 + self.wgmma <= self.stages <= 8 + self.wgmma or self.threads > 1024:
            raise ValueError(f"{self}: not 2 to 8 stages (wgmma: 3 to 9) of at most 32 warps")
        if (
            self.warps < 2
            or not _divides(self.threads // 8, self.tokens)
            or not _divides(self.warps, self.stripes)
        ):
            raise ValueError(f"{self}: copies cannot be shared out evenly among the warps")
        if self.wgmma and (self.warps_n % 4 or self.warps != self.warps_n or self.tokens > 256):
            raise ValueError(f"{self}: not groups of four warps along outputs, with 256 tokens")
        if self.blocks * self.tokens * self.outputs > WORKSPACE_FLOATS:
            raise ValueError(f"{self}: sums of so many blocks do not fit in the workspace")

    @property
    def warps(self) -> int:
        """Warps in a block."""
        return self.warps_n * self.warps_m * self.warps_k

    @property
    def threads(self) -> int:
        """Threads in a block."""
        return 32 * self.warps

    @property
    def stripes(self) -> int:
        """Stripes of 16 outputs in a block."""
        return self.outputs // TILE_N

    @property
    def warp_stripes(self) -> int:
        """Stripes of a warp."""
        return self.stripes // self.warps_n

    @property
    def warp_tokens(self) -> int:
        """Tokens of a warp."""
        return self.tokens // self.warps_m

    def most_splits(self, K: int, N: int) -> int:
        """Into how many parts K may be split, 1 for never."""
        rounds = -(-K // (TILE_K * self.warps_k))
        return max(1, min(rounds // SPLIT_ROUNDS, self.blocks // -(-N // self.outputs)))


def _divides(a: int, b: int) -> bool:
    return a % b == 0 or b % a == 0
