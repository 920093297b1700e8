"""What mlc_llm wrote for a template's name, against the model's own template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mlcawq.build.chat_config import CONFIG_NAME
from mlcawq.build.conversation_presets import preset
from mlcawq.build.via_mlc.template import MlcTemplate


@pytest.mark.parametrize(("written", "same"), [("chatml", True), ("qwen2", False)])
def test_another_template_under_the_same_name_is_noticed(
    tiny_llama: Path, tmp_path: Path, written: str, same: bool
) -> None:
    """The model's is ChatML; Qwen's adds a system message where none is given."""
    folder = tmp_path / "built"
    folder.mkdir()
    shutil.copy(tiny_llama / "tokenizer.json", folder)
    conversation = preset(written)
    assert conversation is not None
    content = {**conversation.to_dict(), "name": "chatml"}
    (folder / CONFIG_NAME).write_text(json.dumps({"conv_template": content}))
    found = MlcTemplate("chatml", None).written(tiny_llama, folder)
    assert found is not None
    assert (not found.differences) == same
    assert any("warning: " in line for line in found.report()) != same


def test_a_name_without_a_template(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / CONFIG_NAME).write_text('{"conv_template": "chatml"}')
    assert MlcTemplate("chatml", None).written(tiny_llama, tmp_path) is None
