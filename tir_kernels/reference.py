"""The numpy reference: every kernel of every target is tested against this and nothing else."""

from __future__ import annotations

import numpy as np
import numpy.typing

from tir_kernels.layouts import BLOCK_N, ORDER, PACK, TILE_K, TILE_N, silu_row


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


def tile(
    qweight: np.ndarray, qzeros: np.ndarray, scales: np.ndarray, silu: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Stock layout -> tiled layout (`tir_kernels.layouts`): qweight, qzeros, scales.

    silu: interleave the rows of a fused gate_up. Raises ValueError where that cannot be done.
    """
    q, z = unpack(qweight), unpack(qzeros)
    K, N = q.shape
    groups = z.shape[0]
    if silu:
        if N % 16:
            raise ValueError(f"gate_up of {N} rows cannot be interleaved: not a multiple of 16")
        order = silu_row(np.arange(N), N)
        q, z, scales = q[:, order], z[:, order], scales[:, order]
    rows, columns = -(-N // TILE_N), -(-K // TILE_K)

    def pad(array: np.ndarray, height: int) -> np.ndarray:
        return np.pad(array, ((0, height - array.shape[0]), (0, rows * TILE_N - N)))

    # [column, step, 8-half of k, t, parity of k, row, 8-half of n, g]
    split: np.ndarray = pad(q, columns * TILE_K).reshape(columns, 4, 2, 4, 2, rows, 2, 8)
    # [row, column, g, t, step, parity, 8-half of k, 8-half of n]: lane, word, nibble
    nibbles = np.ascontiguousarray(split.transpose(5, 0, 7, 3, 1, 4, 2, 6))
    words = _words(nibbles.reshape(rows, columns, -1, 8))
    # [group, row, 8-half, g] -> [row, group, g, 8-half]
    zeros = pad(z, groups).reshape(groups, rows, 2, 8).transpose(1, 0, 3, 2)
    tiled_scales = pad(scales, groups).reshape(groups, rows, 2, 8).transpose(1, 0, 3, 2)
    return (
        words,
        _words(np.ascontiguousarray(zeros).reshape(rows, groups, 2, 8)),
        np.ascontiguousarray(tiled_scales).reshape(rows, groups, TILE_N),
    )


def untile(
    qweight: np.ndarray, qzeros: np.ndarray, scales: np.ndarray, K: int, N: int, silu: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tiled layout -> stock layout of a linear [K, N]: the inverse of `tile`."""
    rows, columns = qweight.shape[:2]
    groups = scales.shape[1]
    split = _nibbles(qweight).reshape(rows, columns, 8, 4, 4, 2, 2, 2)
    q = split.transpose(1, 4, 6, 3, 5, 0, 7, 2).reshape(columns * TILE_K, rows * TILE_N)[:K, :N]

    def by_group(array: np.ndarray) -> np.ndarray:
        parts = array.reshape(rows, groups, 8, 2).transpose(1, 0, 3, 2)
        return np.ascontiguousarray(parts).reshape(groups, -1)[:, :N]

    z, s = by_group(_nibbles(qzeros)), by_group(scales)
    if silu:
        back = np.argsort(silu_row(np.arange(N), N))
        q, z, s = q[:, back], z[:, back], s[:, back]
    return pack(q), pack(z), np.ascontiguousarray(s)


def block(
    qweight: np.ndarray, qzeros: np.ndarray, scales: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Stock layout -> blocked layout (`tir_kernels.layouts`): qweight, qzeros, scales."""
    q, z = unpack(qweight), unpack(qzeros)
    (K, N), groups = q.shape, z.shape[0]
    blocks = -(-N // BLOCK_N)

    def pad(array: np.ndarray) -> np.ndarray:
        return np.pad(array, ((0, 0), (0, blocks * BLOCK_N - N)))

    # [k, 4-half of k, byte, block, n] -> [block, k, n, byte, 4-half]: word, nibble
    nibbles: np.ndarray = pad(q).reshape(K // PACK, 2, 4, blocks, BLOCK_N)
    words = _words(nibbles.transpose(3, 0, 4, 2, 1).reshape(blocks, K // PACK, BLOCK_N, PACK))
    zeros: np.ndarray = pad(z).reshape(groups, blocks, 2, PACK).transpose(1, 0, 2, 3)
    blocked_scales = pad(scales).reshape(groups, blocks, BLOCK_N).transpose(1, 0, 2)
    return words, _words(zeros), np.ascontiguousarray(blocked_scales)


def unblock(
    qweight: np.ndarray, qzeros: np.ndarray, scales: np.ndarray, N: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Blocked layout -> stock layout of a linear with N outputs: the inverse of `block`."""
    blocks, groups = scales.shape[:2]
    nibbles = _nibbles(qweight).reshape(blocks, -1, BLOCK_N, 4, 2)
    q = nibbles.transpose(1, 4, 3, 0, 2).reshape(-1, blocks * BLOCK_N)[:, :N]
    z = _nibbles(qzeros).transpose(1, 0, 2, 3).reshape(groups, -1)[:, :N]
    s = scales.transpose(1, 0, 2).reshape(groups, -1)[:, :N]
    return pack(np.ascontiguousarray(q)), pack(np.ascontiguousarray(z)), np.ascontiguousarray(s)


def _words(nibbles: np.ndarray) -> np.ndarray:
    """Values 0..15, uint8 [..., 8] with the lowest nibble first -> words, int32 [...]."""
    pairs = nibbles[..., 0::2] | (nibbles[..., 1::2] << np.uint8(4))
    words: np.ndarray = np.ascontiguousarray(pairs).view("<i4")
    return words.reshape(nibbles.shape[:-1])


def _nibbles(words: np.ndarray) -> np.ndarray:
    """Words, int32 [...] -> values 0..15, uint8 [..., 8], the lowest nibble first."""
    bits: np.ndarray = np.ascontiguousarray(words)[..., None].view(np.uint8)
    return np.stack((bits & np.uint8(15), bits >> np.uint8(4)), -1).reshape(*words.shape, 8)


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


def w4a16_experts(
    x: np.ndarray,
    experts: np.ndarray,
    qweight: np.ndarray,
    qzeros: np.ndarray,
    scales: np.ndarray,
) -> np.ndarray:
    """x [m, K], row r times the dequantized weight of expert experts[r], in float64 [m, N].

    The weights are [E, ...] of E experts.
    """
    out = np.empty((len(x), scales.shape[-1]))
    for expert in np.unique(experts):
        rows = experts == expert
        out[rows] = w4a16_linear(x[rows], qweight[expert], qzeros[expert], scales[expert])
    return out


def silu_multiply(gate_up: np.ndarray) -> np.ndarray:
    """gate_up [m, 2n] -> silu(gate) * up [m, n], in float64; SwiGLU (arXiv 2002.05202)."""
    gate, up = np.split(gate_up.astype(np.float64), 2, axis=1)
    return gate / (1 + np.exp(-gate)) * up


def dense_linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """x [m, K] times weight [N, K] transposed, plus bias [N], in float64 [m, N]."""
    out = x.astype(np.float64) @ weight.astype(np.float64).T
    return out if bias is None else out + bias.astype(np.float64)
