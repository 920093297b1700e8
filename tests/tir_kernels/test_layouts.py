"""The stock layout: its arithmetic, its reference, its refusals."""

from __future__ import annotations

import numpy as np
import pytest

from mlcawq.checkpoint import awq_format
from tir_kernels import reference
from tir_kernels.layouts import ORDER, LinearShape, column_shift, nibble_column


def test_one_word_by_hand() -> None:
    # Columns 0..7 hold 0..7; nibble i holds column ORDER[i], the lowest nibble first.
    words = reference.pack(np.arange(8, dtype=np.uint8)[None])
    assert words.view(np.uint32)[0, 0] == 0x75316420


def test_pack_and_unpack_are_inverse() -> None:
    q = np.random.default_rng(0).integers(0, 16, (64, 40), dtype=np.uint8)
    assert (reference.unpack(reference.pack(q)) == q).all()


def test_the_two_references_agree() -> None:
    rng = np.random.default_rng(1)
    words = rng.integers(-(2**31), 2**31, (64, 5), dtype=np.int64).astype(np.int32)
    zeros = rng.integers(-(2**31), 2**31, (2, 5), dtype=np.int64).astype(np.int32)
    scales = rng.random((2, 40)).astype(np.float16)
    ours = reference.dequantize(words, zeros, scales)
    np.testing.assert_allclose(awq_format.dequantize(words, zeros, scales, 32), ours, rtol=1e-6)


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
