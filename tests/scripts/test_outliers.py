"""scripts/peers/outliers.py: outliers appear, the function stays."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_decoders import make_tiny_decoder
from tiny_models import make_tiny_model

from mlcawq.checkpoint.tensors import TensorReader
from mlcawq.evaluate.compare import score_windows
from mlcawq.evaluate.scorers import open_scorer

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from peers.outliers import add_outliers


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_channels_grow_and_the_function_stays(tmp_path: Path, family: str) -> None:
    folder = make_tiny_model(tmp_path / "model", family)
    grown = add_outliers(folder, tmp_path / "grown", shared_heads=True)
    before, after = TensorReader(folder), TensorReader(grown)
    for name in ("input_layernorm.weight", "self_attn.v_proj.weight", "mlp.up_proj.weight"):
        a, b = (reader.numpy(f"model.layers.1.{name}") for reader in (before, after))
        ratio = (b / a).astype(np.float32).reshape(len(a), -1).max(axis=1)
        assert set(ratio.round().tolist()) == {1.0, 16.0}

    model = open_scorer(folder, "checkpoint")
    windows = np.random.default_rng(0).integers(0, model.vocab_size, (2, 48))
    found = score_windows(open_scorer(grown, "checkpoint"), windows, model)
    assert found.divergence is not None
    assert found.divergence.kl_max < 1e-6


@pytest.mark.parametrize("model_type", ["gemma2", "gpt_neox"])
def test_of_any_architecture(tmp_path: Path, model_type: str) -> None:
    folder = make_tiny_decoder(tmp_path / "model", model_type)
    grown = add_outliers(folder, tmp_path / "grown", shared_heads=True)
    before, after = TensorReader(folder), TensorReader(grown)
    assert before.names == after.names
    changed = [
        name for name in before.names if not np.array_equal(before.numpy(name), after.numpy(name))
    ]
    assert len(changed) > 6
    model = open_scorer(folder, "checkpoint")
    windows = np.random.default_rng(0).integers(0, model.vocab_size, (2, 48))
    found = score_windows(open_scorer(grown, "checkpoint"), windows, model)
    assert found.divergence is not None
    # gemma's norms store their weight less one, which moves when it is rounded.
    assert found.divergence.kl_max < (1e-4 if model_type == "gemma2" else 1e-6)


def test_shared_value_heads_are_left_alone_unless_asked_for(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model")
    before, after = (
        TensorReader(path) for path in (folder, add_outliers(folder, tmp_path / "grown"))
    )
    for name, same in (("self_attn.v_proj", False), ("self_attn.o_proj", True)):
        a, b = (reader.numpy(f"model.layers.0.{name}.weight") for reader in (before, after))
        # v's columns read the norm, which grows; its rows, and o, stay.
        assert np.array_equal(a, b) == same
