"""The scale search."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mlcawq.quantize.integer import IntegerGrid
from mlcawq.quantize.probes import ModuleProbe, Sample
from mlcawq.quantize.recipe import ScaleRecipe
from mlcawq.quantize.scaling import search_scale

K, N = 128, 96


def _linear(k: int = K, n: int = N, bias: bool = False) -> nn.Linear:
    linear = nn.Linear(k, n, bias=bias)
    linear.weight = nn.Parameter(linear.weight.detach().T.contiguous().T, requires_grad=False)
    return linear.requires_grad_(False)


def _outlier_tokens() -> torch.Tensor:
    tokens = torch.randn(256, K, generator=torch.Generator().manual_seed(3))
    tokens[:, ::25] *= 30
    return tokens


def _sample(tokens: torch.Tensor) -> Sample:
    return Sample(tokens, torch.ones(len(tokens)), 0, len(tokens))


@pytest.mark.parametrize("formula", ["v1", "v2", "both"])
@torch.no_grad()
def test_outlier_channels_are_scaled_up(formula: str) -> None:
    torch.manual_seed(0)
    linear, tokens = _linear(), _outlier_tokens()
    original = linear.weight.clone()
    probe = ModuleProbe(linear, _sample(tokens))
    recipe = ScaleRecipe.model_validate({"formula": formula})
    found = search_scale([linear], [IntegerGrid(4, 32)], tokens.abs().mean(0), probe, recipe)
    assert torch.equal(linear.weight, original)
    assert found.error < 0.5 * found.unscaled
    assert found.scale[::25].mean() > 2 * found.scale.median()


@torch.no_grad()
def test_claimed_error_is_the_true_one() -> None:
    torch.manual_seed(0)
    linear, tokens = _linear(), _outlier_tokens()
    grid = IntegerGrid(4, 32)
    probe = ModuleProbe(linear, _sample(tokens))
    found = search_scale([linear], [grid], tokens.abs().mean(0), probe, ScaleRecipe())
    weight = linear.weight.T.contiguous()
    scaled = weight * found.scale.unsqueeze(1)
    rounded = torch.empty_like(scaled)
    grid.round_to_nearest_(grid.grouped(scaled), grid.grouped(rounded))
    difference = tokens @ (rounded / found.scale.unsqueeze(1) - weight)
    true = difference.square().sum() / (tokens @ weight).square().sum()
    assert found.error == pytest.approx(float(true), rel=1e-3)


@torch.no_grad()
def test_shared_channels_get_one_scale() -> None:
    torch.manual_seed(0)
    linear, tokens = _linear(), _outlier_tokens()
    probe = ModuleProbe(linear, _sample(tokens))
    rows = torch.arange(32).view(2, 1, 16).expand(2, 4, 16).reshape(-1)
    found = search_scale(
        [linear],
        [IntegerGrid(4, 32)],
        tokens.abs().mean(0),
        probe,
        ScaleRecipe(),
        rows=rows,
    )
    view = found.scale.view(2, 4, 16)
    assert torch.equal(view, view[:, :1].expand(2, 4, 16))
    assert view.unique().numel() > 2


@torch.no_grad()
def test_formulas_are_those_of_the_literature() -> None:
    """One candidate each: r = 0 of v1 is what the weights say alone, v2's is no scale at all."""
    torch.manual_seed(0)
    linear, tokens = _linear(), _outlier_tokens()
    linear.weight.mul_(torch.linspace(0.2, 1, K))  # columns of very different sizes
    probe = ModuleProbe(linear, _sample(tokens))
    found = {
        formula: search_scale(
            [linear],
            [IntegerGrid(2, 32)],
            tokens.abs().mean(0),
            probe,
            ScaleRecipe.model_validate({"formula": formula, "grid": 1}),
        ).scale
        for formula in ("v1", "v2")
    }
    groups = linear.weight.abs().view(N, -1, 32)
    expected = 1 / (groups / groups.amax(2, keepdim=True)).view(N, K).mean(0)
    expected /= (expected.max() * expected.min()).sqrt()
    torch.testing.assert_close(found["v1"], expected, rtol=2e-3, atol=0)
    assert torch.equal(found["v2"], torch.ones(K))


@pytest.mark.parametrize("formula", ["v1", "v2", "both"])
@torch.no_grad()
def test_weights_that_no_scale_helps_are_left_alone(formula: str) -> None:
    linear, tokens = _linear(), _outlier_tokens()
    lattice = torch.randint(16, (N, K), generator=torch.Generator().manual_seed(1))
    lattice[:, ::32], lattice[:, 1::32] = 0, 15  # every group reaches both ends of its range
    linear.weight.copy_((lattice - 7) / 64)
    probe = ModuleProbe(linear, _sample(tokens))
    recipe = ScaleRecipe.model_validate({"formula": formula})
    found = search_scale([linear], [IntegerGrid(4, 32)], tokens.abs().mean(0), probe, recipe)
    assert torch.equal(found.scale, torch.ones(K))
    assert found.error == found.unscaled
