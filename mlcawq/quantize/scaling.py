"""Search of AWQ's per-channel scales.

AWQ (arXiv 2306.00978, section 3.2): multiplying an input channel of a linear by s > 1 before
rounding, and its activations by 1/s, keeps the function and makes the channel's rounding error
smaller. Channels with large activations deserve it; how much is found by trying exponents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from mlcawq.quantize.integer import IntegerGrid, Part, chunks
from mlcawq.quantize.parallel import for_each
from mlcawq.quantize.recipe import ScaleRecipe

_FINALISTS = 2
_TINY = 1e-4


class Probe(Protocol):
    """Measures how far a module's output is from that of the original weights."""

    def error(self, scale: torch.Tensor, *, quick: bool) -> float:
        """The error now, the module's inputs being divided by `scale` [K]. quick: fewer tokens."""


@dataclass(frozen=True)
class Scaling:
    """scale: [K], 1 where nothing is scaled. error and unscaled: relative, of the probe."""

    scale: torch.Tensor
    error: float
    unscaled: float


def search_scale(
    linears: Sequence[nn.Linear],
    grids: Sequence[IntegerGrid | None],
    mean_abs: torch.Tensor,
    probe: Probe,
    recipe: ScaleRecipe,
    *,
    rows: torch.Tensor | None = None,
    also: Sequence[nn.Module] = (),
) -> Scaling:
    """The scale of least error for linears that read the same K channels.

    linears: their weights are float32, stored as [K, N] behind Linear.weight; they are as they
        were afterwards.
    grids: of each linear, None where it will not be quantized.
    mean_abs: [K], mean magnitude of the inputs.
    rows: int64 [K]; channels of one row must have one scale (folding.channel_rows).
    also: other readers of the channels, with a weight [N, K], which are scaled and not judged.

    Every second exponent is judged on a few tokens first; the best and their neighbours then on
    all. Not scaling at all is always among the candidates.
    """
    candidates = _Candidates(
        [linear.weight.detach().T for linear in linears], grids, mean_abs, recipe, rows
    )
    readers: list[Any] = [*linears, *also]
    grids = [*grids, *(None for _ in also)]
    originals = [reader.weight.detach().T for reader in readers]
    scratch = [torch.empty_like(weight) for weight in originals]

    def measure(scale: torch.Tensor, quick: bool) -> float:
        for reader, weight, buffer, grid in zip(readers, originals, scratch, grids, strict=True):
            scaled_rounded_(weight, scale, grid, buffer)
            reader.weight = nn.Parameter(buffer.T, requires_grad=False)
        return probe.error(scale, quick=quick)

    try:
        ones = torch.ones_like(mean_abs)
        quick = {key: measure(candidates.scale(key), True) for key in candidates.coarse()}
        best = sorted(quick, key=quick.__getitem__)[:_FINALISTS]
        unscaled = measure(ones, False)
        error, chosen = unscaled, ones
        for key in candidates.around(best):
            scale = candidates.scale(key)
            found = measure(scale, False)
            if found < error:
                error, chosen = found, scale
    finally:
        for reader, weight in zip(readers, originals, strict=True):
            reader.weight = nn.Parameter(weight.T, requires_grad=False)
    return Scaling(chosen, error, unscaled)


def scaled_rounded_(
    weight: torch.Tensor, scale: torch.Tensor, grid: IntegerGrid | None, out: torch.Tensor
) -> torch.Tensor:
    """weight [K, N] times scale [K] by rows, rounded to nearest on `grid` (None: not), in `out`."""
    if grid is None:
        return torch.mul(weight, scale.unsqueeze(1), out=out)
    grouped, result = grid.grouped(weight), grid.grouped(out)
    rows = scale.view(-1, grid.group_size, 1)

    def work(part: Part) -> None:
        scaled = grouped[part] * rows[part[0]]
        low, high = scaled.amin(1, keepdim=True), scaled.amax(1, keepdim=True)
        lattice, zero = grid.parameters(low, high)
        grid.values_(scaled, lattice, zero, out=result[part])

    for_each(work, chunks(grouped))
    return out


class _Candidates:
    """Scales by (formula, exponent index); see ScaleRecipe."""

    def __init__(
        self,
        weights: Sequence[torch.Tensor],
        grids: Sequence[IntegerGrid | None],
        mean_abs: torch.Tensor,
        recipe: ScaleRecipe,
        rows: torch.Tensor | None,
    ) -> None:
        self._grid = recipe.grid
        self._formulas = ("v2", "v1") if recipe.formula == "both" else (recipe.formula,)
        self._activations = _merged(mean_abs, rows)
        self._weights = _merged(_relative_magnitude(weights, grids), rows)

    def coarse(self) -> list[tuple[str, int]]:
        return [(formula, i) for formula in self._formulas for i in range(0, self._grid, 2)]

    def around(self, keys: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
        near = {
            (formula, j) for formula, i in keys for j in (i - 1, i, i + 1) if 0 <= j < self._grid
        }
        return sorted(near - {("v2", 0)})  # which is not scaling

    def scale(self, key: tuple[str, int]) -> torch.Tensor:
        formula, i = key
        ratio = i / self._grid
        scale = self._activations.pow(ratio)
        if formula == "v1":
            scale = scale / (self._weights.pow(1 - ratio) + _TINY)
        scale = scale.clamp(min=_TINY)
        scale = scale / (scale.max() * scale.min()).sqrt()
        return scale.nan_to_num(nan=1.0, posinf=1.0, neginf=1.0)


def _relative_magnitude(
    weights: Sequence[torch.Tensor], grids: Sequence[IntegerGrid | None]
) -> torch.Tensor:
    """[K]: mean over output channels of |w| relative to the largest of its group.

    Linears that are not quantized have no groups of their own, and count by those of the first
    that is.
    """
    usual = next(grid for grid in grids if grid is not None)
    total = weights[0].new_zeros(weights[0].shape[0])
    for weight, grid in zip(weights, grids, strict=True):
        grouped = (grid or usual).grouped(weight)
        sums_of = total.view(grouped.shape[:2])
        for part, sums in zip(*_relative_sums(grouped), strict=True):
            sums_of[part[0]] += sums
    return total / sum(weight.shape[1] for weight in weights)


def _relative_sums(grouped: torch.Tensor) -> tuple[list[Part], list[torch.Tensor]]:
    """The chunks of [K/G, G, N], and for each the sums over N of |w| / max |w| of its group."""

    def work(part: Part) -> torch.Tensor:
        magnitude = grouped[part].abs()
        magnitude /= magnitude.amax(1, keepdim=True) + 1e-6
        return magnitude.sum(2)

    parts = list(chunks(grouped))
    return parts, for_each(work, parts)


def _merged(channels: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """[K]: the mean over the channels that share a row, for each of them."""
    if rows is None:
        return channels
    _, row, count = rows.unique(return_inverse=True, return_counts=True)
    sums = channels.new_zeros(len(count)).index_add_(0, row, channels)
    return (sums / count)[row]
