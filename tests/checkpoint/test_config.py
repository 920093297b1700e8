"""config.json in both generations, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import ROPES, make_tiny_model

from mlcawq.checkpoint.config import load_json, parse_config, read_config
from mlcawq.errors import UserError

LLAMA = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "vocab_size": 1000,
    "torch_dtype": "bfloat16",
}


def problems(raw: dict) -> list[str]:
    with pytest.raises(UserError) as caught:
        parse_config(raw)
    return [problem.what for problem in caught.value.problems]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("rope", list(ROPES))
def test_both_generations_read_alike(tmp_path: Path, family: str, rope: str) -> None:
    new = read_config(make_tiny_model(tmp_path / "5", family, rope=rope, layers=1))
    old = read_config(make_tiny_model(tmp_path / "4", family, rope=rope, layers=1, config_form=4))
    assert "rope_parameters" in new.raw
    assert "rope_theta" in old.raw
    assert "rope_parameters" not in old.raw
    assert old.rope == new.rope
    assert old.rope.rope_type == rope
    assert old.dtype == new.dtype == "float16"
    without_raw = [{**vars(config), "raw": None} for config in (old, new)]
    assert without_raw[0] == without_raw[1]


def test_what_is_left_out_has_the_family_default() -> None:
    config = parse_config(LLAMA)
    assert config.num_key_value_heads == 8
    assert config.head_dim == 32
    assert config.rope.rope_type == "default"
    assert config.rope.theta == 10000.0
    assert config.layer_types == ("full_attention",) * 3


@pytest.mark.parametrize(
    ("family", "settings", "window", "sliding_layers"),
    [
        ("llama", {"sliding_window": 64}, None, 0),
        ("mistral", {"sliding_window": 64}, 64, 3),
        ("mistral", {"sliding_window": None}, None, 0),
        ("qwen2", {"sliding_window": 64}, None, 0),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": True}, None, 0),
        (
            "qwen3",
            {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 1},
            64,
            2,
        ),
    ],
)
def test_sliding_window_follows_the_family(
    family: str, settings: dict, window: int | None, sliding_layers: int
) -> None:
    config = parse_config({**LLAMA, "model_type": family, **settings})
    assert config.sliding_window == window
    assert config.layer_types.count("sliding_attention") == sliding_layers


def test_every_problem_is_reported_at_once() -> None:
    found = problems(
        {
            **LLAMA,
            "hidden_size": -1,
            "vocab_size": "many",
            "hidden_act": "gelu",
            "torch_dtype": "float8_e4m3fn",
            "rope_scaling": {"type": "unheard-of", "factor": 2},
            "quantization_config": {"quant_method": "gptq", "bits": 4},
        }
    )
    for word in ("hidden_size", "vocab_size", "gelu", "float8", "unheard-of", "gptq"):
        assert any(word in text for text in found), (word, found)
    assert len(found) == 6


def test_missing_rope_keys_are_named() -> None:
    assert problems({**LLAMA, "rope_scaling": {"rope_type": "llama3", "factor": 8}}) == [
        "rope type 'llama3' needs low_freq_factor",
        "rope type 'llama3' needs high_freq_factor",
    ]


def test_unknown_family_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="llama, mistral, qwen2, qwen3"):
        parse_config({"model_type": "rwkv"})


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"bits": 8, "group_size": 128}, "8 bits"),
        ({"bits": 4, "group_size": 48}, "group size 48"),
        ({"bits": 4, "group_size": 128, "version": "gemv"}, "gemv"),
    ],
)
def test_unsupported_awq_is_refused(given: dict, word: str) -> None:
    (text,) = problems({**LLAMA, "quantization_config": {"quant_method": "awq", **given}})
    assert word in text


def test_awq_is_read() -> None:
    given = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": False}
    awq = parse_config({**LLAMA, "quantization_config": given}).quantization
    assert awq is not None
    assert (awq.bits, awq.group_size, awq.zero_point, awq.version) == (4, 64, False, "gemm")


@pytest.mark.parametrize("content", ["", "{", "[]", '"text"'])
def test_broken_json_is_an_error_of_the_user(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json"):
        read_config(tmp_path)


def test_a_folder_in_its_place_is_said(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        load_json(tmp_path / "config.json")


def test_no_config_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a Hugging Face checkpoint"):
        read_config(tmp_path)


def test_config_survives_a_round_trip_through_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert read_config(tmp_path) == parse_config(LLAMA)
