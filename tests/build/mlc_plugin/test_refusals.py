"""What the plug-in refuses before work, in an environment with mlc_llm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from awq_checkpoints import make_awq_checkpoint
from mlc_steps import run_step
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny_model

pytestmark = pytest.mark.mlc_llm


@pytest.fixture(scope="module")
def awq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refused")
    plain = make_tiny_model(folder / "qwen2", "qwen2", hidden=128, intermediate=256)
    return make_awq_checkpoint(plain, folder / "awq", 128)[0]


def refusal(python: Path, step: str, checkpoint: Path, *words: object) -> str:
    device = ["--device", "cpu"] if step != "gen_config" else []
    done = run_step(python, step, checkpoint, *words, *device, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr[done.stderr.index("error: ") :]


def edited(checkpoint: Path, folder: Path, **changes: Any) -> Path:
    """The checkpoint with another quantization_config."""
    folder.mkdir()
    for file in checkpoint.iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"].update(changes)
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_quantization_that_is_not_the_checkpoint_s(
    mlc_python: Path, awq: Path, tmp_path: Path
) -> None:
    words = ["-o", tmp_path / "out", "--quantization"]
    for step in ("gen_config", "convert_weight"):
        message = refusal(mlc_python, step, awq, *words, "q4f16_autoawq_g32")
        assert "has groups of 32, the checkpoint has groups of 128" in message
    message = refusal(mlc_python, "convert_weight", awq, *words, "q4f16_1")
    assert "quantized with AWQ already" in message
    other = edited(awq, tmp_path / "gemv", version="gemv", bits=3)
    message = refusal(mlc_python, "gen_config", other, *words, "q4f16_autoawq")
    assert "AWQ with 3 bits" in message
    assert "'gemv'" in message
    assert not list((tmp_path / "out").glob("*"))


def test_tensors_that_are_missing_or_extra(mlc_python: Path, awq: Path, tmp_path: Path) -> None:
    broken = edited(awq, tmp_path / "broken")
    state = load_file(awq / "model.safetensors")
    del state["model.layers.1.self_attn.k_proj.scales"]
    state["model.layers.1.self_attn.k_proj.weight"] = state["model.norm.weight"].clone()
    (broken / "model.safetensors").unlink()
    save_file(state, broken / "model.safetensors")
    words = ["--quantization", "q4f16_autoawq", "-o", tmp_path / "out"]
    message = refusal(mlc_python, "convert_weight", broken, *words)
    assert "tensor model.layers.1.self_attn.k_proj.scales is missing" in message
    assert "model.layers.1.self_attn.k_proj.weight is not part of this architecture" in message
    assert not list((tmp_path / "out").glob("params_shard_*"))


def test_parts_of_a_fused_linear_left_unquantized(
    mlc_python: Path, awq: Path, tmp_path: Path
) -> None:
    partly = edited(awq, tmp_path / "partly", modules_to_not_convert=["0.self_attn.k_proj"])
    words = ["--quantization", "q4f16_autoawq", "-o", tmp_path / "out"]
    message = refusal(mlc_python, "convert_weight", partly, *words)
    assert "model.layers.0.self_attn.k_proj.weight is left unquantized" in message
    assert "quantize all of them, or none" in message


def test_unknown_template_and_folder(mlc_python: Path, awq: Path, tmp_path: Path) -> None:
    words = ["--quantization", "q4f16_autoawq", "-o", tmp_path / "out"]
    message = refusal(mlc_python, "gen_config", awq, *words, "--conv-template", "qwen22")
    assert "no conversation template 'qwen22'" in message
    message = refusal(mlc_python, "gen_config", tmp_path / "nowhere", *words)
    assert "nowhere does not exist" in message


def test_layout_that_the_folder_does_not_name(mlc_python: Path, awq: Path, tmp_path: Path) -> None:
    words = ["--quantization", "q4f16_autoawq", "-o", tmp_path / "out"]
    run_step(mlc_python, "gen_config", awq, *words)
    message = refusal(mlc_python, "convert_weight", awq, *words, "--weight-layout", "n16k64")
    assert "mlc-chat-config.json there says autoawq" in message
    library = ["--weight-layout", "n16k64", "-o", tmp_path / "out" / "lib.so"]
    message = refusal(mlc_python, "compile", tmp_path / "out", *library)
    assert "mlc-chat-config.json there says autoawq" in message
