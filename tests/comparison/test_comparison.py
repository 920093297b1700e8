"""Putting reports side by side: order, differences, and what must not be compared blindly."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from made_up_reports import block, report

from mlcawq.comparison.page import comparison_page
from mlcawq.comparison.result import compare
from mlcawq.comparison.subjects import Subject, differences, read_subjects
from mlcawq.comparison.words import columns, shared_words
from mlcawq.errors import UserError
from mlcawq.quantize.recipe import load_recipe
from mlcawq.quantize.report import REPORT_FILE, Report


def _write(folder: Path, given: Report) -> Path:
    folder.mkdir(parents=True)
    (folder / REPORT_FILE).write_text(json.dumps(given.to_json()))
    return folder


def _subjects() -> list[Subject]:
    good = report()
    bad = report(
        recipe=load_recipe("rtn").model_dump(mode="json"),
        measured=replace(good.measured, kl=0.08),
        blocks=(block(0, error=0.02), block(1, error=0.06, found=0.1)),
    )
    return [Subject("bad", None, bad), Subject("good", None, good)]


def test_the_best_comes_first_and_differences_are_found() -> None:
    result = compare(_subjects())
    assert [row.name for row in result.rows] == ["good", "bad"]
    assert [row.recipe for row in result.rows] == ["awq", "rtn"]
    second = result.layers[1]
    assert second.errors == (0.02, 0.06)
    assert second.ratio == pytest.approx(3)
    kind = {one.where: one.errors for one in result.kinds}["mlp.up_proj"]
    assert kind == pytest.approx((0.05, math.sqrt((0.05**2 + 0.1**2) / 2)))
    assert result.recipes["name"] == ("awq", "rtn")
    assert "bits" not in result.recipes
    assert result.warnings == ()
    json.dumps(result.to_json(), allow_nan=False)


def test_what_is_alike_is_told_once() -> None:
    result = compare(_subjects())
    assert [column.title for column in columns(result)] == ["recipe", "KL, mnat/token"]
    assert "integers w4 g128" in shared_words(result)
    alone = compare(_subjects()[:1])
    assert "integers" in [column.title for column in columns(alone)]
    assert shared_words(alone) == ""


def test_a_report_without_numbers_comes_last() -> None:
    result = compare([Subject("bare", Path(), None), *_subjects()])
    assert [row.name for row in result.rows] == ["good", "bad", "bare"]
    assert result.layers[0].errors == (0.02, 0.02, None)
    assert result.recipes["name"] == ("awq", "rtn", None)


def test_other_models_and_texts_are_told() -> None:
    other = report(3, model="other/model", calibration={**report().calibration, "digest": "0"})
    subjects = [Subject("a", None, report()), Subject("b", None, other)]
    found = list(differences(subjects, measured=False))
    assert "of different models (a: acme/model (llama), b: other/model (llama))" in found
    assert any("numbers of layers" in line for line in found)
    assert any("different tokens" in line for line in found)
    assert not any("different tokens" in line for line in differences(subjects, measured=True))
    result = compare(subjects)
    assert result.layers[2].errors == (None, 0.02)
    assert result.layers[2].ratio == 1.0


def test_names_tell_folders_apart(tmp_path: Path) -> None:
    paths = [_write(tmp_path / name, report()) for name in ("x/awq", "y/awq", "y/rtn")]
    paths[2] /= REPORT_FILE
    names = [subject.name for subject in read_subjects(paths, measured=False)]
    assert names == ["x/awq", "y/awq", "rtn"]


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    good = _write(tmp_path / "good", report())
    bare = tmp_path / "bare"
    bare.mkdir()
    with pytest.raises(UserError) as caught:
        read_subjects([good, bare, tmp_path / "absent", good], measured=False)
    text = str(caught.value)
    assert f"no {REPORT_FILE} in it" in text
    assert "no such file or folder" in text
    assert "is named twice" in text
    assert len(caught.value.problems) == 3


def test_only_folders_can_be_measured(tmp_path: Path) -> None:
    folder = _write(tmp_path / "a", report())
    bare = tmp_path / "bare"
    bare.mkdir()
    assert read_subjects([folder, bare], measured=True)[1].report is None
    with pytest.raises(UserError, match="a report alone cannot be measured"):
        read_subjects([folder / REPORT_FILE], measured=True)


def test_the_page_stands_alone() -> None:
    page = comparison_page(compare(_subjects()))
    assert page.count("<svg") == 3
    assert "#0101" not in page
    assert "#0103" not in page
    assert ">good<" in page.replace("</text>", "<")
    assert "http" not in page.replace("http://www.w3.org", "")
