"""`mlcawq repack`: what is printed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from quantized_folders import make_quantized_folder

from mlcawq.cli.repack import repack
from mlcawq.errors import UserError


def test_a_line_or_a_document(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = make_quantized_folder(tiny_llama, tmp_path / "m", "awq")
    repack(str(folder), tmp_path / "gemv", "awq-gemv")
    shown = capsys.readouterr().out
    assert shown.startswith("14 linears from awq to awq-gemv, ")
    assert shown.endswith(f"written to {tmp_path / 'gemv'}\n")
    repack(str(tmp_path / "gemv"), tmp_path / "awq", "awq", json_output=True)
    found = json.loads(capsys.readouterr().out)
    assert found["output"] == str(tmp_path / "awq")
    assert (found["source"], found["format"], found["linears"]) == ("awq-gemv", "awq", 14)


def test_a_format_that_is_none_is_told_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no format 'exl2'"):
        repack("org/a-model-that-is-nowhere", tmp_path / "out", "exl2")
