"""`mlcawq doctor`, its tables and its exit status."""

from __future__ import annotations

import json

import pytest
import typer

import mlcawq.doctor
from mlcawq.cli.doctor import doctor
from mlcawq.doctor import Capability, Finding, Report

SICK = Report(
    findings=(
        Finding("machine", "system", "ok", "Linux"),
        Finding("compilers", "c++ compiler", "missing", "none found", "apt install [g++]"),
    ),
    capabilities=(
        Capability("build for the CPU", False, "c++ compiler: none found", "apt install [g++]"),
        Capability("chat and evaluate on the CPU", True),
    ),
)


def test_what_is_missing_is_shown_with_its_fix(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mlcawq.doctor, "examine", lambda: SICK)
    with pytest.raises(typer.Exit) as end:
        doctor()
    assert end.value.exit_code == 1
    out = capsys.readouterr().out
    assert "missing  none found" in out
    assert out.count("-> apt install [g++]") == 2


def test_json_is_one_document(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    healthy = Report(SICK.findings[:1], SICK.capabilities[1:])
    monkeypatch.setattr(mlcawq.doctor, "examine", lambda: healthy)
    doctor(json_output=True)
    content = json.loads(capsys.readouterr().out)
    assert content["findings"][0]["value"] == "Linux"
    assert content["capabilities"][0]["works"] is True
