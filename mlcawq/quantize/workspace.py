"""A decoder block under quantization: what every step on it reads and changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from mlcawq.errors import UserError
from mlcawq.families import ScalingGroup
from mlcawq.quantize.activations import RoundedInputs, round_tokens
from mlcawq.quantize.distributed import before, total
from mlcawq.quantize.experts import expert_of, inputs_in
from mlcawq.quantize.integer import IntegerGrid
from mlcawq.quantize.recipe import Recipe
from mlcawq.quantize.report import Spread
from mlcawq.quantize.states import HiddenStates, blank_like, shapes_of
from mlcawq.quantize.statistics import BlockStatistics, InputStatistics, statistics_of

Arguments = Callable[[int, int], dict[str, Any]]
_JUDGED_TOKENS = 512  # that errors are measured on, at least
_FEW_TOKENS = 64  # an expert that saw fewer says too little of what it will see


class Workspace:
    """A block with its calibration inputs, the integers of its linears, and what was seen of both.

    block: a decoder layer of transformers in float32, changed in place by the steps.
    hidden: its calibration inputs, [B, T, hidden_size] each.
    arguments: keyword arguments of the layer for a batch and a number of tokens.
    groups: its scaling groups, in the order in which it computes; they hold all of its linears.
    name: its full name, for messages. full_name: of a linear in the block, for the recipe.

    linears: by name in the block, in the order of the groups. active: those that are quantized.
    experts: by linear, the routed expert that it is in. neglected: experts that saw too few tokens,
    and whose statistics are of all tokens of their mixture.
    grids: of the active ones. targets: the original outputs for `hidden`, [B, T, hidden_size] each.
    input_scale: what an active linear's inputs are divided by by now, [K]. output_scale: what a
    linear's outputs are to be multiplied by to be the original ones, [N]. clip: of a
    linear's groups, the range that was chosen relative to the full one, where one was searched.
    positions: [K, N] of active linears whose integers are to be learned further, what those were
    rounded from, zero point included.

    Raises UserError naming the tensor where a weight is not finite, the linear where an
    activation is not.
    """

    def __init__(
        self,
        block: nn.Module,
        hidden: Sequence[torch.Tensor],
        arguments: Arguments,
        groups: Sequence[ScalingGroup],
        recipe: Recipe,
        name: str,
        full_name: Callable[[str], str],
    ) -> None:
        self.block, self.hidden, self.arguments = block, hidden, arguments
        self.groups, self.recipe, self.name = groups, recipe, name
        for key, value in block.state_dict().items():
            if not torch.isfinite(value).all():
                raise UserError.one("NaN or infinite weights", f"{name}.{key}")
        self.linears: dict[str, nn.Linear] = {}
        self.grids: dict[str, IntegerGrid] = {}
        self._reader: dict[str, str] = {}
        for linear in [linear for group in groups for linear in group.linears]:
            module = block.get_submodule(linear)
            assert isinstance(module, nn.Linear)
            # [K, N] storage behind torch's [N, K]: what the searches work on (integer.py).
            stored = module.weight.detach().T.contiguous()
            module.weight = nn.Parameter(stored.T, requires_grad=False)
            self.linears[linear] = module
            if recipe.converts(full_name(linear)):
                self.grids[linear] = recipe.grid_of(full_name(linear), module.in_features)
        self.active = [linear for linear in self.linears if linear in self.grids]
        members = {linear: expert_of(block, linear) for linear in self.active}
        self.experts = {linear: expert for linear, expert in members.items() if expert}
        self.neglected: dict[str, int] = {}
        self.warnings: list[str] = []
        self.readers = [readers for group in groups for readers in self._readers(group)]
        self.input_scale: dict[str, torch.Tensor] = {}
        self.output_scale: dict[str, torch.Tensor] = {}
        self.clip: dict[str, Spread] = {}
        self.positions: dict[str, torch.Tensor] = {}
        self.statistics: dict[str, InputStatistics] = {}
        self.targets = self._observe()
        self._rounding: RoundedInputs | None = None
        if recipe.activations is not None:
            rounded = [self.linears[linear] for linear in self.active]
            self._rounding = RoundedInputs(rounded, recipe.activations.bits)

    def _readers(self, group: ScalingGroup) -> list[list[str]]:
        """The active linears of a group by the tensor that they read: one for each module.

        Linears of one module read one tensor; a module beside it may see other tokens, as experts
        do. Inputs that no quantized linear reads are left out: they need not divide into groups.
        """
        parts: dict[str, list[str]] = {}
        for linear in group.linears:
            if linear in self.grids:
                parts.setdefault(linear.rpartition(".")[0], []).append(linear)
        for part in parts.values():
            self._reader.update(dict.fromkeys(part, part[0]))
        return list(parts.values())

    def _observe(self) -> HiddenStates | list[torch.Tensor]:
        """The original outputs; fills in the statistics, by the first reader of each input."""
        sample = self.recipe.scale.tokens if self.recipe.scale else 0
        sizes = {
            readers[0]: {self.grids[linear].group_size for linear in readers}
            for readers in self.readers
        }
        whole = [self._whole(group) for group in self.groups if self.quantizes(group)]
        watched = list(dict.fromkeys([*sizes, *whole]))  # in one order on all ranks
        gather = BlockStatistics(
            {name: self.block.get_submodule(name) for name in watched},
            sizes,
            experts={
                name: self.block.get_submodule(self.experts[name])
                for name in watched
                if name in self.experts
            },
            total=sum(batch * tokens for batch, tokens in shapes_of(self.hidden)),
            sample=max(sample, _JUDGED_TOKENS),
            weighted=self.weighted,
            where=self.name,
        )
        targets = blank_like(self.hidden)
        for j, states in enumerate(self.hidden):
            output = self.run(states)
            gather.take(output)
            targets[j] = output
        self.statistics = gather.finish()
        for group in self.groups:
            self._make_up(group)
        return targets

    def quantizes(self, group: ScalingGroup) -> bool:
        """Whether some linear of a group is quantized."""
        return any(linear in self.grids for linear in group.linears)

    def _whole(self, group: ScalingGroup) -> str:
        """A reader of a group's tensor that sees all of it: no expert, where anyone else does."""
        own = [linear for linear in group.linears if linear in self.grids]
        for name in (*own, *group.linears, *group.also):
            if expert_of(self.block, name) is None:
                return self._reader.get(name, name)
        return self._reader[own[0]]

    def _make_up(self, group: ScalingGroup) -> None:
        """Where experts of a group saw too few tokens, let them see all that the group did."""
        whole = self._whole(group) if self.quantizes(group) else None
        if whole is None or whole in self.experts:
            return
        members: dict[str, list[str]] = {}
        for readers in self.readers:
            if readers[0] in self.experts:
                members.setdefault(self.experts[readers[0]], []).append(readers[0])
        given = {self.experts[linear] for linear in group.linears if linear in self.experts}
        for expert in [expert for expert in members if expert in given]:
            seen = min(self.statistics[name].seen for name in members[expert])
            if seen >= min(_FEW_TOKENS, self.statistics[whole].seen):
                continue
            self.neglected[expert] = seen
            module, sample = self.block.get_submodule(expert), self.statistics[whole].sample
            inner = [name.removeprefix(f"{expert}.") for name in members[expert]]
            inputs = inputs_in(module, inner, partial(module, sample.inputs))
            for name, own in zip(members[expert], inner, strict=True):
                sizes = self.statistics[name].grams
                self.statistics[name] = replace(
                    statistics_of(inputs[own], sample.weights, sizes), seen=seen
                )

    @property
    def weighted(self) -> bool:
        """Whether tokens count by the size of what the block leaves of them."""
        return self.recipe.token_weighting == "residual"

    def run(self, states: torch.Tensor) -> torch.Tensor:
        """The block as it is now: [B, T, hidden_size] to the same."""
        output = self.block(states, **self.arguments(*states.shape[:2]))
        return output[0] if isinstance(output, tuple) else output

    def exact(self) -> AbstractContextManager[None]:
        """Within it the linears take their inputs as they are, as the original model's do."""
        return nullcontext() if self._rounding is None else self._rounding.off()

    def readers_of(self, reader: str) -> list[str]:
        """The active linears that read what `reader`, the first of them, reads."""
        return next(readers for readers in self.readers if readers[0] == reader)

    def seen_by(self, linear: str) -> InputStatistics:
        """Of the inputs that the original block gives to an active linear."""
        return self.statistics[self._reader[linear]]

    def seen_together(self, group: ScalingGroup) -> InputStatistics:
        """Of the tensor that a group reads, all tokens of it."""
        return self.statistics[self._whole(group)]

    def gram(self, linear: str) -> torch.Tensor:
        """[K/G, G, G] of those inputs, divided by the scale that they are divided by now."""
        size = self.grids[linear].group_size
        gram = self.seen_by(linear).grams[size]
        if linear not in self.input_scale:
            return gram
        scale = self.input_scale[linear].view(-1, size)
        return gram / (scale.unsqueeze(1) * scale.unsqueeze(2))

    def weight(self, linear: str) -> torch.Tensor:
        """[K, N], float32, contiguous."""
        return self.linears[linear].weight.detach().T

    def install(self, linear: str, weight: torch.Tensor) -> None:
        """Let the block compute with `weight` [K, N]."""
        self.linears[linear].weight = nn.Parameter(weight.T, requires_grad=False)

    def tokens(self, linear: str, *, rounded: bool = False) -> torch.Tensor:
        """The sampled inputs of an active linear, divided by what they are divided by now.

        rounded: as the linear takes them, where the recipe rounds activations.
        """
        inputs = self.seen_by(linear).tokens
        if linear in self.input_scale:
            inputs = inputs / self.input_scale[linear]
        if rounded and self.recipe.activations is not None:
            inputs = round_tokens(inputs, self.recipe.activations.bits)
        return inputs

    def product(self, linear: str, *, rounded: bool = False) -> torch.Tensor:
        """X W of the sampled tokens as the original model means it, whatever was scaled since.

        rounded: see `tokens`.
        """
        inputs = self.tokens(linear, rounded=rounded)
        product = inputs @ self.linears[linear].weight.T
        return product.mul_(self.output_scale[linear]) if linear in self.output_scale else product

    def error(self) -> float:
        """Relative error |h' - h| / |h| of the outputs now, on a part of the calibration inputs."""
        shapes = shapes_of(self.hidden)
        difference = norm = 0.0
        judged = before(sum(batch * tokens for batch, tokens in shapes))
        for j, (batch, tokens) in enumerate(shapes):
            if judged >= _JUDGED_TOKENS:
                break
            target = self.targets[j]
            output = self.run(self.hidden[j])
            difference += float((output - target).square().sum(dtype=torch.float64))
            norm += float(target.square().sum(dtype=torch.float64))
            judged += batch * tokens
        return (total(difference) / max(total(norm), 1e-300)) ** 0.5

    def other_tensors(self) -> list[tuple[str, torch.Tensor]]:
        """What the block holds beside the weights that are quantized."""
        return [
            (key, value)
            for key, value in self.block.state_dict().items()
            if key.removesuffix(".weight") not in self.grids
        ]
