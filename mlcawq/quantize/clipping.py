"""Clipping search: a narrower range rounds most weights more finely and a few large ones wrongly.

AWQ searches one factor for a group by the error of that group's share of the output, over a sample
of tokens. That error is a quadratic form, delta^T H delta, with delta the rounding error of the
group's G weights and H = sum over tokens of x x^T the Gram matrix of its inputs: so all tokens
count, at a cost that does not depend on their number.
"""

from __future__ import annotations

import torch

from mlcawq.quantize.integer import IntegerGrid, Part, chunks
from mlcawq.quantize.parallel import for_each
from mlcawq.quantize.recipe import ClipRecipe


def search_clipping(
    weight: torch.Tensor, gram: torch.Tensor, grid: IntegerGrid, recipe: ClipRecipe
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point [K/G, 1, N] of least error for every group of `weight`.

    weight: float32 [K, N]; gram: [K/G, G, G]. A group's full range is kept wherever no candidate
    is strictly better.
    """
    grouped = grid.grouped(weight)
    scale = torch.empty(grouped.shape[0], 1, grouped.shape[2])
    zero = torch.empty_like(scale)

    def work(part: Part) -> None:
        scale[part], zero[part] = _Search(grouped[part], gram[part[0]], grid).run(recipe)

    for_each(work, chunks(grouped.shape))
    return scale, zero


class _Search:
    """The best range of each group of one chunk [g, G, n], found candidate by candidate."""

    def __init__(self, weight: torch.Tensor, gram: torch.Tensor, grid: IntegerGrid) -> None:
        self._weight = weight.contiguous()
        self._gram = gram
        self._grid = grid
        self._delta = torch.empty_like(self._weight)
        self._product = torch.empty_like(self._weight)
        self._low = weight.amin(1, keepdim=True).clamp_(max=0)
        self._high = weight.amax(1, keepdim=True).clamp_(min=0)
        self._scale, self._zero = grid.parameters(self._low, self._high)
        self._error = self._error_of(self._scale, self._zero)
        # What is left of each side of the range, 1 being all of it.
        self._below = torch.ones_like(self._low)
        self._above = torch.ones_like(self._low)

    def run(self, recipe: ClipRecipe) -> tuple[torch.Tensor, torch.Tensor]:
        steps = [1 - i * recipe.max_shrink / recipe.grid for i in range(1, recipe.grid + 1)]
        if recipe.mode == "symmetric" or self._grid.symmetric:
            widest = torch.maximum(self._high, -self._low)
            for step in steps:
                limit = widest * step
                below = torch.minimum(limit / -self._low, torch.ones_like(limit))
                above = torch.minimum(limit / self._high, torch.ones_like(limit))
                self._try(below.nan_to_num_(1), above.nan_to_num_(1))
            return self._scale, self._zero
        for step in steps:
            self._try(torch.full_like(self._below, step), torch.full_like(self._above, step))
        # Each side by itself, around what both together found.
        pace = recipe.max_shrink / recipe.grid
        for _ in range(recipe.rounds):
            for side in (self._below, self._above):
                centre = side.clone()
                for offset in (-2, -1, 1, 2):
                    moved = (centre + offset * pace).clamp_(1 - recipe.max_shrink, 1)
                    if side is self._below:
                        self._try(moved, self._above.clone())
                    else:
                        self._try(self._below.clone(), moved)
        return self._scale, self._zero

    def _try(self, below: torch.Tensor, above: torch.Tensor) -> None:
        scale, zero = self._grid.parameters(self._low * below, self._high * above)
        error = self._error_of(scale, zero)
        better = error < self._error
        for kept, candidate in (
            (self._error, error),
            (self._scale, scale),
            (self._zero, zero),
            (self._below, below),
            (self._above, above),
        ):
            torch.where(better, candidate, kept, out=kept)

    def _error_of(self, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        self._grid.values_(self._weight, scale, zero, out=self._delta).sub_(self._weight)
        torch.bmm(self._gram, self._delta, out=self._product)
        return self._product.mul_(self._delta).sum(1, keepdim=True)
