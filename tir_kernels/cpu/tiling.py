"""Block sizes of the CPU kernels, chosen from the target's vector registers."""

from __future__ import annotations

from dataclasses import dataclass

from tir_kernels._tvm import Target, target_has_features


@dataclass(frozen=True)
class Tiling:
    """lanes: fp32 elements of a vector register; registers: how many there are.
    micro_rows, micro_columns: the accumulator block that a matrix kernel keeps in registers.
    """

    lanes: int
    registers: int
    micro_rows: int
    micro_columns: int


def tiling_of(target: Target) -> Tiling:
    """Vector width from the target's features; blocks that leave registers for the operands.

    AVX-512 and NEON have 32 registers, AVX2 and SSE 16. The features are asked for one by one:
    LLVM's own answer (`llvm_get_vector_width`) is 512 for every x86 target.
    """
    if target_has_features("avx512f", target):
        return Tiling(lanes=16, registers=32, micro_rows=6, micro_columns=64)
    if target_has_features("avx2", target):
        return Tiling(lanes=8, registers=16, micro_rows=6, micro_columns=16)
    if target_has_features("neon", target):
        return Tiling(lanes=4, registers=32, micro_rows=6, micro_columns=16)
    return Tiling(lanes=4, registers=16, micro_rows=6, micro_columns=8)


def largest_fitting(total: int, candidates: tuple[int, ...]) -> int:
    """The first candidate that divides `total`, else the first that fits into it, else `total`.

    Kernels walk `total` in such blocks, the last one moved back to end with the data: it computes
    some elements a second time, with equal results, and no block needs a tail.
    """
    for size in candidates:
        if total % size == 0:
            return size
    for size in candidates:
        if size <= total:
            return size
    return total


def largest_divisor(total: int, limit: int) -> int:
    """The largest power of two that divides `total` and is at most `limit`."""
    size = 1
    while size * 2 <= limit and total % (size * 2) == 0:
        size *= 2
    return size
