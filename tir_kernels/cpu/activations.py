"""Activations as integers, for integer dot products: a scale for each row and group of inputs.

In 16 bits, x = scale * (256 high + low) with two signed bytes: what is lost is 2^-17 of the largest
of a group, less than float16 has lost before. In 8 bits, x = scale * high.
"""

from __future__ import annotations

from tir_kernels._tvm import T, Target
from tir_kernels.cpu.lanes import lanes_for

_LARGEST = {8: 127, 16: 127 * 256}  # in 16 bits rounding the high byte must not overflow
_ABSOLUTE = 0x7FFFFFFF


def planes_of(bits: int) -> int:
    """Bytes that an activation takes."""
    return bits // 8


def quantize_group(target: Target, group_size: int, bits: int):
    """TIR for one group of one row: (x, row, first, words, at, scales, sums, r, g).

    The inputs are x[row, first ...]. words: int32, of four bytes each; at(plane, k, lanes): the
    indices where those of inputs k, k + 1, ... of the group go, `lanes` words side by side; plane 0
    has the higher bytes. scales fp32 and sums int32 (of the group's integers) go to [r, g].

    The largest magnitude is found among the bits of the numbers, as integers: an infinity or NaN
    among the inputs is the largest then, and comes out again as NaN.
    """
    lanes = lanes_for(target, group_size)
    floats, ints = f"float32x{lanes}", f"int32x{lanes}"
    words_dtype = f"int32x{lanes // 4}" if lanes > 4 else "int32"
    largest = T.float32(_LARGEST[bits])

    def read(x, row, k):
        return T.Cast(floats, x[row, T.ramp(k, 1, lanes)])

    def magnitude(values):
        return T.bitwise_and(T.reinterpret(ints, values), T.broadcast(T.int32(_ABSOLUTE), lanes))

    def rounded(values, inverse):
        scaled = values * T.broadcast(inverse, lanes)
        return T.Cast(ints, T.call_llvm_pure_intrin(floats, "llvm.nearbyint", scaled))

    def high_byte(q):
        half = T.broadcast(T.int32(128), lanes)
        return T.shift_right(q + half, T.broadcast(T.int32(8), lanes))

    def as_words(q):
        return T.reinterpret(words_dtype, T.Cast(f"int8x{lanes}", q))

    def reduced(name, vector):
        return T.call_llvm_pure_intrin("int32", f"llvm.vector.reduce.{name}", vector)

    @T.inline
    def quantize(x, row, first, words, at, scales, sums, r, g):
        most = T.alloc_buffer((lanes,), "int32")
        total = T.alloc_buffer((lanes,), "int32")
        q = T.alloc_buffer((lanes,), "int32")
        factor = T.alloc_buffer((2,), "float32")
        every = T.meta_var(T.ramp(0, 1, lanes))
        most[every] = T.broadcast(T.int32(0), lanes)
        for i in range(group_size // lanes):
            most[every] = T.max(most[every], magnitude(read(x, row, first + i * lanes)))
        factor[0] = T.reinterpret("float32", reduced("smax", most[every]))
        factor[1] = T.Select(factor[0] > T.float32(0), largest / factor[0], T.float32(0))
        total[every] = T.broadcast(T.int32(0), lanes)
        for i in range(group_size // lanes):
            q[every] = rounded(read(x, row, first + i * lanes), factor[1])
            total[every] = total[every] + q[every]
            if bits == 16:
                T.buffer_store(words, as_words(high_byte(q[every])), at(0, i * lanes, lanes // 4))
                T.buffer_store(words, as_words(q[every]), at(1, i * lanes, lanes // 4))
            else:
                T.buffer_store(words, as_words(q[every]), at(0, i * lanes, lanes // 4))
        scales[r, g] = factor[0] / largest
        sums[r, g] = reduced("add", total[every])

    return quantize
