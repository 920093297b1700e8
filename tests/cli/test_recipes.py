"""`mlcawq recipes`: what is listed, and files that quantize takes again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlcawq.cli.recipes import recipes
from mlcawq.errors import UserError
from mlcawq.quantize.recipe import load_recipe, recipe_names


def test_every_recipe_is_listed_and_explained(capsys: pytest.CaptureFixture[str]) -> None:
    recipes()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == recipe_names()
    assert all(len(line.split()) > 5 for line in lines)
    recipes(json_output=True)
    assert list(json.loads(capsys.readouterr().out)) == recipe_names()


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_comes_back_as_a_file(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipes(name)
    copy = tmp_path / "mine.yaml"
    copy.write_text(capsys.readouterr().out)
    assert load_recipe(str(copy)) == load_recipe(name)
    recipes(name, json_output=True)
    assert json.loads(capsys.readouterr().out)["name"] == name


def test_an_unknown_one() -> None:
    with pytest.raises(UserError, match=r"no recipe 'aqw'"):
        recipes("aqw")
