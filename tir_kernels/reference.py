"""The numpy reference: every kernel of every target is tested against this and nothing else."""

from __future__ import annotations

import numpy as np
import numpy.typing

from tir_kernels.layouts import ORDER, PACK


def pack(q: np.ndarray) -> np.ndarray:
    """Values 0..15, uint8 [R, N] -> words, int32 [R, N/8]. Raises ValueError if they do not fit."""
    rows, columns = q.shape
    if columns % PACK:
        raise ValueError(f"{columns} columns are not a multiple of {PACK}")
    if q.size and q.max() > 15:
        raise ValueError("a value does not fit in 4 bits")
    by_word: np.ndarray = q.reshape(rows, columns // PACK, PACK).astype(np.uint32)
    words = np.zeros((rows, columns // PACK), np.uint32)
    for nibble, column in enumerate(ORDER):
        words |= by_word[:, :, column] << np.uint32(4 * nibble)
    return words.view(np.int32)


def unpack(words: np.ndarray) -> np.ndarray:
    """Words, int32 [R, W] -> values 0..15, uint8 [R, 8W]."""
    bits = np.ascontiguousarray(words).view(np.uint32)
    q = np.empty((*bits.shape, PACK), np.uint8)
    for nibble, column in enumerate(ORDER):
        q[:, :, column] = (bits >> np.uint32(4 * nibble)) & np.uint32(15)
    return q.reshape(bits.shape[0], -1)


def dequantize(
    qweight: np.ndarray,
    qzeros: np.ndarray,
    scales: np.ndarray,
    dtype: np.typing.DTypeLike = np.float64,
) -> np.ndarray:
    """w[k, n] = (q[k, n] - z[k // G, n]) * s[k // G, n] as [K, N]; G follows from the shapes.

    float32 holds every such product exactly: a difference of 4-bit values times a float16.
    """
    group_size = qweight.shape[0] // qzeros.shape[0]
    weight = unpack(qweight).astype(dtype)
    weight -= unpack(qzeros).astype(dtype).repeat(group_size, axis=0)
    weight *= scales.astype(dtype).repeat(group_size, axis=0)
    return weight


def w4a16_linear(
    x: np.ndarray,
    qweight: np.ndarray,
    qzeros: np.ndarray,
    scales: np.ndarray,
    bias: np.ndarray | None = None,
) -> np.ndarray:
    """x [m, K] times the dequantized weight, plus bias [N], in float64 [m, N]."""
    out = x.astype(np.float64) @ dequantize(qweight, qzeros, scales)
    return out if bias is None else out + bias.astype(np.float64)


def dense_linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """x [m, K] times weight [N, K] transposed, plus bias [N], in float64 [m, N]."""
    out = x.astype(np.float64) @ weight.astype(np.float64).T
    return out if bias is None else out + bias.astype(np.float64)
