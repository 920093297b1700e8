"""Quantization names, compile sizes, and which linears are int4: decisions made before work."""

from __future__ import annotations

import dataclasses

import pytest

from mlcawq.checkpoint.config import AwqConfig, ModelConfig, read_config
from mlcawq.errors import UserError
from mlcawq.graph.settings import (
    TARGET_KINDS,
    check_layout,
    compile_settings,
    default_layout,
    infer_quantization,
    quantization_named,
    quantized_linears,
)
from tests.tiny_models import make_tiny_model


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return read_config(make_tiny_model(tmp_path_factory.mktemp("settings") / "model"))


def with_awq(config: ModelConfig, group_size: int = 128, skip: tuple[str, ...] = ()) -> ModelConfig:
    return dataclasses.replace(config, quantization=AwqConfig(4, group_size, True, "gemm", skip))


def test_names_follow_the_checkpoint(config: ModelConfig) -> None:
    assert infer_quantization(config).name == "q0f16"
    assert infer_quantization(dataclasses.replace(config, dtype="bfloat16")).name == "q0f16"
    assert infer_quantization(dataclasses.replace(config, dtype="float32")).name == "q0f32"
    assert infer_quantization(with_awq(config)).name == "q4f16_autoawq"
    assert infer_quantization(with_awq(config, 64)).name == "q4f16_autoawq_g64"
    assert infer_quantization(with_awq(config, 32)).group_size == 32


def test_a_request_must_agree(config: ModelConfig) -> None:
    assert infer_quantization(config, "q0f32").dtype == "float32"
    with pytest.raises(UserError, match="not quantized"):
        infer_quantization(config, "q4f16_autoawq")
    with pytest.raises(UserError, match="group size 64"):
        infer_quantization(with_awq(config, 64), "q4f16_autoawq")
    with pytest.raises(UserError, match="q4f16_autoawq_g32"):
        quantization_named("q4f16_1")


def test_layouts(config: ModelConfig) -> None:
    assert [default_layout(kind) for kind in TARGET_KINDS] == ["n16k8", "n16k64", "n16k64"]
    assert default_layout("cpu", "float32") == "autoawq"
    assert infer_quantization(with_awq(config)).weight_layout == "autoawq"
    assert infer_quantization(with_awq(config), weight_layout="n16k64").weight_layout == "n16k64"
    assert infer_quantization(config, weight_layout="n16k64").weight_layout is None
    with pytest.raises(UserError, match="autoawq, n16k64"):
        infer_quantization(with_awq(config), weight_layout="n8k8")
    for kind in ("cuda", "vulkan"):
        check_layout("n16k64", kind)
        check_layout("autoawq", kind)
        with pytest.raises(UserError, match=rf"(?s)for CPUs.*autoawq.*--target {kind}"):
            check_layout("n16k8", kind)
    check_layout("n16k8", "cpu")
    with pytest.raises(UserError, match=r"--weight-layout autoawq.*--target cpu"):
        check_layout("n16k64", "cpu")


def test_float32_beside_int4(config: ModelConfig) -> None:
    kind = infer_quantization(with_awq(config, 64), "q4f32_autoawq_g64")
    assert (kind.dtype, kind.group_size) == ("float32", 64)
    with pytest.raises(UserError, match="q4f16_autoawq_g64 or q4f32_autoawq_g64"):
        infer_quantization(with_awq(config, 64), "q4f32_autoawq")


def test_defaults_of_sizes(config: ModelConfig) -> None:
    settings = compile_settings(config)
    assert settings.context_window_size == 1024
    assert settings.prefill_chunk_size == 1024
    large = compile_settings(dataclasses.replace(config, max_position_embeddings=131072))
    assert large.context_window_size == 131072
    assert large.prefill_chunk_size == 2048


def test_sizes_that_cannot_be(config: ModelConfig) -> None:
    with pytest.raises(UserError) as caught:
        compile_settings(config, context_window_size=-1, max_batch_size=0)
    assert len(caught.value.problems) == 2
    windowed = dataclasses.replace(config, sliding_window=128)
    assert compile_settings(windowed).context_window_size == 128
    with pytest.raises(UserError, match=r"128 tokens.*sliding window"):
        compile_settings(windowed, context_window_size=256)


def test_modules_to_not_convert(config: ModelConfig) -> None:
    assert quantized_linears(config) == frozenset()
    assert len(quantized_linears(with_awq(config))) == 4 * config.num_hidden_layers
    kept = quantized_linears(with_awq(config, skip=("down_proj", "layers.1.self_attn.o_proj")))
    assert "model.layers.0.mlp.down_proj" not in kept
    assert "model.layers.0.self_attn.o_proj" in kept
    assert "model.layers.1.self_attn.o_proj" not in kept
    with pytest.raises(UserError, match="gate_up_proj"):
        quantized_linears(with_awq(config, skip=("gate_proj",)))
