"""Weights from the stock layout into the blocked one, fast enough for whole models.

`reference.block` says what it does; as in `pack_tiles`, words are moved as words, and eight of them
are exchanged nibble for nibble where they meet. One array at a time: qweight, qzeros and scales can
be streamed.
"""

from __future__ import annotations

import numpy as np

from tir_kernels.layouts import BLOCK_N, ORDER, PACK
from tir_kernels.pack_tiles import exchange_nibbles

_INPUTS = (0, 4, 1, 5, 2, 6, 3, 7)  # of nibble i of a word: the input within its eight
_STRIPE = 2**16  # words that are worked on at a time: they stay in a core's cache
_WORDS = BLOCK_N // PACK  # words of the stock layout that hold a block's outputs


def block_qweight(qweight: np.ndarray) -> np.ndarray:
    """qweight, int32 [K, N/8] -> int32 [ceil(N/16), K/8, 16]."""
    words = _padded(qweight.view(np.uint32), _WORDS)
    K, blocks = words.shape[0], words.shape[1] // _WORDS
    out = np.empty((blocks, K // PACK, _WORDS, PACK), np.uint32)
    stripe = max(1, _STRIPE // (_WORDS * K))
    for start in range(0, blocks, stripe):
        part = words[:, start * _WORDS : (start + stripe) * _WORDS]
        by_input = part.reshape(K // PACK, PACK, -1, _WORDS)[:, _INPUTS]
        eight = np.ascontiguousarray(by_input.transpose(1, 2, 0, 3))
        exchange_nibbles(eight.reshape(PACK, -1))
        for nibble, output in enumerate(ORDER):
            out[start : start + stripe, :, :, output] = eight[nibble]
    return out.view(np.int32).reshape(blocks, K // PACK, BLOCK_N)


def block_qzeros(qzeros: np.ndarray) -> np.ndarray:
    """qzeros, int32 [K/G, N/8] -> int32 [ceil(N/16), K/G, 2], nibbles in the order of outputs."""
    words = _padded(qzeros.view(np.uint32), _WORDS)
    ordered = np.zeros_like(words)
    for nibble, output in enumerate(ORDER):
        value = (words >> np.uint32(4 * nibble)) & np.uint32(15)
        ordered |= value << np.uint32(4 * output)
    by_block = ordered.reshape(len(words), -1, _WORDS).transpose(1, 0, 2)
    return np.ascontiguousarray(by_block).view(np.int32)


def block_scales(scales: np.ndarray) -> np.ndarray:
    """scales, [K/G, N] -> [ceil(N/16), K/G, 16] of the same type."""
    padded = _padded(scales, BLOCK_N)
    by_block = padded.reshape(len(scales), -1, BLOCK_N).transpose(1, 0, 2)
    return np.ascontiguousarray(by_block)


def _padded(array: np.ndarray, multiple: int) -> np.ndarray:
    missing = -array.shape[1] % multiple
    return np.pad(array, ((0, 0), (0, missing))) if missing else array
