"""The fast packing into blocks gives the bits of `reference.block`, and nothing is lost there."""

from __future__ import annotations

import numpy as np
import pytest

from tests.tir_kernels.test_pack_tiles import random_weights
from tir_kernels import pack_blocks
from tir_kernels.layouts import BLOCKED, LinearShape
from tir_kernels.reference import block, unblock, unpack


@pytest.mark.parametrize(
    ("K", "N", "group_size"), [(32, 16, 32), (64, 8, 64), (96, 80, 32), (128, 1048, 128)]
)
def test_as_the_reference(K: int, N: int, group_size: int) -> None:
    seed = int(np.random.SeedSequence().entropy or 0)
    stock = random_weights(np.random.default_rng(seed), K, N, group_size)
    got = (
        pack_blocks.block_qweight(stock[0]),
        pack_blocks.block_qzeros(stock[1]),
        pack_blocks.block_scales(stock[2]),
    )
    shapes = LinearShape(K, N, group_size).parameters(BLOCKED).values()
    for ours, expected, (shape, dtype) in zip(got, block(*stock), shapes, strict=True):
        assert (ours.shape, ours.dtype) == (shape, np.dtype(dtype))
        np.testing.assert_array_equal(ours, expected, f"seed {seed}")
    for ours, original in zip(unblock(*got, N), stock, strict=True):
        np.testing.assert_array_equal(ours, original, f"seed {seed}")


def test_a_word_is_what_the_layout_says() -> None:
    stock = random_weights(np.random.default_rng(), 64, 40, 32)
    words, zeros, scales = block(*stock)
    q, z = unpack(stock[0]), unpack(stock[1])
    b, k, n, j = 1, 5, 13, 2
    byte = (int(words.view(np.uint32)[b, k, n]) >> (8 * j)) & 255
    assert (byte & 15, byte >> 4) == (q[8 * k + j, 16 * b + n], q[8 * k + 4 + j, 16 * b + n])
    assert (int(zeros.view(np.uint32)[b, 1, 1]) >> 20) & 15 == z[1, 16 * b + 13]
    assert scales[b, 1, n] == stock[2][1, 16 * b + n]
    assert not words[2, :, 8:].any()
    assert not scales[2, :, 8:].any()


def test_stripes_meet_without_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = random_weights(np.random.default_rng(), 64, 176, 32)
    whole = pack_blocks.block_qweight(stock[0])
    monkeypatch.setattr(pack_blocks, "_STRIPE", 2 * 64 * 3)
    np.testing.assert_array_equal(pack_blocks.block_qweight(stock[0]), whole)


def test_scales_keep_their_type() -> None:
    scales = np.random.default_rng().standard_normal((4, 24), np.float32)
    assert pack_blocks.block_scales(scales).dtype == np.float32
