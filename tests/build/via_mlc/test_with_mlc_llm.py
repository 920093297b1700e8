"""Builds through an mlc_llm that is really there."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from awq_checkpoints import make_awq_checkpoint
from tiny_models import make_tiny_model

from mlcawq.build.pipeline import BuildRequest
from mlcawq.build.via_mlc.interpreter import find_mlc
from mlcawq.build.via_mlc.pipeline import build
from mlcawq.build.via_mlc.plan import MlcRequest

pytestmark = pytest.mark.mlc_llm


def test_the_probe_reads_mlc_llm(mlc_python: Path) -> None:
    found = find_mlc(mlc_python)
    assert found.tvm
    assert "llvm" in found.generators
    assert found.models is not None
    assert {"llama", "mistral", "qwen2", "qwen3", "gemma2"} <= found.models
    assert found.awq_models is not None
    assert "llama" in found.awq_models
    assert "qwen2" not in found.awq_models
    assert found.quantizations is not None
    assert {"q0f16", "q4f16_1", "q4f16_autoawq"} <= found.quantizations
    assert found.conv_templates is not None
    assert {"chatml", "llama-3", "LM"} <= found.conv_templates
    assert {"--opt", "--overrides", "--device"} <= found.options["compile"]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_build_computes_what_the_checkpoint_does(
    family: str, mlc_python: Path, tmp_path: Path
) -> None:
    plain = make_tiny_model(tmp_path / "plain", family, layers=1)
    checkpoint, _ = make_awq_checkpoint(plain, tmp_path / "awq", 64)
    output = io.BytesIO()
    result = build(
        checkpoint, tmp_path / "out", MlcRequest(BuildRequest(), mlc_python), None, output
    )
    assert result.quantization == "q4f16_autoawq_g64"
    assert result.verification is not None
    assert result.verification.mode == "full"
    assert b"lib-cpu.so" in output.getvalue()


def test_mlc_llm_as_it_is(mlc_python: Path, tmp_path: Path) -> None:
    plain = make_tiny_model(tmp_path / "plain", layers=1, config_form=4)
    checkpoint, _ = make_awq_checkpoint(plain, tmp_path / "awq", 128)
    request = MlcRequest(BuildRequest(), mlc_python, plugin=False)
    result = build(checkpoint, tmp_path / "out", request, None, io.BytesIO())
    assert result.verification is not None
    # Nothing of the checkpoint is touched, though mlc_llm would write an index into it.
    assert not (checkpoint / "model.safetensors.index.json").exists()
