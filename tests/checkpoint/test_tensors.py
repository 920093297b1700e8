"""Lazy reading against safetensors' own reader, and every way a shard can be broken."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mlcawq.checkpoint.tensors import INDEX, TensorReader
from mlcawq.errors import UserError


def two_shards(folder: Path) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a": torch.randn(7, 5, generator=generator).to(torch.bfloat16),
        "b": torch.randn(3, generator=generator).to(torch.float16),
        "c": torch.randint(-9, 9, (2, 2, 2), generator=generator, dtype=torch.int32),
        "empty": torch.zeros(0, 4),
    }
    save_file({"a": tensors["a"]}, folder / "one.safetensors")
    save_file({name: tensors[name] for name in ("b", "c", "empty")}, folder / "two.safetensors")
    shards = {"a": "one.safetensors"} | dict.fromkeys(("b", "c", "empty"), "two.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": shards}))
    return tensors


def message(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        TensorReader(folder)
    return str(caught.value)


def test_reads_what_safetensors_reads(tmp_path: Path) -> None:
    tensors = two_shards(tmp_path)
    reader = TensorReader(tmp_path)
    assert reader.names == sorted(tensors)
    assert reader.total_bytes == sum(tensor.nbytes for tensor in tensors.values())
    for name, expected in tensors.items():
        assert name in reader
        assert reader.info(name).shape == tuple(expected.shape)
        assert torch.equal(reader.torch(name), expected)
        with safe_open(reader.info(name).file, framework="pt") as shard:
            assert torch.equal(shard.get_tensor(name), reader.torch(name))
        as_float = reader.numpy(name).astype(np.float64)
        assert np.array_equal(as_float, expected.double().numpy())


def test_one_file_needs_no_index(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "anything.safetensors")
    assert TensorReader(tmp_path).names == ["x"]


def test_an_unknown_name_is_named(tmp_path: Path) -> None:
    two_shards(tmp_path)
    with pytest.raises(UserError, match="no tensor z"):
        TensorReader(tmp_path).numpy("z")


def test_all_broken_shards_are_reported_together(tmp_path: Path) -> None:
    two_shards(tmp_path)
    one = tmp_path / "one.safetensors"
    one.write_bytes(one.read_bytes()[:-3])
    (tmp_path / "two.safetensors").unlink()
    text = message(tmp_path)
    assert "truncated" in text
    assert "one.safetensors" in text
    assert "missing" in text
    assert "two.safetensors" in text


@pytest.mark.parametrize("keep", [0, 5, 8, 40])
def test_truncation_anywhere_is_found(tmp_path: Path, keep: int) -> None:
    save_file({"x": torch.ones(64)}, tmp_path / "model.safetensors")
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert "model.safetensors" in message(tmp_path)


def test_a_damaged_header_is_found(tmp_path: Path) -> None:
    save_file({"x": torch.ones(64)}, tmp_path / "model.safetensors")
    file = tmp_path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[10] = 0xFF
    file.write_bytes(bytes(data))
    assert "header is damaged" in message(tmp_path)


def test_a_git_lfs_pointer_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "git lfs pull" in message(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        "[]",
        '{"x": 1}',
        '{"x": {"dtype": "F32", "shape": [1]}}',
        '{"x": {"dtype": "F32", "shape": null, "data_offsets": [0, 4]}}',
        '{"x": {"dtype": "F32", "shape": [1], "data_offsets": [4]}}',
        '{"x": {"dtype": "F32", "shape": [1], "data_offsets": ["a", "b"]}}',
        '{"x": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
        '{"x": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}',
    ],
)
def test_a_header_of_another_shape_is_damaged(tmp_path: Path, header: str) -> None:
    data = header.encode()
    (tmp_path / "model.safetensors").write_bytes(len(data).to_bytes(8, "little") + data + bytes(8))
    assert "model.safetensors" in message(tmp_path)


def test_a_tensor_that_no_shard_holds_is_named(tmp_path: Path) -> None:
    two_shards(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["ghost"] = "one.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert "ghost" in message(tmp_path)


@pytest.mark.parametrize("file", [None, 3, ["one.safetensors"]])
def test_an_index_names_files(tmp_path: Path, file: object) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": file}}))
    assert "weight_map is damaged" in message(tmp_path)


def test_rows_are_those_of_the_tensor(tmp_path: Path) -> None:
    tensors = two_shards(tmp_path)
    reader, rows = TensorReader(tmp_path), torch.tensor([[3, 0], [6, 3]])
    found = reader.torch_rows("a", rows)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, tensors["a"][rows])


def test_an_index_cannot_point_elsewhere(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": "../../etc/passwd"}}))
    assert "not a plain file name" in message(tmp_path)


def test_no_weights(tmp_path: Path) -> None:
    assert "no safetensors weights" in message(tmp_path)
