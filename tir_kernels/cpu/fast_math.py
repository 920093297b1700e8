"""Exponentials as arithmetic: LLVM would call the C library once for each element instead."""

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
