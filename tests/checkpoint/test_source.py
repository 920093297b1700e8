"""What the user names, and what is refused with an instruction."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from mlcawq.checkpoint.source import (
    copy_side_files,
    load_tokenizer,
    require_tokenizer,
    resolve,
)
from mlcawq.checkpoint.tensors import TensorReader
from mlcawq.errors import UserError


@pytest.fixture
def pickled(tmp_path: Path, tiny_llama: Path) -> Path:
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_llama, folder)
    reader = TensorReader(folder)
    torch.save({name: reader.torch(name) for name in reader.names}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def message(model: str, **options: bool) -> str:
    with pytest.raises(UserError) as caught:
        resolve(model, **options)
    return str(caught.value)


def test_a_checkpoint_is_found(tiny_llama: Path) -> None:
    assert resolve(str(tiny_llama)) == tiny_llama


def test_a_hub_name_without_network_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "neither a folder here nor reachable on the hub" in message("nobody/nothing")


def test_a_name_that_the_hub_cannot_have_is_said() -> None:
    assert "nor reachable on the hub" in message("nobody--/nothing..here")


@pytest.mark.parametrize("name", ["./nothing-here", "/no/such/folder", "a/b/c"])
def test_no_such_folder(name: str) -> None:
    assert "no such folder" in message(name)


def test_other_things_are_recognised(tmp_path: Path) -> None:
    assert "not a Hugging Face checkpoint" in message(str(tmp_path))
    (tmp_path / "model.gguf").touch()
    assert "GGUF" in message(str(tmp_path))
    assert "GGUF" in message(str(tmp_path / "model.gguf"))
    (tmp_path / "mlc-chat-config.json").touch()
    assert "mlcawq chat" in message(str(tmp_path))


def test_pickles_need_trust(pickled: Path) -> None:
    assert "--trust-pickle" in message(str(pickled))


def test_trusted_pickles_are_converted_once(
    pickled: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = resolve(str(pickled), trust_pickle=True)
    assert folder == resolve(str(pickled), trust_pickle=True)
    converted, original = TensorReader(folder), TensorReader(tiny_llama)
    assert converted.names == original.names
    for name in original.names:
        assert torch.equal(converted.torch(name), original.torch(name))
    require_tokenizer(folder)
    # What is beside the weights goes with them, and a change of it is seen.
    (pickled / "chat_template.jinja").write_text("{{ messages }} and more")
    changed = resolve(str(pickled), trust_pickle=True)
    assert (changed / "chat_template.jinja").read_text() == "{{ messages }} and more"


def test_what_a_trainer_saves_beside_the_weights_is_left_alone(
    pickled: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.save({"state": {}, "step": 3}, pickled / "optimizer.pt")
    folder = resolve(str(pickled), trust_pickle=True)
    assert TensorReader(folder).names == TensorReader(tiny_llama).names
    (pickled / "pytorch_model.bin").unlink()
    assert "more than tensors by name" in message(str(pickled), trust_pickle=True)


def test_a_pickle_that_runs_code_is_refused_even_when_trusted(
    pickled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "exploded",))

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.save({"x": Bomb()}, pickled / "pytorch_model.bin")
    assert "not a plain file of tensors" in message(str(pickled), trust_pickle=True)
    assert not (tmp_path / "exploded").exists()


def test_a_tokenizer_is_required(tiny_llama: Path, tmp_path: Path) -> None:
    require_tokenizer(tiny_llama)
    with pytest.raises(UserError, match="no tokenizer"):
        require_tokenizer(tmp_path)
    assert "tokenizer.json" in copy_side_files(tiny_llama, tmp_path)
    require_tokenizer(tmp_path)


def test_a_broken_tokenizer_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    assert load_tokenizer(tiny_llama)("fox").input_ids
    copy_side_files(tiny_llama, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="the tokenizer cannot be read"):
        load_tokenizer(tmp_path)
