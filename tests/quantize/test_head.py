"""The output head: slices against the whole, stored, read again, measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_decoders import make_tiny_decoder
from tiny_models import make_tiny_model, make_tokenizer
from torch import nn

from mlcawq.checkpoint.streaming import StreamedModel
from mlcawq.errors import UserError
from mlcawq.quantize import head as heads
from mlcawq.quantize.calibration import BUNDLED, CalibrationData, load_calibration
from mlcawq.quantize.head import Head, HeadResult, quantize_head
from mlcawq.quantize.pipeline import check_checkpoint, quantize_checkpoint
from mlcawq.quantize.recipe import Recipe, load_recipe

K, V = 128, 1000


@pytest.fixture(scope="module")
def calibration() -> CalibrationData:
    return load_calibration(BUNDLED, make_tokenizer(), samples=8, seq_len=64)


def _setting() -> tuple[torch.Tensor, nn.Module, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(V, K, generator=generator)
    norm = nn.RMSNorm(K).requires_grad_(False)
    norm.weight.copy_(torch.rand(K, generator=generator) + 0.5)
    norm.weight[::30] *= 20
    mixing = torch.eye(K) + 0.3 * torch.randn(K, K, generator=generator) / K**0.5
    hidden = [torch.randn(4, 64, K, generator=generator) @ mixing for _ in range(3)]
    return weight, norm, hidden


def _quantized(**options: Any) -> HeadResult:
    weight, norm, hidden = _setting()
    recipe = Recipe.model_validate({"group_size": 32, **options})
    return quantize_head(Head("lm_head", V, lambda rows: weight[rows], norm), hidden, recipe)


def _error(result: HeadResult) -> float:
    """Of the logits, with the norm as it is afterwards."""
    weight, norm, hidden = _setting()
    states = torch.cat(hidden).flatten(0, 1)
    expected = norm(states) @ weight.T
    if result.norm:
        norm.load_state_dict(result.norm)
    found = norm(states) @ result.weight.dequantized()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("compensation", [None, {}])
def test_error_is_the_logits_and_falls(compensation: dict[str, Any] | None) -> None:
    nearest = _quantized(scale=None, clip=None)
    better = _quantized(compensation=compensation)
    for result in (nearest, better):
        assert result.linear.found == pytest.approx(_error(result), rel=0.02)
    assert nearest.linear.found == nearest.linear.nearest == better.linear.nearest
    assert better.linear.found < 0.7 * nearest.linear.found
    assert not nearest.norm
    assert better.norm


@pytest.mark.parametrize("compensation", [None, {}])
def test_slices_are_as_the_whole(
    compensation: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _quantized(compensation=compensation)
    monkeypatch.setattr(heads, "_SLICE", 1)
    parts = _quantized(compensation=compensation)
    same = (whole.weight.codes == parts.weight.codes).float().mean()
    assert same > 0.999  # sums of another order
    assert torch.equal(whole.weight.scale, parts.weight.scale)


@pytest.mark.parametrize(
    ("fmt", "tie"), [("awq", False), ("awq", True), ("compressed-tensors", False), ("fake", True)]
)
def test_head_is_stored_read_and_measured(
    fmt: str, tie: bool, tmp_path: Path, calibration: CalibrationData
) -> None:
    source = make_tiny_model(tmp_path / "model", tie=tie)
    out = tmp_path / "out"
    recipe = load_recipe("awq", {"group_size": 32, "head": True})
    report = quantize_checkpoint(source, out, recipe, calibration, fmt=fmt)
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert any("head" in warning for warning in report.warnings) == tie
    head = report.blocks[-1]
    assert (head.name, head.linears[0].name) == ("lm_head", "lm_head")
    assert 0 < head.error < 0.2

    kl = []
    for ids in calibration.held_out:
        expected, found = (
            StreamedModel(folder).logits([ids.unsqueeze(0)])[0][0].log_softmax(-1)
            for folder in (source, out)
        )
        kl.append((expected.exp() * (expected - found)).sum(-1))
    assert float(torch.cat(kl).mean()) == pytest.approx(report.measured.kl, rel=0.02)
    written = StreamedModel(out)
    if fmt == "awq":
        assert "lm_head.qweight" in written.reader
        assert "lm_head.weight" not in written.reader
        assert "lm_head" not in config["quantization_config"]["modules_to_not_convert"]


def test_a_head_goes_on_after_the_blocks(
    tmp_path: Path, calibration: CalibrationData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the head and the writing, the same command ends with the same bytes."""
    source = make_tiny_model(tmp_path / "model")
    recipe = load_recipe("rtn", {"group_size": 32, "head": True})
    quantize_checkpoint(source, tmp_path / "once", recipe, calibration)
    with monkeypatch.context() as patch:
        patch.setattr("mlcawq.quantize.output.write_report", _killed)
        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(source, tmp_path / "twice", recipe, calibration)
    quantize_checkpoint(source, tmp_path / "twice", recipe, calibration)
    once, twice = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("once", "twice")
    )
    assert once == twice


def _killed(*_: Any) -> None:
    raise KeyboardInterrupt


def test_what_cannot_be_meant(tmp_path: Path) -> None:
    source = make_tiny_decoder(tmp_path / "model", "llama")
    recipe = load_recipe("smooth-w8a8", {"head": True})
    with pytest.raises(UserError) as caught:
        check_checkpoint(source, tmp_path / "out", recipe, "compressed-tensors")
    assert "no engine" in str(caught.value)
