"""The fast packing into tiles gives the bits of `reference.tile`."""

from __future__ import annotations

import numpy as np
import pytest

from tir_kernels import pack_tiles
from tir_kernels.reference import tile, untile

Weights = tuple[np.ndarray, np.ndarray, np.ndarray]


def random_weights(rng: np.random.Generator, K: int, N: int, group_size: int) -> Weights:
    def words(rows: int) -> np.ndarray:
        return rng.integers(-(2**31), 2**31, (rows, N // 8), dtype=np.int64).astype(np.int32)

    scales = rng.standard_normal((K // group_size, N)).astype(np.float16)
    return words(K), words(K // group_size), scales


def packed(qweight: np.ndarray, qzeros: np.ndarray, scales: np.ndarray, silu: bool) -> Weights:
    return (
        pack_tiles.tile_qweight(qweight, silu),
        pack_tiles.tile_qzeros(qzeros, silu),
        pack_tiles.tile_scales(scales, silu),
    )


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(
    ("K", "N", "group_size"),
    [(32, 16, 32), (64, 48, 64), (96, 80, 32), (128, 1040, 128), (2208, 336, 32)],
)
def test_as_the_reference(K: int, N: int, group_size: int, silu: bool) -> None:
    seed = int(np.random.SeedSequence().entropy or 0)
    stock = random_weights(np.random.default_rng(seed), K, N, group_size)
    got = packed(*stock, silu)
    for ours, expected in zip(got, tile(*stock, silu), strict=True):
        assert ours.dtype == expected.dtype
        np.testing.assert_array_equal(ours, expected, f"seed {seed}")
    for ours, original in zip(untile(*got, K, N, silu), stock, strict=True):
        np.testing.assert_array_equal(ours, original, f"seed {seed}")


@pytest.mark.parametrize(("K", "N"), [(32, 8), (160, 24), (64, 1032)])
def test_a_last_tile_that_is_padded(K: int, N: int) -> None:
    seed = int(np.random.SeedSequence().entropy or 0)
    stock = random_weights(np.random.default_rng(seed), K, N, 32)
    for ours, expected in zip(packed(*stock, False), tile(*stock), strict=True):
        np.testing.assert_array_equal(ours, expected, f"seed {seed}")


def test_stripes_meet_without_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = random_weights(np.random.default_rng(), 64, 176, 32)
    whole = pack_tiles.tile_qweight(stock[0])
    monkeypatch.setattr(pack_tiles, "_BLOCK", 2 * 64 * 3)  # three of eleven tile rows at a time
    np.testing.assert_array_equal(pack_tiles.tile_qweight(stock[0]), whole)


def test_scales_keep_their_type() -> None:
    scales = np.random.default_rng().standard_normal((4, 24), np.float32)
    assert pack_tiles.tile_scales(scales).dtype == np.float32


def test_a_gate_up_that_cannot_be_interleaved() -> None:
    _, qzeros, scales = random_weights(np.random.default_rng(), 32, 24, 32)
    for attempt in (
        lambda: pack_tiles.tile_qweight(np.zeros((32, 3), np.int32), silu=True),
        lambda: pack_tiles.tile_qzeros(qzeros, silu=True),
        lambda: pack_tiles.tile_scales(scales, silu=True),
    ):
        with pytest.raises(ValueError, match="gate_up of 24 rows"):
            attempt()
