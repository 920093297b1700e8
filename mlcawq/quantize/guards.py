"""What is done where numbers overflow: simpler steps instead of the end of hours of work.

A linear whose search gives no finite result is left by that one step. Where a block as a whole
does not give finite outputs, it is quantized again from its original weights with one kind of step
less each time, down to plain rounding. Every retreat is told by a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

from torch import nn

from mlcawq.errors import UserError
from mlcawq.quantize.recipe import Recipe

Result = TypeVar("Result")

# What may be left out, in this order, and what it is called.
_PARTS = {
    "learning": "learning",
    "compensation": "compensated rounding",
    "scale": "scales",
    "clip": "narrower ranges",
}


class NotFiniteError(UserError):
    """A search or a quantized block gave NaN or infinity."""


def simpler(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """What is left out of a recipe, and what remains, one step more each time."""
    for field, name in _PARTS.items():
        if getattr(recipe, field, None) is not None:
            recipe = recipe.model_copy(update={field: None})
            yield name, recipe


def quantize_guarded(
    block: nn.Module,
    load: Callable[[], nn.Module],
    recipe: Recipe,
    quantize: Callable[[nn.Module, Recipe], Result],
    where: str,
) -> tuple[nn.Module, Result, tuple[str, ...]]:
    """The quantized block, what `quantize` made of it, and warnings.

    block: with its original weights. load: the same once more. quantize: changes a block by a
    recipe. where: its name.
    Raises UserError naming the block where not even rounding to nearest is finite.
    """
    warnings: list[str] = []
    rest = simpler(recipe)
    while True:
        try:
            return block, quantize(block, recipe), tuple(warnings)
        except NotFiniteError as error:
            left_out, recipe = next(rest, (None, recipe))
            if left_out is None:
                raise UserError.one(
                    f"not even rounding to nearest gives finite outputs ({error})",
                    where,
                    f"leave this block as it is: --keep '{where}'",
                ) from error
            warnings.append(f"{error}; done again without {left_out}")
            block = load()
