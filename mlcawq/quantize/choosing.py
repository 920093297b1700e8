"""The best of several recipes for each block, within a time that the user gives.

Candidates are fitted on a part of the calibration text and judged on the rest: each for the same
inputs, by the distance of the block's output from that of the original model. The quantization
goes on from the one of least distance.

With a time budget, what there is time for is decided between two blocks, from what candidates took
in the blocks before and what is left. The decision for a block is written to the journal with the
block before it: a run that goes on after an interruption tries what it would have tried anyway, and
ends with the same bytes. Without a budget every candidate is tried on every block, and the result
depends on no clock.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from mlcawq.errors import UserError
from mlcawq.quantize.distributed import before, total
from mlcawq.quantize.recipe import ChoiceRecipe, Recipe
from mlcawq.quantize.states import shapes_of
from mlcawq.quantize.statistics import token_weights

Result = TypeVar("Result")


@dataclass(frozen=True)
class Trial:
    """One candidate on one block: what it took, and its error on the text that judges."""

    name: str
    seconds: float
    error: float


class Part(Sequence[torch.Tensor]):
    """Some sequences of a text's hidden states, [B, T, hidden_size] each.

    numbers: of the sequences in the whole text, over all ranks; those that are ours are taken.
    """

    def __init__(self, states: Sequence[torch.Tensor], numbers: Sequence[int]) -> None:
        self._states = states
        wanted = set(numbers)
        number = before(sequences(states))
        self._rows: list[tuple[int, list[int]]] = []
        for j, (batch, _) in enumerate(shapes_of(states)):
            rows = [row for row in range(batch) if number + row in wanted]
            if rows:
                self._rows.append((j, rows))
            number += batch

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i):  # type: ignore[no-untyped-def] # slices are of no use here
        j, rows = self._rows[i]
        return self._states[j][rows]


def sequences(states: Sequence[torch.Tensor]) -> int:
    """How many of a text's sequences are ours."""
    return sum(batch for batch, _ in shapes_of(states))


def divided(states: Sequence[torch.Tensor], hold_back: int) -> tuple[list[int], list[int]]:
    """Numbers of the sequences to fit on, and of those that judge: one of `hold_back`.

    A text of fewer sequences than that does both.
    """
    numbers = list(range(int(total(sequences(states)))))
    judges = numbers[hold_back - 1 :: hold_back]
    if not judges:
        return numbers, numbers
    held = set(judges)
    return [number for number in numbers if number not in held], judges


@torch.no_grad()
def distance(
    outputs: Iterator[torch.Tensor], aims: Iterator[torch.Tensor], *, weighted: bool
) -> float:
    """Relative error of hidden states [B, T, hidden_size], tokens counting as in every search."""
    difference = norm = 0.0
    for output, aim in zip(outputs, aims, strict=True):
        weights = token_weights(aim, weighted)
        difference += float((output - aim).square().mean(-1).flatten() @ weights)
        norm += float(aim.square().mean(-1).flatten() @ weights)
    return (total(difference) / max(total(norm), 1e-300)) ** 0.5


def within(recipe: Recipe, budget: str) -> Recipe:
    """`recipe` with a time to keep within: "90s", "30m", "2h", minutes where nothing follows.

    Raises UserError for what is no time, and for a recipe that does not choose.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", budget.strip().lower())
    minutes = float(found[1]) * {"s": 1 / 60, "m": 1, "": 1, "h": 60}[found[2]] if found else 0.0
    if minutes <= 0:
        raise UserError.one(f"{budget!r} is no time", "--budget", "as 90s, 30m or 2h")
    if recipe.choice is None:
        raise UserError.one(
            f"the recipe {recipe.name} has nothing to choose from",
            "--budget",
            "it goes with --recipe best",
        )
    choice = recipe.choice.model_copy(update={"budget_minutes": minutes})
    return recipe.model_copy(update={"choice": choice})


class Chooser:
    """Decides what is tried on each block, and keeps the account.

    blocks: of the model. entries: of the journal, of the blocks that are done, with their "usage"
    and what `record` gave.
    """

    def __init__(
        self, choice: ChoiceRecipe, blocks: int, entries: Sequence[Mapping[str, Any]]
    ) -> None:
        self._budget = None if choice.budget_minutes is None else 60 * choice.budget_minutes
        self._order = [candidate.name for candidate in choice.candidates]
        self._blocks = blocks
        self._seconds = [float(entry["usage"]["seconds"]) for entry in entries]
        self._trials = [
            [Trial(**trial) for trial in entry["choice"]["trials"]] for entry in entries
        ]
        plain = [candidate.name for candidate in choice.candidates if candidate.learning is None]
        self._quick = (plain or self._order)[0]
        self._next = self._order
        if entries:
            self._next = list(entries[-1]["choice"]["next"])
        elif self._budget is not None:
            self._next = sorted(self._order, key=lambda name: name != self._quick)

    def choose(self, attempt: Callable[[str], tuple[Result, Trial]]) -> tuple[Result, list[Trial]]:
        """The attempt of least error on the next block, and all trials.

        attempt: fits and judges the candidate of that name. On the first block nothing is known
        of times: the first that does not learn begins, and others follow in their order until
        this block's share of the budget is used up.
        """
        share = None if self._budget is None else self._budget / self._blocks
        trials: list[Trial] = []
        best: tuple[float, Result] | None = None
        for name in self._next:
            used = sum(trial.seconds for trial in trials)
            if share is not None and not self._trials and trials and used >= share:
                break
            result, trial = attempt(name)
            trials.append(trial)
            if best is None or trial.error < best[0]:
                best = trial.error, result
        assert best is not None
        return best[1], trials

    def record(self, trials: Sequence[Trial], seconds: float) -> dict[str, Any]:
        """Account for a block that took `seconds` in all: its entry, with the next block's plan."""
        self._trials.append(list(trials))
        self._seconds.append(seconds)
        self._next = self._plan()
        return {"trials": [vars(trial) for trial in trials], "next": self._next}

    def _plan(self) -> list[str]:
        left = self._blocks - len(self._seconds)
        if self._budget is None or not left:
            return self._order
        known: dict[str, list[float]] = {}
        for trial in (trial for trials in self._trials for trial in trials):
            known.setdefault(trial.name, []).append(trial.seconds)
        costs = {name: max(seconds) for name, seconds in known.items()}
        tried = sum(trial.seconds for trials in self._trials for trial in trials)
        beside = max(0.0, sum(self._seconds) - tried) / len(self._seconds)
        allowed = max(0.0, self._budget - sum(self._seconds)) / left - beside
        return affordable(self._order, costs, allowed) or [self._quick]


def affordable(order: Sequence[str], costs: Mapping[str, float], allowed: float) -> list[str]:
    """Those of `order` that `allowed` seconds suffice for, one after another. What has no known
    cost did not fit into the first block.
    """
    chosen: list[str] = []
    for name in order:
        if name in costs and costs[name] <= allowed:
            chosen.append(name)
            allowed -= costs[name]
    return chosen
