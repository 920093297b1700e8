"""`mlcawq recipes`: the quantization recipes that are shipped."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(help="Print this recipe's YAML: a file to change and pass to --recipe."),
    ] = None,
    json_output: Annotated[
        bool, typer.Option("--json", help="One JSON document on stdout.")
    ] = False,
) -> None:
    """List the recipes of `mlcawq quantize --recipe`, and what each does."""
    from mlcawq.quantize.recipe import load_recipe, recipe_names, recipe_summary, recipe_text

    if name is not None:
        recipe = load_recipe(name)
        if json_output:
            print(recipe.model_dump_json(indent=2))
        else:
            print(recipe_text(name), end="")
        return
    summaries = {shipped: recipe_summary(shipped) for shipped in recipe_names()}
    if json_output:
        print(json.dumps(summaries, indent=2, ensure_ascii=False))
        return
    width = max(map(len, summaries))
    for shipped, summary in summaries.items():
        print(f"{shipped.ljust(width)}  {summary}")
