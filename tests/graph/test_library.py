"""Compiled libraries for the CPU against PyTorch."""

from __future__ import annotations

import pytest

from tests.graph.built_library import (
    Built,
    Case,
    build,
    check_batches_of_different_lengths,
    check_prefill_in_chunks_then_decode,
    check_verify_fork_and_rollback,
)

LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": 768}

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


# The others are in the stock layout, which the CPU runs too.
BLOCKED = ("llama", "qwen2", "qwen3")


def layout_of(case: Case) -> str | None:
    if case.awq is None:
        return None
    return "n16k8" if case in [CASES[name] for name in BLOCKED] else "autoawq"


@pytest.fixture(scope="module", params=CASES)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    case = CASES[request.param]
    root = tmp_path_factory.mktemp(request.param)
    return build(case, root, layout=layout_of(case))


def test_prefill_in_chunks_then_decode(built: Built) -> None:
    check_prefill_in_chunks_then_decode(built)


def test_batches_of_different_lengths(built: Built) -> None:
    check_batches_of_different_lengths(built)


def test_verify_fork_and_rollback(built: Built) -> None:
    check_verify_fork_and_rollback(built)


def test_parameters_are_those_of_the_folder(built: Built) -> None:
    metadata = built.driver().metadata
    names = {parameter["name"] for parameter in metadata["params"]}
    tied = built.config.tie_word_embeddings
    assert ("lm_head.weight" in names) != tied
    assert metadata["kv_cache"]["num_key_value_heads"] == built.config.num_key_value_heads
    assert metadata["weight_layout"] == layout_of(built.case)
    planned = metadata["memory_usage"]
    assert planned["batch_decode"] > 0
    # Prefill makes logits of one row, and plans no more than that.
    assert planned["prefill"] < planned["batch_verify"]
    if built.case.awq:
        fused = "c_attn" if built.config.model_type.startswith("qwen") else "qkv_proj"
        assert f"model.layers.0.self_attn.{fused}.qweight" in names
    if built.case.awq and built.case.awq.get("skip"):
        assert "model.layers.1.mlp.down_proj.weight" in names
        assert "model.layers.0.mlp.down_proj.qweight" in names
