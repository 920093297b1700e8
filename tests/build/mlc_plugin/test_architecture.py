"""What is recorded of a model that mlc_llm compiles: its config, where mlc_llm reads it alike."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mlcawq.build.mlc_plugin.architecture import architecture

MODEL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 400,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "position_embedding_base": 50000,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}


def config(model_type: str = "llama", **changes: Any) -> dict[str, Any]:
    model = {**MODEL, **changes}
    return {"model_type": model_type, "context_window_size": 1024, "model_config": model}


def read(**changes: Any) -> SimpleNamespace:
    """As mlc_llm's config objects are."""
    return SimpleNamespace(**{**MODEL, "rope_scaling": None, **changes})


def test_what_mlc_llm_computes_is_recorded() -> None:
    recorded = architecture(config(), read())
    assert recorded is not None
    assert recorded["rope"] == {"rope_type": "default", "theta": 50000, "params": {}}
    assert recorded["num_key_value_heads"] == 2
    scaled = architecture(config(rope_scaling=LLAMA3), read(rope_scaling=LLAMA3))
    assert scaled is not None
    assert scaled["rope"]["params"]["factor"] == 8.0


@pytest.mark.parametrize(
    ("described", "found"),
    [
        (config("gemma"), read()),  # no table for it
        (config(), read(position_embedding_base=10000)),
        (config(rope_scaling=LLAMA3), read()),
        (config(), read(rms_norm_eps=1e-6)),
        (config(tie_word_embeddings=True), read()),
    ],
)
def test_nothing_is_recorded_that_is_not_known_to_be_so(
    described: dict[str, Any], found: SimpleNamespace
) -> None:
    assert architecture(described, found) is None
