"""Recipes are validated whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlcawq.errors import UserError
from mlcawq.quantize.integer import IntegerGrid
from mlcawq.quantize.recipe import (
    ActivationRecipe,
    CompensationRecipe,
    Override,
    Recipe,
    RotationRecipe,
    extended,
    load_recipe,
    parse_recipe,
    recipe_names,
    recipe_summary,
)


def test_shipped_recipes_say_what_the_code_defaults_to() -> None:
    assert {"awq", "awq+gptq", "gptq", "quarot", "rtn", "smooth-w8a8"} <= set(recipe_names())
    assert load_recipe("awq") == Recipe()
    compensated = CompensationRecipe()
    assert load_recipe("awq+gptq") == Recipe(name="awq+gptq", compensation=compensated)
    assert load_recipe("gptq") == Recipe(
        name="gptq", scale=None, clip=None, compensation=compensated
    )
    assert load_recipe("rtn") == Recipe(name="rtn", scale=None, clip=None)
    assert load_recipe("quarot") == Recipe(
        name="quarot", rotation=RotationRecipe(), scale=None, compensation=compensated
    )
    assert load_recipe("smooth-w8a8") == Recipe(
        name="smooth-w8a8",
        bits=8,
        group_size="channel",
        symmetric=True,
        clip=None,
        activations=ActivationRecipe(),
    )


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_tell_what_they_are(name: str) -> None:
    assert load_recipe(name).name == name
    assert len(recipe_summary(name)) > 20


def test_integers_of_a_linear() -> None:
    recipe = parse_recipe(
        {
            "overrides": [
                {"match": "down_proj$", "bits": 8, "group_size": "channel"},
                {"match": r"layers\.0\.", "symmetric": True},
            ],
            "modules_to_not_convert": ["lm_head", r"layers\.[01]\.self_attn"],
        }
    )
    assert recipe.grid_of("model.layers.1.mlp.up_proj", 256) == IntegerGrid(4, 128)
    assert recipe.grid_of("model.layers.1.mlp.down_proj", 256) == IntegerGrid(8, 256)
    assert recipe.grid_of("model.layers.0.mlp.down_proj", 256) == IntegerGrid(8, 256, True)
    kept = ["lm_head", "model.layers.1.self_attn.q_proj"]
    assert not any(map(recipe.converts, kept))
    assert recipe.converts("model.layers.2.self_attn.q_proj")


def test_patterns_are_checked() -> None:
    content = {"modules_to_not_convert": ["("], "overrides": [{"match": "*", "bits": 8}]}
    with pytest.raises(UserError) as caught:
        parse_recipe(content)
    assert str(caught.value).count("not a regular expression") == 2


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
    with pytest.raises(UserError, match=r"awq, awq\+gptq, .*rtn"):
        load_recipe("magic")


def test_a_bad_option_is_named_as_it_was_typed() -> None:
    with pytest.raises(UserError) as caught:
        load_recipe("awq", {"group_size": 48, "bits": 5})
    assert {problem.where for problem in caught.value.problems} == {"--group-size 48", "--bits 5"}


def test_lists_are_gone_on_with() -> None:
    recipe = parse_recipe({"modules_to_not_convert": ["lm_head"]})
    longer = extended(
        recipe,
        {
            "overrides": [{"match": "down_proj$", "bits": 8, "group_size": "channel"}],
            "modules_to_not_convert": ["q_proj"],
        },
    )
    assert longer.modules_to_not_convert == ("lm_head", "q_proj")
    assert longer.overrides == (Override(match="down_proj$", bits=8, group_size="channel"),)
    assert extended(recipe, {"overrides": [], "modules_to_not_convert": []}) == recipe


def test_bad_items_are_named_by_their_options() -> None:
    with pytest.raises(UserError) as caught:
        extended(
            Recipe(),
            {
                "overrides": [{"match": "a", "bits": 5}, {"match": "b", "group_size": 48}],
                "modules_to_not_convert": ["("],
            },
        )
    places = {problem.where for problem in caught.value.problems}
    assert places == {"--override a", "--override b", "--keep ("}
