"""The stock layout: its arithmetic, its reference, its refusals."""

from __future__ import annotations

import numpy as np
import pytest

from tir_kernels import reference
from tir_kernels.layouts import ORDER, LinearShape, column_shift, nibble_column


def test_one_word_by_hand() -> None:
    # Columns 0..7 hold 0..7; nibble i holds column ORDER[i], the lowest nibble first.
    words = reference.pack(np.arange(8, dtype=np.uint8)[None])
    assert words.view(np.uint32)[0, 0] == 0x75316420


@pytest.mark.parametrize("shape", [(1, 8), (3, 40), (16, 128)])
def test_every_value_lies_where_the_rule_says(shape: tuple[int, int]) -> None:
    q = np.random.default_rng().integers(0, 16, shape, np.uint8)
    words = reference.pack(q)
    assert words.dtype == np.int32
    assert words.shape == (shape[0], shape[1] // 8)
    for row in range(shape[0]):
        for column in range(shape[1]):
            word = int(words[row, column // 8]) & 0xFFFFFFFF
            nibble = [0, 2, 4, 6, 1, 3, 5, 7].index(column % 8)
            assert (word >> (4 * nibble)) & 15 == q[row, column]
    assert np.array_equal(reference.unpack(words), q)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_dequantize_by_the_definition(group_size: int) -> None:
    rng = np.random.default_rng()
    k, n = 2 * group_size, 24
    q = rng.integers(0, 16, (k, n), np.uint8)
    z = rng.integers(0, 16, (2, n), np.uint8)
    s = rng.uniform(0.01, 1, (2, n)).astype(np.float16)
    words = reference.pack(q), reference.pack(z)
    exact = reference.dequantize(*words, s)
    for row in (0, group_size - 1, group_size, k - 1):
        group = row // group_size
        by_hand = (q[row].astype(float) - z[group].astype(float)) * s[group].astype(float)
        assert np.array_equal(exact[row], by_hand)
    assert np.array_equal(reference.dequantize(*words, s, np.float32), exact)


def test_order_as_arithmetic() -> None:
    assert tuple(nibble_column(i) for i in range(8)) == ORDER
    assert [column_shift(c) for c in range(8)] == [4 * ORDER.index(c) for c in range(8)]


@pytest.mark.parametrize(
    ("K", "N", "group"), [(100, 64, 32), (128, 60, 32), (128, 64, 48), (0, 8, 32)]
)
def test_shapes_that_the_layout_cannot_hold(K: int, N: int, group: int) -> None:
    with pytest.raises(ValueError, match=r"is not"):
        LinearShape(K, N, group)


def test_values_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="4 bits"):
        reference.pack(np.full((1, 8), 16, np.uint8))
    with pytest.raises(ValueError, match="multiple of 8"):
        reference.pack(np.zeros((1, 9), np.uint8))
