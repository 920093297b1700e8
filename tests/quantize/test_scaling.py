"""The scale search, and that fusing scales keeps the function."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from mlcawq.errors import UserError
from mlcawq.quantize.integer import IntegerGrid
from mlcawq.quantize.probes import ModuleProbe
from mlcawq.quantize.recipe import ScaleRecipe
from mlcawq.quantize.scaling import fuse_scale, search_scale, storable_scale

K, N = 128, 96


def _linear(k: int = K, n: int = N, bias: bool = False) -> nn.Linear:
    linear = nn.Linear(k, n, bias=bias)
    linear.weight = nn.Parameter(linear.weight.detach().T.contiguous().T, requires_grad=False)
    return linear.requires_grad_(False)


def _outlier_tokens() -> torch.Tensor:
    tokens = torch.randn(256, K, generator=torch.Generator().manual_seed(3))
    tokens[:, ::25] *= 30
    return tokens


@pytest.mark.parametrize("duo", [True, False])
@torch.no_grad()
def test_outlier_channels_are_scaled_up(duo: bool) -> None:
    torch.manual_seed(0)
    linear, tokens = _linear(), _outlier_tokens()
    original = linear.weight.clone()
    probe = ModuleProbe(linear, tokens, torch.ones(len(tokens)))
    found = search_scale(
        [linear], [True], tokens.abs().mean(0), probe, IntegerGrid(4, 32), ScaleRecipe(duo=duo)
    )
    assert torch.equal(linear.weight, original)
    assert found.error < 0.5 * found.unscaled
    assert found.scale[::25].mean() > 2 * found.scale.median()


@torch.no_grad()
def test_claimed_error_is_the_true_one() -> None:
    torch.manual_seed(0)
    linear, tokens = _linear(), _outlier_tokens()
    grid = IntegerGrid(4, 32)
    probe = ModuleProbe(linear, tokens, torch.ones(len(tokens)))
    found = search_scale([linear], [True], tokens.abs().mean(0), probe, grid, ScaleRecipe())
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
    probe = ModuleProbe(linear, tokens, torch.ones(len(tokens)))
    shared = (2, 4, 16)
    found = search_scale(
        [linear],
        [True],
        tokens.abs().mean(0),
        probe,
        IntegerGrid(4, 32),
        ScaleRecipe(),
        shared=shared,
    )
    view = found.scale.view(shared)
    assert torch.equal(view, view[:, :1].expand(shared))


@torch.no_grad()
def test_norm_absorbs_a_scale_without_any_error() -> None:
    """Not even that of rounding the norm to float16: the scale is chosen to make up for it."""
    generator = torch.Generator().manual_seed(0)
    norm = LlamaRMSNorm(K)
    norm.weight = nn.Parameter(torch.rand(K, generator=generator).half().float() + 0.25)
    norm.weight[3] = 0
    linear = _linear()
    x = torch.randn(16, K, generator=generator)
    before = linear(norm(x))
    fuse_scale(norm, [linear], torch.rand(K, generator=generator) * 3 + 0.1, where="norm")
    assert torch.equal(norm.weight, norm.weight.half().float())
    torch.testing.assert_close(linear(norm(x)), before, rtol=1e-5, atol=1e-6)


def test_scale_that_float16_cannot_take_is_left_out() -> None:
    norm = torch.tensor([1.0, 1.0, 0.0, 1.0])
    scale, rounded = storable_scale(torch.tensor([2.0, 1e-9, 2.0, 1e12]), norm)
    assert scale.tolist() == [2.0, 1.0, 1.0, 1.0]
    assert rounded.tolist() == [0.5, 1.0, 0.0, 1.0]


@torch.no_grad()
def test_grouped_query_attention_keeps_its_function() -> None:
    """v has 2 heads of 16, o reads 8 heads: 4 query heads share each value head's scale."""
    torch.manual_seed(0)
    v, o = _linear(64, 32, bias=True), _linear(128, 64)
    shared = (2, 4, 16)
    x = torch.randn(10, 64)

    def attend() -> torch.Tensor:
        values = v(x).view(10, 2, 1, 16).expand(10, *shared)
        return o(values.reshape(10, 128))

    before = attend()
    scale = (torch.rand(2, 1, 16) + 0.5).expand(shared).reshape(-1)
    fuse_scale(v, [o], scale, where="v_proj", shared=shared)
    torch.testing.assert_close(attend(), before, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_overflow_is_named() -> None:
    with pytest.raises(UserError, match=r"layers\.3"):
        fuse_scale(_linear(N, K), [_linear()], torch.full((K,), torch.inf), where="layers.3")
