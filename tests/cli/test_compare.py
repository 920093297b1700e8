"""`mlcawq compare` as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from made_up_reports import report
from tiny_models import make_tiny_model

from mlcawq.quantize.report import REPORT_FILE


def _compare(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mlcawq", "compare", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("compare")
    found = []
    for name in ("one", "two"):
        (place / name).mkdir()
        (place / name / REPORT_FILE).write_text(json.dumps(report().to_json()))
        found.append(place / name)
    return found


def test_reports_side_by_side_with_a_page(folders: list[Path], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    found = _compare(*folders, "--html", page)
    assert found.returncode == 0, found.stderr
    for part in ("one", "two", "All alike:", "mlp.down_proj", "model.layers.1"):
        assert part in found.stdout
    assert "</svg>" in page.read_text()
    assert str(page) in found.stderr.replace("\n", "")


def test_measured_against_the_original(tiny_llama: Path, tmp_path: Path) -> None:
    """The best is the original itself; the other's lag is its divergence, with an error."""
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    other = make_tiny_model(tmp_path / "other", seed=1)
    same = tmp_path / "same"
    same.symlink_to(tiny_llama)
    found = _compare(
        *(other, same, "--against", tiny_llama, "--text", text, "--window", 64, "--json")
    )
    assert found.returncode == 0, found.stderr
    result = json.loads(found.stdout)
    best, worst = result["rows"]
    assert (best["name"], worst["name"]) == ("same", "other")
    assert best["kl"]["mean"] == pytest.approx(0, abs=1e-9)
    assert best["behind"] is None
    assert worst["behind"]["mean"] == pytest.approx(worst["kl"]["mean"])
    assert worst["behind"]["standard_error"] > 0
    assert worst["perplexity"] != worst["original_perplexity"] == best["perplexity"]
    assert result["tokens"] % 63 == 0


def test_mistakes_are_told_before_any_work(folders: list[Path], tmp_path: Path) -> None:
    found = _compare(folders[0], tmp_path, "--html", tmp_path / "absent" / "page.html")
    assert found.returncode == 1
    assert found.stdout == ""
    assert "Traceback" not in found.stderr
    for part in ("no such folder", f"no {REPORT_FILE} in it"):
        assert part in found.stderr
    assert _compare(folders[0]).returncode == 2
    assert "go together" in _compare(*folders, "--against", folders[0]).stderr
