"""Which linears of a model a recipe quantizes, and to what."""

from __future__ import annotations

from mlcawq.checkpoint.outline import Outline
from mlcawq.quantize.formats.base import LinearSpec
from mlcawq.quantize.recipe import Recipe


def linear_specs(outline: Outline, recipe: Recipe) -> dict[str, LinearSpec]:
    """Every linear within the blocks that is to be quantized, by the checkpoint's full name."""
    active = recipe.activations.bits if recipe.activations is not None else None
    return {
        name: LinearSpec(k, n, recipe.grid_of(name, k), active)
        for name, (k, n) in outline.all_quantizable().items()
        if recipe.converts(name)
    }
