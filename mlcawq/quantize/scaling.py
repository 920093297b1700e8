"""Search of AWQ's per-channel scales, and fusing them into the operation before.

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

from mlcawq.errors import UserError
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
    rounded: Sequence[bool],
    mean_abs: torch.Tensor,
    probe: Probe,
    grid: IntegerGrid,
    recipe: ScaleRecipe,
    *,
    shared: tuple[int, int, int] | None = None,
) -> Scaling:
    """The scale of least error for linears that read the same K channels.

    linears: their weights are float32, stored as [K, N] behind Linear.weight; they are as they
        were afterwards.
    rounded: which of them will be quantized.
    mean_abs: [K], mean magnitude of the inputs.
    shared: (outer, repeats, inner) with K = outer * repeats * inner where channels that differ in
        the middle index only must have one scale: with grouped-query attention, the query heads
        that read the same value head.

    Every second exponent is judged on a few tokens first; the best and their neighbours then on
    all. Not scaling at all is always among the candidates.
    """
    originals = [linear.weight.detach().T for linear in linears]
    scratch = [torch.empty_like(weight) for weight in originals]
    candidates = _Candidates(originals, mean_abs, grid, recipe, shared)

    def measure(scale: torch.Tensor, quick: bool) -> float:
        for linear, weight, buffer, active in zip(
            linears, originals, scratch, rounded, strict=True
        ):
            scaled_rounded_(weight, scale, grid if active else None, buffer)
            linear.weight = nn.Parameter(buffer.T, requires_grad=False)
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
        for linear, weight in zip(linears, originals, strict=True):
            linear.weight = nn.Parameter(weight.T, requires_grad=False)
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

    for_each(work, chunks(grouped.shape))
    return out


class _Candidates:
    """Scales by (kind, exponent index); "duo" divides by the weights' mean magnitude as well."""

    def __init__(
        self,
        weights: Sequence[torch.Tensor],
        mean_abs: torch.Tensor,
        grid: IntegerGrid,
        recipe: ScaleRecipe,
        shared: tuple[int, int, int] | None,
    ) -> None:
        self._grid = recipe.grid
        self._kinds = ("plain", "duo") if recipe.duo else ("plain",)
        self._activations = _merged(mean_abs, shared)
        self._weights = _merged(_relative_magnitude(weights, grid), shared)

    def coarse(self) -> list[tuple[str, int]]:
        return [(kind, i) for kind in self._kinds for i in range(0, self._grid, 2)]

    def around(self, keys: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
        near = {(kind, j) for kind, i in keys for j in (i - 1, i, i + 1) if 0 <= j < self._grid}
        return sorted(near - {("plain", 0)})  # which is not scaling

    def scale(self, key: tuple[str, int]) -> torch.Tensor:
        kind, i = key
        ratio = i / self._grid
        scale = self._activations.pow(ratio)
        if kind == "duo":
            scale = scale / (self._weights.pow(1 - ratio) + _TINY)
        scale = scale.clamp(min=_TINY)
        scale = scale / (scale.max() * scale.min()).sqrt()
        return scale.nan_to_num(nan=1.0, posinf=1.0, neginf=1.0)


def _relative_magnitude(weights: Sequence[torch.Tensor], grid: IntegerGrid) -> torch.Tensor:
    """[K]: mean over output channels of |w| relative to the largest of its group."""
    total = torch.zeros(weights[0].shape[0] // grid.group_size, grid.group_size)
    for weight in weights:
        for part, sums in zip(*_relative_sums(grid.grouped(weight)), strict=True):
            total[part[0]] += sums
    return total.flatten() / sum(weight.shape[1] for weight in weights)


def _relative_sums(grouped: torch.Tensor) -> tuple[list[Part], list[torch.Tensor]]:
    """The chunks of [K/G, G, N], and for each the sums over N of |w| / max |w| of its group."""

    def work(part: Part) -> torch.Tensor:
        magnitude = grouped[part].abs()
        magnitude /= magnitude.amax(1, keepdim=True) + 1e-6
        return magnitude.sum(2)

    parts = list(chunks(grouped.shape))
    return parts, for_each(work, parts)


def _merged(channels: torch.Tensor, shared: tuple[int, int, int] | None) -> torch.Tensor:
    if shared is None:
        return channels
    outer, repeats, inner = shared
    mean = channels.view(outer, repeats, inner).mean(1, keepdim=True)
    return mean.expand(outer, repeats, inner).reshape(-1)


def storable_scale(scale: torch.Tensor, norm: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale that dividing a float16 norm weight really applies, and that weight.

    norm / scale has to be rounded to float16. Taking norm / rounded for the scale in its place
    leaves no error at all: the function of norm and linears together is kept. Returns
    (scale, rounded norm), both float32 [K]; channels where that is impossible keep scale 1.
    """
    rounded = (norm / scale).to(torch.float16).float()
    exact = norm / rounded
    usable = torch.isfinite(exact) & torch.isfinite(rounded) & (exact > 0)
    return torch.where(usable, exact, torch.ones_like(exact)), torch.where(usable, rounded, norm)


def fuse_scale(
    previous: nn.Module,
    linears: Sequence[nn.Linear],
    scale: torch.Tensor,
    *,
    where: str,
    shared: tuple[int, int, int] | None = None,
) -> torch.Tensor:
    """Divide the output of `previous` by `scale` and multiply the columns of `linears` by it.

    Returns the scale that was applied. Raises UserError naming `where` when it is not finite.
    """
    if isinstance(previous, nn.Linear):
        rows = scale
        if shared is not None:
            rows = scale.view(*shared)[:, 0].reshape(-1)
        previous.weight.detach().div_(rows.unsqueeze(1))
        if previous.bias is not None:
            previous.bias.detach().div_(rows)
    else:
        norm: Any = previous
        scale, rounded = storable_scale(scale, norm.weight.detach())
        norm.weight = nn.Parameter(rounded, requires_grad=False)
    for linear in linears:
        linear.weight.detach().mul_(scale)
        if not torch.isfinite(linear.weight).all():
            raise UserError.one("scaling gave NaN or infinite weights", where)
    return scale
