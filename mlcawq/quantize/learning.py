"""Integers learned by gradient on the error of a block's output.

Rounding linear by linear cannot know how their errors meet at the end of the block. Here the block
is run as it will compute, with rounded weights, and what can be stored is moved against the
gradient of its output error: where each weight is rounded to (SignRound, arXiv 2309.05516) and how
wide the groups' ranges are (OmniQuant's learnable weight clipping, arXiv 2308.13137). It goes on
from whatever rounding came before, and what it leaves is integers, scales and zero points as
before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn.utils import parametrize

from mlcawq.quantize.distributed import before, sum_, total
from mlcawq.quantize.fake_quantization import LearnedRounding
from mlcawq.quantize.integer import QuantizedWeight, full_range
from mlcawq.quantize.moments import Original
from mlcawq.quantize.recipe import LearningRecipe
from mlcawq.quantize.report import Spread
from mlcawq.quantize.states import blank_like, shapes_of
from mlcawq.quantize.statistics import token_weights
from mlcawq.quantize.workspace import Workspace

_LOOKS = 5  # at the error, evenly over the iterations
_MOMENTUM, _SQUARES = 0.9, 0.99  # how slowly Adam's averages of gradients and their squares move
_REACH = 0.5  # of an integer before rounding: to the next one and no further

# What is learned, its step at first, and how far from zero it may go.
_Rated = tuple[nn.Parameter, float, float | None]


@torch.no_grad()
def learn(
    work: Workspace,
    starts: Mapping[str, QuantizedWeight],
    recipe: LearningRecipe,
    original: Original | None,
) -> dict[str, QuantizedWeight]:
    """Better integers for the active linears of a block, installed.

    starts: what the block computes with, and begins with; `work.positions` are used up. original:
        where the recipe aims at the original model's outputs.

    Returns the iterate of least error, `starts` among them, by the sequences that are held back
    (by all, where the recipe holds none back).
    """
    if not recipe.iterations:
        return dict(starts)
    text = _Text(work, recipe, original)
    best, least = dict(starts), text.error()
    learned = {name: _Learned(work, name, start, recipe) for name, start in starts.items()}
    delay = round(recipe.iterations * recipe.scales_first) if "scales" in recipe.learns else 0
    pause = max(1, recipe.iterations // _LOOKS)
    for i in range(recipe.iterations):
        if i in (0, delay):
            parts = recipe.learns if i == delay else ("scales",)
            rated = [item for linear in learned.values() for item in linear.rated(parts)]
            steps = _Steps(rated, recipe)
        text.descend()
        steps.take(1 - i / recipe.iterations)
        if i + 1 == recipe.iterations or (i + 1) % pause == 0:
            error = text.error()
            if error < least:
                least = error
                best = {name: linear.quantized() for name, linear in learned.items()}
    for name, linear in learned.items():
        linear.remove()
        work.install(name, best[name].dequantized())
        if name in work.clip:
            full, _ = full_range(linear.meant, best[name].grid)
            work.clip[name] = Spread.of(best[name].scale.float().unsqueeze(1) / full)
    return best


class _Text:
    """The calibration sequences, numbered over all ranks: some teach, the others judge."""

    def __init__(self, work: Workspace, recipe: LearningRecipe, original: Original | None) -> None:
        self._work, self._recipe = work, recipe
        self._aims = _aims(work, recipe, original)
        shapes = shapes_of(work.hidden)
        self._lengths = [length for _, length in shapes]
        self._places = [(j, row) for j, (rows, _) in enumerate(shapes) for row in range(rows)]
        self._first = before(len(self._places))
        numbers = list(range(int(total(len(self._places)))))
        every = recipe.hold_back or len(numbers) + 1
        self._judges = numbers[every - 1 :: every]
        judging = set(self._judges)
        self._teachers = [number for number in numbers if number not in judging]
        if not self._judges:
            self._judges = self._teachers
        self._random = torch.Generator(device="cpu").manual_seed(recipe.seed)
        self._drawn: list[int] = []

    def descend(self) -> None:
        """Add the gradients of the next sequences' error to what is learned."""
        wanted = min(self._recipe.batch, len(self._teachers))
        if len(self._drawn) < wanted:
            order = torch.randperm(len(self._teachers), generator=self._random, device="cpu")
            self._drawn = [self._teachers[i] for i in order.tolist()]
        chosen, self._drawn = self._drawn[:wanted], self._drawn[wanted:]
        for states, aims, weights in self._parts(chosen):
            with torch.enable_grad():
                with _arithmetic(self._recipe, states.device):
                    output = self._work.run(states)
                _difference(output, aims, weights).backward()  # type: ignore[no-untyped-call]

    def error(self) -> float:
        """Of the sequences that judge, as the block is now."""
        error = 0.0
        for start in range(0, len(self._judges), self._recipe.batch):
            for states, aims, weights in self._parts(
                self._judges[start : start + self._recipe.batch]
            ):
                error += float(_difference(self._work.run(states), aims, weights))
        return total(error)

    def _parts(
        self, numbers: Sequence[int]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Those of the sequences that are ours, by their lengths: inputs and aims of the block,
        [B, T, hidden_size], and the tokens' weights, [B * T].
        """
        ours = range(self._first, self._first + len(self._places))
        rows: dict[int, list[int]] = {}
        for number in sorted(number for number in numbers if number in ours):
            j, row = self._places[number - self._first]
            rows.setdefault(j, []).append(row)
        lengths: dict[int, list[int]] = {}
        for j in rows:
            lengths.setdefault(self._lengths[j], []).append(j)
        for batches in lengths.values():
            states, aims, targets = (
                torch.cat([of[j][rows[j]] for j in batches])
                for of in (self._work.hidden, self._aims, self._work.targets)
            )
            yield states, aims, token_weights(targets, self._work.weighted)


def _difference(output: torch.Tensor, aims: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted sum over tokens of the mean squared error of a hidden state."""
    return (output.float() - aims).square().mean(-1).flatten() @ weights


def _aims(
    work: Workspace, recipe: LearningRecipe, original: Original | None
) -> Sequence[torch.Tensor]:
    """What the block shall give, like `work.targets`."""
    if original is None:
        return work.targets
    aims = blank_like(work.hidden)
    for j, states in enumerate(original.hidden):
        output = original.block(states, **work.arguments(*states.shape[:2]))
        meant = output[0] if isinstance(output, tuple) else output
        aims[j] = torch.lerp(work.targets[j], meant, recipe.towards_original)
    return aims


class _Learned:
    """A linear whose weight is made of what is learned, until it is removed."""

    def __init__(
        self, work: Workspace, name: str, start: QuantizedWeight, recipe: LearningRecipe
    ) -> None:
        self._linear, position = work.linears[name], work.positions.pop(name)
        self._start, self._position = start, position
        self._maker = LearnedRounding(start, position)
        offset = torch.zeros_like(position).T
        self._linear.weight = nn.Parameter(offset, requires_grad=False)
        parametrize.register_parametrization(self._linear, "weight", self._maker, unsafe=True)
        self._rates = {
            "scales": (self._maker.scale_change, recipe.scale_rate / start.grid.levels, None),
            "rounding": (self._offset, recipe.rounding_rate or 1 / recipe.iterations, _REACH),
        }

    def rated(self, parts: Sequence[str]) -> list[_Rated]:
        """What is learned from now on, and nothing else."""
        for part, (parameter, _, _) in self._rates.items():
            parameter.requires_grad_(part in parts)
        return [self._rates[part] for part in parts]

    @property
    def _offset(self) -> nn.Parameter:
        original: nn.Parameter = self._linear.parametrizations.weight.original  # type: ignore[union-attr, assignment]
        return original

    @property
    def meant(self) -> torch.Tensor:
        """The weight [K, N] that was rounded at first."""
        grid = self._start.grid
        steps = grid.grouped(self._position) - self._start.zero.float().unsqueeze(1)
        return (steps * self._start.scale.float().unsqueeze(1)).view_as(self._position)

    def quantized(self) -> QuantizedWeight:
        """What would be stored now."""
        return self._maker.quantized(self._offset)

    def remove(self) -> None:
        """Leave the linear without a weight that means anything."""
        parametrize.remove_parametrizations(self._linear, "weight", leave_parametrized=False)


class _Steps:
    """Descent with steps that end at zero: by the gradient's sign, or as Adam does."""

    def __init__(self, rated: Sequence[_Rated], recipe: LearningRecipe) -> None:
        self._rated, self._adam = rated, recipe.optimizer == "adam"
        self._taken = 0
        for parameter, _, _ in rated:
            parameter.grad = torch.zeros_like(parameter)
        self._averages = [
            (torch.zeros_like(parameter), torch.zeros_like(parameter))
            for parameter, _, _ in (rated if self._adam else ())
        ]

    def take(self, share: float) -> None:
        """One step, of that share of its size at first. The gradients are used up."""
        gradients = [parameter.grad for parameter, _, _ in self._rated]
        sum_(*[gradient for gradient in gradients if gradient is not None])
        self._taken += 1
        for i, (parameter, rate, limit) in enumerate(self._rated):
            gradient = gradients[i]
            assert gradient is not None
            if self._adam:
                parameter.sub_(self._adams(i, gradient), alpha=rate * share)
            else:
                parameter.sub_(gradient.sign(), alpha=rate * share)
            if limit is not None:
                parameter.clamp_(-limit, limit)
            gradient.zero_()

    def _adams(self, i: int, gradient: torch.Tensor) -> torch.Tensor:
        mean, squares = self._averages[i]
        mean.lerp_(gradient, 1 - _MOMENTUM)
        squares.lerp_(gradient.square(), 1 - _SQUARES)
        size = (squares / (1 - _SQUARES**self._taken)).sqrt_()
        size.clamp_(min=torch.finfo(size.dtype).tiny)
        return mean.div(1 - _MOMENTUM**self._taken).div_(size)


def _arithmetic(recipe: LearningRecipe, device: torch.device) -> AbstractContextManager[object]:
    """bfloat16 in the linears where it is much faster: the noise of its products is far below that
    of the integers, and the iterates are judged in float32.
    """
    if recipe.compute == "float32":
        return nullcontext()
    fast = device.type == "cuda"
    if device.type == "cpu":
        fast = hasattr(torch.cpu, "get_capabilities") and torch.cpu.get_capabilities()["amx_bf16"]
    if recipe.compute == "bfloat16" or fast:
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()
