"""Sine and cosine of large angles in fp32.

Positions times frequencies reach a hundred thousand radians. The hardware's own functions are made
for angles of a few turns: WGSL promises eleven bits within half a turn and nothing beyond it.
"""

from __future__ import annotations

import math

from tir_kernels._tvm import T

# pi/2 in parts. The number of a quarter turn times the first and times the second part is exact in
# fp32 up to 2^19 quarters, and so are the differences; the third leaves errors of a few 1e-6 only.
_PARTS = (25 / 16, 1 / 128, 4.837512969970703e-4)
_REST = math.pi / 2 - sum(_PARTS)


def sine_and_cosine():
    """TIR called with an fp32 angle, a local fp32 buffer of 3 and one int32 of 1 as scratch: it
    leaves the sine in element 0 and the cosine in element 1.

    The absolute error is below 1e-5 for angles from 0 to 500,000.
    """

    @T.inline
    def evaluate(angle, result, quarter):
        quarter[0] = T.Cast("int32", T.floor(angle * T.float32(2 / math.pi) + T.float32(0.5)))
        quarters = T.meta_var(T.Cast("float32", quarter[0]))
        result[2] = angle - quarters * T.float32(_PARTS[0])
        result[2] = result[2] - quarters * T.float32(_PARTS[1])
        result[2] = result[2] - quarters * T.float32(_PARTS[2])
        result[2] = result[2] - quarters * T.float32(_REST)
        odd = T.meta_var(T.bitwise_and(quarter[0], 1) == 1)
        sine = T.meta_var(T.Select(odd, _cosine(result[2]), _sine(result[2])))
        cosine = T.meta_var(T.Select(odd, _sine(result[2]), _cosine(result[2])))
        result[0] = T.Select(T.bitwise_and(quarter[0], 2) == 2, T.float32(0) - sine, sine)
        result[1] = T.Select(T.bitwise_and(quarter[0] + 1, 2) == 2, T.float32(0) - cosine, cosine)

    return evaluate


def _sine(x):
    """Taylor's series to x^9, for an eighth of a turn both ways: 2e-9 off."""
    return x * _series(x, (6, 20, 42, 72))


def _cosine(x):
    """Taylor's series to x^10, likewise."""
    return _series(x, (2, 12, 30, 56, 90))


def _series(x, divisors):
    total = T.float32(1)
    for divisor in reversed(divisors):
        total = T.float32(1) - x * x * T.float32(1 / divisor) * total
    return total
