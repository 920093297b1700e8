"""`--via mlc-llm` at the command line: what is printed where, exit codes, interrupts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from awq_checkpoints import make_awq_checkpoint
from fake_mlc import FakeMlc, gone
from tiny_models import make_tiny_model

from mlcawq.cli import main as cli


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("via")
    plain = make_tiny_model(folder / "hf", layers=1)
    return make_awq_checkpoint(plain, folder / "awq", 128)[0]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeMlc:
    fake = FakeMlc(tmp_path / "mlc")
    monkeypatch.setenv("MLCAWQ_MLC_PYTHON", str(fake.python))
    return fake


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The program in this process; returns its exit status."""
    monkeypatch.setattr(sys, "argv", ["mlcawq", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


VIA = ("--via", "mlc-llm")


def test_a_build_prints_a_summary_and_passes_the_output_on(
    checkpoint: Path,
    fake: FakeMlc,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    out = tmp_path / "out"
    arguments = ("build", checkpoint, "-o", out, *VIA, "--no-verify")
    assert run(monkeypatch, *arguments, "--compile-args=--opt O3") == 0
    captured = capfdbinary.readouterr()
    text = captured.out.decode()
    assert "through    mlc_llm 0.20.0 with apache-tvm 0.26.0" in text
    assert "verified   no: --no-verify" in text
    assert f"next       mlcawq chat {out}" in text
    assert b"convert_weight is done" in captured.err
    assert "convert_weight" not in text
    assert fake.calls[-1][-2:] == ["--opt", "O3"]
    arguments = ("build", checkpoint, "-o", out, *VIA, "--overwrite", "--target", "metal")
    assert run(monkeypatch, *arguments, "--json") == 0
    content = json.loads(capfdbinary.readouterr().out)
    assert content["library"] == "lib-metal.so"
    assert content["unverified"] == "mlcawq has no engine for metal"


def test_a_dry_run_starts_nothing(
    checkpoint: Path,
    fake: FakeMlc,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ("build", checkpoint, "-o", tmp_path / "out", *VIA, "--dry-run")
    assert run(monkeypatch, *arguments) == 0
    script = capsys.readouterr().out
    assert run(monkeypatch, *arguments, "--json") == 0
    assert "\n".join(json.loads(capsys.readouterr().out)["commands"]) == script.rstrip("\n")
    assert fake.calls == []
    assert not (tmp_path / "out").exists()
    # Typed, it makes the folder.
    subprocess.run(["sh", "-e"], input=script, text=True, check=True, capture_output=True)
    assert (tmp_path / "out" / "lib-cpu.so").is_file()
    config = json.loads((tmp_path / "out" / "mlc-chat-config.json").read_text())
    assert config["conv_template"]["name"] == "chatml"


def test_the_steps(
    checkpoint: Path,
    fake: FakeMlc,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    extra = ("--", "--attention-sink-size", "4")
    assert run(monkeypatch, "gen-config", checkpoint, "-o", out, *VIA, *extra) == 0
    assert capfd.readouterr().out.strip() == str(out / "mlc-chat-config.json")
    assert run(monkeypatch, "convert-weight", checkpoint, "-o", out, *VIA, "--json") == 0
    assert json.loads(capfd.readouterr().out)["file"] == str(out / "tensor-cache.json")
    assert run(monkeypatch, "compile", out, *VIA, "--dry-run", "--", "--opt", "O3") == 0
    assert "--opt O3" in capfd.readouterr().out
    assert run(monkeypatch, "compile", out, *VIA, "--no-plugin", "--", "--opt", "O3") == 0
    assert capfd.readouterr().out.strip() == str(out / "lib-cpu.so")
    assert fake.calls[0][-2:] == list(extra[1:])
    assert fake.calls[-1][:3] == ["-m", "mlc_llm", "compile"]
    assert run(monkeypatch, "compile", out, *VIA, "--", "--device", "cuda") == 1
    assert "mlcawq has --target for it" in capfd.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ["--dry-run"],
        ["--no-plugin"],
        ["--mlc-python", "python3"],
        ["--compile-args", "--opt O3"],
        ["--via", "something-else"],
    ],
)
def test_options_without_via_are_wrong_usage(
    options: list[str], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(monkeypatch, "build", checkpoint, "-o", "out", *options) == 2


def test_more_arguments_without_via_are_wrong_usage(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "compile", checkpoint, "other") == 2
    assert "more go with --via mlc-llm" in capsys.readouterr().err


def test_a_wrong_interpreter_is_one_message(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ("build", checkpoint, "-o", tmp_path / "out", *VIA)
    assert run(monkeypatch, *arguments, "--mlc-python", "/nonexistent") == 1
    message = capsys.readouterr().err
    assert message.startswith("error: --mlc-python: /nonexistent does not exist\n  -> ")


def test_ctrl_c_ends_with_130_and_leaves_nothing(
    checkpoint: Path, fake: FakeMlc, tmp_path: Path
) -> None:
    fake.plays(convert_weight="hangs")
    work = tmp_path / "work"
    work.mkdir()
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-m", "mlcawq", "build", str(checkpoint), "-o", "out", *VIA]
    process = subprocess.Popen(
        command,
        cwd=work,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(scratch), "MLCAWQ_MLC_PYTHON": str(fake.python)},
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line == "hanging\n":
            break
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait(timeout=60) == 130
    assert "Traceback" not in rest
    assert list(work.iterdir()) == []
    assert list(scratch.iterdir()) == []
    assert all(map(gone, fake.pids))
