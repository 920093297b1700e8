"""Other integers for some linears: stored, reported, read again; one group for a whole channel."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_models import make_tiny_model, make_tokenizer

from mlcawq.checkpoint.streaming import StreamedModel
from mlcawq.errors import UserError
from mlcawq.quantize.calibration import BUNDLED, load_calibration
from mlcawq.quantize.pipeline import check_checkpoint, quantize_checkpoint
from mlcawq.quantize.recipe import load_recipe

OVERRIDES = [
    {"match": r"down_proj$", "bits": 8, "group_size": "channel"},
    {"match": r"layers\.1\.self_attn\.[qk]_proj$", "bits": 2, "symmetric": True},
]
RECIPE = load_recipe("rtn", {"group_size": 32, "overrides": OVERRIDES})


def _rounded(weight: np.ndarray, bits: int, size: int, symmetric: bool) -> np.ndarray:
    """Round to nearest in float64; weight [N, K]."""
    groups = weight.astype(np.float64).reshape(len(weight), -1, size)
    low, high = (np.minimum(groups.min(2), 0), np.maximum(groups.max(2), 0))
    if symmetric:
        scale = np.maximum(high, -low) / (2 ** (bits - 1) - 1)
    else:
        scale = (high - low) / (2**bits - 1)
    scale = scale.astype(np.float16).astype(np.float64)
    zero = np.full_like(scale, 2 ** (bits - 1)) if symmetric else np.round(-low / scale)
    scale, zero = scale[..., None], zero[..., None]
    codes = np.clip(np.round(groups / scale) + zero, 0, 2**bits - 1)
    return ((codes - zero) * scale).reshape(weight.shape)


def test_overrides_reach_storage_and_report(tmp_path: Path) -> None:
    source, out = make_tiny_model(tmp_path / "model"), tmp_path / "out"
    calibration = load_calibration(BUNDLED, make_tokenizer(), samples=4, seq_len=32)
    report = quantize_checkpoint(source, out, RECIPE, calibration, fmt="compressed-tensors")
    found = {
        f"{block.name}.{linear.name}": (linear.bits, linear.group_size, linear.symmetric)
        for block in report.blocks
        for linear in block.linears
    }
    expected = {
        "model.layers.0.self_attn.q_proj": (4, 32, False),
        "model.layers.1.self_attn.q_proj": (2, 32, True),
        "model.layers.1.self_attn.v_proj": (4, 32, False),
        "model.layers.0.mlp.down_proj": (8, "channel", False),
    }
    assert {name: found[name] for name in expected} == expected
    groups = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"]
    assert {group["weights"]["num_bits"] for group in groups.values()} == {2, 4, 8}

    before, after = StreamedModel(source), StreamedModel(out)
    for name, (bits, size, symmetric) in expected.items():
        weight = before.tensor(f"{name}.weight").numpy()
        width = weight.shape[1] if size == "channel" else size
        reference = _rounded(weight, bits, width, symmetric)
        same = np.isclose(after.tensor(f"{name}.weight").numpy(), reference, rtol=1e-5, atol=1e-6)
        assert same.mean() > 0.999  # float32 decides a tie in another way now and then


def test_a_format_that_cannot_mix_says_so_before_work(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "model")
    with pytest.raises(UserError) as caught:
        check_checkpoint(source, tmp_path / "out", RECIPE, "awq")
    text = str(caught.value)
    assert "down_proj" in text
    assert "q_proj" in text


def test_an_override_for_nothing_is_a_slip_of_the_pen(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "model")
    recipe = load_recipe("rtn", {"group_size": 32, "overrides": [{"match": "dwon_proj"}]})
    with pytest.raises(UserError, match="did you mean down_proj") as caught:
        check_checkpoint(source, tmp_path / "out", recipe, "awq")
    assert caught.value.problems[0].where == "--override"
