"""Integer dot products of small unsigned weights with signed bytes, four to a 32-bit lane.

Each target has its instruction: VPDPBUSD (AVX-512 VNNI, AVX-VNNI), SDOT (Arm's dot product), and
where there is neither, PMADDUBSW with PMADDWD or SMULL with pairwise sums, in a few steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tir_kernels._tvm import T, Target, target_has_features

MOST = 8  # pairs that one call of `IntegerDot.add` takes


@dataclass(frozen=True)
class IntegerDot:
    """lanes: 32-bit lanes of a vector.

    add(sums, pairs): int32 sums plus, in each lane, the dot products of the four bytes of weights
    (0..15) with the four bytes of x (-128..127), for every pair (weights, x) of int32 vectors.
    Exact; at most MOST pairs.
    """

    lanes: int
    add: Callable[[Any, Sequence[tuple[Any, Any]]], Any]


def integer_dot_of(target: Target) -> IntegerDot:
    """The fastest one that the target's features allow; without any, plain vector code."""
    if target_has_features("avx512vnni", target):
        return IntegerDot(16, _fused("llvm.x86.avx512.vpdpbusd.512", 16))
    if target_has_features("avxvnni", target):
        return IntegerDot(8, _fused("llvm.x86.avx512.vpdpbusd.256", 8))
    if target_has_features("avx2", target):
        return IntegerDot(8, _by_pairs("llvm.x86.avx2.pmadd.ub.sw", "llvm.x86.avx2.pmadd.wd", 8))
    if target_has_features("ssse3", target):
        names = "llvm.x86.ssse3.pmadd.ub.sw.128", "llvm.x86.sse2.pmadd.wd"
        return IntegerDot(4, _by_pairs(*names, 4))
    if target_has_features("dotprod", target):
        return IntegerDot(4, _fused("llvm.aarch64.neon.sdot", 4))
    if target_has_features("neon", target):
        return IntegerDot(4, _widening)
    return IntegerDot(4, _plain)


def _fused(intrinsic: str, lanes: int):
    def add(sums: Any, pairs: Sequence[tuple[Any, Any]]) -> Any:
        for weights, x in pairs:
            sums = T.call_llvm_pure_intrin(
                f"int32x{lanes}", intrinsic, sums, _bytes(weights, lanes), _bytes(x, lanes)
            )
        return sums

    return add


def _by_pairs(unsigned_by_signed: str, pairs_to_words: str, lanes: int):
    """16-bit sums of two products hold MOST times 2 * 15 * 128 and are widened once."""

    def add(sums: Any, pairs: Sequence[tuple[Any, Any]]) -> Any:
        shorts = f"int16x{2 * lanes}"
        total: Any = None
        for weights, x in pairs:
            product = T.call_llvm_pure_intrin(
                shorts, unsigned_by_signed, _bytes(weights, lanes), _bytes(x, lanes)
            )
            total = product if total is None else total + product
        ones = T.broadcast(T.int16(1), 2 * lanes)
        return sums + T.call_llvm_pure_intrin(f"int32x{lanes}", pairs_to_words, total, ones)

    return add


def _widening(sums: Any, pairs: Sequence[tuple[Any, Any]]) -> Any:
    for weights, x in pairs:
        w, v = _bytes(weights, 4), _bytes(x, 4)
        halves = []
        for half in (T.vectorlow, T.vectorhigh):
            products = T.call_llvm_pure_intrin(
                "int16x8", "llvm.aarch64.neon.smull", half("int8x8", w), half("int8x8", v)
            )
            halves.append(T.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.saddlp", products))
        sums = sums + T.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.addp", *halves)
    return sums


def _plain(sums: Any, pairs: Sequence[tuple[Any, Any]]) -> Any:
    for weights, x in pairs:
        for j in range(4):
            byte = T.bitwise_and(T.shift_right(weights, _all(8 * j)), _all(15))
            signed = T.shift_right(T.shift_left(x, _all(24 - 8 * j)), _all(24))
            sums = sums + byte * signed
    return sums


def _all(value: int) -> Any:
    return T.broadcast(T.int32(value), 4)


def _bytes(words: Any, lanes: int) -> Any:
    return T.reinterpret(f"int8x{4 * lanes}", words)
