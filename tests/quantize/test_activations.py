"""Activations rounded token by token, against numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_models import make_tiny_model
from torch import nn

from mlcawq.checkpoint.streaming import StreamedModel
from mlcawq.families import ARCHITECTURES
from mlcawq.quantize.activations import RoundedInputs, round_tokens
from mlcawq.quantize.block import BlockResult, quantize_block
from mlcawq.quantize.integer import IntegerGrid, full_range, quantize_weight
from mlcawq.quantize.recipe import Recipe


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


def _quantized(folder: Path, **changes: Any) -> tuple[StreamedModel, nn.Module, BlockResult]:
    """Block 0 of a tiny model, W8A8 unless changed, after its quantization."""
    model = StreamedModel(folder)
    block, hidden = model.block(0), _hidden()
    recipe = Recipe.model_validate(
        {
            "bits": 8,
            "group_size": "channel",
            "symmetric": True,
            "clip": None,
            "activations": {},
            **changes,
        }
    )
    result = quantize_block(
        block,
        hidden,
        lambda batch, tokens: model.layer_arguments(0, batch, tokens),
        ARCHITECTURES["llama"].groups_of(block),
        recipe,
        name="block",
        full_name=lambda linear: linear,
        head_dim=model.config.head_dim,
    )
    return model, block, result


def _hidden() -> list[torch.Tensor]:
    states = torch.randn(4, 16, 128, generator=torch.Generator().manual_seed(1))
    states[..., [3, 70]] *= 40  # channels that leave little room for the others
    return [states]


def test_block_is_measured_as_it_will_run(tmp_path: Path) -> None:
    """The quantized block's outputs are those of int8 linears, and the error is theirs."""
    folder = make_tiny_model(tmp_path / "model")
    model, block, result = _quantized(folder)
    (states,) = _hidden()
    exact = model.run_block(model.block(0), 0, states)
    found = model.run_block(block, 0, states)
    torch.testing.assert_close(found, result.outputs[0])
    error = float((found - exact).norm() / exact.norm())
    assert abs(error - result.error) < 1e-4 * error

    reference = model.block(0)
    reference.load_state_dict({**reference.state_dict(), **result.changed})
    for name, weight in result.weights.items():
        linear = reference.get_submodule(name)
        linear.weight = nn.Parameter(weight.dequantized().T, requires_grad=False)
        linear.register_forward_pre_hook(lambda _, given: (round_tokens(given[0], 8),))
    torch.testing.assert_close(model.run_block(reference, 0, states), found)


def test_searched_scales_make_activations_rounder(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model")
    _, _, scaled = _quantized(folder)
    _, _, plain = _quantized(folder, scale=None)
    _, _, blind = _quantized(folder, activations=None)
    assert scaled.error < 0.8 * plain.error
    before, after = (
        {linear.name: linear.found for linear in result.linears} for result in (plain, scaled)
    )
    assert after["self_attn.q_proj"] < 0.8 * before["self_attn.q_proj"]
    assert plain.error > blind.error  # rounding activations costs something, and is seen
