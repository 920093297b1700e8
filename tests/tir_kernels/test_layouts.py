"""The stock layout: its arithmetic, its reference, its refusals."""

from __future__ import annotations

import numpy as np
import pytest

from tir_kernels import reference
from tir_kernels.layouts import ORDER, LinearShape, column_shift, nibble_column, silu_row


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


def stock(rng: np.random.Generator, K: int, N: int, group_size: int) -> tuple[np.ndarray, ...]:
    groups = K // group_size
    q = rng.integers(0, 16, (K, N), np.uint8)
    z = rng.integers(0, 16, (groups, N), np.uint8)
    s = rng.uniform(0.01, 1, (groups, N)).astype(np.float16)
    return reference.pack(q), reference.pack(z), s


TILED_SHAPES = [
    (64, 16, 32, False),
    (96, 24, 32, False),
    (256, 40, 128, False),
    (192, 48, 64, True),
]


@pytest.mark.parametrize(("K", "N", "group_size", "silu"), TILED_SHAPES)
def test_every_nibble_of_a_tile_lies_where_the_rule_says(
    K: int, N: int, group_size: int, silu: bool
) -> None:
    weights = stock(np.random.default_rng(), K, N, group_size)
    tiles, zeros, scales = reference.tile(*weights, silu)
    shape = LinearShape(K, N, group_size)
    for array, (expected, dtype) in zip(
        (tiles, zeros, scales), shape.parameters("n16k64").values(), strict=True
    ):
        assert (array.shape, array.dtype) == (expected, dtype)
    q, z = reference.unpack(weights[0]), reference.unpack(weights[1])
    bits = tiles.view(np.uint32)
    for row, column in np.ndindex(tiles.shape[:2]):
        for word, i in np.ndindex(128, 8):
            lane, step = divmod(word, 4)
            g, t = divmod(lane, 4)
            n = 16 * row + g + 8 * (i % 2)
            k = 64 * column + 16 * step + 2 * t + i // 4 + 8 * (i // 2 % 2)
            inside = n < N and k < K
            expected = q[k, silu_row(n, N) if silu else n] if inside else 0
            assert (bits[row, column, word] >> np.uint32(4 * i)) & 15 == expected
    for row, group, g, h in np.ndindex(*zeros.shape[:2], 8, 2):
        n = 16 * row + g + 8 * h
        word, shift = divmod(8 * g + 4 * h, 32)
        zero = (int(zeros[row, group, word]) >> shift) & 15
        source = silu_row(n, N) if silu else n
        assert zero == (z[group, source] if n < N else 0)
        assert scales[row, group, 2 * g + h] == (weights[2][group, source] if n < N else 0)


@pytest.mark.parametrize(("K", "N", "group_size", "silu"), TILED_SHAPES)
def test_tiling_is_reversible(K: int, N: int, group_size: int, silu: bool) -> None:
    weights = stock(np.random.default_rng(), K, N, group_size)
    back = reference.untile(*reference.tile(*weights, silu), K, N, silu)
    for ours, theirs in zip(back, weights, strict=True):
        assert ours.dtype == theirs.dtype
        assert np.array_equal(ours, theirs)


def test_silu_rows_pair_gate_with_up() -> None:
    N = 48
    rows = [silu_row(row, N) for row in range(N)]
    assert sorted(rows) == list(range(N))
    for tile_row in range(N // 16):
        for g in range(8):
            gate, up = rows[16 * tile_row + g], rows[16 * tile_row + g + 8]
            assert gate == 8 * tile_row + g
            assert up == gate + N // 2


def test_gate_up_that_cannot_be_interleaved() -> None:
    with pytest.raises(ValueError, match="multiple of 16"):
        reference.tile(*stock(np.random.default_rng(), 32, 24, 32), silu=True)


def test_unknown_layout() -> None:
    with pytest.raises(ValueError, match="packed_v9"):
        LinearShape(128, 64, 32).parameters("packed_v9")
