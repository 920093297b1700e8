"""One decoder block: original weights and calibration inputs in, integers out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from mlcawq.families import ScalingGroup
from mlcawq.quantize.balancing import balance
from mlcawq.quantize.distributed import total
from mlcawq.quantize.guards import NotFiniteError
from mlcawq.quantize.integer import QuantizedWeight
from mlcawq.quantize.learning import learn
from mlcawq.quantize.recipe import Recipe
from mlcawq.quantize.report import LinearReport, Spread
from mlcawq.quantize.rounding import Original, round_compensating, round_nearest
from mlcawq.quantize.states import HiddenStates
from mlcawq.quantize.workspace import Arguments, Workspace


@dataclass(frozen=True)
class BlockResult:
    """What became of a block.

    weights: the quantized linears by their names in the block.
    changed: other tensors that are no longer the checkpoint's (norms and biases that took a
        scale), float32, by name in the block.
    outputs: hidden states that the next block is calibrated on.
    linears: of every quantized linear, in the order of the family's table.
    error: relative error |h' - h| / |h| of the block's output, on its calibration inputs.
    warnings: what the user should know of it.
    """

    weights: dict[str, QuantizedWeight]
    changed: dict[str, torch.Tensor]
    outputs: HiddenStates | list[torch.Tensor]
    linears: list[LinearReport]
    error: float
    warnings: tuple[str, ...] = ()


@torch.no_grad()
def quantize_block(
    block: nn.Module,
    hidden: Sequence[torch.Tensor],
    arguments: Arguments,
    groups: Sequence[ScalingGroup],
    recipe: Recipe,
    *,
    name: str,
    full_name: Callable[[str], str],
    head_dim: int,
    original: Original | None = None,
) -> BlockResult:
    """Search and round the linears of `block`, which is changed in place and computes the result.

    block, hidden, arguments, groups, name, full_name: see Workspace.
    original: the block again, which stays as it is, and its inputs in the original model, batches
        like those of `hidden`; wanted by recipes that follow it (`Recipe.follows_original`).

    Raises UserError naming the layer where a weight or an activation is not finite, NotFiniteError
    where the quantized block gives what is not.
    """
    work = Workspace(block, hidden, arguments, groups, recipe, name, full_name)
    before = {key: value.clone() for key, value in work.other_tensors()}
    unquantized = {linear: _Unquantized(work, linear) for linear in work.active}

    if recipe.scale is not None:
        balance(work, recipe.scale, head_dim)
    if recipe.compensation is not None:
        weights = round_compensating(work, recipe.compensation, original)
    else:
        weights = round_nearest(work)
    if recipe.learning is not None:
        weights = learn(work, weights, recipe.learning, original)

    linears = [
        unquantized[linear].compared(work, linear, weight) for linear, weight in weights.items()
    ]
    error, outputs = _propagate(work)
    changed = {
        key: value for key, value in work.other_tensors() if not torch.equal(value, before[key])
    }
    return BlockResult(weights, changed, outputs, linears, error, _warnings(work))


def _warnings(work: Workspace) -> tuple[str, ...]:
    neglected = (
        f"{expert}: saw {seen} calibration tokens; searched on tokens of the other experts too"
        for expert, seen in work.neglected.items()
    )
    return (*neglected, *work.warnings)


class _Unquantized:
    """What a linear gave on a sample of tokens before anything was done to the block."""

    def __init__(self, work: Workspace, linear: str) -> None:
        self._reference = work.product(linear)
        weight, grid = work.weight(linear), work.grids[linear]
        rounded = torch.empty_like(weight)
        grid.round_to_nearest_(grid.grouped(weight), grid.grouped(rounded))
        self._nearest = _relative(work.tokens(linear, rounded=True) @ rounded, self._reference)

    def compared(self, work: Workspace, linear: str, weight: QuantizedWeight) -> LinearReport:
        """What it gives now, stored as `weight`."""
        grid, scale = weight.grid, work.input_scale.get(linear)
        return LinearReport(
            linear,
            self._nearest,
            _relative(work.product(linear, rounded=True), self._reference),
            bits=grid.bits,
            group_size="channel" if grid.group_size == len(weight.codes) else grid.group_size,
            symmetric=grid.symmetric,
            weights=weight.codes.numel(),
            scale=None if scale is None else Spread.of(scale),
            clip=work.clip.get(linear),
            tokens=work.seen_by(linear).seen,
        )


def _propagate(work: Workspace) -> tuple[float, HiddenStates | list[torch.Tensor]]:
    """Relative error of the block's outputs, and what the next block is calibrated on."""
    if work.recipe.propagate == "original":
        return _finite(work.error(), work), work.targets
    difference = norm = 0.0
    for j, states in enumerate(work.hidden):
        output, target = work.run(states), work.targets[j]
        difference += float((output - target).square().sum(dtype=torch.float64))
        norm += float(target.square().sum(dtype=torch.float64))
        work.targets[j] = output  # the original one is not wanted any more
    error = (total(difference) / max(total(norm), 1e-300)) ** 0.5
    return _finite(error, work), work.targets


def _finite(error: float, work: Workspace) -> float:
    # The same on all ranks, and float64 does not overflow: it is an output that is not finite.
    if not math.isfinite(error):
        raise NotFiniteError.one("the quantized block gives NaN or infinity", work.name)
    return error


def _relative(found: torch.Tensor, reference: torch.Tensor) -> float:
    difference, size = total(_squares(found - reference)), total(_squares(reference))
    return (difference / size) ** 0.5 if size else 0.0


def _squares(values: torch.Tensor) -> float:
    return float(values.square().sum(dtype=torch.float64))
