"""From a block's weights to integers: ranges, and rounding to nearest or compensated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from mlcawq.quantize.clipping import search_clipping
from mlcawq.quantize.compensation import aimed_at_original, round_compensated
from mlcawq.quantize.distributed import sum_
from mlcawq.quantize.integer import QuantizedWeight, full_range, quantize_weight
from mlcawq.quantize.recipe import CompensationRecipe
from mlcawq.quantize.report import Spread
from mlcawq.quantize.statistics import diagonal_blocks, inputs_of, token_weights
from mlcawq.quantize.workspace import Workspace


@dataclass(frozen=True)
class Original:
    """A block as it was, and what it is given in the original model, [B, T, hidden_size] each."""

    block: nn.Module
    hidden: Sequence[torch.Tensor]


def round_nearest(work: Workspace) -> dict[str, QuantizedWeight]:
    """Every active linear on its own, and installed."""
    rounded = {}
    for linear in work.active:
        weight = work.weight(linear)
        scale, zero = ranges(work, linear, weight, work.gram(linear))
        rounded[linear] = quantize_weight(weight, scale, zero, work.grids[linear])
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
    if clip is not None and not linear.endswith(clip.exclude):
        full = scale
        scale, zero = search_clipping(weight, gram, grid, clip)
        work.clip[linear] = Spread.of(scale / full)
    return scale, zero


def round_compensating(
    work: Workspace, recipe: CompensationRecipe, original: Original | None
) -> dict[str, QuantizedWeight]:
    """Round the linears in the order in which the block computes, and install them."""
    rounded: dict[str, QuantizedWeight] = {}
    before: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}
    if not recipe.true_sequential:
        before = {readers[0]: _moments(work, readers[0], original) for readers in work.readers}
    for readers in work.readers:
        found = before.pop(readers[0], None)
        moment, cross = found or _moments(work, readers[0], original)
        for linear in readers:
            weight, grid = work.weight(linear), work.grids[linear]
            if cross is not None:
                weight = aimed_at_original(weight, moment, cross, recipe)
            gram = diagonal_blocks(moment, grid.group_size)
            scale, zero = ranges(work, linear, weight, gram)
            rounded[linear] = round_compensated(weight, moment, scale, zero, grid, recipe)
        for linear in readers:
            work.install(linear, rounded[linear].dequantized())
    return {linear: rounded[linear] for linear in work.active}


def _moments(
    work: Workspace, linear: str, original: Original | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Sums over tokens, weighted, [K, K]: of x' x'^T with the inputs x' that the block as it is now
    gives to `linear`, and of x' x^T with the original model's x, scaled like x'.
    """
    weight = work.weight(linear)
    moment = weight.new_zeros(len(weight), len(weight))
    cross = None if original is None else torch.zeros_like(moment)
    for j, states in enumerate(work.hidden):
        inputs = inputs_of(work.linears[linear], partial(work.run, states))
        counted = (inputs * token_weights(work.targets[j], work.weighted).unsqueeze(1)).T
        moment.addmm_(counted, inputs)
        if original is not None and cross is not None:
            states = original.hidden[j]
            meant = inputs_of(
                original.block.get_submodule(linear),
                partial(original.block, states, **work.arguments(*states.shape[:2])),
            )
            if linear in work.input_scale:
                meant /= work.input_scale[linear]
            cross.addmm_(counted, meant)
    sum_(moment) if cross is None else sum_(moment, cross)
    return moment, cross
