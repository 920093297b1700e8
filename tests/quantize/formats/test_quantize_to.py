"""`mlcawq quantize --format`: each format holds what the search computed with."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_decoders import make_tiny_decoder
from tiny_models import make_tiny_model

from mlcawq.checkpoint.source import load_tokenizer
from mlcawq.checkpoint.streaming import StreamedModel
from mlcawq.errors import UserError
from mlcawq.quantize.calibration import CalibrationData, load_calibration
from mlcawq.quantize.formats import FORMATS
from mlcawq.quantize.pipeline import check_checkpoint, quantize_checkpoint
from mlcawq.quantize.recipe import Override, load_recipe

PEER_LOADERS = {"autoawq": "autoawq.py", "gptqmodel": "transformers_.py"}
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


@pytest.fixture(scope="module")
def neox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In AutoAWQ's gemm storage: a family in whose MLP AutoAWQ may move a scale."""
    folder = make_tiny_decoder(tmp_path_factory.mktemp("neox") / "neox", "gpt_neox")
    text = load_calibration("bundled", load_tokenizer(folder), samples=2, seq_len=32)
    out = folder.parent / "out"
    quantize_checkpoint(folder, out, load_recipe("rtn", {"group_size": 32}), text)
    return out


def test_activations_that_readers_divide_by_scales_have_some(neox: Path, tmp_path: Path) -> None:
    state = load_file(neox / "model.safetensors")
    scales = {name: t for name, t in state.items() if name.endswith("mlp.act.scales")}
    assert len(scales) == 2
    assert all(bool((tensor == 1).all()) for tensor in scales.values())
    assert not any("mlp.act" in name for name in StreamedModel(neox).outline.stored.names)

    folder = tmp_path / "moved"
    shutil.copytree(neox, folder)
    name = next(iter(scales))
    state[name][3] = 2
    save_file(state, folder / "model.safetensors")
    with pytest.raises(UserError, match=rf"{name}: AutoAWQ has moved an AWQ scale"):
        StreamedModel(folder)


@pytest.mark.peers
@pytest.mark.parametrize("peer", ["autoawq", "gptqmodel"])
def test_readers_divide_by_ones(neox: Path, peer: str, tmp_path: Path) -> None:
    python = Path(__file__).parents[3] / ".peers" / peer / "bin/python"
    if not python.is_file():
        pytest.skip(f"no {python}")
    loader = Path(__file__).parent / "loaders" / PEER_LOADERS[peer]
    tokens = torch.randint(0, 380, (1, 24), generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "ids.npy", tokens.numpy())
    files = [neox, tmp_path / "ids.npy", tmp_path / "out.npy"]
    words = [python, "-W", "ignore", loader, *files, *(["float32"] if peer == "gptqmodel" else [])]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    (expected,) = StreamedModel(neox).logits([tokens])
    difference = torch.from_numpy(np.load(tmp_path / "out.npy")) - expected
    assert difference.square().mean().sqrt() < 3e-2 * expected.std()  # NaN is not
