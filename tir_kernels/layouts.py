"""How 4-bit weights lie in memory, as numbers that kernels are generated from.

The stock layout, "autoawq", is AutoAWQ's "gemm": for a linear of K inputs, N outputs and group
size G

    qweight  int32   [K, N/8]    eight values of one row in a word
    qzeros   int32   [K/G, N/8]  zero points, packed alike
    scales   float16 [K/G, N]

where nibble i (bits 4i..4i+3) of word j belongs to column 8j + ORDER[i]. ORDER interleaves even
and odd columns; kernels need it as arithmetic, because a loop variable cannot index a Python tuple:
`nibble_column` and `column_shift` take ints and TIR expressions alike.

The tiled layout, "n16k64", is what GPU kernels load best. The weight is cut into tiles of 16
outputs by 64 inputs, 512 bytes each, and the 32 lanes of a warp read 16 bytes of a tile each, one
after the other:

    qweight  int32   [ceil(N/16), ceil(K/64), 128]   word 4 * lane + step of a tile
    qzeros   int32   [ceil(N/16), K/G, 2]            bits 8g + 4h of the 64: output g + 8h
    scales   float16 [ceil(N/16), K/G, 16]           element 2g + h: output g + 8h

A word is what one lane multiplies in one `mma.m16n8k16` whose A operand is the weight: with
g = lane / 4 and t = lane % 4, nibble i of word `step` is

    output  16 * tile_row + g + 8 * (i % 2)
    input   64 * tile_column + 16 * step + 2t + i / 4 + 8 * (i / 2 % 2)

so that nibbles i and i + 4, which lie 16 bits apart, are a pair of neighbouring inputs, and masking
a word with 0x000f000f << 4i leaves the half2 of register a[i] (the PTX manual's figure for
.m16n8k16, A fragment). No lane needs another lane's bits, and one load serves four steps. Nothing
is target specific: without tensor cores a lane has 16 inputs of 2 outputs. What lies beyond K or N
has value and scale 0.

The blocked layout, "n16k8", is what CPU kernels load best: a vector of 16 words is 16 outputs, each
with eight inputs, and what is read next lies behind it, for all of K.

    qweight  int32   [ceil(N/16), K/8, 16]  byte j of word (b, k, n): inputs 8k + j (low nibble) and
                                            8k + 4 + j (high nibble) of output 16b + n
    qzeros   int32   [ceil(N/16), K/G, 2]   nibble i of word h: output 16b + 8h + i
    scales   float16 [ceil(N/16), K/G, 16]

Masking a word's low nibbles leaves four bytes, one for each of four neighbouring inputs, which is
what instructions for integer dot products (VPDPBUSD, SDOT, PMADDUBSW) and the rows of AMX's B tiles
take. Outputs beyond N have value, zero point and scale 0.

In the tiled layout, where silu(gate) * up follows, the rows of a fused gate_up are interleaved
(`silu_row`): outputs g and g + 8 of a tile are gate and up of one element, and meet in one lane's
accumulators.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

AUTOAWQ = "autoawq"
TILED = "n16k64"
BLOCKED = "n16k8"
LAYOUTS = (AUTOAWQ, TILED, BLOCKED)
SYMMETRIC_ZEROS = -0x77777778  # a word of qzeros that a symmetric checkpoint leaves out: eights
TILE_N = 16
TILE_K = 64
TILE_WORDS = TILE_N * TILE_K // 8
BLOCK_N = 16

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PACK = 8
GROUP_SIZES = (32, 64, 128)


def nibble_column(i: Any) -> Any:
    """The column within its word of nibble i: ORDER[i]."""
    return 2 * (i % 4) + i // 4


def column_shift(c: Any) -> Any:
    """How far to shift a word right to bring column c of it to bits 0..3: 4 * ORDER.index(c)."""
    return 2 * c + 14 * (c % 2)


def silu_row(row: Any, N: int) -> Any:
    """Which row of a fused gate_up (gate [N/2] above up [N/2]) is row `row` of the tiled layout.

    N/2 must be a multiple of 8. Takes ints, arrays and TIR expressions.
    """
    return row // 16 * 8 + row % 8 + (row // 8 % 2) * (N // 2)


@dataclass(frozen=True)
class LinearShape:
    """A quantized linear: K inputs, N outputs, groups of `group_size` inputs share a scale.

    Raises ValueError for what the layout cannot hold.
    """

    K: int
    N: int
    group_size: int

    def __post_init__(self) -> None:
        if self.group_size not in GROUP_SIZES:
            raise ValueError(f"group size {self.group_size} is not one of {GROUP_SIZES}")
        if self.K <= 0 or self.K % self.group_size:
            raise ValueError(f"K={self.K} is not a multiple of the group size {self.group_size}")
        if self.N <= 0 or self.N % self._least_outputs:
            raise ValueError(f"N={self.N} is not a multiple of {self._least_outputs}")

    @property
    def _least_outputs(self) -> int:
        return PACK

    @property
    def words(self) -> int:
        """Words in a row of qweight."""
        return self.N // PACK

    @property
    def groups(self) -> int:
        """Rows of qzeros and scales."""
        return self.K // self.group_size

    @property
    def tile_rows(self) -> int:
        """Tiles along N, the last one padded."""
        return -(-self.N // TILE_N)

    @property
    def tile_columns(self) -> int:
        """Tiles along K, the last one padded."""
        return -(-self.K // TILE_K)

    @property
    def blocks(self) -> int:
        """Blocks of 16 outputs, the last one padded."""
        return -(-self.N // BLOCK_N)

    def parameters(
        self, layout: str, scale_dtype: str = "float16"
    ) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of qweight, qzeros and scales in `layout`, in the kernels' order.

        Raises ValueError for a layout that is not known.
        """
        K, N, groups = self.K, self.N, self.groups
        if layout == AUTOAWQ:
            shapes: tuple[tuple[int, ...], ...] = ((K, N // PACK), (groups, N // PACK), (groups, N))
        elif layout == TILED:
            rows = self.tile_rows
            shapes = (
                (rows, self.tile_columns, TILE_WORDS),
                (rows, groups, 2),
                (rows, groups, TILE_N),
            )
        elif layout == BLOCKED:
            shapes = (
                (self.blocks, K // PACK, BLOCK_N),
                (self.blocks, groups, BLOCK_N // PACK),
                (self.blocks, groups, BLOCK_N),
            )
        else:
            raise ValueError(f"layout {layout!r} is not one of {LAYOUTS}")
        names, dtypes = ("qweight", "qzeros", "scales"), ("int32", "int32", scale_dtype)
        return {
            name: (shape, dtype) for name, shape, dtype in zip(names, shapes, dtypes, strict=True)
        }


@dataclass(frozen=True)
class BlockedShape(LinearShape):
    """A linear in the blocked layout, which holds any number of outputs."""

    @property
    def _least_outputs(self) -> int:
        return 1


@dataclass(frozen=True)
class ExpertsShape(LinearShape):
    """One linear of each of `experts` experts, in the stock layout: every array of a linear once
    for each of them, one after the other.
    """

    experts: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.experts < 1:
            raise ValueError(f"{self.experts} experts are too few")

    def parameters(
        self, layout: str = AUTOAWQ, scale_dtype: str = "float16"
    ) -> dict[str, tuple[tuple[int, ...], str]]:
        """As of a linear, with the experts as the first axis. Raises ValueError for another layout
        than the stock one.
        """
        if layout != AUTOAWQ:
            raise ValueError(f"experts have the layout {AUTOAWQ} only, not {layout}")
        of_one = super().parameters(layout, scale_dtype)
        return {name: ((self.experts, *shape), dtype) for name, (shape, dtype) in of_one.items()}
