"""Weights from the stock layout into the tiled one, fast enough for whole models.

`reference.tile` says what it does; here words are moved as words, and eight of them are exchanged
nibble for nibble where they meet, so that nothing is ever unpacked to a byte a value. One array at
a time: qweight, qzeros and scales can be streamed. silu interleaves the rows of a fused gate_up
(`layouts.silu_row`), gate in the first half of the columns and up in the second.
"""

from __future__ import annotations

import numpy as np

from tir_kernels.layouts import ORDER, PACK, TILE_K, TILE_N, TILE_WORDS

_WORDS = TILE_N // PACK  # words of a row of the stock layout that make a tile's 16 outputs
_BLOCK = 2**16  # words that are worked on at a time: they stay in a core's cache


def tile_qweight(qweight: np.ndarray, silu: bool = False) -> np.ndarray:
    """qweight, int32 [K, N/8] -> int32 [ceil(N/16), ceil(K/64), 128].

    Raises ValueError for a gate_up whose N is no multiple of 16.
    """
    K = qweight.shape[0]
    words = _by_tile_row(qweight.view(np.uint32), silu)
    rows, columns = words.shape[1], -(-K // TILE_K)
    out = np.empty((rows, columns, 8, 4, 4), np.uint32)  # row, column, g, t, step
    stripe = max(1, _BLOCK // (_WORDS * K))
    for start in range(0, rows, stripe):
        part = slice(start, start + stripe)
        out[part] = _tile_stripe(words[:, part], columns)
    return out.view(np.int32).reshape(rows, columns, TILE_WORDS)


def tile_qzeros(qzeros: np.ndarray, silu: bool = False) -> np.ndarray:
    """qzeros, int32 [K/G, N/8] -> int32 [ceil(N/16), K/G, 2]. Raises ValueError as `tile_qweight`.

    The two words of a tile row hold outputs 0..7 and 8..15; the result has output g of both in
    byte g.
    """
    words = _by_tile_row(qzeros.view(np.uint32), silu)
    rows, groups = words.shape[1:]
    out = np.empty((rows, groups, 8), np.uint8)
    for nibble, g in enumerate(ORDER):
        low, high = (words >> np.uint32(4 * nibble)) & np.uint32(15)
        out[:, :, g] = low | (high << np.uint32(4))
    return out.view("<i4")


def tile_scales(scales: np.ndarray, silu: bool = False) -> np.ndarray:
    """scales, [K/G, N] -> [ceil(N/16), K/G, 16] of the same type. Raises ValueError as above."""
    groups, N = scales.shape
    padded = _padded(scales, 8 * _WORDS, silu)
    halves: tuple[int, ...] = (groups, 2, -1, 8) if silu else (groups, -1, 2, 8)
    by_row = padded.reshape(halves).transpose((2, 0, 3, 1) if silu else (1, 0, 3, 2))
    return np.ascontiguousarray(by_row).reshape(-(-N // TILE_N), groups, TILE_N)


def _by_tile_row(words: np.ndarray, silu: bool) -> np.ndarray:
    """[height, N/8] -> a view [2, rows, height]: the words of outputs 0..7 and of 8..15 of a row.

    Eight outputs of the stock layout are a word, and interleaving gate and up takes whole words.
    """
    height = words.shape[0]
    padded = _padded(words, _WORDS, silu)
    if silu:
        return padded.reshape(height, _WORDS, -1).transpose(1, 2, 0)
    return padded.reshape(height, -1, _WORDS).transpose(2, 1, 0)


def _padded(array: np.ndarray, multiple: int, silu: bool) -> np.ndarray:
    missing = -array.shape[1] % multiple
    if missing and silu:
        N = array.shape[1] * TILE_N // multiple
        raise ValueError(f"gate_up of {N} rows cannot be interleaved: not a multiple of 16")
    return np.pad(array, ((0, 0), (0, missing))) if missing else array


def _tile_stripe(words: np.ndarray, columns: int) -> np.ndarray:
    """[2, rows, K] of the stock layout -> [rows, columns, g, t, step] of the tiled one."""
    _, rows, K = words.shape
    if K % TILE_K:
        words = np.pad(words, ((0, 0), (0, 0), (0, columns * TILE_K - K)))
    # K is column, step, 8-half, t, parity; the first three axes count the nibbles of the result.
    split = words.reshape(_WORDS, rows, columns, 4, 2, 4, 2)
    eight = np.ascontiguousarray(split.transpose(6, 4, 0, 1, 2, 5, 3))
    exchange_nibbles(eight.reshape(8, -1))
    tiled = eight.reshape(8, rows, columns, 4, 4)
    out = np.empty((rows, columns, 8, 4, 4), np.uint32)
    for nibble, g in enumerate(ORDER):
        out[:, :, g] = tiled[nibble]
    return out


def exchange_nibbles(eight: np.ndarray) -> None:
    """uint32 [8, n], in place: nibble j of word i and nibble i of word j change places.

    The transposition of a matrix by halves (Hacker's Delight, section 7-3).
    """
    for step, mask in ((4, 0x0000FFFF), (2, 0x00FF00FF), (1, 0x0F0F0F0F)):
        pairs = eight.reshape(-1, 2, step, eight.shape[1])
        low, high = pairs[:, 0], pairs[:, 1]
        moved = (low >> np.uint32(4 * step)) ^ high
        moved &= np.uint32(mask)
        high ^= moved
        low ^= moved << np.uint32(4 * step)
