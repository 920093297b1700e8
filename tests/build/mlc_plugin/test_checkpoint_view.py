"""What mlc_llm is shown of a checkpoint: transformers 4's keys, and nothing written into it."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tiny_models import ROPES, make_tiny_model

from mlcawq.build.mlc_plugin.checkpoint_view import older_form, open_view
from mlcawq.errors import UserError

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def test_rotary_parameters_are_where_they_used_to_be() -> None:
    raw = {"model_type": "llama", "rope_parameters": {**LLAMA3, "rope_theta": 500000.0}}
    shown = older_form(raw)
    assert shown["rope_theta"] == 500000
    assert isinstance(shown["rope_theta"], int)
    assert shown["rope_scaling"] == LLAMA3
    assert shown["rope_parameters"] == raw["rope_parameters"]


@pytest.mark.parametrize("rope", [None, "llama3"])
def test_new_form_reads_as_the_old_one(tmp_path: Path, rope: str | None) -> None:
    """config.json of transformers 5, shown in the older form, beside the rewritten file."""
    configs = [
        json.loads((make_tiny_model(tmp_path / str(form), "llama", rope=rope, config_form=form) /
                    "config.json").read_text())
        for form in (5, 4)
    ]  # fmt: skip
    shown, old = older_form(configs[0]), configs[1]
    for key in ("rope_theta", "rope_scaling", "torch_dtype"):
        assert shown[key] == old[key]
    assert "dtype" not in shown
    assert older_form(old) == old


def test_layers_with_a_window_have_a_base_of_their_own() -> None:
    rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
    }
    shown = older_form({"model_type": "gemma3_text", "rope_parameters": rope})
    assert shown["rope_theta"] == 1000000
    assert shown["rope_local_base_freq"] == 10000
    assert shown["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}


def test_nested_text_config_is_shown_in_the_older_form_too() -> None:
    text = {"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}, "dtype": "bfloat16"}
    shown = older_form({"model_type": "gemma3", "text_config": text})["text_config"]
    assert (shown["rope_theta"], shown["rope_scaling"]) == (7, None)
    assert shown["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("model_type", "key"), [("phi", "partial_rotary_factor"), ("gpt_neox", "rotary_pct")]
)
def test_share_of_rotated_dimensions_has_its_family_s_name(model_type: str, key: str) -> None:
    rope = {"rope_theta": 10000.0, "partial_rotary_factor": 0.25, "rope_type": "default"}
    assert older_form({"model_type": model_type, "rope_parameters": rope})[key] == 0.25


def test_long_rope_has_its_oldest_name_too() -> None:
    rope: dict[str, Any] = {**(ROPES["longrope"] or {}), "short_factor": [1.0]}
    shown = older_form({"model_type": "phi3", "rope_parameters": rope})
    assert shown["rope_scaling"]["type"] == shown["rope_scaling"]["rope_type"] == "longrope"


@pytest.mark.parametrize(("method", "shown"), [("awq", False), ("fp8", True)])
def test_only_the_settings_of_awq_are_withheld(method: str, shown: bool) -> None:
    raw = {"model_type": "qwen3", "quantization_config": {"quant_method": method}}
    assert ("quantization_config" in older_form(raw)) is shown


def test_view_shares_the_files_and_keeps_writes_out(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    config = {"model_type": "llama", "dtype": "float16", "rope_parameters": {"rope_theta": 5.0}}
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    with ExitStack() as until:
        view = open_view(checkpoint / "config.json", until)
        folder = view.config.parent
        assert (folder / "model.safetensors").read_bytes() == b"weights"
        assert json.loads(view.config.read_text())["rope_theta"] == 5
        (folder / "model.safetensors.index.json").write_text("{}")
        assert (view.checkpoint, view.raw) == (checkpoint, config)
        assert view.where == str(checkpoint / "config.json")
        assert not view.is_awq
    assert not folder.exists()
    assert sorted(entry.name for entry in checkpoint.iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_damaged_config_is_an_error_for_users(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with ExitStack() as until, pytest.raises(UserError, match="not valid JSON"):
        open_view(tmp_path / "config.json", until)
