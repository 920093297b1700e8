"""The clipping search against a direct evaluation with tokens."""

from __future__ import annotations

import pytest
import torch

from mlcawq.quantize.clipping import search_clipping
from mlcawq.quantize.integer import IntegerGrid, full_range, quantize_weight
from mlcawq.quantize.recipe import ClipRecipe

K, N, G, T = 128, 48, 32, 400


def _setting() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(K, N, generator=generator)
    weight[::37] *= 4  # a few weights that stretch their groups
    weight[5] += 3
    tokens = (
        torch.randn(T, K, generator=generator) @ torch.randn(K, K, generator=generator) / K**0.5
    )
    groups = tokens.T.view(K // G, G, T)
    return weight, tokens, groups @ groups.transpose(1, 2)


def _group_errors(
    weight: torch.Tensor, tokens: torch.Tensor, rounded: torch.Tensor
) -> torch.Tensor:
    """[K/G, N]: squared error of each group's share of the output, token by token."""
    difference = (rounded - weight).view(K // G, G, N)
    shares = torch.einsum("tgk,gkn->tgn", tokens.view(T, K // G, G), difference)
    return shares.square().sum(0)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("mode", ["symmetric", "asymmetric"])
def test_no_group_gets_worse_and_the_whole_better(mode: str, symmetric: bool) -> None:
    weight, tokens, gram = _setting()
    grid = IntegerGrid(3, G, symmetric)
    recipe = ClipRecipe.model_validate({"mode": mode})
    full = quantize_weight(weight, *full_range(weight, grid), grid).dequantized()
    clipped = quantize_weight(weight, *search_clipping(weight, gram, grid, recipe), grid)
    before = _group_errors(weight, tokens, full)
    after = _group_errors(weight, tokens, clipped.dequantized())
    assert (after <= before * (1 + 1e-4)).all()
    assert after.sum() < 0.9 * before.sum()


def test_symmetric_cut_is_the_best_of_its_grid() -> None:
    """Against AWQ's own formulation: clamp the weights to +-m, round, look at the outputs."""
    weight, tokens, gram = _setting()
    grid = IntegerGrid(4, G)
    recipe = ClipRecipe(mode="symmetric", grid=10, max_shrink=0.5)
    found = quantize_weight(weight, *search_clipping(weight, gram, grid, recipe), grid)
    widest = weight.view(K // G, G, N).abs().amax(1, keepdim=True)
    best = torch.full((K // G, N), torch.inf)
    for i in range(11):
        limit = widest * (1 - i * 0.05)
        clamped = weight.view(K // G, G, N).clamp(-limit, limit).view(K, N)
        rounded = quantize_weight(clamped, *full_range(clamped, grid), grid).dequantized()
        best = torch.minimum(best, _group_errors(weight, tokens, rounded))
    errors = _group_errors(weight, tokens, found.dequantized())
    # Rarely a weight outside the cut rounds to the integer beyond the one that the cut itself
    # rounds to: ours judges that integer, as it is the one that is stored.
    assert torch.isclose(errors, best, rtol=1e-3).float().mean() > 0.97
    assert errors.sum() < 1.01 * best.sum()


def test_two_ends_beat_one_cut_where_weights_lean_to_one_side() -> None:
    weight, tokens, gram = _setting()
    weight = weight.abs() ** 1.5 - 0.3
    grid = IntegerGrid(3, G)
    errors = {}
    for mode in ("symmetric", "asymmetric"):
        recipe = ClipRecipe.model_validate({"mode": mode})
        found = quantize_weight(weight, *search_clipping(weight, gram, grid, recipe), grid)
        errors[mode] = _group_errors(weight, tokens, found.dequantized()).sum()
    assert errors["asymmetric"] < errors["symmetric"]


@pytest.mark.parametrize("mode", ["symmetric", "asymmetric"])
def test_groups_that_no_cut_helps_keep_their_range(mode: str) -> None:
    weight, _, gram = _setting()
    grid = IntegerGrid(4, G)
    half = slice(0, K // 2)  # whose weights are integers of the full range already
    weight[half] = quantize_weight(weight, *full_range(weight, grid), grid).dequantized()[half]
    recipe = ClipRecipe.model_validate({"mode": mode})
    (scale, zero), (full, middle) = (
        search_clipping(weight, gram, grid, recipe),
        full_range(weight, grid),
    )
    groups = slice(0, K // G // 2)
    assert torch.equal(scale[groups], full[groups])
    assert torch.equal(zero[groups], middle[groups])
    assert not torch.equal(scale, full)


def test_asymmetric_cut_without_rounds_narrows_both_ends_by_one_factor() -> None:
    """Against LLMC's formulation for clip_sym: false, weights clamped and rounded."""
    weight, tokens, gram = _setting()
    grid = IntegerGrid(2, G)
    recipe = ClipRecipe(mode="asymmetric", grid=10, max_shrink=0.5, rounds=0)
    found = quantize_weight(weight, *search_clipping(weight, gram, grid, recipe), grid)
    grouped = weight.view(K // G, G, N)
    low, high = grouped.amin(1, keepdim=True), grouped.amax(1, keepdim=True)
    best = torch.full((K // G, N), torch.inf)
    for i in range(11):
        factor = 1 - i * 0.05
        clamped = grouped.clamp(low * factor, high * factor).view(K, N)
        rounded = quantize_weight(clamped, *full_range(clamped, grid), grid).dequantized()
        best = torch.minimum(best, _group_errors(weight, tokens, rounded))
    errors = _group_errors(weight, tokens, found.dequantized())
    assert torch.isclose(errors, best, rtol=1e-3).float().mean() > 0.97
    assert errors.sum() < 1.01 * best.sum()
