"""mlc-chat-config.json as mlc_llm wrote it, completed to what a native build writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlcawq.build.chat_config import DROPPED_KEYS, awq_keys
from mlcawq.build.generation_settings import generation_settings
from mlcawq.build.mlc_plugin.checkpoint_view import CheckpointView, older_form
from mlcawq.checkpoint.config import load_json, read_quantization
from mlcawq.checkpoint.writing import write_json
from mlcawq.engine.conversation import Conversation


def complete(
    file: Path, view: CheckpointView, quantization: Any, conversation: Conversation | None
) -> None:
    """Add what mlc_llm leaves out: config.json's own keys, the checkpoint's AWQ settings and
    layout, the sampling that its publisher recommends, and the keys of `conversation` that are
    ours. Its own values stay, but for those that the checkpoint's publisher gives.
    """
    content = load_json(file)
    described = {
        key: value for key, value in older_form(view.raw).items() if key not in DROPPED_KEYS
    }
    content["model_config"] = {**described, **content["model_config"]}
    content.update(generation_settings(view.checkpoint))
    content["max_batch_size"] = content["model_config"].get("max_batch_size", 1)
    if conversation is not None:
        content["conv_template"] = conversation.to_dict()
    if view.is_awq:
        awq = read_quantization(view.raw, view.where)
        assert awq is not None
        content |= awq_keys(awq, quantization.weight_layout)
    write_json(file, content)
