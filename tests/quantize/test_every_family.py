"""Every architecture from checkpoint to checkpoint, and one that nobody has made a table of."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from decoder_blocks import CASES, VARIANTS
from tiny_decoders import load_decoder, make_tiny_decoder

from mlcawq.checkpoint.source import load_tokenizer
from mlcawq.checkpoint.streaming import StreamedModel
from mlcawq.quantize.calibration import load_calibration
from mlcawq.quantize.pipeline import quantize_checkpoint
from mlcawq.quantize.recipe import load_recipe
from mlcawq.quantize.repack import repack
from mlcawq.quantize.report import REPORT_FILE

_TEXT = """The quick brown fox jumps over the lazy dog while seven wizards box.
Paris is the capital of France. Water boils at 100 degrees Celsius.
def add(a, b):
    return a + b
"""


def _text(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text(_TEXT * 8 + " ".join(str(i * i) for i in range(200)))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_quantized_reloaded_and_dequantized_are_one_model(tmp_path: Path, case: str) -> None:
    """The quantized folder gives the logits that transformers gives on the weights that it stands
    for, and is near the original.
    """
    model_type, changes = VARIANTS.get(case, (case, {}))
    source, quantized, plain = (tmp_path / name for name in ("source", "quantized", "plain"))
    make_tiny_decoder(source, model_type, **changes)
    text = load_calibration(
        str(_text(tmp_path)), load_tokenizer(source), samples=8, seq_len=64, seed=0
    )
    recipe = load_recipe("awq", {"group_size": 32})
    report = quantize_checkpoint(source, quantized, recipe, text)
    assert any(linear.scale for block in report.blocks for linear in block.linears)
    repack(quantized, plain, "fake")

    ids = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    found = StreamedModel(quantized).logits([ids])[0]
    with torch.no_grad():
        meant = load_decoder(plain)(input_ids=ids).logits.float()
        original = load_decoder(source)(input_ids=ids).logits.float()
    assert float((found - meant).norm() / meant.norm()) < 5e-3  # float16 weights
    assert float((found - original).norm() / original.norm()) < 0.6


def test_an_architecture_without_a_table(tmp_path: Path) -> None:
    """CodeGen fuses its queries, keys and values in an order of its own, for four accelerators."""
    source, out = tmp_path / "source", tmp_path / "out"
    make_tiny_decoder(source, "codegen")
    command = [sys.executable, "-m", "mlcawq", "quantize", source, "-o", out, "--json"]
    options = [
        "--group-size",
        32,
        "--calib",
        _text(tmp_path),
        "--calib-seq-len",
        64,
        "--calib-samples",
        4,
    ]
    found = subprocess.run(
        [*map(str, command), *map(str, options)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert "codegen has no table; its blocks were traced instead:" in found.stderr
    assert "attn.qkv_proj, mlp.fc_in: scaled by ln_1" in found.stderr
    assert "attn.out_proj: scaled by attn.qkv_proj, by a row map" in found.stderr
    assert "mlp.fc_out: nothing before can absorb a scale" in found.stderr
    report = json.loads((out / REPORT_FILE).read_text())
    scaled = {
        linear["name"]
        for block in report["blocks"]
        for linear in block["linears"]
        if linear["scale"]
    }
    assert scaled == {"attn.qkv_proj", "mlp.fc_in", "attn.out_proj"}
    ids = torch.randint(3, 300, (1, 20), generator=torch.Generator().manual_seed(0))
    quantized, original = (StreamedModel(folder).logits([ids])[0] for folder in (out, source))
    assert float((quantized - original).norm() / original.norm()) < 0.5
