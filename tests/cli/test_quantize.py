"""`mlcawq quantize` as a user runs it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import pytest
from tiny_models import make_tiny_model

from mlcawq.quantize.report import REPORT_FILE, REPORT_PAGE

FAST = ("--calib-samples", 8, "--calib-seq-len", 64, "--group-size", 64)


def _command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "mlcawq", "quantize", *map(str, arguments)]


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def _quantize(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        _command(*arguments), capture_output=True, text=True, env=_environment(), check=False
    )


def _hashes(folder: Path) -> dict[str, str]:
    """Of all files but the reports, which tell the time that a run took."""
    return {
        path.name: sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.stem != Path(REPORT_FILE).stem
    }


def _refused(found: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert found.returncode == 1, found.stderr
    assert found.stdout == ""
    assert "Traceback" not in found.stderr
    for part in parts:
        assert part in found.stderr


def test_json_goes_to_stdout_and_progress_to_stderr(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = _quantize(tiny_llama, "-o", out, *FAST, "--symmetric", "--seed", 3, "--json")
    assert found.returncode == 0, found.stderr
    report = json.loads(found.stdout)
    assert report["recipe"]["symmetric"] is True
    assert report["recipe"]["group_size"] == 64
    assert report["model"] == tiny_llama.name
    assert len(report["blocks"]) == 2
    assert "model.layers.1: relative output error" in found.stderr
    assert "of memory and" in found.stderr

    again = _quantize(tiny_llama, "-o", out, *FAST, "--overwrite")
    assert again.returncode == 0, again.stderr
    assert "relative output error, %" in again.stdout
    assert "millinats a token" in again.stdout
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["group_size"] == 64
    assert "</svg>" in (out / REPORT_PAGE).read_text()


def test_killed_at_random_moments_ends_with_the_same_bytes(tmp_path: Path) -> None:
    """SIGKILL after the first block, between blocks and while the output is written."""
    model = make_tiny_model(tmp_path / "model", layers=5)
    undisturbed = tmp_path / "undisturbed"
    assert _quantize(model, "-o", undisturbed, *FAST).returncode == 0

    out, work = tmp_path / "out", tmp_path / ".out.mlcawq-work"
    triggers = (
        lambda: (work / "block-00000.safetensors").exists(),
        lambda: any(work.glob("state-0000[34]*")),
        lambda: any(tmp_path.glob(".out.partial-*/*")),
    )
    killed = 0
    for trigger in triggers:
        with subprocess.Popen(
            _command(model, "-o", out, *FAST), stderr=subprocess.DEVNULL, env=_environment()
        ) as process:
            deadline = time.monotonic() + 120
            while process.poll() is None and not trigger() and time.monotonic() < deadline:
                time.sleep(0.0005)
            process.send_signal(signal.SIGKILL)
        killed += process.returncode == -signal.SIGKILL
        assert not out.exists() or process.returncode == 0
    assert killed >= 2  # the last moment is short and may be missed

    if not out.exists():
        found = _quantize(model, "-o", out, *FAST)
        assert found.returncode == 0, found.stderr
        assert "finished blocks of 5" in found.stderr
    assert _hashes(out) == _hashes(undisturbed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "undisturbed"]


def test_interrupted_says_how_to_go_on(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", layers=12)
    work = tmp_path / ".out.mlcawq-work"
    with subprocess.Popen(
        _command(model, "-o", tmp_path / "out", *FAST),
        stderr=subprocess.PIPE,
        text=True,
        env=_environment(),
    ) as process:
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if (work / "journal.json").exists():
                break
            time.sleep(0.0005)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "run the same command again" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()
    assert (work / "journal.json").exists()

    other = _quantize(model, "-o", tmp_path / "out", *FAST, "--bits", 4, "--symmetric")
    _refused(other, "another recipe", "--restart")


def test_everything_wrong_is_said_before_work(tmp_path: Path) -> None:
    """One clear message each, and nothing left beside the inputs."""
    good = make_tiny_model(tmp_path / "good", hidden=96, intermediate=192)
    _refused(_quantize(good, "-o", tmp_path / "o", "--group-size", 128), "q_proj", "down_proj")

    unknown = tmp_path / "unknown"
    shutil.copytree(good, unknown)
    config = json.loads((unknown / "config.json").read_text())
    (unknown / "config.json").write_text(json.dumps({**config, "model_type": "unheard-of"}))
    _refused(_quantize(unknown, "-o", tmp_path / "o"), "unheard-of", "not supported")

    bare = tmp_path / "bare"
    shutil.copytree(good, bare)
    (bare / "tokenizer.json").unlink()
    _refused(_quantize(bare, "-o", tmp_path / "o", "--group-size", 32), "no tokenizer")

    cut = tmp_path / "cut"
    shutil.copytree(good, cut)
    with (cut / "model.safetensors").open("r+b") as stream:
        stream.truncate(2000)
    _refused(_quantize(cut, "-o", tmp_path / "o", "--group-size", 32), "truncated")

    pickled = tmp_path / "pickled"
    shutil.copytree(good, pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    _refused(_quantize(pickled, "-o", tmp_path / "o"), "pickle", "--trust-pickle")

    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").touch()
    _refused(_quantize(good, "-o", full, "--group-size", 32), "not empty", "--overwrite")

    made = {"good", "unknown", "bare", "cut", "pickled", "full"}
    assert {path.name for path in tmp_path.iterdir()} == made
    assert [path.name for path in full.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    "arguments", [("--bits", "7"), ("--group-size", "100"), ("--recipe", "magic")]
)
def test_bad_recipe(tiny_llama: Path, tmp_path: Path, arguments: tuple[str, str]) -> None:
    _refused(_quantize(tiny_llama, "-o", tmp_path / "out", *arguments))
    assert list(tmp_path.iterdir()) == []
