"""Compiled libraries for GPUs against PyTorch: on Vulkan, and on emulated CUDA."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlcawq.engine.devices import Missing, find_device
from mlcawq.graph.pipeline import build_module, compile_module
from mlcawq.graph.settings import CompileSettings, quantization_named
from tests.graph.built_library import (
    Built,
    Case,
    build,
    build_weights,
    check_batches_of_different_lengths,
    check_prefill_in_chunks_then_decode,
    check_verify_fork_and_rollback,
    error,
)
from tests.tir_kernels.backends import CUDA, WEBGPU
from tests.tir_kernels.cuda_emulator import emulated_cuda, load_emulated, why_not
from tir_kernels._tvm import tvm

FP16 = 3e-3  # an order below what the CPU's libraries are held to; measured 1e-3
CASES: dict[str, tuple[Case, str | None]] = {
    "qwen2-tiled": (
        Case("qwen2", {"heads": 6, "hidden": 192}, {"group_size": 64}, "q4f16_autoawq_g64", FP16),
        "n16k64",
    ),
    "llama-stock": (
        Case(
            "llama",
            {"tie": True, "bias": True, "mlp_bias": True, "rope": "llama3"},
            {"group_size": 32, "skip": ("layers.1.mlp", "layers.0.self_attn.o_proj")},
            "q4f16_autoawq_g32",
            FP16,
        ),
        "autoawq",
    ),
    "llama-tiled": (
        Case(
            "llama",
            {"bias": True, "mlp_bias": True},
            {"group_size": 32, "skip": ("layers.1.mlp", "layers.0.self_attn.o_proj")},
            "q4f16_autoawq_g32",
            FP16,
        ),
        "n16k64",
    ),
    "qwen3-fp32-tiled": (
        Case(
            "qwen3",
            {"head_dim": 80, "heads": 6},
            {"group_size": 32},
            "q4f32_autoawq_g32",
            1e-5,
            asked=True,
        ),
        "n16k64",
    ),
    "qwen3-unquantized": (Case("qwen3", {"head_dim": 64}, None, "q0f16", FP16), None),
    "mistral-fp32": (Case("mistral", {"rope": "yarn"}, None, "q0f32", 1e-5, asked=True), None),
}


@pytest.fixture(
    scope="module",
    params=[
        name if name == "qwen2-tiled" else pytest.param(name, marks=pytest.mark.slow)
        for name in CASES
    ],
)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    device = find_device("vulkan")
    if isinstance(device, Missing):
        pytest.skip(f"no Vulkan device: {device.reason}")
    case, layout = CASES[request.param]
    return build(case, tmp_path_factory.mktemp(request.param), WEBGPU, layout, device.tvm)


def test_prefill_in_chunks_then_decode(built: Built) -> None:
    check_prefill_in_chunks_then_decode(built)


def test_batches_of_different_lengths(built: Built) -> None:
    check_batches_of_different_lengths(built)


def test_verify_fork_and_rollback(built: Built) -> None:
    check_verify_fork_and_rollback(built)


def test_functions_beside_the_model(built: Built) -> None:
    driver, rng = built.driver(), np.random.default_rng()
    vocabulary = built.config.vocab_size
    logits = rng.standard_normal((2, 1, vocabulary)).astype(np.float32)
    got = driver.vm["softmax_with_temperature"](
        driver.tensor(logits), driver.tensor(np.array([1, 0.5], np.float32))
    )
    weights = np.exp(logits.astype(np.float64) / np.array([1, 0.5])[:, None, None])
    assert error(got.numpy(), weights / weights.sum(-1, keepdims=True)) < 1e-5

    hidden = driver.embed(built.ids[:5])
    picked = driver.vm["batch_select_last_hidden_states"](
        hidden, driver.tensor(np.array([4, 0], np.int32))
    )
    np.testing.assert_array_equal(picked.numpy(), hidden.numpy()[[4, 0]])
    assert driver.vm["alloc_embedding_tensor"]().shape == (256, built.config.hidden_size)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["n16k64", "autoawq"])
@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_on_emulated_cuda(layout: str, tmp_path: Path) -> None:
    model: dict[str, Any] = {"heads": 4, "kv_heads": 2, "head_dim": 64, "layers": 2}
    case = Case("qwen3", model, {"group_size": 64}, "q4f16_autoawq_g64", FP16)
    built = build_weights(case, tmp_path, layout, tokens=100)
    settings = CompileSettings(1024, 256, 3)
    quantization = quantization_named(case.quantization, layout)
    module, metadata = build_module(built.config, quantization, settings, CUDA)
    executable = compile_module(module, settings, CUDA, metadata)
    with emulated_cuda("sm_80"):
        built = replace(built, library=load_emulated(executable), device=tvm.cuda(0))
        check_prefill_in_chunks_then_decode(built, (1, 40), 4)
        check_batches_of_different_lengths(built)
        check_verify_fork_and_rollback(built)
