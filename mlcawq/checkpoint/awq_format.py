"""The AutoAWQ "gemm" storage of 4-bit weights, in numpy: the reference everything is tested by.

A linear of in_features K, out_features N and group size G is stored as
    qweight  int32   [K, N/8]    eight 4-bit values of a row in one word
    qzeros   int32   [K/G, N/8]  zero points, packed alike
    scales   float16 [K/G, N]
with nibble i (bits 4i to 4i+3) of word j holding column 8j + ORDER[i], and
    weight[k, n] = (q[k, n] - z[k // G, n]) * s[k // G, n].
"""

from __future__ import annotations

import numpy as np

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PACK = 8  # values in a word


def pack(q: np.ndarray) -> np.ndarray:
    """uint8 [R, N] of values 0..15 -> int32 [R, N/8]. Raises ValueError when N % 8 != 0."""
    rows, columns = q.shape
    if columns % PACK:
        raise ValueError(f"{columns} columns are not a multiple of {PACK}")
    if q.size and q.max() > 15:
        raise ValueError("a value does not fit in 4 bits")
    nibbles = q.reshape(rows, columns // PACK, PACK)[:, :, ORDER].astype(np.uint32)
    words = np.zeros((rows, columns // PACK), np.uint32)
    for i in range(PACK):
        words |= nibbles[:, :, i] << np.uint32(4 * i)
    return words.view(np.int32)


def unpack(words: np.ndarray) -> np.ndarray:
    """int32 [R, N/8] -> uint8 [R, N] of values 0..15."""
    rows, count = words.shape
    bits = np.ascontiguousarray(words).view(np.uint32)
    q = np.empty((rows, count, PACK), np.uint8)
    for i, column in enumerate(ORDER):
        q[:, :, column] = (bits >> np.uint32(4 * i)) & np.uint32(15)
    return q.reshape(rows, count * PACK)


def dequantize(
    qweight: np.ndarray, qzeros: np.ndarray, scales: np.ndarray, group_size: int
) -> np.ndarray:
    """The weight as float32 [K, N] (in_features first, the transpose of torch's Linear.weight)."""
    zeros = unpack(qzeros).astype(np.float32).repeat(group_size, axis=0)
    weight = unpack(qweight).astype(np.float32)
    weight -= zeros
    weight *= scales.astype(np.float32).repeat(group_size, axis=0)
    return weight
