"""What a fusing function does to rows, applied to packed columns."""

from __future__ import annotations

import numpy as np
import pytest

from mlcawq.build.mlc_plugin.rows import Fuse, by_expert, fuse_columns, fuse_words, row_order
from tir_kernels.reference import pack, unpack


def above(*weights: np.ndarray) -> np.ndarray:
    return np.concatenate(weights, axis=0).astype(np.float16)


def by_heads(weight: np.ndarray) -> np.ndarray:
    """Rows q, k, v of each of four heads -> all q, all k, all v, as for GPT-NeoX."""
    heads = weight.reshape(4, 3, -1, weight.shape[-1])
    return heads.transpose(1, 0, 2, 3).reshape(weight.shape)


@pytest.mark.parametrize(("fuse", "sizes"), [(above, [48, 16, 32]), (above, [8]), (by_heads, [96])])
def test_packed_columns_are_fused_as_rows_are(fuse: Fuse, sizes: list[int]) -> None:
    random = np.random.default_rng(0)
    values = [random.integers(0, 16, (5, size), np.uint8) for size in sizes]
    words = fuse_words(fuse, [pack(part) for part in values])
    expected = fuse(*[part.T for part in values]).T
    np.testing.assert_array_equal(unpack(words), expected)
    np.testing.assert_array_equal(fuse_columns(fuse, values), expected)


def test_experts_are_put_apart_from_each_other() -> None:
    def stack(*weights: np.ndarray) -> np.ndarray:
        """gate and up of each of two experts -> [2, gate and up, K]."""
        pairs = (np.concatenate(weights[i : i + 2]) for i in range(0, len(weights), 2))
        return np.stack(list(pairs)).astype(np.float16)

    random = np.random.default_rng(0)
    values = [random.integers(0, 16, (5, 16), np.uint8) for _ in range(4)]
    words = by_expert(fuse_words(stack, [pack(part) for part in values]), 2)
    expected = stack(*[part.T for part in values]).transpose(0, 2, 1)
    np.testing.assert_array_equal([unpack(of_one) for of_one in words], expected)
    np.testing.assert_array_equal(by_expert(fuse_columns(stack, values), 2), expected)


def test_rows_beyond_the_exact_numbers_of_float16_are_told_apart() -> None:
    order = row_order(above, [20_000, 45_000])
    np.testing.assert_array_equal(order, np.arange(65_000))


@pytest.mark.parametrize(
    ("fuse", "message"),
    [
        (lambda weight: weight.T, "became an array of shape"),
        (lambda weight: weight + 1, "not only chosen but changed"),
        (lambda weight: weight.reshape(7, -1), "not fused by rows"),
    ],
)
def test_other_functions_are_refused(fuse: Fuse, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        row_order(fuse, [16])
