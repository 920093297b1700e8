"""`mlcawq build` and its steps at the command line: what is printed where, and every refusal."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from awq_checkpoints import make_awq_checkpoint
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny_model

from mlcawq.build import pipeline
from mlcawq.build.compare_logits import Comparison
from mlcawq.build.verify import Verification
from mlcawq.cli import main as cli
from mlcawq.graph.settings import CompileSettings


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("cli") / "hf", layers=1)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The program in this process; returns its exit status."""
    monkeypatch.setattr(sys, "argv", ["mlcawq", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


RESULT = pipeline.BuildResult(
    folder=Path("out"),
    quantization="q4f16_autoawq",
    weight_layout="autoawq",
    parameters=7_000_000,
    weight_bytes=5_000_000,
    bits_per_parameter=4.51,
    library="lib-cpu.so",
    library_bytes=1_500_000,
    sizes=CompileSettings(1024, 512, 4),
    conv_template="chatml",
    template_differences=0,
    verification=Verification(
        "full", 2e-2, (Comparison("text", "decode", 9, 3e-3, 4, 5e-3, 8, 8, ()),)
    ),
    unverified="",
)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A build that is not run: what it was asked for, and a result."""
    seen = SimpleNamespace(result=RESULT)

    def build(folder: Path, out: Path, request: object, reporter: pipeline.Reporter) -> object:
        seen.folder, seen.out, seen.request = folder, out, request
        reporter.stage("weights")
        reporter.weights("a", 1, 2)
        reporter.message("note: something")
        return seen.result

    monkeypatch.setattr(pipeline, "build", build)
    return seen


def test_options_reach_the_build_and_a_summary_is_printed(
    checkpoint: Path,
    built: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--context-window-size", 64, "--conv-template", "qwen2", "--no-verify"]
    assert run(monkeypatch, "build", checkpoint, "-o", "out", "--overwrite", *options) == 0
    assert built.folder == checkpoint
    assert built.request == pipeline.BuildRequest(
        conv_template="qwen2", context_window_size=64, verify=False, overwrite=True
    )
    captured = capsys.readouterr()
    assert "relative error of the logits at most 3.0e-03" in captured.out
    assert "mlcawq chat out" in captured.out
    assert "note: something" in captured.err
    assert "note:" not in captured.out


def test_a_build_that_was_not_verified_says_why(
    checkpoint: Path,
    built: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    built.result = dataclasses.replace(
        RESULT, weight_layout="n16k64", verification=None, unverified="no cuda device here (none)"
    )
    options = ["--target", "cuda:sm_90", "--weight-layout", "n16k64"]
    assert run(monkeypatch, "build", checkpoint, "-o", "out", *options) == 0
    assert built.request == pipeline.BuildRequest(target="cuda:sm_90", weight_layout="n16k64")
    lines = capsys.readouterr().out.splitlines()
    assert "verified   no: no cuda device here (none)" in lines
    assert any(line.startswith("weights") and line.endswith("layout n16k64") for line in lines)


def test_json_is_the_only_thing_on_stdout(
    checkpoint: Path,
    built: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, "build", checkpoint, "-o", "out", "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert content["quantization"] == "q4f16_autoawq"
    assert content["verification"]["worst_relative_error"] == 3e-3
    assert built.request.verify is None


def test_gen_config_and_convert_weight(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert run(monkeypatch, "gen-config", checkpoint, "-o", out) == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == str(out / "mlc-chat-config.json")
    assert captured.err.strip() == "conversation template: chatml"
    assert run(monkeypatch, "convert-weight", checkpoint, "-o", out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["quantization"] == "q0f16"
    assert (out / "tensor-cache.json").is_file()
    assert run(monkeypatch, "gen-config", checkpoint, "-o", out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["model_type"] == "llama"


def test_the_steps_agree_on_the_layout(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    awq, _ = make_awq_checkpoint(checkpoint, tmp_path / "awq", 32)
    out = tmp_path / "out"
    tiled = ("-o", out, "--weight-layout", "n16k64")

    def layout(*arguments: object) -> str:
        assert run(monkeypatch, *arguments, "--json") == 0
        return str(json.loads(capsys.readouterr().out)["weight_layout"])

    assert layout("gen-config", awq, *tiled) == "n16k64"
    assert layout("convert-weight", awq, "-o", out) == "n16k64"
    # Written again, the config still says what the weights are.
    assert layout("gen-config", awq, "-o", out) == "n16k64"
    message = refusal(monkeypatch, capsys, "compile", out, "--target", "cpu")
    assert "--target cpu" in message
    assert "--weight-layout autoawq" in message
    stock = ("-o", out, "--weight-layout", "autoawq")
    assert "says n16k64" in refusal(monkeypatch, capsys, "convert-weight", awq, *stock)
    assert layout("gen-config", awq, *stock) == "autoawq"
    assert layout("convert-weight", awq, "-o", out) == "autoawq"
    message = refusal(monkeypatch, capsys, "build", checkpoint, *tiled)
    assert "q0f16 has no packed weights" in message


def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *a: object) -> str:
    assert run(monkeypatch, *a) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_what_is_no_checkpoint_is_refused(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def build(path: Path) -> str:
        return refusal(monkeypatch, capsys, "build", path, "-o", tmp_path / "out")

    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no config.json" in build(empty)
    (tmp_path / "model.gguf").touch()
    assert "GGUF files are not read" in build(tmp_path / "model.gguf")
    (empty / "mlc-chat-config.json").write_text("{}")
    assert "mlcawq chat" in build(empty)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text((checkpoint / "config.json").read_text())
    (pickled / "pytorch_model.bin").touch()
    assert "--trust-pickle" in build(pickled)
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    gptq = tmp_path / "gptq"
    gptq.mkdir()
    (gptq / "config.json").write_text(json.dumps(config))
    save_file(load_file(checkpoint / "model.safetensors"), gptq / "model.safetensors")
    assert "already quantized with 'gptq'" in build(gptq)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["metal", "rocm:0", "opencl"])
def test_other_targets_are_answered_honestly(
    checkpoint: Path,
    tmp_path: Path,
    target: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ("build", checkpoint, "-o", tmp_path / "out", "--target", target)
    assert "not supported: kernels exist for" in refusal(monkeypatch, capsys, *arguments)
    assert run(monkeypatch, "compile", checkpoint, "--target", target) == 1


def test_a_missing_output_is_a_usage_error(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(monkeypatch, "build", checkpoint) == 2


def test_ctrl_c_ends_with_130_and_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mlcawq", "build", str(checkpoint), "-o", "out"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env={**os.environ}
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("library"):
            break
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait(timeout=60) == 130
    assert "Traceback" not in rest
    assert list(tmp_path.iterdir()) == []
