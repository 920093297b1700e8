"""config.json of any decoder: what is read of it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_decoders import make_tiny_decoder
from tiny_models import ROPES, make_tiny_model
from transformers import AutoConfig

from mlcawq.checkpoint.decoder_config import UNLIMITED, DecoderConfig, read_decoder_config
from mlcawq.checkpoint.hf_config import portable_config
from mlcawq.errors import UserError


def _write(folder: Path, **content: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def _read(folder: Path, model_type: str, **settings: Any) -> DecoderConfig:
    config = AutoConfig.for_model(model_type, architectures=["Whatever"], **settings)
    config.save_pretrained(folder)
    return read_decoder_config(folder)


@pytest.mark.parametrize(
    ("model_type", "settings", "expected"),
    [
        ("gpt_bigcode", {"n_embd": 96, "n_layer": 3, "n_positions": 77}, (96, 3, 77)),
        ("mpt", {"d_model": 64, "n_layers": 5, "max_seq_len": 99}, (64, 5, 99)),
        ("opt", {"hidden_size": 48, "num_hidden_layers": 1}, (48, 1, 2048)),
        ("bloom", {"hidden_size": 64, "n_layer": 4}, (64, 4, UNLIMITED)),
        (
            "gemma3",
            {"text_config": {"hidden_size": 72, "num_hidden_layers": 7}},
            (72, 7, 131072),
        ),
    ],
)
def test_sizes_by_every_name(
    tmp_path: Path, model_type: str, settings: dict[str, Any], expected: tuple[int, ...]
) -> None:
    config = _read(tmp_path, model_type, **settings)
    found = (config.hidden_size, config.num_hidden_layers, config.max_position_embeddings)
    assert found == expected
    assert config.model_type == model_type
    assert config.architectures == ("Whatever",)


def test_blooms_length_is_in_the_file_alone(tmp_path: Path) -> None:
    folder = make_tiny_decoder(tmp_path, "bloom")
    raw = json.loads((folder / "config.json").read_text())
    _write(folder, **{**raw, "seq_length": 2048})
    assert read_decoder_config(folder).max_position_embeddings == 2048


def test_code_in_the_checkpoint_is_not_run(tmp_path: Path) -> None:
    """An architecture that brings its code along, and one that transformers has by now."""
    (tmp_path / "configuration_mine.py").write_text("raise SystemExit('this was run')")
    auto_map = {"AutoConfig": "configuration_mine.MineConfig"}
    with pytest.raises(UserError, match="code of its own, which would have to be trusted") as error:
        read_decoder_config(_write(tmp_path, model_type="mine", auto_map=auto_map))
    assert "converted for transformers" in str(error.value)
    known = AutoConfig.for_model("phi3").to_dict()
    folder = _write(tmp_path, **{**known, "auto_map": auto_map})
    assert read_decoder_config(folder).model_type == "phi3"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "model_type must name an architecture, found None"),
        ({"model_type": "unheard-of"}, "'unheard-of' is not supported"),
        ({"model_type": "vit"}, "'vit' is no language model"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "an encoder-decoder model"),
        ({"model_type": "gemma", "num_hidden_layers": "four"}, "does not accept it: .*four"),
        ({"model_type": "gemma", "num_hidden_layers": 0}, "num_hidden_layers must be a positive"),
        ({"model_type": "gemma", "dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn' is not"),
        ({"model_type": "gemma", "quantization_config": 4}, "must be an object, found 4"),
        # The strict reader's words for the families that are compiled.
        ({"model_type": "llama"}, "num_attention_heads must be a positive integer"),
    ],
)
def test_refusals(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_decoder_config(_write(tmp_path, **content))


def test_no_config_and_no_json(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a Hugging Face checkpoint"):
        read_decoder_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_decoder_config(tmp_path)


@pytest.mark.parametrize("rope", sorted(ROPES))
def test_portable_config_means_the_same_to_both_readers(tmp_path: Path, rope: str) -> None:
    folder = make_tiny_model(tmp_path, rope=rope, layers=1, context=512)
    portable = portable_config(read_decoder_config(folder), dtype="bfloat16")
    assert portable["dtype"] == portable["torch_dtype"] == "bfloat16"
    assert portable["rope_theta"] == 10000.0
    kind = None if rope == "default" else portable["rope_scaling"]["rope_type"]
    assert kind == (None if rope == "default" else rope)
    before = read_decoder_config(folder).hf.rope_parameters
    assert read_decoder_config(_write(folder, **portable)).hf.rope_parameters == before


def test_portable_config_of_windowed_and_vision_models(tmp_path: Path) -> None:
    config = _read(
        tmp_path,
        "gemma3",
        text_config={
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            }
        },
    )
    text = portable_config(config)["text_config"]
    assert text["rope_theta"] == 1e6
    assert text["rope_local_base_freq"] == 1e4
    assert text["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    _write(tmp_path, **portable_config(config))
    assert read_decoder_config(tmp_path).hf.rope_parameters == config.hf.rope_parameters


def test_portable_config_adds_no_rope_where_there_is_none(tmp_path: Path) -> None:
    portable = portable_config(_read(tmp_path, "opt"))
    assert not [key for key in portable if "rope" in key]
