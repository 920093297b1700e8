"""How 4-bit weights lie in memory, as numbers that kernels are generated from.

The stock layout is AutoAWQ's "gemm": for a linear of K inputs, N outputs and group size G

    qweight  int32   [K, N/8]    eight values of one row in a word
    qzeros   int32   [K/G, N/8]  zero points, packed alike
    scales   float16 [K/G, N]

where nibble i (bits 4i..4i+3) of word j belongs to column 8j + ORDER[i]. ORDER interleaves even
and odd columns; kernels need it as arithmetic, because a loop variable cannot index a Python tuple:
`nibble_column` and `column_shift` take ints and TIR expressions alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

NAME = "autoawq"
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PACK = 8
GROUP_SIZES = (32, 64, 128)


def nibble_column(i: Any) -> Any:
    """The column within its word of nibble i: ORDER[i]."""
    return 2 * (i % 4) + i // 4


def column_shift(c: Any) -> Any:
    """How far to shift a word right to bring column c of it to bits 0..3: 4 * ORDER.index(c)."""
    return 2 * c + 14 * (c % 2)


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
        if self.N <= 0 or self.N % PACK:
            raise ValueError(f"N={self.N} is not a multiple of {PACK}")

    @property
    def words(self) -> int:
        """Words in a row of qweight."""
        return self.N // PACK

    @property
    def groups(self) -> int:
        """Rows of qzeros and scales."""
        return self.K // self.group_size
