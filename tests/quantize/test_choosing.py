"""The choice among recipes: text divided, time accounted for, the closest taken, resumable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_tiny_model, make_tokenizer

from mlcawq.errors import UserError
from mlcawq.quantize.calibration import BUNDLED, CalibrationData, load_calibration
from mlcawq.quantize.choosing import (
    Chooser,
    Part,
    Trial,
    affordable,
    distance,
    divided,
    within,
)
from mlcawq.quantize.pipeline import quantize_checkpoint
from mlcawq.quantize.progress import Silent
from mlcawq.quantize.recipe import ChoiceRecipe, Recipe, load_recipe, parse_recipe
from mlcawq.quantize.report import BlockReport, Report

COSTS = {"a": 30.0, "b": 10.0, "c": 20.0}


def test_a_part_of_the_text() -> None:
    """Sequences by their number, batch by batch; nobody both fits and judges."""
    states = [torch.arange(6.0).view(3, 2, 1), torch.arange(10.0, 16).view(2, 3, 1)]
    fitted, judging = divided(states, 2)
    assert (fitted, judging) == ([0, 2, 4], [1, 3])
    assert [part.tolist() for part in Part(states, judging)] == [
        [[[2.0], [3.0]]],
        [[[10.0], [11.0], [12.0]]],
    ]
    assert [part.shape[0] for part in Part(states, fitted)] == [2, 1]
    assert len(Part(states, [4])) == 1
    assert divided(states, 9) == ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4])  # too few to hold any back


def test_distance_counts_every_token_alike() -> None:
    aims = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    aims[0, 0] *= 1000
    error = distance(iter([1.1 * aims]), iter([aims]), weighted=True)
    assert error == pytest.approx(0.1, rel=1e-4)
    wrong = aims.clone()
    wrong[1, 4] = 0
    assert distance(iter([wrong]), iter([aims]), weighted=True) == pytest.approx(10**-0.5, rel=1e-4)


def test_what_there_is_time_for() -> None:
    order = ["a", "b", "c", "d"]  # d was never tried: no time was left on the first block
    assert affordable(order, COSTS, 100) == ["a", "b", "c"]
    assert affordable(order, COSTS, 45) == ["a", "b"]
    assert affordable(order, COSTS, 25) == ["b"]
    assert affordable(order, COSTS, 3) == []


def _choice(minutes: float | None, names: str = "abc") -> ChoiceRecipe:
    candidates = [{"name": name, "learning": {} if name == "a" else None} for name in names]
    return ChoiceRecipe.model_validate({"candidates": candidates, "budget_minutes": minutes})


def _run(chooser: Chooser, blocks: int, pace: float = 1.0) -> list[list[str]]:
    """What is tried on each block, every candidate taking its time, and five seconds beside."""
    tried = []
    for _ in range(blocks):
        _, trials = chooser.choose(
            lambda name: (name, Trial(name, pace * COSTS[name], 1 / COSTS[name]))
        )
        chooser.record(trials, sum(trial.seconds for trial in trials) + 5)
        tried.append([trial.name for trial in trials])
    return tried


def test_the_budget_is_kept() -> None:
    """Two blocks' worth of everything is spent over six blocks, the first one's excess too."""
    tried = _run(Chooser(_choice(minutes=250 / 60), 6, []), 6)
    spent = sum(sum(COSTS[name] for name in block) + 5 for block in tried)
    assert spent <= 250
    assert tried[0] == ["b", "a", "c"]
    assert {"a"} < {name for block in tried[1:] for name in block}


def test_a_short_budget_leaves_what_is_quick() -> None:
    assert _run(Chooser(_choice(minutes=0.1), 3, []), 3) == [["b"]] * 3


def test_without_a_budget_no_clock_decides() -> None:
    assert _run(Chooser(_choice(None), 3, []), 3) == [["a", "b", "c"]] * 3


def test_a_plan_survives_an_interruption() -> None:
    """What is tried next stands in the journal, however fast the machine has become."""
    first = Chooser(_choice(minutes=2), 4, [])
    entries: list[dict[str, Any]] = []
    for _ in range(2):
        _, trials = first.choose(lambda name: (name, Trial(name, COSTS[name], 1.0)))
        seconds = sum(trial.seconds for trial in trials) + 5
        entries.append({"usage": {"seconds": seconds}, "choice": first.record(trials, seconds)})
    again = Chooser(_choice(minutes=2), 4, entries)
    assert _run(again, 1, pace=0.01) == _run(first, 1) == [entries[-1]["choice"]["next"]]


def test_least_error_is_taken() -> None:
    errors = {"a": 0.3, "b": 0.1, "c": 0.2}
    best, trials = Chooser(_choice(None), 2, []).choose(
        lambda name: (name.upper(), Trial(name, 1.0, errors[name]))
    )
    assert best == "B"
    assert len(trials) == 3


def test_candidates_keep_the_integers() -> None:
    recipe = load_recipe("best", {"bits": 3, "group_size": 64})
    found = recipe.alternatives()
    assert all((each.bits, each.group_size, each.choice) == (3, 64, None) for each in found)
    for each in found:
        shipped = each.name if each.name != "gptq+signround" else "gptq"
        same = load_recipe(shipped)
        assert (each.scale, each.clip) == (same.scale, same.clip)
        assert each.compensation == same.compensation


@pytest.mark.parametrize(
    "choice", [{"candidates": []}, {"candidates": [{"name": "a"}, {"name": "a"}]}]
)
def test_what_is_no_choice_is_refused(choice: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="choice"):
        parse_recipe({"choice": choice})


@pytest.mark.parametrize(("text", "minutes"), [("90s", 1.5), ("30m", 30), ("1.5h", 90), ("45", 45)])
def test_budgets_are_times(text: str, minutes: float) -> None:
    choice = within(load_recipe("best"), text).choice
    assert choice is not None
    assert choice.budget_minutes == pytest.approx(minutes)


@pytest.mark.parametrize("text", ["soon", "0m", "-3m", "5d", ""])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="no time"):
        within(load_recipe("best"), text)


def test_a_budget_needs_a_choice() -> None:
    with pytest.raises(UserError, match="--recipe best"):
        within(load_recipe("awq"), "30m")


class _Killed(Silent):
    """Dies after the first block."""

    def block_done(self, report: BlockReport) -> None:
        raise KeyboardInterrupt


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def calibration() -> CalibrationData:
    return load_calibration(BUNDLED, make_tokenizer(), samples=8, seq_len=48)


def _brief(recipe: Recipe) -> Recipe:
    """The same with two steps of learning."""
    content = recipe.model_dump()
    parts = [content, *(content["choice"]["candidates"] if content["choice"] else [])]
    for part in parts:
        if part["learning"]:
            part["learning"] = {**part["learning"], "iterations": 2, "batch": 2}
    return parse_recipe(content)


def test_best_is_recorded_and_resumes_to_the_same_bytes(
    model: Path, calibration: CalibrationData, tmp_path: Path
) -> None:
    recipe = _brief(load_recipe("best", {"group_size": 64}))
    reports: list[Report] = []
    for name, interrupted in (("whole", False), ("resumed", True)):
        if interrupted:
            with pytest.raises(KeyboardInterrupt):
                quantize_checkpoint(model, tmp_path / name, recipe, calibration, progress=_Killed())
        reports.append(quantize_checkpoint(model, tmp_path / name, recipe, calibration))
    names = [candidate.name for candidate in recipe.alternatives()]
    assert all(block.chosen in names for block in reports[0].blocks)
    assert reports[0].blocks == reports[1].blocks
    whole, resumed = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "resumed")
    )
    assert whole == resumed


@pytest.mark.parametrize("shipped", ["signround", "awq+gptq+signround"])
def test_learning_resumes_to_the_same_bytes(
    model: Path, calibration: CalibrationData, tmp_path: Path, shipped: str
) -> None:
    recipe = _brief(load_recipe(shipped, {"group_size": 64}))
    quantize_checkpoint(model, tmp_path / "whole", recipe, calibration)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(model, tmp_path / "resumed", recipe, calibration, progress=_Killed())
    quantize_checkpoint(model, tmp_path / "resumed", recipe, calibration)
    whole, resumed = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "resumed")
    )
    assert whole == resumed
