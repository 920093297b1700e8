"""Intel's matrix registers (AMX) from TIR: eight tiles of 16 rows of 64 bytes to each thread.

Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18. A thread
configures its tiles before it uses them and releases them afterwards: as long as they are in use,
the operating system saves their 8 KiB at every switch. Linux lets a process use them once it has
asked (arch_prctl, ARCH_REQ_XCOMP_PERM), which is up to whoever loads the code.

What the functions return are statements of TIR. A tile is a number from 0 to 7, known when the
kernel is compiled: a loop over tiles has to be unrolled.
"""

from __future__ import annotations

from typing import Any

from tir_kernels._tvm import T

ROWS = 16  # of a tile
WORDS = 16  # of 32 bits, in a row of a tile
_ROW_BYTES = 64


def configure() -> Any:
    """TIR (words): all tiles have their full size; words: 16 int32 to write the description to."""

    @T.inline
    def load(words):
        for i in T.unroll(WORDS):
            words[i] = 0
        words[0] = 1  # the palette
        for i in T.unroll(4):  # bytes of a row, 16 bits for each tile
            words[4 + i] = _ROW_BYTES << 16 | _ROW_BYTES
        for i in T.unroll(2):  # rows, 8 bits for each tile
            words[12 + i] = ROWS << 24 | ROWS << 16 | ROWS << 8 | ROWS
        T.evaluate(_call("ldtilecfg", T.address_of(words[0])))

    return load


def release() -> Any:
    return _call("tilerelease")


def zero(tile: int) -> Any:
    return _call("tilezero", T.int8(tile))


def load(tile: int, address: Any, row_bytes: int) -> Any:
    """row_bytes: from one row in memory to the next."""
    return _call("tileloadd64", T.int8(tile), address, T.int64(row_bytes))


def store(tile: int, address: Any, row_bytes: int) -> Any:
    return _call("tilestored64", T.int8(tile), address, T.int64(row_bytes))


def dot_bfloat16(total: int, a: int, b: int) -> Any:
    """total fp32 [16, 16] += a [16, 32] @ b [32, 16]; rows 2i and 2i + 1 of b are one row of its
    tile, taken by turns (VNNI).
    """
    return _call("tdpbf16ps", T.int8(total), T.int8(a), T.int8(b))


def dot_int8(total: int, a: int, b: int, signs: str) -> Any:
    """total int32 [16, 16] += a [16, 64] @ b [64, 16]; four rows of b are one of its tile's.

    signs: s or u for a and for b, as in "su".
    """
    return _call(f"tdpb{signs}d", T.int8(total), T.int8(a), T.int8(b))


def _call(name: str, *arguments: Any) -> Any:
    return T.call_llvm_intrin("void", f"llvm.x86.{name}", *arguments)
