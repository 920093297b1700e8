"""4-bit values to fp32 by magic numbers: no conversion instruction, no shift for half of them.

A nibble that stands at bits 4i..4i+3 of a word, i < 4, is masked and given the exponent under which
its lowest bit is worth one: the float is 2^(23-4i) + q exactly. Subtracting 2^(23-4i) + z, also
exact, leaves q - z. Nibbles 4 to 7 are read from the word shifted right by 16.
"""

from __future__ import annotations

from typing import Any

from tir_kernels._tvm import T


def magic(word: Any, i: Any) -> Any:
    """2^(23 - 4i) + nibble i of an int32, i < 4."""
    mask = T.shift_left(T.int32(15), 4 * i)
    exponent = T.shift_left(150 - 4 * i, 23)
    return T.reinterpret("float32", T.bitwise_or(T.bitwise_and(word, mask), exponent))


def magic_zero(z: Any, i: Any) -> Any:
    """2^(23 - 4i) + z for an int32 z in 0..15: what to subtract from `magic`."""
    return T.reinterpret(
        "float32", T.bitwise_or(T.shift_left(z, 4 * i), T.shift_left(150 - 4 * i, 23))
    )
