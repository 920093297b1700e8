"""Compiled libraries against float32 PyTorch models holding the same (dequantized) weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mlcawq.build.compile import compile_model
from mlcawq.build.convert_weight import convert_weight
from mlcawq.checkpoint.config import ModelConfig, read_config
from tests.awq_checkpoints import make_awq_checkpoint
from tests.graph.library_driver import LibraryDriver
from tests.tiny_models import make_tiny_model

LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": 768}


@dataclass(frozen=True)
class Case:
    """A family with its quirks. awq: make_awq_checkpoint's options, None to stay unquantized."""

    family: str
    model: dict[str, Any]
    awq: dict[str, Any] | None
    quantization: str
    tolerance: float = 1e-2


CASES = {
    "llama": Case(
        "llama",
        {"tie": True, "rope": "llama3"},
        {"group_size": 32, "skip": ("layers.1.mlp.down_proj",)},
        "q4f16_autoawq_g32",
    ),
    "llama-biased-longrope": Case(
        "llama",
        {"bias": True, "mlp_bias": True, "rope": LONGROPE},
        {"group_size": 64, "zero_point": False, "with_zeros": False},
        "q4f16_autoawq_g64",
    ),
    "mistral": Case("mistral", {"rope": "yarn", "dtype": "bfloat16"}, None, "q0f16"),
    "qwen2": Case("qwen2", {"heads": 6, "hidden": 192}, {"group_size": 64}, "q4f16_autoawq_g64"),
    "qwen3": Case("qwen3", {"head_dim": 64}, {"group_size": 128}, "q4f16_autoawq"),
    "qwen3-fp32": Case(
        "qwen3", {"tie": True, "dtype": "float32", "rope": "linear"}, None, "q0f32", 1e-5
    ),
}


@dataclass(frozen=True)
class Built:
    case: Case
    config: ModelConfig
    folder: Path
    ids: list[int]
    expected: np.ndarray  # logits [len(ids), vocabulary]

    def driver(self) -> LibraryDriver:
        return LibraryDriver(self.folder / "lib-cpu.so", self.folder)


@pytest.fixture(scope="module", params=CASES)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    case = CASES[request.param]
    root = tmp_path_factory.mktemp(request.param)
    plain = make_tiny_model(root / "plain", case.family, **case.model)
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    checkpoint = plain
    if case.awq is not None:
        checkpoint, state = make_awq_checkpoint(plain, root / "awq", **case.awq)
        model.load_state_dict(state, strict=False)
    config = read_config(checkpoint)
    folder = root / "built"
    assert convert_weight(checkpoint, folder).quantization == case.quantization
    library = compile_model(config, folder / "lib-cpu.so", prefill_chunk_size=256, max_batch_size=3)
    assert library.metadata["quantization"] == case.quantization
    ids = np.random.default_rng(0).integers(0, config.vocab_size, 600).tolist()
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    return Built(case, config, folder, ids, expected)


def error(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def test_prefill_in_chunks_then_decode(built: Built) -> None:
    driver, ids, tolerance = built.driver(), built.ids, built.case.tolerance
    for sequence, length in enumerate((1, 7, 128, 513)):
        driver.add(sequence)
        for start in range(0, length, 256):
            chunk = ids[start : min(start + 256, length)]
            logits = driver.prefill(sequence, chunk)
            assert error(logits, built.expected[start + len(chunk) - 1]) < tolerance
        if length in (7, 513):
            steps = range(length, length + 64)
            got = np.stack([driver.decode(sequence, ids[i]) for i in steps])
            assert error(got, built.expected[steps.start : steps.stop]) < tolerance
        driver.remove(sequence)


def test_batches_of_different_lengths(built: Built) -> None:
    driver, ids, tolerance = built.driver(), built.ids, built.case.tolerance
    lengths = {0: 5, 1: 40, 2: 17}
    for sequence in lengths:
        driver.add(sequence)
    logits = driver.batch_prefill({s: ids[:n] for s, n in lengths.items()})
    for row, n in zip(logits, lengths.values(), strict=True):
        assert error(row, built.expected[n - 1]) < tolerance
    # A second chunk on top of the cache, of other lengths, one sequence left out.
    more = {0: 30, 2: 3}
    logits = driver.batch_prefill({s: ids[lengths[s] : lengths[s] + n] for s, n in more.items()})
    for row, (sequence, n) in zip(logits, more.items(), strict=True):
        lengths[sequence] += n
        assert error(row, built.expected[lengths[sequence] - 1]) < tolerance
    for _ in range(4):
        logits = driver.batch_decode({s: ids[n] for s, n in lengths.items()})
        for row, n in zip(logits, lengths.values(), strict=True):
            assert error(row, built.expected[n]) < tolerance
        lengths = {s: n + 1 for s, n in lengths.items()}


def test_verify_fork_and_rollback(built: Built) -> None:
    driver, ids, tolerance = built.driver(), built.ids, built.case.tolerance
    driver.add(0)
    logits = driver.batch_verify(0, ids[:20])
    assert error(logits, built.expected[:20]) < tolerance
    # A fork shares the pages of its prefix, the last of them half full.
    driver.fork(0, 1, 20)
    assert error(driver.decode(1, ids[20]), built.expected[20]) < tolerance
    assert error(driver.decode(0, ids[20]), built.expected[20]) < tolerance
    driver.popn(0, 5)
    assert error(driver.prefill(0, ids[16:30]), built.expected[29]) < tolerance


def test_parameters_are_those_of_the_folder(built: Built) -> None:
    metadata = built.driver().metadata
    names = {parameter["name"] for parameter in metadata["params"]}
    tied = built.config.tie_word_embeddings
    assert ("lm_head.weight" in names) != tied
    assert metadata["kv_cache"]["num_key_value_heads"] == built.config.num_key_value_heads
    assert metadata["weight_layout"] == ("autoawq" if built.case.awq else None)
    planned = metadata["memory_usage"]
    assert planned["batch_decode"] > 0
    # Prefill makes logits of one row, and plans no more than that.
    assert planned["prefill"] < planned["batch_verify"]
    if built.case.awq:
        assert "model.layers.0.self_attn.qkv_proj.qweight" in names
    if built.case.awq and built.case.awq.get("skip"):
        assert "model.layers.1.mlp.down_proj.weight" in names
        assert "model.layers.0.mlp.down_proj.qweight" in names
