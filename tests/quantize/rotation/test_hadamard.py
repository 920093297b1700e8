"""Random Hadamard matrices."""

from __future__ import annotations

import pytest
import torch

from mlcawq.quantize.rotation.hadamard import Rotation, random_hadamard

# Powers of two, both of Paley's constructions, and hidden sizes of models.
HADAMARD = [1, 2, 64, 256, 12, 20, 28, 36, 76, 108, 576, 640, 768, 896, 960, 1152, 1536, 2880]
OTHERS = [7, 52, 92]


def _rotation(size: int, seed: int = 0) -> Rotation:
    return random_hadamard(size, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", HADAMARD)
def test_entries_are_of_one_magnitude(size: int) -> None:
    entries = _rotation(size).matrix().abs() * size**0.5
    torch.testing.assert_close(entries, torch.ones_like(entries))


@pytest.mark.parametrize("size", [*HADAMARD, *OTHERS])
def test_orthogonal_and_applied_as_its_matrix(size: int) -> None:
    rotation = _rotation(size)
    matrix = rotation.matrix()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))
    values = torch.randn(2, 3, size, generator=torch.Generator().manual_seed(1))
    expected = (values.double() @ matrix).float()
    torch.testing.assert_close(rotation.apply(values), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [4096, 5120, 6656, 3584])
def test_sizes_of_large_models_are_made_of_small_factors(size: int) -> None:
    rotation = _rotation(size)
    assert max(map(len, rotation.factors)) <= 104
    one = torch.zeros(1, size)
    one[0, 5] = 1
    spread = rotation.apply(one).abs() * size**0.5
    torch.testing.assert_close(spread, torch.ones_like(spread))


def test_seeds() -> None:
    assert torch.equal(_rotation(64).matrix(), _rotation(64).matrix())
    assert not torch.equal(_rotation(64).matrix(), _rotation(64, seed=1).matrix())
