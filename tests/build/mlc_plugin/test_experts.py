"""Mixtures of experts from AWQ checkpoints through mlc_llm, run in our engine, against PyTorch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from awq_mixtures import make_awq_mixture
from mlc_steps import read_parameters, run_step
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from mlcawq.engine.artifact import read_folder
from mlcawq.engine.runtime import ModelRuntime
from tests.tir_kernels.backends import backend_named

pytestmark = pytest.mark.mlc_llm

CPU = {"kind": "llvm"}
WEBGPU = {"kind": "webgpu"}
TOLERANCE = 1e-2
LENGTH = 40


def build(python: Path, checkpoint: Path, out: Path, name: str, target: dict[str, str]) -> Path:
    words = [checkpoint, "--quantization", name, "-o", out]
    sizes = ["--context-window-size", 256, "--prefill-chunk-size", 64, "--max-batch-size", 2]
    run_step(python, "gen_config", *words, *sizes)
    run_step(python, "convert_weight", *words, "--device", "cpu")
    library = out / f"lib-{'cpu' if target == CPU else 'vulkan'}.so"
    device = "cpu" if target == CPU else json.dumps(target)
    run_step(python, "compile", out, "--device", device, "-o", library)
    return out


def reference(plain: Path, ids: list[int]) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    with torch.no_grad():
        logits: np.ndarray = model(torch.tensor([ids])).logits[0].numpy()
    return logits


def check(folder: Path, plain: Path, device: str) -> None:
    """Prefill, decode, and two sequences in one batch."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 400, LENGTH).tolist() for _ in range(2)]
    expected = [reference(plain, ids) for ids in prompts]
    runtime = ModelRuntime(read_folder(folder), device)

    def same(got: np.ndarray, wanted: np.ndarray) -> None:
        difference = np.linalg.norm(got - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)
        assert difference.max() < TOLERANCE, difference

    for start in (1, LENGTH - 4):
        runtime.clear()
        runtime.add_sequence(0)
        logits = [runtime.prefill([(0, prompts[0][:start])])]
        logits += [runtime.decode([0], [token]) for token in prompts[0][start : start + 4]]
        same(np.concatenate(logits), expected[0][start - 1 : start + 4])
    runtime.clear()
    for sequence in (0, 1):
        runtime.add_sequence(sequence)
    same(
        runtime.prefill([(i, ids[: 20 + i]) for i, ids in enumerate(prompts)]),
        np.stack([expected[0][19], expected[1][20]]),
    )
    same(
        runtime.decode([0, 1], [prompts[0][20], prompts[1][21]]),
        np.stack([expected[0][20], expected[1][21]]),
    )


@pytest.mark.parametrize(
    ("family", "group_size", "name"),
    [
        ("mixtral", 32, "q4f16_autoawq_g32"),
        ("qwen3_moe", 64, "q4f32_autoawq_g64"),
        ("qwen2_moe", 32, "q4f16_autoawq_g32"),
    ],
)
def test_library_computes_what_the_checkpoint_stands_for(
    mlc_python: Path, tmp_path: Path, family: str, group_size: int, name: str
) -> None:
    awq, plain = make_awq_mixture(tmp_path, family, group_size)
    check(build(mlc_python, awq, tmp_path / "out", name, CPU), plain, "cpu")


@pytest.mark.slow
def test_quantized_routers(mlc_python: Path, tmp_path: Path) -> None:
    awq, plain = make_awq_mixture(tmp_path, "qwen3_moe", quantize_router=True)
    assert "model.layers.0.mlp.gate.qweight" in load_file(awq / "model.safetensors")
    check(build(mlc_python, awq, tmp_path / "out", "q4f16_autoawq_g32", CPU), plain, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "qwen2_moe"])
def test_the_same_on_vulkan(mlc_python: Path, tmp_path: Path, family: str) -> None:
    backend_named("vulkan")  # or skipped
    awq, plain = make_awq_mixture(tmp_path, family)
    name = "q4f16_autoawq_g32"
    check(build(mlc_python, awq, tmp_path / "out", name, WEBGPU), plain, "vulkan")


def test_experts_lie_one_after_the_other(mlc_python: Path, tmp_path: Path) -> None:
    awq, _ = make_awq_mixture(tmp_path, "mixtral")
    out = tmp_path / "out"
    words = [awq, "--quantization", "q4f16_autoawq_g32", "-o", out]
    run_step(mlc_python, "gen_config", *words)
    run_step(mlc_python, "convert_weight", *words, "--device", "cpu")
    built, given = read_parameters(out), load_file(awq / "model.safetensors")
    for part in ("qweight", "qzeros", "scales"):
        stored = built[f"model.layers.1.moe.e1_e3.{part}"].array
        for expert, of_one in enumerate(stored):
            name = f"model.layers.1.block_sparse_moe.experts.{expert}"
            both = [given[f"{name}.{linear}.{part}"] for linear in ("w1", "w3")]
            assert of_one.tobytes() == np.concatenate(both, axis=1).tobytes(), (part, expert)
