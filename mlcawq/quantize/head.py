"""The output head, quantized after the blocks: slice by slice of the vocabulary.

It is one linear that reads the final norm, treated as those of a block are: AWQ's scale, folded
into the norm, ranges, and rounding, nearest or compensated. But it is several times as large as any
of them, so that nothing but its integers is ever there as a whole. The scale is judged by the
logits of a part of the vocabulary; everything else is done for each slice by itself, which changes
nothing, since each output channel has ranges and errors of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mlcawq.errors import UserError
from mlcawq.quantize.clipping import search_clipping
from mlcawq.quantize.compensation import Compensator
from mlcawq.quantize.distributed import total
from mlcawq.quantize.folding import fold_scale
from mlcawq.quantize.integer import IntegerGrid, QuantizedWeight, full_range, quantize_weight
from mlcawq.quantize.probes import ModuleProbe
from mlcawq.quantize.recipe import Recipe
from mlcawq.quantize.report import LinearReport, Spread
from mlcawq.quantize.scaling import search_scale
from mlcawq.quantize.states import shapes_of
from mlcawq.quantize.statistics import BlockStatistics, InputStatistics

_JUDGED_ROWS = 2048  # of the vocabulary, whose logits judge a scale
_JUDGED_TOKENS = 512
_SLICE = 1 << 24  # weights in a slice


@dataclass(frozen=True)
class HeadResult:
    """What became of the head.

    weight: its integers. norm: the final norm's state afterwards, by name, float32; empty where
        it is as it was. linear: for the report.
    """

    weight: QuantizedWeight
    norm: dict[str, torch.Tensor]
    linear: LinearReport


class Head:
    """A head to be quantized.

    name: of the linear, in full. vocabulary: its output channels. rows: reads its weights for given
    ones, int64 [n] -> float32 [n, K]. norm: the module before, with its weights, in float32.
    """

    def __init__(
        self,
        name: str,
        vocabulary: int,
        rows: Callable[[torch.Tensor], torch.Tensor],
        norm: nn.Module,
    ) -> None:
        self.name, self.vocabulary, self.rows = name, vocabulary, rows
        self.norm = copy.deepcopy(norm)


@torch.no_grad()
def quantize_head(head: Head, hidden: Sequence[torch.Tensor], recipe: Recipe) -> HeadResult:
    """Round a head for what the blocks give it on the calibration text.

    hidden: [B, T, K] each, what leaves the last block of the quantized model.
    Raises UserError where a weight or an activation is not finite.
    """
    sample = torch.linspace(0, head.vocabulary - 1, min(head.vocabulary, _JUDGED_ROWS))
    linear = _linear(_read(head, sample.round().long()))
    grid = recipe.grid_of(head.name, linear.in_features)
    seen = _observe(head, linear, hidden, grid, recipe)
    scale = _scale(head, linear, seen, grid, recipe)
    rounding = _Rounding(seen, scale, grid, recipe)
    step = max(256, _SLICE // linear.in_features)
    parts = [
        rounding.slice(_read(head, torch.arange(start, min(start + step, head.vocabulary))))
        for start in range(0, head.vocabulary, step)
    ]
    weight = QuantizedWeight(
        torch.cat([part.codes for part in parts], 1),
        torch.cat([part.scale for part in parts], 1),
        torch.cat([part.zero for part in parts], 1),
        grid,
    )
    changed = {} if scale is None else dict(head.norm.state_dict())
    return HeadResult(weight, changed, rounding.report(head.name, weight))


def _read(head: Head, rows: torch.Tensor) -> torch.Tensor:
    weights = head.rows(rows).float()
    if not torch.isfinite(weights).all():
        raise UserError.one("NaN or infinite weights", f"{head.name}.weight")
    return weights


def _linear(rows: torch.Tensor) -> nn.Linear:
    """A linear of these rows [n, K], stored as the searches want it (integer.py)."""
    linear = nn.Linear(rows.shape[1], rows.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(rows.T.contiguous().T, requires_grad=False)
    return linear


def _observe(
    head: Head,
    linear: nn.Linear,
    hidden: Sequence[torch.Tensor],
    grid: IntegerGrid,
    recipe: Recipe,
) -> InputStatistics:
    """Of the final norm's outputs; with compensation, of all channels together too."""
    K = linear.in_features
    gather = BlockStatistics(
        {head.name: linear},
        {head.name: {grid.group_size, *((K,) if recipe.compensation else ())}},
        total=sum(batch * tokens for batch, tokens in shapes_of(hidden)),
        sample=max(_JUDGED_TOKENS, recipe.scale.tokens if recipe.scale else 0),
        weighted=False,  # the norm has made all tokens alike
        where="the final norm",
    )
    for states in hidden:
        linear(head.norm(states))
        gather.take(states)
    return gather.finish()[head.name]


def _scale(
    head: Head, linear: nn.Linear, seen: InputStatistics, grid: IntegerGrid, recipe: Recipe
) -> torch.Tensor | None:
    """The scale [K] that was folded into the norm; None where there is none, or none helps."""
    if recipe.scale is None or getattr(head.norm, "weight", None) is None:
        return None
    sample = seen.sample.every(max(1, seen.sample.count // recipe.scale.tokens))
    probe = ModuleProbe(linear, sample)
    found = search_scale([linear], [grid], seen.mean_abs, probe, recipe.scale)
    if found.error >= found.unscaled:
        return None
    return fold_scale(head.norm, [linear], found.scale, where=head.name)


class _Rounding:
    """Slices of the head, one after another, and the sums of their errors."""

    def __init__(
        self,
        seen: InputStatistics,
        scale: torch.Tensor | None,
        grid: IntegerGrid,
        recipe: Recipe,
    ) -> None:
        self._grid, self._recipe, self._scale, self._seen = grid, recipe, scale, seen
        self._tokens = seen.tokens
        self._gram = self._scaled(seen.grams[grid.group_size])
        self._compensator: Compensator | None = None
        if recipe.compensation is not None:
            (moment,) = self._scaled(seen.grams[len(seen.mean_abs)])
            self._compensator = Compensator(moment, recipe.compensation)
        self._clips: list[torch.Tensor] = []
        self._squares = {"reference": 0.0, "nearest": 0.0, "found": 0.0}

    def _scaled(self, gram: torch.Tensor) -> torch.Tensor:
        """[K/G, G, G] of the inputs divided by the scale."""
        if self._scale is None:
            return gram
        scale = self._scale.view(gram.shape[0], -1)
        return gram / (scale.unsqueeze(1) * scale.unsqueeze(2))

    def slice(self, rows: torch.Tensor) -> QuantizedWeight:
        """Rows [n, K] of the head, quantized."""
        grid, recipe = self._grid, self._recipe
        original = rows.T.contiguous()
        weight = original if self._scale is None else original * self._scale.unsqueeze(1)
        scale, zero = full_range(weight, grid)
        if recipe.clip is not None:
            full = scale
            scale, zero = search_clipping(weight, self._gram, grid, recipe.clip)
            self._clips.append(scale / full)
        if self._compensator is not None:
            rounded = self._compensator.rounded(weight, scale, zero, grid)
        else:
            rounded = quantize_weight(weight, scale, zero, grid)
        nearest = quantize_weight(original, *full_range(original, grid), grid).dequantized()
        found = rounded.dequantized()
        if self._scale is not None:
            found /= self._scale.unsqueeze(1)
        for key, value in (
            ("reference", original),
            ("nearest", nearest - original),
            ("found", found - original),
        ):
            product = self._tokens @ value
            self._squares[key] += float(product.square().sum(dtype=torch.float64))
        return rounded

    def report(self, name: str, weight: QuantizedWeight) -> LinearReport:
        """Of all slices."""
        sums: dict[str, Any] = {key: total(value) for key, value in self._squares.items()}
        size = sums["reference"] or 1.0
        size_of_groups = weight.grid.group_size
        return LinearReport(
            name,
            (sums["nearest"] / size) ** 0.5,
            (sums["found"] / size) ** 0.5,
            bits=weight.grid.bits,
            group_size="channel" if size_of_groups == len(weight.codes) else size_of_groups,
            symmetric=weight.grid.symmetric,
            weights=weight.codes.numel(),
            scale=None if self._scale is None else Spread.of(self._scale),
            clip=Spread.of(torch.cat(self._clips, 2)) if self._clips else None,
            tokens=self._seen.seen,
        )
