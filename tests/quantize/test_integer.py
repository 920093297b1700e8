"""Rounding to what storage can hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mlcawq.quantize import integer
from mlcawq.quantize.integer import IntegerGrid, full_range, quantize_weight


def _by_the_book(weight: np.ndarray, bits: int, group: int) -> np.ndarray:
    """Asymmetric rounding, group by group and column by column, in float64."""
    result = np.empty_like(weight, dtype=np.float64)
    top = 2**bits - 1
    for start in range(0, weight.shape[0], group):
        for n in range(weight.shape[1]):
            w = weight[start : start + group, n].astype(np.float64)
            low, high = min(w.min(), 0), max(w.max(), 0)
            scale = float(np.float16((high - low) / top))
            zero = np.clip(np.round(-low / scale), 0, top)
            codes = np.clip(np.round(w / scale) + zero, 0, top)
            result[start : start + group, n] = (codes - zero) * scale
    return result


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_asymmetric_is_the_textbook_rule(bits: int, group: int) -> None:
    weight = torch.randn(256, 24, generator=torch.Generator().manual_seed(bits))
    grid = IntegerGrid(bits, group)
    found = quantize_weight(weight, *full_range(weight, grid), grid)
    assert found.codes.max() <= 2**bits - 1
    assert found.scale.dtype == torch.float16
    np.testing.assert_allclose(
        found.dequantized().numpy(), _by_the_book(weight.numpy(), bits, group), rtol=1e-5, atol=1e-7
    )


def test_search_and_storage_round_alike() -> None:
    weight = torch.randn(256, 40, generator=torch.Generator().manual_seed(0))
    for grid in (IntegerGrid(4, 64), IntegerGrid(4, 64, symmetric=True)):
        searched = torch.empty_like(weight)
        grid.round_to_nearest_(grid.grouped(weight), grid.grouped(searched))
        stored = quantize_weight(weight, *full_range(weight, grid), grid).dequantized()
        assert torch.equal(searched, stored)


def test_symmetric_has_its_zero_in_the_middle() -> None:
    weight = torch.randn(128, 8, generator=torch.Generator().manual_seed(0)) + 1
    grid = IntegerGrid(4, 32, symmetric=True)
    found = quantize_weight(weight, *full_range(weight, grid), grid)
    assert (found.zero == 8).all()
    # The step is 1/7 of the largest weight; rounding loses at most half of it.
    step = weight.view(4, 32, 8).abs().amax(1, keepdim=True) / 7
    error = (found.dequantized() - weight).view(4, 32, 8).abs()
    assert (error <= 0.502 * step).all()


@pytest.mark.parametrize("values", [(0.0, 0.0), (1e-7, 2e-7), (3.0, 3.5), (-9e4, -8e4), (2.0, 2.0)])
def test_awkward_groups(values: tuple[float, float]) -> None:
    """All zero, tiny, all of one sign, beyond float16, constant: finite, in range, sign kept."""
    weight = torch.linspace(*values, 32).unsqueeze(1).expand(32, 8).contiguous()
    grid = IntegerGrid(4, 32)
    found = quantize_weight(weight, *full_range(weight, grid), grid)
    result = found.dequantized()
    assert torch.isfinite(result).all()
    width = max(abs(values[0]), abs(values[1]), 15 * integer.SMALLEST_SCALE)
    assert (result - weight).abs().max() <= width / 15 * 0.51


def test_chunks_cover_everything_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integer, "CHUNK", 32 * 300)
    count = torch.zeros(5, 32, 700)
    for part in integer.chunks(count):
        count[part] += 1
    assert (count == 1).all()
