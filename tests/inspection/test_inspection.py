"""What is told of folders and files, whole ones and broken ones."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from awq_checkpoints import make_awq_checkpoint
from safetensors.torch import load_file, save_file
from tiny_decoders import make_tiny_decoder
from tiny_models import make_tiny_model

from mlcawq.build.convert_weight import convert_weight
from mlcawq.build.gen_config import gen_config
from mlcawq.engine import shard_checks
from mlcawq.engine.artifact import read_folder
from mlcawq.errors import UserError
from mlcawq.inspection import Description, describe
from mlcawq.inspection.description import size


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("inspect") / "hf", "qwen3", layers=2)


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def messages(description: Description) -> str:
    return "\n".join(map(str, description.problems))


def test_a_checkpoint(checkpoint: Path) -> None:
    out = describe(checkpoint)
    assert out.kind == "a Hugging Face checkpoint"
    assert out.problems == []
    assert out.facts["model_type"] == "qwen3"
    assert out.facts["layers"] == 2
    assert out.facts["heads"] == "4 query, 2 key/value, 32 wide"
    assert out.facts["bytes by kind"] == {"F16": 2 * out.facts["parameters"]}
    assert out.facts["chat template"] == "chatml"
    assert out.facts["ends of text"] == ["<|im_end|>"]
    assert out.next_step == f"mlcawq quantize {checkpoint} -o OUT"
    assert json.loads(json.dumps(out.as_json()))["problems"] == []


def test_an_awq_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    folder, _ = make_awq_checkpoint(checkpoint, tmp_path / "awq", 64, skip=["down_proj"])
    out = describe(folder)
    assert out.kind == "a Hugging Face checkpoint, quantized (awq)"
    assert out.facts["quantization"] == "AWQ gemm, 4 bits, groups of 64, asymmetric"
    assert out.facts["not quantized"] == ["down_proj"]
    kinds = out.facts["bytes by kind"]
    # Per group of 64: 32 bytes of values, half a byte of zero, two bytes of scale.
    assert kinds["qweight"] == 64 * kinds["qzeros"] == 16 * kinds["scales"]
    assert 4 < out.facts["bits a parameter"] < 16
    assert out.next_step.startswith("mlcawq build")


def test_other_quantizations_are_named(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (copy / "config.json").write_text(json.dumps(config))
    out = describe(copy)
    assert out.kind == "a Hugging Face checkpoint, quantized (gptq)"
    assert "already quantized with 'gptq'" in messages(out)
    assert "weights" in out.facts
    config["quantization_config"] = ["gptq"]
    (copy / "config.json").write_text(json.dumps(config))
    assert "quantization_config must be an object" in messages(describe(copy))


def test_an_unknown_family_is_still_described(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["model_type"] = "unheard-of"
    (copy / "config.json").write_text(json.dumps(config))
    out = describe(copy)
    assert out.facts["model_type"] == "unheard-of"
    assert out.facts["tokenizer"].startswith("400 tokens")
    assert "'unheard-of' is not supported" in messages(out)
    assert out.next_step == ""


def test_a_decoder_that_is_not_compiled(tmp_path: Path) -> None:
    folder = make_tiny_decoder(tmp_path / "mixture", "mixtral", tie_word_embeddings=True)
    out = describe(folder)
    assert not out.problems
    tensors = load_file(folder / "model.safetensors")
    assert out.facts["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert out.facts["experts"] == "4 a layer"
    assert out.next_step.startswith("mlcawq quantize")

    del tensors["model.layers.0.block_sparse_moe.experts.3.w1.weight"]
    save_file(tensors, folder / "model.safetensors")
    assert "block_sparse_moe.experts.3.w1.weight: tensor is missing" in messages(describe(folder))


def test_everything_broken_is_listed(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    out = describe(copy)
    assert "no tokenizer" in messages(out)
    assert "model.safetensors" in messages(out)


def test_pickles_are_said_and_not_opened(copy: Path, tmp_path: Path) -> None:
    (copy / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(2)}, copy / "pytorch_model.bin")
    assert "--trust-pickle" in messages(describe(copy))
    assert "pickle file" in describe(copy / "pytorch_model.bin").kind
    old = tmp_path / "old.pt"
    torch.save({"a": torch.zeros(2)}, old, _use_new_zipfile_serialization=False)
    assert "pickle file" in describe(old).kind


def test_a_model_folder_without_a_library(checkpoint: Path, tmp_path: Path) -> None:
    out_folder = tmp_path / "mlc"
    out_folder.mkdir()
    gen_config(checkpoint, out_folder)
    assert "the weights are missing" in messages(describe(out_folder))
    convert_weight(checkpoint, out_folder)
    out = describe(out_folder)
    assert out.kind == "an MLC model folder"
    assert out.facts["quantization"] == "q0f16"
    assert out.facts["conversation template"] == "chatml"
    assert out.facts["bits a parameter"] == 16
    assert "mlcawq compile" in messages(out)
    (out_folder / "mlc-chat-config.json").unlink()
    assert describe(out_folder).kind == "converted weights without mlc-chat-config.json"


def test_a_damaged_shard_is_found_although_it_is_remembered(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gen_config(checkpoint, tmp_path)
    convert_weight(checkpoint, tmp_path)
    (tmp_path / "lib-cpu.so").write_bytes(b"\x7fELF nonsense")
    assert "md5" not in messages(describe(tmp_path))
    shard = tmp_path / "params_shard_0.bin"
    data = bytearray(shard.read_bytes())
    data[99] ^= 1
    shard.write_bytes(data)
    known = {
        shard_checks._key(each): shard_checks._state(each).stamp
        for each in read_folder(tmp_path).shards
    }
    monkeypatch.setattr(shard_checks, "_read_memory", lambda: known)
    assert f"{shard}: damaged: its md5 sum" in messages(describe(tmp_path))


def test_a_library_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "lib.so").write_bytes(b"\x7fELF nonsense")
    out = describe(tmp_path / "lib.so")
    assert out.kind == "a shared library"
    assert "not a model library" in messages(out)


def gguf_string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def test_a_gguf_file(tmp_path: Path) -> None:
    entries = [
        gguf_string("general.architecture") + struct.pack("<I", 8) + gguf_string("llama"),
        gguf_string("tokens") + struct.pack("<IIQ", 9, 8, 2) + gguf_string("a") + gguf_string("b"),
        gguf_string("scores") + struct.pack("<IIQ", 9, 6, 2) + struct.pack("<ff", 1, 2),
        gguf_string("llama.context_length") + struct.pack("<II", 4, 4096),
    ]
    header = b"GGUF" + struct.pack("<IQQ", 3, 291, len(entries)) + b"".join(entries)
    path = tmp_path / "model.gguf"
    path.write_bytes(header)
    out = describe(path)
    assert out.kind == "a GGUF file (llama.cpp)"
    assert out.problems == []
    facts = {k: out.facts[k] for k in ("version", "tensors", "architecture", "context length")}
    assert facts == {
        "version": 3,
        "tensors": 291,
        "architecture": "llama",
        "context length": 4096,
    }
    assert "Hugging Face checkpoint" in out.next_step
    assert describe(tmp_path).kind == out.kind
    path.write_bytes(header[:60])
    assert "damaged" in messages(describe(path))
    path.write_bytes(b"else")
    assert "does not begin" in messages(describe(path))


def test_other_paths(checkpoint: Path, tmp_path: Path) -> None:
    assert describe(tmp_path).kind == "an empty folder"
    (tmp_path / "notes.txt").write_text("hello")
    assert describe(tmp_path).kind == "a folder without a model"
    assert describe(tmp_path / "notes.txt").kind == "not a model file that is known here"
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    adapter = describe(tmp_path)
    assert "LoRA" in adapter.kind
    assert adapter.facts["base model"] == "some/base"
    tensors = describe(checkpoint / "model.safetensors")
    assert tensors.facts["bytes by type"].keys() == {"F16"}
    with pytest.raises(UserError, match="nothing here"):
        describe(tmp_path / "nowhere")


def test_sizes_for_readers() -> None:
    assert [size(n) for n in (12, 1200, 2_500_000, 7 * 10**9)] == [
        "12 bytes",
        "1.20 kB",
        "2.50 MB",
        "7.00 GB",
    ]
