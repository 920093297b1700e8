"""From a block's weights to integers: ranges, and rounding to nearest or compensated."""

from __future__ import annotations

import torch

from mlcawq.quantize.clipping import search_clipping
from mlcawq.quantize.compensation import Compensator
from mlcawq.quantize.integer import QuantizedWeight, full_range, quantize_weight
from mlcawq.quantize.moments import Moments, Original, gather_moments, readers_at_once
from mlcawq.quantize.recipe import CompensationRecipe
from mlcawq.quantize.report import Spread
from mlcawq.quantize.statistics import diagonal_blocks
from mlcawq.quantize.workspace import Workspace


def round_nearest(work: Workspace) -> dict[str, QuantizedWeight]:
    """Every active linear on its own, and installed."""
    rounded = {}
    for linear in work.active:
        weight = work.weight(linear)
        scale, zero = ranges(work, linear, weight, work.gram(linear))
        grid = work.grids[linear]
        rounded[linear] = quantize_weight(weight, scale, zero, grid)
        if work.recipe.learning is not None:
            position = torch.addcmul(zero, grid.grouped(weight), scale.reciprocal())
            work.positions[linear] = position.view_as(weight)
    for linear, quantized in rounded.items():
        work.install(linear, quantized.dequantized())
    return rounded


def ranges(
    work: Workspace, linear: str, weight: torch.Tensor, gram: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point [K/G, 1, N] of every group of `weight` [K, N], by the recipe.

    gram: [K/G, G, G], of the inputs that `weight` takes.
    """
    clip, grid = work.recipe.clip, work.grids[linear]
    scale, zero = full_range(weight, grid)
    if clip is not None and not torch.isfinite(gram).all():
        work.warnings.append(f"{linear}: its inputs overflow when squared; full ranges are kept")
        return scale, zero
    if clip is not None and not linear.endswith(clip.exclude):
        full = scale
        scale, zero = search_clipping(weight, gram, grid, clip)
        work.clip[linear] = Spread.of(scale / full)
    return scale, zero


def _usable(
    work: Workspace, reader: str, moment: torch.Tensor, cross: torch.Tensor | None
) -> Moments:
    """The moments of a reader's inputs, or, where they overflow, those of inputs that have nothing
    to do with each other: whatever reads them is rounded to nearest.
    """
    if torch.isfinite(moment).all() and (cross is None or torch.isfinite(cross).all()):
        return moment, cross
    names = ", ".join(work.readers_of(reader))
    work.warnings.append(f"{names}: inputs overflow when squared; rounded to nearest")
    return torch.eye(len(moment), device=moment.device), None


def round_compensating(
    work: Workspace, recipe: CompensationRecipe, original: Original | None
) -> dict[str, QuantizedWeight]:
    """Round the linears in the order in which the block computes, and install them."""
    rounded: dict[str, QuantizedWeight] = {}
    batches = readers_at_once(work)
    before: dict[str, Moments] = {}
    if not recipe.true_sequential:
        for batch in batches:
            before |= gather_moments(work, batch, original)
    for batch in batches:
        found = before or gather_moments(work, batch, original)
        for reader in batch:
            moment, cross = _usable(work, reader, *found.pop(reader))
            compensator = Compensator(moment, recipe)
            missing = None if cross is None else cross.sub_(moment)
            for linear in work.readers_of(reader):
                weight, grid = work.weight(linear), work.grids[linear]
                if missing is not None:
                    weight = compensator.aimed(weight, missing)
                gram = diagonal_blocks(moment, grid.group_size)
                scale, zero = ranges(work, linear, weight, gram)
                position = torch.empty_like(weight) if work.recipe.learning else None
                rounded[linear] = compensator.rounded(weight, scale, zero, grid, position)
                if position is not None:
                    work.positions[linear] = position
        for linear in [linear for reader in batch for linear in work.readers_of(reader)]:
            work.install(linear, rounded[linear].dequantized())
    return {linear: rounded[linear] for linear in work.active}
