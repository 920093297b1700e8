"""Frequencies against transformers' own, for every type and both generations of config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mlcawq.checkpoint.config import read_config
from mlcawq.graph.rope import context_limit, inverse_frequencies
from tests.tiny_models import ROPES, make_tiny_model

CASES: dict[str, dict[str, Any] | str | None] = {
    **{name: name for name in ROPES if name != "default"},
    "default": None,
    "yarn without ramp": {
        "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 512,
        "beta_fast": 16, "beta_slow": 2, "truncate": False,
    },
    "yarn with mscale": {
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 128,
        "mscale": 0.7, "mscale_all_dim": 1.1,
    },
    "yarn with attention factor": {
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 128,
        "attention_factor": 1.25,
    },
    "llama3 of Llama 3.2": {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "longrope with factor": {
        "rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 256,
    },
}  # fmt: skip


@pytest.mark.parametrize("config_form", [4, 5])
@pytest.mark.parametrize("case", CASES)
def test_frequencies_are_those_of_transformers(case: str, config_form: int, tmp_path: Path) -> None:
    folder = make_tiny_model(
        tmp_path / "model", rope=CASES[case], head_dim=64, config_form=config_form, layers=1
    )
    theirs = LlamaRotaryEmbedding(AutoConfig.from_pretrained(folder))
    frequencies, scale = inverse_frequencies(read_config(folder))
    np.testing.assert_allclose(frequencies, theirs.inv_freq.numpy(), rtol=2e-6)
    assert scale == pytest.approx(theirs.attention_scaling, rel=1e-6)

    # As used: within the limit, cos and sin of the last position agree too.
    limit, _ = context_limit(read_config(folder))
    position = torch.tensor([[(limit or 1024) - 1]])
    cos, sin = theirs(torch.zeros(1), position)
    angles = position.numpy()[0] * frequencies
    np.testing.assert_allclose(np.cos(angles) * scale, cos[0, 0, :32].numpy(), atol=2e-4)
    np.testing.assert_allclose(np.sin(angles) * scale, sin[0, 0, :32].numpy(), atol=2e-4)


@pytest.mark.parametrize(
    ("family", "extra", "limit", "words"),
    [
        ("llama", {}, None, ""),
        ("llama", {"rope": "yarn"}, None, ""),
        ("llama", {"rope": "dynamic"}, 1024, "dynamic"),
        ("llama", {"rope": "longrope"}, 256, "longrope"),
        ("mistral", {"sliding_window": 128}, 128, "sliding window"),
        ("mistral", {"sliding_window": None}, None, ""),
        ("qwen2", {"sliding_window": 128, "use_sliding_window": False}, None, ""),
    ],
)
def test_context_limit(
    family: str, extra: dict[str, Any], limit: int | None, words: str, tmp_path: Path
) -> None:
    config = read_config(make_tiny_model(tmp_path / "model", family, layers=1, **extra))
    found, reason = context_limit(config)
    assert found == limit
    assert words in reason
