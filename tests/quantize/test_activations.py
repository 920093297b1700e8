"""Activations rounded token by token, against numpy."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from mlcawq.quantize.activations import RoundedInputs, round_tokens
from mlcawq.quantize.integer import IntegerGrid, full_range, quantize_weight


def _inputs(*shape: int) -> torch.Tensor:
    inputs = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    inputs[0] *= 50  # tokens of different sizes
    return inputs


def test_each_token_has_its_own_scale() -> None:
    inputs = _inputs(5, 96)
    inputs[3] = 0
    found = round_tokens(inputs, 8).numpy()
    values = inputs.numpy().astype(np.float64)
    scale = np.abs(values).max(1, keepdims=True) / 127
    with np.errstate(invalid="ignore"):
        codes = np.nan_to_num(np.clip(np.round(values / scale), -127, 127))
    np.testing.assert_allclose(found, codes * scale, rtol=1e-5, atol=1e-6)
    assert not found[3].any()


def test_both_sides_in_integers_against_numpy() -> None:
    """What an int8 kernel computes: integer products, scaled by token and by output channel."""
    torch.manual_seed(0)
    inputs, linear = _inputs(7, 64), nn.Linear(64, 24, bias=False).requires_grad_(False)
    weight = linear.weight.T.contiguous()
    grid = IntegerGrid(8, 64, symmetric=True)
    stored = quantize_weight(weight, *full_range(weight, grid), grid)
    linear.weight = nn.Parameter(stored.dequantized().T, requires_grad=False)
    RoundedInputs([linear], 8)
    found = linear(inputs).numpy()

    values = inputs.numpy().astype(np.float64)
    token_scale = np.abs(values).max(1, keepdims=True) / 127
    tokens = np.round(values / token_scale).astype(np.int32)
    matrix = weight.numpy().astype(np.float64)
    channel_scale = np.abs(matrix).max(0) / 127
    channel_scale = channel_scale.astype(np.float16).astype(np.float64)
    channels = np.clip(np.round(matrix / channel_scale), -128, 127).astype(np.int32)
    expected = (tokens @ channels) * token_scale * channel_scale
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_rounding_can_be_put_off() -> None:
    linear = nn.Linear(16, 4).requires_grad_(False)
    inputs = _inputs(3, 16)
    exact = linear(inputs)
    rounded = RoundedInputs([linear], 8)
    assert not torch.equal(linear(inputs), exact)
    with rounded.off():
        assert torch.equal(linear(inputs), exact)
    assert not torch.equal(linear(inputs), exact)
