"""Which linears of a model a recipe quantizes, and to what."""

from __future__ import annotations

from torch import nn

from mlcawq.checkpoint.outline import Outline
from mlcawq.families import Architecture
from mlcawq.quantize.formats.base import LinearSpec
from mlcawq.quantize.recipe import Recipe


def linear_specs(outline: Outline, recipe: Recipe) -> dict[str, LinearSpec]:
    """Every linear that is to be quantized, by the checkpoint's full name, the head last."""
    active = recipe.activations.bits if recipe.activations is not None else None
    shapes = {
        name: shape for name, shape in outline.all_quantizable().items() if recipe.converts(name)
    }
    if recipe.head:
        source = outline.names.source_of(f"{outline.skeleton.head}.weight")
        if source is not None:  # a missing one is a problem of its own
            vocabulary, width = outline.reader.info(source).shape
            shapes[head_name(outline)] = (width, vocabulary)
    return {
        name: LinearSpec(k, n, recipe.grid_of(name, k), active) for name, (k, n) in shapes.items()
    }


def head_name(outline: Outline) -> str:
    """What the checkpoint calls the output head, or would where it is tied to the embedding."""
    return outline.names.stored_name(outline.skeleton.head)


def final_norm(outline: Outline, table: Architecture) -> nn.Module | None:
    """The norm between the last block and the head; None where there is none of that name."""
    try:
        return outline.skeleton.model.get_submodule(table.final_norm)
    except AttributeError:
        return None
