"""What a library of mlc_llm's computes, recorded as native builds record it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlcawq.checkpoint.config import ModelConfig, computed_settings
from mlcawq.engine.artifact import described_model
from mlcawq.errors import UserError

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
)


def architecture(config: Mapping[str, Any], read: Any) -> dict[str, Any] | None:
    """The settings that the engine compares with a folder's config before it runs a library.

    config: mlc-chat-config.json; read: mlc_llm's config object made from it. None for families
    that mlcawq does not know, and where mlc_llm leaves something out that the config asks for.
    """
    try:
        described = described_model(config)
    except UserError:
        return None
    return computed_settings(described) if _agree(described, read) else None


def _agree(described: ModelConfig, read: Any) -> bool:
    sizes = all(getattr(read, name, None) == getattr(described, name) for name in _SIZES)
    tied = bool(getattr(read, "tie_word_embeddings", False)) == described.tie_word_embeddings
    theta = getattr(read, "position_embedding_base", 0) or getattr(read, "rope_theta", 0)
    scaling = getattr(read, "rope_scaling", None) or {}
    rope = theta == described.rope.theta
    rope = rope and (scaling.get("rope_type") or "default") == described.rope.rope_type
    windows = described.sliding_window is None
    return sizes and tied and rope and windows
