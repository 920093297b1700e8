"""Recipes are validated whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlcawq.errors import UserError
from mlcawq.quantize.recipe import Recipe, load_recipe, recipe_names


def test_shipped_recipes_say_what_the_code_defaults_to() -> None:
    assert recipe_names() == ["awq", "awq+gptq", "gptq", "rtn"]
    assert load_recipe("awq") == Recipe()
    assert load_recipe("awq+gptq") == Recipe(method="awq+gptq")
    assert load_recipe("gptq") == Recipe(method="gptq")
    assert load_recipe("rtn").method == "rtn"


def test_overrides_and_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("group_size: 64\nclip: null\n")
    recipe = load_recipe(str(path), {"bits": 3})
    assert (recipe.bits, recipe.group_size, recipe.clip) == (3, 64, None)


def test_every_bad_key_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("bits: 5\nscale: {grid: 0}\ncolour: red\n")
    with pytest.raises(UserError) as caught:
        load_recipe(str(path))
    text = str(caught.value)
    assert len(caught.value.problems) == 3
    assert all(key in text for key in ("bits", "scale.grid", "colour"))


@pytest.mark.parametrize("content", ["- 1\n", "a: [\n"])
def test_not_a_recipe(tmp_path: Path, content: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(UserError):
        load_recipe(str(path))


def test_unknown_recipe_lists_the_known() -> None:
    with pytest.raises(UserError, match=r"awq, awq\+gptq, gptq, rtn"):
        load_recipe("magic")


def test_a_bad_option_is_named_as_it_was_typed() -> None:
    with pytest.raises(UserError) as caught:
        load_recipe("awq", {"group_size": 48, "bits": 5})
    assert {problem.where for problem in caught.value.problems} == {"--group-size 48", "--bits 5"}
