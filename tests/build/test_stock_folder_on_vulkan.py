"""A folder in the stock layout, such as mlc_llm writes, gets a GPU's library beside its own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from awq_checkpoints import make_awq_checkpoint
from tiny_models import make_tiny_model
from vulkan_device import needs_vulkan

from mlcawq.build.pipeline import BuildRequest, build, compile_folder
from mlcawq.engine.artifact import read_folder
from mlcawq.engine.runtime import ModelRuntime

pytestmark = [needs_vulkan, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stock")
    plain = make_tiny_model(root / "hf", "qwen2", layers=1, hidden=64, intermediate=96, tie=True)
    checkpoint, _ = make_awq_checkpoint(plain, root / "awq", 32)
    sizes = {"context_window_size": 128, "prefill_chunk_size": 64, "max_batch_size": 2}
    build(checkpoint, root / "built", BuildRequest(verify=False, **sizes))
    file = root / "built" / "mlc-chat-config.json"
    config = json.loads(file.read_text())
    for ours in ("weight_layout", "awq"):
        del config[ours]
    file.write_text(json.dumps(config))
    compile_folder(root / "built", None, "vulkan")
    return root / "built"


def test_both_libraries_compute_the_same(folder: Path) -> None:
    built = read_folder(folder)
    assert set(built.libraries) == {"cpu", "vulkan"}
    seed = int(np.random.SeedSequence().entropy or 0)
    ids = np.random.default_rng(seed).integers(0, 390, 40).tolist()
    logits = []
    for device in ("cpu", "vulkan"):
        runtime = ModelRuntime(built, device, max_total_tokens=128)
        assert runtime.library == built.libraries[device]
        assert runtime.metadata["weight_layout"] == "autoawq"
        runtime.add_sequence(0)
        rows = [runtime.prefill([(0, ids[:33])])]
        rows += [runtime.decode([0], [token]) for token in ids[33:]]
        logits.append(np.concatenate(rows).astype(np.float64))
    error = np.linalg.norm(logits[1] - logits[0]) / np.linalg.norm(logits[0])
    assert error < 5e-3, f"seed {seed}"
