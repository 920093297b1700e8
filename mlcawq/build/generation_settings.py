"""How a model is sampled and ends, as its publisher says: the part of mlc-chat-config.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlcawq.checkpoint.config import load_json

# MLC's values where a model gives none.
_SYSTEM_DEFAULTS: dict[str, Any] = {
    "temperature": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "top_p": 1.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Ours: mlc_llm's file has no place for them, and ignores them.
_MORE_SAMPLING = ("top_k", "min_p")


def generation_settings(checkpoint: Path) -> dict[str, Any]:
    """Sampling defaults and token ids: generation_config.json's, config.json's, MLC's."""
    sources: list[Mapping[str, Any]] = [
        load_json(checkpoint / name)
        for name in ("generation_config.json", "config.json")
        if (checkpoint / name).is_file()
    ]
    out = {}
    for key, default in _SYSTEM_DEFAULTS.items():
        values = (source.get(key) for source in sources)
        out[key] = next((value for value in values if value is not None), default)
    out |= {key: sources[0][key] for key in _MORE_SAMPLING if sources[0].get(key) is not None}
    # MLC has no do_sample: a model published as greedy has temperature 0 there.
    if next((s["do_sample"] for s in sources if "do_sample" in s), None) is False:
        out["temperature"] = 0.0
    return out
