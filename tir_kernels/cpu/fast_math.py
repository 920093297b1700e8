"""Exponentials as arithmetic: LLVM would call the C library once for each element instead."""

from typing import Any

from tir_kernels._tvm import T

_LOG2_E = 1.4426950408889634
# Taylor coefficients of 2^f, highest first: on |f| <= 1/2 the error of the sum is below 2e-8.
_POLYNOMIAL = (
    1.5252733804059841e-5,
    1.5403530393381608e-4,
    1.3333558146428443e-3,
    9.6181291076284771e-3,
    5.5504108664821580e-2,
    2.4022650695910071e-1,
    6.9314718055994531e-1,
    1.0,
)


def exp2(x: Any) -> Any:
    """2^x of an fp32 expression. Below -126 it is 2^-126 (as good as zero), above 126 2^126.

    x = n + f with integer n and |f| <= 1/2; 2^n is written into the exponent bits.
    """
    clipped = T.max(T.min(x, T.float32(126)), T.float32(-126))
    whole = T.floor(clipped + T.float32(0.5))
    fraction = clipped - whole
    series = T.float32(_POLYNOMIAL[0])
    for coefficient in _POLYNOMIAL[1:]:
        series = series * fraction + T.float32(coefficient)
    exponent = T.shift_left(T.Cast("int32", whole) + 127, 23)
    return series * T.reinterpret("float32", exponent)


def exp(x: Any) -> Any:
    """e^x of an fp32 expression, to about 1e-6 relative near zero."""
    return exp2(x * T.float32(_LOG2_E))
