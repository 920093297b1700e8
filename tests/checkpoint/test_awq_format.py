"""The storage rule against a scalar reading of its definition."""

from __future__ import annotations

import numpy as np
import pytest

from mlcawq.checkpoint.awq_format import dequantize, pack, unpack


@pytest.mark.parametrize("shape", [(1, 8), (3, 40), (16, 128)])
def test_pack_places_each_value_by_the_rule(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng()
    q = rng.integers(0, 16, shape, np.uint8)
    words = pack(q)
    assert words.dtype == np.int32
    assert words.shape == (shape[0], shape[1] // 8)
    for row in range(shape[0]):
        for j in range(shape[1] // 8):
            word = int(words[row, j]) & 0xFFFFFFFF
            for i, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                assert (word >> (4 * i)) & 15 == q[row, 8 * j + column]
    assert np.array_equal(unpack(words), q)


def test_pack_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="multiple of 8"):
        pack(np.zeros((2, 12), np.uint8))
    with pytest.raises(ValueError, match="4 bits"):
        pack(np.full((2, 8), 16, np.uint8))


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_dequantize(group_size: int) -> None:
    rng = np.random.default_rng()
    k, n = 2 * group_size, 24
    q = rng.integers(0, 16, (k, n), np.uint8)
    z = rng.integers(0, 16, (2, n), np.uint8)
    s = rng.uniform(0.01, 1, (2, n)).astype(np.float16)
    weight = dequantize(pack(q), pack(z), s, group_size)
    assert weight.dtype == np.float32
    for row in (0, group_size - 1, group_size, k - 1):
        group = row // group_size
        exact = (q[row].astype(float) - z[group].astype(float)) * s[group].astype(float)
        np.testing.assert_allclose(weight[row], exact, rtol=1e-6)
