"""A table of the vocabulary, [rows, width], in 8 or 4 bits, packed for the CPU's kernels.

8 bits: symmetric, one scale for the largest magnitude of a group. 4 bits: of several ranges for a
group, ever narrower, the one with the least squared error, with the scale as it will be stored. A
few rows are in float32 at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mlcawq.graph.tables import Table
from tir_kernels import int8_weights
from tir_kernels.layouts import BLOCK_N
from tir_kernels.reference import dequantize, unblock

_BLOCK = 2**16  # weights that are worked on at a time: they stay in a core's cache
_NARROWEST = 0.7  # of the range between a group's smallest and largest weight
_STEPS = 13  # ranges that are tried, the whole one included

Arrays = dict[str, np.ndarray]


def round_table(weight: np.ndarray, table: Table, scale_dtype: str) -> Arrays:
    """The arrays of `Table.parameters` for a weight [rows, width] of any floating type.

    A group with values that are not finite has such a scale.
    """
    rows, width = weight.shape
    arrays: Arrays = {
        name: np.zeros(shape, dtype)
        for name, (shape, dtype) in table.parameters(rows, width, scale_dtype).items()
    }
    pack = _pack_int8 if table.bits == 8 else _pack_int4
    for start, part in _parts(weight, table.group_size):
        blocks = slice(start // BLOCK_N, start // BLOCK_N + -(-len(part) // BLOCK_N))
        for name, packed in pack(part).items():
            arrays[name][blocks] = packed
    return arrays


def read_table(arrays: Arrays, table: Table, rows: int) -> np.ndarray:
    """The weight that packed arrays stand for, [rows, width] in the type of their scales."""
    blocks, width = arrays["scales"].shape[0], arrays["scales"].shape[1] * table.group_size
    out = np.empty((rows, width), arrays["scales"].dtype)
    step = max(1, _BLOCK // (BLOCK_N * width))
    for first in range(0, blocks, step):
        part: Arrays = {name: array[first : first + step] for name, array in arrays.items()}
        place = out[first * BLOCK_N : (first + step) * BLOCK_N]
        if table.bits == 8:
            weight = int8_weights.dequantize(
                part["qweight"], part["scales"], len(place), np.float32
            )
        else:
            count = len(part["scales"]) * BLOCK_N
            stock = unblock(part["qweight"], part["qzeros"], part["scales"], count)
            weight = dequantize(*stock, np.float32).T[: len(place)]
        place[:] = weight
    return out


def _parts(weight: np.ndarray, group_size: int) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, float32 [rows, groups, group_size]), whole blocks of rows but for the last."""
    rows, width = weight.shape
    step = max(1, _BLOCK // (BLOCK_N * width)) * BLOCK_N
    for start in range(0, rows, step):
        part: np.ndarray = weight[start : start + step].astype(np.float32)
        yield start, part.reshape(len(part), -1, group_size)


def _stored(scale: np.ndarray) -> np.ndarray:
    """As float16 holds it; 1 where a group is zero, or too small for float16."""
    with np.errstate(over="ignore"):
        halves: np.ndarray = scale.astype(np.float16)
    halves[halves == 0] = 1
    return halves


def _pack_int8(weight: np.ndarray) -> Arrays:
    scale = _stored(np.abs(weight).max(2) / int8_weights.LARGEST)
    with np.errstate(invalid="ignore"):  # seen in the scale
        q = np.rint(weight / scale.astype(np.float32)[:, :, None])
        # A scale that was rounded down would give 128.
        q = np.clip(q, -int8_weights.LARGEST, int8_weights.LARGEST).astype(np.int8)
    return {
        "qweight": int8_weights.pack(q.reshape(len(q), -1)),
        "scales": int8_weights.pack_scales(scale),
    }


def _pack_int4(weight: np.ndarray) -> Arrays:
    q, zero, scale = _round_int4(weight)
    missing = -len(weight) % BLOCK_N
    q, zero, scale = (
        np.pad(array, ((0, missing), *((0, 0),) * (array.ndim - 1))) for array in (q, zero, scale)
    )
    rows, groups, _ = q.shape
    # [block, n, k, half, byte]: a byte holds inputs 8k + j and 8k + 4 + j
    split = q.reshape(rows // BLOCK_N, BLOCK_N, -1, 2, 4)
    words = np.ascontiguousarray(split[:, :, :, 0] | (split[:, :, :, 1] << np.uint8(4)))
    by_block = zero.reshape(-1, BLOCK_N, groups).transpose(0, 2, 1)
    zeros = np.ascontiguousarray(by_block[:, :, 0::2] | (by_block[:, :, 1::2] << np.uint8(4)))
    return {
        "qweight": words.view("<i4")[..., 0].transpose(0, 2, 1),
        "qzeros": zeros.view("<i4"),
        "scales": scale.reshape(-1, BLOCK_N, groups).transpose(0, 2, 1),
    }


def _round_int4(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float32 [rows, groups, G] -> q uint8 of that shape, zero uint8 and scale float16, both
    [rows, groups].
    """
    # Zero has to be among the values, or the zero point would not fit into 4 bits.
    low, high = np.minimum(weight.min(2), 0), np.maximum(weight.max(2), 0)
    least = np.full(low.shape, np.inf, np.float32)
    best, best_zero = np.zeros(weight.shape, np.uint8), np.zeros(low.shape, np.uint8)
    best_scale = np.full(low.shape, np.nan, np.float16)  # stays so where no error is a number
    for share in np.linspace(1, _NARROWEST, _STEPS, dtype=np.float32):
        scale = _stored((high - low) * (share / 15))
        step: np.ndarray = scale.astype(np.float32)
        zero = np.clip(np.rint(-low * share / step), 0, 15)
        # Into a few arrays again and again: these are as large as a core's cache.
        q = np.multiply(weight, (1 / step)[:, :, None])
        np.rint(q, out=q)
        q += zero[:, :, None]
        np.clip(q, 0, 15, out=q)
        difference = q - zero[:, :, None]
        difference *= step[:, :, None]
        difference -= weight
        error = np.einsum("rgk,rgk->rg", difference, difference)
        better = error < least
        for kept, found in ((least, error), (best_zero, zero), (best_scale, scale)):
            np.copyto(kept, found, where=better, casting="unsafe")
        np.copyto(best, q, where=better[:, :, None], casting="unsafe")
    return best, best_zero, best_scale
