"""Which rows of which sources make up a fused weight, learned from the function that fuses it.

A mapping of mlc_llm makes the weight [N, K] of one linear from weights [n, K] of a checkpoint:
mostly by putting them one above the other, in some models by taking the rows of several heads
apart, and for experts by putting those of one after those of another. An AWQ checkpoint holds the
same weights as columns, eight to a word, so the function cannot be applied to its arrays; but what
it does to rows can.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tir_kernels.reference import pack, unpack

Fuse = Callable[..., np.ndarray]

# Rows are numbered in digits to this base, which bfloat16, the narrowest type of a model, holds
# exactly; three of them number two million rows.
_BASE = 128
_DIGITS = 3


def row_order(fuse: Fuse, sizes: Sequence[int]) -> np.ndarray:
    """For every row that `fuse` returns, which row it is of the sources one above the other.

    sizes: the number of rows of each source. Returns int64 [N]; the rows [N, K] of several experts
    [E, N, K] count as [E * N]. Raises ValueError for a function
    that does more than to choose rows.
    """
    total = sum(sizes)
    numbers = np.arange(total)
    digits = np.stack([numbers // _BASE**power % _BASE for power in range(_DIGITS)], axis=1)
    try:
        fused = fuse(*np.split(digits.astype(np.float32), np.cumsum(sizes)[:-1]))
    except (ValueError, IndexError, TypeError) as error:
        raise ValueError(f"the weights are not fused by rows: {error}") from None
    if fused.ndim not in (2, 3) or fused.shape[-1] != _DIGITS:
        raise ValueError(f"rows of {_DIGITS} became an array of shape {fused.shape}")
    found = np.asarray(fused, np.float64).reshape(-1, _DIGITS)
    order = (found @ np.array([_BASE**power for power in range(_DIGITS)])).astype(np.int64)
    if not ((order >= 0) & (order < total)).all() or not np.array_equal(digits[order], found):
        raise ValueError("the rows are not only chosen but changed")
    return order


def fuse_columns(fuse: Fuse, arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Scales [K/G, n] of each source -> [K/G, N], in the order that `fuse` gives the rows."""
    joined = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=1)
    order = row_order(fuse, [array.shape[1] for array in arrays])
    return joined if _unchanged(order, joined.shape[1]) else joined[:, order]


def fuse_words(fuse: Fuse, arrays: Sequence[np.ndarray]) -> np.ndarray:
    """As `fuse_columns` for words int32 [R, n/8] of packed columns -> [R, N/8]."""
    joined = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=1)
    order = row_order(fuse, [8 * array.shape[1] for array in arrays])
    if _unchanged(order, 8 * joined.shape[1]):
        return joined
    return pack(unpack(joined)[:, order])


def by_expert(fused: np.ndarray, experts: int) -> np.ndarray:
    """Columns [R, E * W] of E experts, those of one after those of another, -> [E, R, W]."""
    split = fused.reshape(len(fused), experts, -1)
    return np.ascontiguousarray(split.transpose(1, 0, 2))


def _unchanged(order: np.ndarray, size: int) -> bool:
    return np.array_equal(order, np.arange(size))
