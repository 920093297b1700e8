"""Repacking between storage formats, without a weight changed."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from quantized_folders import make_quantized_folder
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny_model

from mlcawq.checkpoint.config import read_config
from mlcawq.checkpoint.streaming import StreamedModel
from mlcawq.errors import UserError
from mlcawq.quantize.formats import FORMATS
from mlcawq.quantize.integer import IntegerGrid
from mlcawq.quantize.repack import repack

needs_library = pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None, reason="wants compressed-tensors"
)
OTHERS = [
    pytest.param(name, marks=needs_library if name == "compressed-tensors" else ())
    for name in FORMATS
    if name not in ("awq", "fake")
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("repack") / "llama", intermediate=128, tie=True)


@pytest.fixture(scope="module")
def gemm(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    return make_quantized_folder(source, tmp_path_factory.mktemp("gemm") / "m", "awq")


def _config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("name", OTHERS)
def test_there_and_back(gemm: tuple[Path, dict], name: str, tmp_path: Path) -> None:
    folder, state = gemm
    there = repack(folder, tmp_path / "there", name)
    assert (there.source, there.format, there.linears) == ("awq", name, 14)
    model = StreamedModel(tmp_path / "there")
    for key, tensor in state.items():
        expected = tensor if key.endswith("_proj.weight") else tensor.half().float()
        assert torch.equal(model.tensor(key), expected), key
    again = repack(tmp_path / "there", tmp_path / "back", "awq")
    assert again.linears == 14
    back, given = (
        load_file(tmp_path / "back/model.safetensors"),
        load_file(folder / "model.safetensors"),
    )
    assert back.keys() == given.keys()
    for key, tensor in given.items():
        assert torch.equal(back[key], tensor), key
    assert _config(tmp_path / "back")["quantization_config"] == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    }
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (
        folder / "tokenizer.json"
    ).read_bytes()


def test_every_tensor_that_llm_awq_wants_is_in_one_file(
    gemm: tuple[Path, dict], tmp_path: Path
) -> None:
    repack(gemm[0], tmp_path / "out", "llm-awq")
    state = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
    config = _config(tmp_path / "out")["quantization_config"]
    assert (config["backend"], config["version"]) == ("llm-awq", "gemv")


def test_plain_weights(gemm: tuple[Path, dict], tmp_path: Path) -> None:
    folder, state = gemm
    repack(folder, tmp_path / "out", "fake")
    assert "quantization_config" not in _config(tmp_path / "out")
    found = load_file(tmp_path / "out/model.safetensors")
    assert found.keys() == state.keys()
    for key, tensor in state.items():
        assert torch.equal(found[key], tensor.half())


@needs_library
def test_zero_points_that_are_all_the_middle_are_not_stored(source: Path, tmp_path: Path) -> None:
    grid = IntegerGrid(4, 32, symmetric=True)
    folder, _ = make_quantized_folder(source, tmp_path / "m", "awq", grid)
    repack(folder, tmp_path / "out", "compressed-tensors")
    names = load_file(tmp_path / "out/model.safetensors")
    assert not any(name.endswith("zero_point") for name in names)
    (group,) = _config(tmp_path / "out")["quantization_config"]["config_groups"].values()
    assert group["weights"]["symmetric"] is True
    repack(tmp_path / "out", tmp_path / "back", "awq")
    back = load_file(tmp_path / "back/model.safetensors")
    for key, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(back[key], tensor), key


@needs_library
def test_what_a_format_cannot_hold_is_said_before_any_work(source: Path, tmp_path: Path) -> None:
    folder, _ = make_quantized_folder(
        source, tmp_path / "m", "compressed-tensors", IntegerGrid(3, 32)
    )
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UserError) as caught:
        repack(folder, tmp_path / "out", "llm-awq")
    message = str(caught.value)
    assert "AWQ storage holds 4 bits, not 3" in message
    assert "the kernels of llm-awq compute with groups of 128 alone" in message
    assert "is a file" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "out"]


def test_folders_that_cannot_be_repacked(
    source: Path, gemm: tuple[Path, dict], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="the checkpoint is not quantized"):
        repack(source, tmp_path / "out", "awq")
    with pytest.raises(UserError, match="is stored as awq already"):
        repack(gemm[0], tmp_path / "out", "awq")
    with pytest.raises(UserError, match="no format 'gptq'"):
        repack(gemm[0], tmp_path / "out", "gptq")
    with pytest.raises(UserError, match="would replace the original model"):
        repack(gemm[0], gemm[0], "awq-gemv", overwrite=True)
    assert not any(tmp_path.iterdir())


def test_a_damaged_folder_is_told_of_at_once(gemm: tuple[Path, dict], tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(gemm[0], folder)
    file = folder / "model.safetensors"
    state = load_file(file)
    del state["model.layers.0.mlp.up_proj.scales"], state["model.layers.1.mlp.up_proj.qzeros"]
    save_file(state, file)
    with pytest.raises(UserError) as caught:
        repack(folder, tmp_path / "out", "awq-gemv")
    message = str(caught.value)
    assert "model.layers.0.mlp.up_proj.scales: tensor is missing" in message
    assert "model.layers.1.mlp.up_proj.qzeros: tensor is missing" in message
    for part in ("qweight", "qzeros", "scales"):
        state.pop(f"model.layers.0.mlp.up_proj.{part}", None)
        state.pop(f"model.layers.1.mlp.up_proj.{part}", None)
    save_file(state, file)
    with pytest.raises(UserError, match=r"model.layers.1.mlp.up_proj.weight: tensor is missing"):
        repack(folder, tmp_path / "out", "awq-gemv")


def test_a_failure_half_way_leaves_nothing(
    gemm: tuple[Path, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> dict:
        raise UserError.one("the disk of this test is full")

    monkeypatch.setattr(type(FORMATS["awq-gemv"]), "tensors", fail)
    with pytest.raises(UserError, match="the disk of this test is full"):
        repack(gemm[0], tmp_path / "out", "awq-gemv")
    assert not any(tmp_path.iterdir())


def test_a_build_names_the_way_to_what_it_reads(gemm: tuple[Path, dict], tmp_path: Path) -> None:
    repack(gemm[0], tmp_path / "out", "awq-gemv")
    with pytest.raises(UserError, match=r"version 'gemv' is not supported.*\n.*mlcawq repack"):
        read_config(tmp_path / "out")
