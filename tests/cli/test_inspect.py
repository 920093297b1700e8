"""`mlcawq inspect`: what is printed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer

import mlcawq.inspection
from mlcawq.cli.inspect import inspect
from mlcawq.errors import Problem
from mlcawq.inspection import Description


def description(**more: object) -> Description:
    facts = {
        "parameters": 7_250_000,
        "tied embeddings": True,
        "bytes by kind": {"F16": 2_000_000, "qweight": 900},
        "functions": ["embed", "prefill"],
        "metadata": {"large": "object"},
    }
    return Description(Path("there"), "a model", facts, **more)  # type: ignore[arg-type]


def test_facts_and_the_next_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = description(next_step="mlcawq chat there")
    monkeypatch.setattr(mlcawq.inspection, "describe", lambda path: found)
    inspect(Path("there"))
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "there: a model",
        "  parameters       7,250,000 (7.2 M)",
        "  tied embeddings  yes",
        "  bytes by kind    F16 2.00 MB, qweight 900 bytes",
        "  functions        embed, prefill",
        "next: mlcawq chat there",
    ]


def test_problems_take_the_place_of_the_next_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = description(problems=[Problem("it is torn", "page 3", "mend it")], next_step="read on")
    monkeypatch.setattr(mlcawq.inspection, "describe", lambda path: found)
    with pytest.raises(typer.Exit, match="1"):
        inspect(Path("there"))
    out = capsys.readouterr().out
    assert out.endswith("problems:\n  page 3: it is torn\n    -> mend it\n")
    assert "read on" not in out
    with pytest.raises(typer.Exit, match="1"):
        inspect(Path("there"), json_output=True)
    content = json.loads(capsys.readouterr().out)
    assert content["metadata"] == {"large": "object"}
    assert content["problems"] == [{"what": "it is torn", "where": "page 3", "fix": "mend it"}]
