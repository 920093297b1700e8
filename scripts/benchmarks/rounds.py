"""Contests between schedules, run on the GPU: every schedule is checked, then timed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.cases import Case, Linear, relative_error
from benchmarks.contenders import calling, cloned
from benchmarks.prebuilt import Prebuilt
from benchmarks.timing import copies_needed, measure

# The numbers of rows that a kernel is judged by, by the most that it is for.
JUDGED = {
    "1": (1,),
    "8": (2, 4, 8),
    "16": (12, 16),
    "32": (24, 32),
    "64": (48, 64),
    "more": (128, 512, 2048),
}
_TOLERANCE = 2e-3


@dataclass(frozen=True)
class Contest:
    """Schedules of a kernel for a linear.

    limit: the most rows that the kernel is for, or "more". kernel, key: where schedules.json has
    the winner. schedules: fields by function; the first is the rule's choice.
    """

    name: str
    linear: Linear
    limit: str
    kernel: str
    key: str
    schedules: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """winner: fields of the best schedule. seconds: geometric mean over the judged rows. gain: the
    time of the rule's choice, in seconds of the winner's. wrong: schedules with wrong results.
    """

    contest: Contest
    winner: Mapping[str, Any]
    seconds: float
    gain: float
    wrong: int


def contests_of(prebuilt: Prebuilt) -> list[Contest]:
    """Those of a prepared folder."""
    found = prebuilt.manifest.get("contests", [])
    return [Contest(**{**one, "linear": Linear(**one["linear"])}) for one in found]


def hold(prebuilt: Prebuilt, contest: Contest, seed: int) -> Outcome:
    """Check and time all schedules. Raises ArithmeticError where none gives the right results."""
    case = Case(contest.linear, "cuda", seed)
    weight = case.dense(torch.float64)
    inputs = [case.activations(m) for m in JUDGED[contest.limit]]
    expected = [x.double() @ weight for x in inputs]
    del weight
    count = copies_needed(contest.linear.K * contest.linear.N // 2)
    copies = [cloned(case.tiled) for _ in range(count)]
    seconds: dict[str, float] = {}
    for name in contest.schedules:
        function = prebuilt.function(contest.name, name)
        applies = [calling(lambda m, f=function: f, own, contest.linear.N) for own in copies]
        right = all(
            relative_error(applies[0](x), wanted) <= _TOLERANCE
            for x, wanted in zip(inputs, expected, strict=True)
        )
        if right:
            times = [
                measure([lambda apply=apply, x=x: apply(x) for apply in applies]).seconds
                for x in inputs
            ]
            seconds[name] = math.exp(sum(map(math.log, times)) / len(times))
    if not seconds:
        raise ArithmeticError(f"{contest.name}: no schedule gives the right results")
    best = min(seconds, key=lambda name: seconds[name])
    rule = seconds.get(next(iter(contest.schedules)), math.nan)
    wrong = len(contest.schedules) - len(seconds)
    return Outcome(contest, contest.schedules[best], seconds[best], rule / seconds[best], wrong)
