"""Exponentials and angles as arithmetic: LLVM would call the C library for each element instead."""

import math
from typing import Any

from tir_kernels._tvm import T

_LOG2_E = 1.4426950408889634
# 2^f on |f| <= 1/2, highest power first, with the least maximum of the relative error (1e-7 in
# exact arithmetic) among those that are 1 at 0.
_POLYNOMIAL = (
    1.3264726057591796e-3,
    9.671512721870057e-3,
    5.550733747038338e-2,
    2.402224208358276e-1,
    6.931469775965331e-1,
    1.0,
)
# Added to a number below 2^22, it leaves the nearest integer in the lowest bits of the sum.
_ROUNDING = 1.5 * 2**23


def exp2(x: Any) -> Any:
    """2^x of an fp32 expression, to 2e-7. Below -126 it is 2^-126 (as good as zero), above 126
    2^126.

    x = n + f with integer n and |f| <= 1/2; n is added to the exponent bits of 2^f.
    """
    clipped = T.max(T.min(x, T.float32(126)), T.float32(-126))
    # Through the bits, or TVM would cancel what is added and subtracted.
    shifted = T.reinterpret("int32", clipped + T.float32(_ROUNDING))
    fraction = clipped - (T.reinterpret("float32", shifted) - T.float32(_ROUNDING))
    series = T.float32(_POLYNOMIAL[0])
    for coefficient in _POLYNOMIAL[1:]:
        series = series * fraction + T.float32(coefficient)
    exponent = T.shift_left(shifted, 23)
    return T.reinterpret("float32", T.reinterpret("int32", series) + exponent)


def exp(x: Any) -> Any:
    """e^x of an fp32 expression, to about 1e-6 relative near zero."""
    return exp2(x * T.float32(_LOG2_E))


def quarter_turns(angle: Any) -> Any:
    """The nearest number of quarter turns to an fp32 angle, int32. In double precision, because
    angles of positions times frequencies reach a hundred thousand radians.
    """
    turns = T.Cast("float64", angle) * T.float64(2 / math.pi)
    return T.Cast("int32", T.floor(turns + T.float64(0.5)))


def beyond(angle: Any, quarters: Any) -> Any:
    """What an fp32 angle is beyond that many quarter turns, fp32: an eighth of a turn at most."""
    whole = T.Cast("float64", quarters) * T.float64(math.pi / 2)
    return T.Cast("float32", T.Cast("float64", angle) - whole)


def sine(quarters: Any, rest: Any) -> Any:
    """The sine, to 1e-7, of an angle of which `quarter_turns` and `beyond` were taken."""
    odd = T.bitwise_and(quarters, 1) == 1
    value = T.Select(odd, _series(rest, (2, 12, 30, 56)), rest * _series(rest, (6, 20, 42, 72)))
    return T.Select(T.bitwise_and(quarters, 2) == 2, T.float32(0) - value, value)


def _series(x: Any, divisors: tuple[int, ...]) -> Any:
    """Taylor's series of the cosine, and of the sine over x, up to x^8."""
    total = T.float32(1)
    for divisor in reversed(divisors):
        total = T.float32(1) - x * x * T.float32(1 / divisor) * total
    return total
