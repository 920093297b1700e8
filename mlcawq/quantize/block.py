"""One decoder block: original weights and calibration inputs in, integers out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from mlcawq.errors import UserError
from mlcawq.families import Family, ScalingGroup
from mlcawq.quantize.clipping import search_clipping
from mlcawq.quantize.compensation import aimed_at_original, round_compensated
from mlcawq.quantize.integer import IntegerGrid, QuantizedWeight, full_range, quantize_weight
from mlcawq.quantize.probes import ModuleProbe, SumProbe, mixes_tokens
from mlcawq.quantize.recipe import Recipe
from mlcawq.quantize.scaling import Probe, fuse_scale, search_scale
from mlcawq.quantize.statistics import (
    BlockStatistics,
    InputStatistics,
    diagonal_blocks,
    inputs_of,
    token_weights,
)

Arguments = Callable[[int, int], dict[str, Any]]
_PROBE_LENGTH = 256  # tokens of each sequence that judges an attention
_JUDGED_TOKENS = 512  # that reported errors are measured on, at least


@dataclass(frozen=True)
class LinearError:
    """Relative output errors |Y' - Y| / |Y| of one linear, Y = X W, on calibration tokens X.

    nearest: the original weight rounded to nearest. found: what is stored, scales undone.
    """

    name: str
    nearest: float
    found: float


@dataclass(frozen=True)
class BlockResult:
    """What became of a block.

    weights: the quantized linears by their names in the block.
    changed: other tensors that are no longer the checkpoint's (norms and biases that took a
        scale), float32, by name in the block.
    outputs: hidden states that the next block is calibrated on.
    errors: of every quantized linear, in the order of the family's table.
    error: relative error |h' - h| / |h| of the block's output, on its calibration inputs.
    """

    weights: dict[str, QuantizedWeight]
    changed: dict[str, torch.Tensor]
    outputs: list[torch.Tensor]
    errors: list[LinearError]
    error: float


@torch.no_grad()
def quantize_block(
    block: nn.Module,
    hidden: Sequence[torch.Tensor],
    arguments: Arguments,
    family: Family,
    recipe: Recipe,
    *,
    name: str,
    head_dim: int,
    original: Sequence[torch.Tensor] | None = None,
) -> BlockResult:
    """Search and round the linears of `block`, which is changed in place and computes the result.

    block: a decoder layer of transformers in float32.
    hidden: its calibration inputs, [B, T, hidden_size] each.
    arguments: keyword arguments of the layer for a batch and a number of tokens.
    name: full name in the checkpoint, for messages and for `recipe.modules_to_not_convert`.
    original: what the block is given in the original model, like `hidden`; wanted by recipes that
        follow it (`Recipe.follows_original`).

    Raises UserError naming the layer where a weight or an activation is not finite.
    """
    quantizer = _BlockQuantizer(block, hidden, arguments, family, recipe, name, head_dim)
    return quantizer.run(original)


@dataclass(frozen=True)
class _Original:
    """A block as it was, and what it is given in the original model, [B, T, hidden_size] each."""

    block: nn.Module
    hidden: Sequence[torch.Tensor]


class _BlockQuantizer:
    def __init__(
        self,
        block: nn.Module,
        hidden: Sequence[torch.Tensor],
        arguments: Arguments,
        family: Family,
        recipe: Recipe,
        name: str,
        head_dim: int,
    ) -> None:
        self.block, self.hidden, self.arguments = block, hidden, arguments
        self.family, self.recipe = family, recipe
        self.name, self.head_dim = name, head_dim
        self.grid = IntegerGrid(recipe.bits, recipe.group_size, recipe.symmetric)
        for key, value in block.state_dict().items():
            if not torch.isfinite(value).all():
                raise UserError.one("NaN or infinite weights", f"{name}.{key}")
        self.linears: dict[str, nn.Linear] = {}
        for linear in family.linears:
            module = block.get_submodule(linear)
            assert isinstance(module, nn.Linear)
            # [K, N] storage behind torch's [N, K]: what the searches work on (integer.py).
            stored = module.weight.detach().T.contiguous()
            module.weight = nn.Parameter(stored.T, requires_grad=False)
            self.linears[linear] = module
        self.active = [linear for linear in self.linears if recipe.converts(f"{name}.{linear}")]
        # What the linears' inputs are divided by and their outputs are to be multiplied by.
        self.input_scale: dict[str, torch.Tensor] = {}
        self.output_scale: dict[str, torch.Tensor] = {}
        self.statistics: dict[str, InputStatistics] = {}

    def run(self, original: Sequence[torch.Tensor] | None) -> BlockResult:
        clean = None
        if self.recipe.follows_original:
            assert original is not None
            clean = _Original(deepcopy(self.block), original)
        before = {key: value.clone() for key, value in self._other_tensors()}
        targets = self._observe()
        references = {linear: self._product(linear) for linear in self.active}
        nearest = {linear: self._nearest(linear, references[linear]) for linear in self.active}

        if self.recipe.searches and self.recipe.scale is not None:
            for group in self.family.groups:
                self._scale(group)
        if self.recipe.compensates:
            weights = self._compensate(targets, clean)
        else:
            weights = {linear: self._quantize(linear) for linear in self.active}
            for linear, weight in weights.items():
                self._install(linear, weight.dequantized())
        errors = [
            LinearError(linear, nearest[linear], _relative(self._product(linear), reference))
            for linear, reference in references.items()
        ]
        outputs, error = self._propagate(targets)
        changed = {
            key: value
            for key, value in self._other_tensors()
            if not torch.equal(value, before[key])
        }
        return BlockResult(weights, changed, outputs, errors, error)

    # Looking at the original block

    def _observe(self) -> list[torch.Tensor]:
        """The original outputs; fills in the statistics, by the first reader of each input.

        Inputs that no quantized linear reads are left out: they need not divide into groups.
        """
        sample = self.recipe.scale.tokens if self.recipe.scale else 0
        readers = [
            group.linears[0]
            for group in self.family.groups
            if any(linear in self.active for linear in group.linears)
        ]
        gather = BlockStatistics(
            {linear: self.linears[linear] for linear in readers},
            self.recipe.group_size,
            total=sum(states.shape[0] * states.shape[1] for states in self.hidden),
            sample=max(sample, _JUDGED_TOKENS),
            weighted=self.recipe.token_weighting == "residual",
            where=self.name,
        )
        targets = []
        for states in self.hidden:
            targets.append(self._run(states))
            gather.take(targets[-1])
        self.statistics = gather.finish()
        return targets

    def _seen_by(self, linear: str) -> InputStatistics:
        reader = next(group.linears[0] for group in self.family.groups if linear in group.linears)
        return self.statistics[reader]

    def _run(self, states: torch.Tensor) -> torch.Tensor:
        output = self.block(states, **self.arguments(*states.shape[:2]))
        return output[0] if isinstance(output, tuple) else output

    def _product(self, linear: str) -> torch.Tensor:
        """X W of the sampled tokens as the original model means it, whatever was scaled since."""
        inputs = self._seen_by(linear).tokens
        if linear in self.input_scale:
            inputs = inputs / self.input_scale[linear]
        product = inputs @ self.linears[linear].weight.T
        return product.mul_(self.output_scale[linear]) if linear in self.output_scale else product

    def _nearest(self, linear: str, reference: torch.Tensor) -> float:
        stored = self.linears[linear].weight.T
        rounded = torch.empty_like(stored)
        self.grid.round_to_nearest_(self.grid.grouped(stored), self.grid.grouped(rounded))
        return _relative(self._seen_by(linear).tokens @ rounded, reference)

    # Searching

    def _scale(self, group: ScalingGroup) -> None:
        rounded = [linear in self.active for linear in group.linears]
        assert self.recipe.scale is not None
        if not any(rounded):
            return
        linears = [self.linears[linear] for linear in group.linears]
        previous = self.block.get_submodule(group.previous)
        shared = self._shared_channels(previous, linears[0])
        found = search_scale(
            linears,
            rounded,
            self._seen_by(group.linears[0]).mean_abs,
            self._probe(group),
            self.grid,
            self.recipe.scale,
            shared=shared,
        )
        if found.error >= found.unscaled:
            return
        where = f"{self.name}.{group.previous}"
        scale = fuse_scale(previous, linears, found.scale, where=where, shared=shared)
        self.input_scale.update(dict.fromkeys(group.linears, scale))
        if isinstance(previous, nn.Linear):
            rows = scale.view(*shared)[:, 0].reshape(-1) if shared else scale
            self.output_scale[group.previous] = rows

    def _shared_channels(
        self, previous: nn.Module, linear: nn.Linear
    ) -> tuple[int, int, int] | None:
        """With grouped-query attention, query heads of a group read one value head."""
        if not isinstance(previous, nn.Linear) or previous.out_features == linear.in_features:
            return None
        heads = previous.out_features // self.head_dim
        return heads, linear.in_features // previous.out_features, self.head_dim

    def _probe(self, group: ScalingGroup) -> Probe:
        assert self.recipe.scale is not None
        seen = self._seen_by(group.linears[0])
        count = self.recipe.scale.tokens
        step = max(1, seen.tokens.shape[0] // count)
        tokens, weights = seen.tokens[::step], seen.weights[::step]
        if self.recipe.scale.objective == "linear":
            return SumProbe(
                [
                    ModuleProbe(self.linears[linear], tokens, weights)
                    for linear in group.linears
                    if linear in self.active
                ]
            )
        module = self.block.get_submodule(group.inspect)
        if not mixes_tokens(module):
            return ModuleProbe(module, tokens, weights)
        inputs, weights = self._sequences(group.linears[0], count)
        return ModuleProbe(module, inputs, weights, self.arguments)

    def _sequences(self, linear: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs [S, T, K] of `linear` and weights [S, T] on beginnings of whole sequences."""
        length = min(_PROBE_LENGTH, max(states.shape[1] for states in self.hidden))
        sequences = [
            sequence[:length]
            for states in self.hidden
            for sequence in states
            if states.shape[1] >= length
        ]
        step = max(1, len(sequences) * length // count)
        gather = BlockStatistics(
            {linear: self.linears[linear]},
            self.recipe.group_size,
            total=length * len(sequences[::step]),
            sample=length * len(sequences[::step]),
            weighted=self.recipe.token_weighting == "residual",
            where=self.name,
        )
        states = torch.stack(sequences[::step])
        gather.take(self._run(states))
        seen = gather.finish()[linear]
        return seen.tokens.view(*states.shape[:2], -1), seen.weights.view(states.shape[:2])

    def _quantize(self, linear: str) -> QuantizedWeight:
        gram = self._seen_by(linear).gram
        if linear in self.input_scale:
            scale = self.input_scale[linear].view(-1, self.recipe.group_size)
            gram = gram / (scale.unsqueeze(1) * scale.unsqueeze(2))
        weight = self.linears[linear].weight.detach().T
        return quantize_weight(weight, *self._ranges(linear, weight, gram), self.grid)

    def _ranges(
        self, linear: str, weight: torch.Tensor, gram: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point of every group; gram: of the inputs that `weight` [K, N] takes."""
        clip = self.recipe.clip
        if not self.recipe.searches or clip is None or linear.endswith(clip.exclude):
            return full_range(weight, self.grid)
        return search_clipping(weight, gram, self.grid, clip)

    def _compensate(
        self, targets: list[torch.Tensor], original: _Original | None
    ) -> dict[str, QuantizedWeight]:
        """Round the linears in the order in which the block computes, and install them."""
        rounded: dict[str, QuantizedWeight] = {}
        groups = [
            [linear for linear in group.linears if linear in self.active]
            for group in self.family.groups
        ]
        groups = [group for group in groups if group]
        before: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}
        if not self.recipe.compensation.true_sequential:
            before = {group[0]: self._moments(group[0], targets, original) for group in groups}
        for group in groups:
            found = before.pop(group[0], None)
            moment, cross = found or self._moments(group[0], targets, original)
            gram = diagonal_blocks(moment, self.recipe.group_size)
            for linear in group:
                weight = self.linears[linear].weight.detach().T
                if cross is not None:
                    weight = aimed_at_original(weight, moment, cross, self.recipe.compensation)
                rounded[linear] = round_compensated(
                    weight,
                    moment,
                    *self._ranges(linear, weight, gram),
                    self.grid,
                    self.recipe.compensation,
                )
            for linear in group:
                self._install(linear, rounded[linear].dequantized())
        return {linear: rounded[linear] for linear in self.active}

    def _moments(
        self, linear: str, targets: list[torch.Tensor], original: _Original | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Sums over tokens, weighted, [K, K]: of x' x'^T with the inputs x' that the block as it is
        now gives to `linear`, and of x' x^T with the original model's x, scaled like x'.
        """
        K = self.linears[linear].in_features
        moment = torch.zeros(K, K)
        cross = None if original is None else torch.zeros(K, K)
        weighted = self.recipe.token_weighting == "residual"
        for j, states in enumerate(self.hidden):
            inputs = inputs_of(self.linears[linear], partial(self._run, states))
            counted = (inputs * token_weights(targets[j], weighted).unsqueeze(1)).T
            moment.addmm_(counted, inputs)
            if original is not None and cross is not None:
                states = original.hidden[j]
                meant = inputs_of(
                    original.block.get_submodule(linear),
                    partial(original.block, states, **self.arguments(*states.shape[:2])),
                )
                if linear in self.input_scale:
                    meant /= self.input_scale[linear]
                cross.addmm_(counted, meant)
        return moment, cross

    # Leaving the block as it will be stored

    def _install(self, linear: str, weight: torch.Tensor) -> None:
        self.linears[linear].weight = nn.Parameter(weight.T, requires_grad=False)

    def _propagate(self, targets: list[torch.Tensor]) -> tuple[list[torch.Tensor], float]:
        original = self.recipe.propagate == "original"
        difference = norm = judged = 0.0
        for j, states in enumerate(self.hidden):
            if original and judged >= _JUDGED_TOKENS:
                break
            output = self._run(states)
            if not torch.isfinite(output).all():
                raise UserError.one("the quantized block gives NaN or infinity", self.name)
            difference += float((output - targets[j]).square().sum(dtype=torch.float64))
            norm += float(targets[j].square().sum(dtype=torch.float64))
            judged += states.shape[0] * states.shape[1]
            if not original:
                targets[j] = output
        return targets, (difference / max(norm, 1e-300)) ** 0.5

    def _other_tensors(self) -> list[tuple[str, torch.Tensor]]:
        return [
            (key, value)
            for key, value in self.block.state_dict().items()
            if key.removesuffix(".weight") not in self.active
        ]


def _relative(found: torch.Tensor, reference: torch.Tensor) -> float:
    size = float(reference.norm())
    return float((found - reference).norm()) / size if size else 0.0
