"""Folding scales keeps the function."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from mlcawq.errors import UserError
from mlcawq.quantize.folding import fold_scale, storable_scale

K, N = 128, 96


def _linear(k: int = K, n: int = N, bias: bool = False) -> nn.Linear:
    return nn.Linear(k, n, bias=bias).requires_grad_(False)


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
    fold_scale(norm, [linear], torch.rand(K, generator=generator) * 3 + 0.1, where="norm")
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
    rows = torch.arange(32).view(2, 1, 16).expand(shared).reshape(-1)
    x = torch.randn(10, 64)

    def attend() -> torch.Tensor:
        values = v(x).view(10, 2, 1, 16).expand(10, *shared)
        return o(values.reshape(10, 128))

    before = attend()
    scale = (torch.rand(2, 1, 16) + 0.5).expand(shared).reshape(-1)
    fold_scale(v, [o], scale, rows, where="v_proj")
    torch.testing.assert_close(attend(), before, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_overflow_is_named() -> None:
    with pytest.raises(UserError, match=r"layers\.3"):
        fold_scale(_linear(N, K), [_linear()], torch.full((K,), torch.inf), where="layers.3")
