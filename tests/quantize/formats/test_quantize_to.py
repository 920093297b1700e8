"""`mlcawq quantize --format`: each format holds what the search computed with."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import make_tiny_model

from mlcawq.checkpoint.source import load_tokenizer
from mlcawq.checkpoint.streaming import StreamedModel
from mlcawq.errors import UserError
from mlcawq.quantize.calibration import CalibrationData, load_calibration
from mlcawq.quantize.formats import FORMATS
from mlcawq.quantize.pipeline import check_checkpoint, quantize_checkpoint
from mlcawq.quantize.recipe import Override, load_recipe

needs_library = pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None, reason="wants compressed-tensors"
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("formats") / "llama"
    return make_tiny_model(folder, layers=1, intermediate=128)


@pytest.fixture(scope="module")
def calibration(source: Path) -> CalibrationData:
    return load_calibration("bundled", load_tokenizer(source), samples=4, seq_len=64)


@pytest.fixture(scope="module")
def gemm(
    source: Path, calibration: CalibrationData, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("gemm") / "out"
    quantize_checkpoint(source, out, load_recipe("rtn"), calibration)
    return out


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=needs_library if name == "compressed-tensors" else ())
        for name in FORMATS
        if name != "awq"
    ],
)
def test_every_format_holds_the_same_weights(
    name: str, source: Path, calibration: CalibrationData, gemm: Path, tmp_path: Path
) -> None:
    report = quantize_checkpoint(
        source, tmp_path / "out", load_recipe("rtn"), calibration, fmt=name
    )
    assert report.format == name
    assert (
        f"Stored {'dequantized' if name == 'fake' else 'as'}"
        in (tmp_path / "out/README.md").read_text()
    )
    found, expected = StreamedModel(tmp_path / "out"), StreamedModel(gemm)
    for key in load_file(source / "model.safetensors"):
        rounded = expected.tensor(key)
        assert torch.equal(found.tensor(key), rounded.half().float() if name == "fake" else rounded)


def test_gemm_is_written_as_ever(gemm: Path) -> None:
    config = json.loads((gemm / "config.json").read_text())["quantization_config"]
    assert list(config.items()) == [
        ("quant_method", "awq"),
        ("bits", 4),
        ("group_size", 128),
        ("zero_point", True),
        ("version", "gemm"),
        ("modules_to_not_convert", ["lm_head"]),
    ]


@needs_library
def test_overrides_become_groups_of_their_own(
    source: Path, calibration: CalibrationData, tmp_path: Path
) -> None:
    recipe = load_recipe("rtn", {"bits": 3, "group_size": 32})
    others = (Override(match="down_proj", bits=8, group_size="channel", symmetric=True),)
    recipe = recipe.model_copy(update={"overrides": others})
    out = tmp_path / "out"
    quantize_checkpoint(source, out, recipe, calibration, fmt="compressed-tensors")
    groups = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"]
    found = [(g["targets"][0], g["weights"]["num_bits"]) for g in groups.values()]
    assert found == [("Linear", 3), (r"re:model\.layers\.\d+\.mlp\.down_proj$", 8)]
    linears = StreamedModel(out).outline.stored.linears
    assert linears["model.layers.0.mlp.down_proj"].grid.bits == 8
    assert linears["model.layers.0.mlp.up_proj"].grid.bits == 3
    with pytest.raises(UserError, match="AWQ storage holds 4 bits, not 3 and 8") as caught:
        check_checkpoint(source, tmp_path / "awq", recipe, "awq")
    assert "one group size for all linears" in str(caught.value)
