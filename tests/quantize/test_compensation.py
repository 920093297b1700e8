"""Compensated rounding against its definition, worked out channel by channel in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mlcawq.quantize.compensation import Compensator, inverse_factor
from mlcawq.quantize.integer import IntegerGrid, full_range, quantize_weight
from mlcawq.quantize.recipe import CompensationRecipe
from mlcawq.quantize.statistics import diagonal_blocks


def correlated(tokens: int, K: int, seed: int) -> np.ndarray:
    """float32 [tokens, K]: channels that go together, some much larger than others."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((tokens, K)) @ rng.standard_normal((K, K)) / K**0.5
    return (mixed * np.exp(rng.standard_normal(K))).astype(np.float32)


def by_definition(
    weight: np.ndarray,
    moment: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray,
    levels: int,
    group: int,
    recipe: CompensationRecipe,
) -> np.ndarray:
    """The integers by Optimal Brain Quantization's rule (arXiv 2208.11580): after each channel, the
    inverse of what remains of the moment says how the others move.
    """
    K = len(weight)
    hessian = moment.astype(np.float64) + recipe.damping * np.diag(moment).mean() * np.eye(K)
    order = np.argsort(-np.diag(moment), kind="stable") if recipe.act_order else np.arange(K)
    rest, codes = weight.astype(np.float64).copy(), np.zeros(weight.shape, np.uint8)
    for position, channel in enumerate(order):
        others = order[position:]
        inverse = np.linalg.inv(hessian[np.ix_(others, others)])
        s, z = (a[channel // group, 0].astype(np.float64) for a in (scale, zero))
        codes[channel] = np.clip(np.round(rest[channel] / s + z), 0, levels)
        error = (rest[channel] - (codes[channel] - z) * s) / inverse[0, 0]
        rest[others] -= np.outer(inverse[0], error)
    return codes


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("bits", "symmetric"), [(4, False), (3, True)])
def test_as_the_definition_says(act_order: bool, bits: int, symmetric: bool) -> None:
    seed = int(np.random.SeedSequence().entropy or 0)
    K, N, group = 96, 40, 32
    X = correlated(300, K, seed)
    weight = np.random.default_rng(seed + 1).standard_normal((K, N)).astype(np.float32)
    grid = IntegerGrid(bits, group, symmetric)
    scale, zero = full_range(torch.from_numpy(weight), grid)
    recipe = CompensationRecipe(act_order=act_order, block_size=20)
    moment = X.T @ X
    compensator = Compensator(torch.from_numpy(moment), recipe)
    found = compensator.rounded(torch.from_numpy(weight), scale, zero, grid)
    expected = by_definition(
        weight, moment, scale.numpy(), zero.numpy(), grid.levels, group, recipe
    )
    # A weight that lies half-way may fall to the other side in float32, and takes others along.
    same = (found.codes.numpy() == expected).mean()
    assert same > 0.99, f"seed {seed}: {same:.2%} of the integers agree"
    errors = [
        np.linalg.norm(X @ (weight - dequantized))
        for dequantized in (
            found.dequantized().numpy(),
            quantize_weight(torch.from_numpy(weight), scale, zero, grid).dequantized().numpy(),
        )
    ]
    assert errors[0] < 0.95 * errors[1], f"seed {seed}"


def test_block_size_is_a_matter_of_speed() -> None:
    X = torch.from_numpy(correlated(200, 64, 5))
    weight = torch.randn(64, 24, generator=torch.Generator().manual_seed(5))
    grid = IntegerGrid(4, 32)
    scale, zero = full_range(weight, grid)
    found = [
        Compensator(X.T @ X, CompensationRecipe(block_size=size))
        .rounded(weight, scale, zero, grid)
        .codes
        for size in (1, 7, 64, 1000)
    ]
    assert all((codes == found[0]).float().mean() > 0.99 for codes in found[1:])


def test_channels_without_input_are_rounded_to_nearest() -> None:
    X = torch.from_numpy(correlated(100, 64, 9))
    X[:, [3, 40]] = 0
    weight = torch.randn(64, 16, generator=torch.Generator().manual_seed(9))
    grid = IntegerGrid(4, 32)
    scale, zero = full_range(weight, grid)
    found = Compensator(X.T @ X, CompensationRecipe()).rounded(weight, scale, zero, grid)
    nearest = quantize_weight(weight, scale, zero, grid)
    assert torch.equal(found.codes[[3, 40]], nearest.codes[[3, 40]])
    assert not torch.equal(found.codes, nearest.codes)


@pytest.mark.parametrize("tokens", [1, 5, 400])
def test_the_factor_of_the_inverse(tokens: int) -> None:
    """Also of moments of fewer tokens than channels, which have no inverse of their own."""
    X = torch.from_numpy(correlated(tokens, 48, 3))
    moment = X.T @ X
    factor = inverse_factor(moment, 0.01)
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(48)
    product = factor.double().T @ factor.double() @ damped.double()
    assert torch.allclose(product, torch.eye(48, dtype=torch.float64), atol=1e-3)
    assert torch.equal(factor, factor.triu())
    assert torch.isfinite(inverse_factor(torch.zeros(8, 8), 0.01)).all()


def test_diagonal_blocks() -> None:
    moment = torch.arange(36.0).view(6, 6)
    blocks = diagonal_blocks(moment, 3)
    assert torch.equal(blocks[0], moment[:3, :3])
    assert torch.equal(blocks[1], moment[3:, 3:])


def test_aiming_is_least_squares() -> None:
    """Towards the weight that makes the original's outputs from the inputs of the other model."""
    X = correlated(400, 48, 11).astype(np.float64)
    given = X + 0.3 * X[:, ::-1]
    weight = np.random.default_rng(11).standard_normal((48, 8))
    expected = np.linalg.lstsq(given, X @ weight, rcond=None)[0]
    moment, cross = (torch.from_numpy(given.T @ x).float() for x in (given, X))
    for share in (0.0, 0.25, 1.0):
        recipe = CompensationRecipe(damping=1e-6, towards_original=share)
        compensator = Compensator(moment, recipe)
        found = compensator.aimed(torch.from_numpy(weight).float(), cross - moment).numpy()
        wanted = weight + share * (expected - weight)
        assert np.linalg.norm(found - wanted) < 2e-2 * np.linalg.norm(wanted)
