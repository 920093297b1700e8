"""Learned integers: their gradients by autograd, what they must keep and what they must better."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mlcawq.checkpoint.streaming import StreamedModel
from mlcawq.errors import UserError
from mlcawq.families import ARCHITECTURES
from mlcawq.quantize.block import BlockResult, quantize_block
from mlcawq.quantize.fake_quantization import LearnedRounding, rounded
from mlcawq.quantize.integer import IntegerGrid, QuantizedWeight, full_range, quantize_weight
from mlcawq.quantize.moments import Original
from mlcawq.quantize.recipe import load_recipe, parse_recipe

LEARNED = ("awq+omniquant", "signround", "awq+gptq+signround")


def _start(
    bits: int, *, symmetric: bool = False, seed: int = 0
) -> tuple[QuantizedWeight, torch.Tensor, torch.Tensor]:
    """A rounded weight [64, 6], the weight and its positions, some beyond a narrowed range."""
    weight = torch.randn(64, 6, generator=torch.Generator().manual_seed(seed))
    grid = IntegerGrid(bits, 32, symmetric)
    scale, zero = full_range(0.7 * weight, grid)
    position = torch.addcmul(zero, grid.grouped(weight), scale.reciprocal()).view_as(weight)
    return quantize_weight(weight, scale, zero, grid), weight, position


def _through(values: torch.Tensor) -> torch.Tensor:
    return values + (values.round() - values).detach()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gradients_are_those_of_the_straight_through_formula(bits: int) -> None:
    start, _, position = _start(bits)
    given = [position, start.scale.float().unsqueeze(1), start.zero.float().unsqueeze(1)]
    ours, theirs = ([tensor.clone().requires_grad_() for tensor in given] for _ in range(2))
    found = rounded(*ours, start.grid)
    codes = _through(theirs[0]).clamp(0, start.grid.levels).view(-1, 32, 6)
    expected = ((codes - theirs[2]) * theirs[1]).view_as(position)
    torch.testing.assert_close(found, expected)
    weighing = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
    for value in (found, expected):
        (value * weighing).square().sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad, other.grad)


def test_gradient_of_scales_is_the_slope_of_what_is_computed() -> None:
    """By finite differences: with the integers held, the weight is linear in its scale."""
    start, _, position = _start(3)
    scale, zero = start.scale.double().unsqueeze(1), start.zero.double().unsqueeze(1)
    weighing = torch.randn(64, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def loss(scale: torch.Tensor) -> torch.Tensor:
        return (rounded(position.double(), scale, zero, start.grid) * weighing).square().sum()

    leaf = scale.clone().requires_grad_()
    loss(leaf).backward()
    for group, column in ((0, 0), (1, 4)):
        step = torch.zeros_like(scale)
        step[group, 0, column] = 1e-6
        slope = (loss(scale + step) - loss(scale - step)) / 2e-6
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad[group, 0, column], slope, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_learning_begins_with_the_very_integers(bits: int, symmetric: bool) -> None:
    start, weight, position = _start(bits, symmetric=symmetric)
    maker, offset = LearnedRounding(start, position), torch.zeros_like(weight).T
    stored = maker.quantized(offset)
    for name in ("codes", "scale", "zero"):
        assert torch.equal(getattr(stored, name), getattr(start, name)), name
    torch.testing.assert_close(maker(offset).T, start.dequantized(), rtol=0, atol=0)


def test_what_is_stored_is_what_was_computed() -> None:
    start, _, position = _start(3)
    random = torch.Generator().manual_seed(2)
    maker, offset = LearnedRounding(start, position), torch.rand(6, 64, generator=random) - 0.5
    nn.init.uniform_(maker.scale_change, -0.2, 0.2, generator=random)
    stored = maker.quantized(offset)
    assert int((stored.codes != start.codes).sum()) > 0
    assert int(stored.codes.max()) <= 7
    torch.testing.assert_close(maker(offset).T, stored.dequantized(), rtol=0, atol=0)


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> StreamedModel:
    return StreamedModel(tiny_llama)


def _texts() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Inputs of a block whose directions differ much in size, as those of text do; fresh ones."""
    random = torch.Generator().manual_seed(0)
    size = torch.arange(128).div(-32).exp()
    mixing = torch.linalg.qr(torch.randn(128, 128, generator=random)).Q * size.unsqueeze(1)
    states = torch.randn(56, 64, 128, generator=random) @ mixing
    return [states[:28], states[28:48]], [states[48:]]


def _quantized(
    model: StreamedModel, recipe: str, bits: int = 3, **learning: Any
) -> tuple[nn.Module, BlockResult]:
    """Block 0 and its result; learning None leaves that step out."""
    chosen = load_recipe(recipe, {"bits": bits, "group_size": 32})
    parts = chosen.model_dump()
    brief = {"iterations": 30, "batch": 4, "hold_back": 4}
    parts["learning"] = {**parts["learning"], **brief, **learning}
    chosen = parse_recipe(parts)
    block, (hidden, _) = model.block(0), _texts()
    result = quantize_block(
        block,
        hidden,
        lambda batch, tokens: model.layer_arguments(0, batch, tokens),
        ARCHITECTURES["llama"].groups_of(block),
        chosen,
        name="block",
        full_name=lambda linear: linear,
        head_dim=model.config.head_dim,
        original=Original(model.block(0), _texts()[0]) if chosen.follows_original else None,
    )
    return block, result


def _error(model: StreamedModel, block: nn.Module, texts: list[torch.Tensor]) -> float:
    """Relative, on tokens that count alike once the next norm has taken their size away."""
    difference = norm = 0.0
    for states in texts:
        target = model.run_block(model.block(0), 0, states)
        size = target.square().mean(-1, keepdim=True).sqrt()
        found = model.run_block(block, 0, states)
        difference += float(((found - target) / size).square().sum())
        norm += float((target / size).square().sum())
    return (difference / norm) ** 0.5


@pytest.mark.parametrize("recipe", LEARNED)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_learning_lowers_the_error_of_the_block(
    model: StreamedModel, recipe: str, bits: int
) -> None:
    """On the text that it has seen and on text that it has not."""
    before, started = _quantized(model, recipe, bits, iterations=0)
    after, learned = _quantized(model, recipe, bits)
    for texts in _texts():
        assert _error(model, after, texts) < _error(model, before, texts)
    for name, weight in learned.weights.items():
        assert int(weight.codes.max()) < 2**bits
        assert int(weight.zero.max()) < 2**bits
        linear = after.get_submodule(name)
        assert type(linear) is nn.Linear
        assert torch.equal(linear.weight.detach(), weight.dequantized().T)
    moved = [
        (weight.codes.int() - started.weights[name].codes.int()).abs().max()
        for name, weight in learned.weights.items()
    ]
    assert max(moved) <= (recipe != "awq+omniquant")


@pytest.mark.parametrize("recipe", LEARNED)
def test_same_seed_same_integers(model: StreamedModel, recipe: str) -> None:
    first, second = (_quantized(model, recipe, iterations=6)[1].weights for _ in range(2))
    for name, weight in first.items():
        assert torch.equal(weight.codes, second[name].codes)
        assert torch.equal(weight.scale, second[name].scale)
        assert torch.equal(weight.zero, second[name].zero)


def test_batches_of_the_text_do_not_matter(
    model: StreamedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences are drawn by their number in the whole text, however that is cut."""
    _, found = _quantized(model, "signround", iterations=4, compute="float32")
    hidden, fresh = _texts()
    cut = [part for states in hidden for part in states.split(3)]
    monkeypatch.setattr(f"{__name__}._texts", lambda: (cut, fresh))
    _, other = _quantized(model, "signround", iterations=4, compute="float32")
    same = [
        float((weight.codes == other.weights[name].codes).float().mean())
        for name, weight in found.weights.items()
    ]
    assert min(same) > 0.99


def test_without_iterations_nothing_is_learned(model: StreamedModel) -> None:
    for recipe, base in (("awq+gptq+signround", "awq+gptq"), ("signround", "awq")):
        _, found = _quantized(model, recipe, iterations=0, towards_original=0.5)
        plain = load_recipe(base, {"bits": 3, "group_size": 32})
        block, (hidden, _) = model.block(0), _texts()
        expected = quantize_block(
            block,
            hidden,
            lambda batch, tokens: model.layer_arguments(0, batch, tokens),
            ARCHITECTURES["llama"].groups_of(block),
            plain,
            name="block",
            full_name=lambda linear: linear,
            head_dim=model.config.head_dim,
            original=Original(model.block(0), hidden) if plain.follows_original else None,
        )
        for name, weight in found.weights.items():
            assert torch.equal(weight.codes, expected.weights[name].codes)


@pytest.mark.parametrize("learning", [{"learns": []}, {"hold_back": 1}, {"learns": ["zeros"]}])
def test_what_cannot_be_learned_is_refused(learning: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="learn"):
        parse_recipe({"learning": learning})
