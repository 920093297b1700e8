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
    scale = weight.new_empty(grouped.shape[0], 1, grouped.shape[2])
    zero = torch.empty_like(scale)

    def work(part: Part) -> None:
        scale[part], zero[part] = _Search(grouped[part], gram[part[0]], grid).run(recipe)

    for_each(work, chunks(grouped))
    return scale, zero


class _Search:
    """The best range of each group of one chunk [g, G, n], found candidate by candidate."""

    def __init__(self, weight: torch.Tensor, gram: torch.Tensor, grid: IntegerGrid) -> None:
        self._weight = weight.contiguous()
        self._gram = gram
        self._grid = grid
        self._delta = torch.empty_like(self._weight)
        self._product = torch.empty_like(self._weight)
        # The full range of each group, and the best found so far.
        self._full = (
            weight.amin(1, keepdim=True).clamp_(max=0),
            weight.amax(1, keepdim=True).clamp_(min=0),
        )
        self._best = [end.clone() for end in self._full]
        self._scale, self._zero = grid.parameters(*self._full)
        self._error = self._error_of(self._scale, self._zero)

    def run(self, recipe: ClipRecipe) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = self._full
        pace = recipe.max_shrink / recipe.grid
        steps = [1 - i * pace for i in range(1, recipe.grid + 1)]
        if recipe.mode == "symmetric" or self._grid.symmetric:
            widest = torch.maximum(high, -low)
            for step in steps:
                limit = widest * step
                self._try(torch.maximum(low, -limit), torch.minimum(high, limit))
            return self._scale, self._zero
        for step in steps:
            self._try(low * step, high * step)
        # Each end by itself, around what both together found.
        for _ in range(recipe.rounds):
            for end in (0, 1):
                centre, other = self._best[end].clone(), self._best[1 - end].clone()
                narrowest = self._full[end] * (1 - recipe.max_shrink)
                bounds = (self._full[end], narrowest) if end == 0 else (narrowest, self._full[end])
                for offset in (-2, -1, 1, 2):
                    moved = (centre + offset * pace * self._full[end]).clamp_(*bounds)
                    self._try(*((moved, other) if end == 0 else (other, moved)))
        return self._scale, self._zero

    def _try(self, low: torch.Tensor, high: torch.Tensor) -> None:
        scale, zero = self._grid.parameters(low, high)
        error = self._error_of(scale, zero)
        better = error < self._error
        for kept, candidate in (
            (self._error, error),
            (self._scale, scale),
            (self._zero, zero),
            (self._best[0], low),
            (self._best[1], high),
        ):
            torch.where(better, candidate, kept, out=kept)

    def _error_of(self, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        self._grid.values_(self._weight, scale, zero, out=self._delta).sub_(self._weight)
        torch.bmm(self._gram, self._delta, out=self._product)
        return self._product.mul_(self._delta).sum(1, keepdim=True)
