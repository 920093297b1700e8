"""What is printed: a table for each model and number of threads, and the targets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from benchmarks.cpu.contenders import LLAMACPP, OURS, PYTORCH
from benchmarks.cpu.measures import CHAT, PREFILL, START, Outcome, Part, Plan, decode_at

_DECODE, _PREFILL, _SHARE = 1.1, 1.5, 0.85  # what ours is to reach, see Target
_START = 1.0  # seconds, for a model of a billion parameters


@dataclass(frozen=True)
class Target:
    """value: what was measured, None where it was not. at_most: whether less is better."""

    name: str
    where: str
    limit: float
    value: float | None
    at_most: bool = False

    @property
    def reached(self) -> bool | None:
        if self.value is None:
            return None
        return self.value <= self.limit if self.at_most else self.value >= self.limit

    def line(self) -> str:
        word = {True: "reached", False: "MISSED", None: "not measured"}[self.reached]
        value = "-" if self.value is None else f"{self.value:.2f}"
        bound = f"{'at most' if self.at_most else 'at least'} {self.limit:.2f}"
        return f"{word:<13}{value:>6}  {self.name}, {bound}: {self.where}"


def targets(part: Part, plan: Plan) -> list[Target]:
    """Every one of ours against the best of the others, measure by measure."""
    found = []
    for outcome in part.outcomes:
        if outcome.contender.project == OURS:
            found += _targets_of(part, outcome, plan)
    return found


def _targets_of(part: Part, own: Outcome, plan: Plan) -> Iterable[Target]:
    where = f"{part.model}, {part.threads} threads, {own.contender.name}"
    for context in plan.contexts:
        measure = decode_at(context)
        ratio = _ratio(_best(part, measure, LLAMACPP), own.seconds(measure))
        at = f"{where}, context {context}"
        yield Target("decode, times llama.cpp's best", at, _DECODE, ratio)
        share = part.share(own, context, plan.tokens)
        yield Target("decode, share of the bandwidth", at, _SHARE, share)
    ratio = _ratio(_best(part, PREFILL, LLAMACPP, PYTORCH), own.seconds(PREFILL))
    yield Target("prefill, times the best of llama.cpp and PyTorch", where, _PREFILL, ratio)
    peak = min(
        (
            other.memory["peak"]
            for other in part.outcomes
            if other.contender.project == LLAMACPP and other.memory
        ),
        default=None,
    )
    ratio = own.memory["peak"] / peak if own.memory and peak else None
    yield Target("peak memory, of llama.cpp's least", where, 1.0, ratio, at_most=True)
    for name, measure in (
        ("seconds to the first token", START),
        ("seconds of `mlcawq chat`", CHAT),
    ):
        if own.runs.get(measure):
            yield Target(name, where, _START, own.seconds(measure), at_most=True)


def _best(part: Part, measure: str, *projects: str) -> float | None:
    """Seconds of the fastest contender of `projects`."""
    found = [o.seconds(measure) for o in part.outcomes if o.contender.project in projects]
    return min((seconds for seconds in found if seconds is not None), default=None)


def _ratio(over: float | None, under: float | None) -> float | None:
    return over / under if over is not None and under is not None else None


def rows(part: Part, plan: Plan) -> list[list[str]]:
    """The head, then a row for every contender."""
    decodes = [f"decode at {context}, tokens/s" for context in plan.contexts]
    shares = [f"of bandwidth at {context}" for context in plan.contexts]
    head = ["", f"prefill {plan.prompt}, tokens/s", *decodes, *shares]
    out = [[*head, "peak memory, MB", "first token, s"]]
    for outcome in part.outcomes:
        name = outcome.contender.name
        if outcome.refused:
            out.append([name, outcome.refused, *[""] * (len(out[0]) - 2)])
            continue
        out.append(
            [
                name,
                _number(outcome.seconds(PREFILL), lambda s: plan.prompt / s),
                *(_number(outcome.seconds(decode_at(c)), lambda s: 1 / s) for c in plan.contexts),
                *(_percent(part.share(outcome, c, plan.tokens)) for c in plan.contexts),
                f"{outcome.memory['peak'] / 1e6:.0f}" if outcome.memory else "-",
                _number(outcome.seconds(START), lambda s: s, 2),
            ]
        )
    return out


def heading(part: Part) -> str:
    """What the machine did meanwhile."""
    speeds = ", ".join(
        f"{kind} {median(runs) / 1e9:.1f} GB/s" for kind, runs in part.bandwidth.items() if runs
    )
    return (
        f"{part.model}, {part.threads} thread{'s' if part.threads > 1 else ''}; "
        f"reading memory: {speeds or 'not measured'}; others used {part.others:.0%} of the machine"
    )


def as_text(part: Part, plan: Plan) -> list[str]:
    table = rows(part, plan)
    # What was refused has its reason where the numbers would be: it sets no width.
    full = [row for row in table if row[-1]]
    widths = [max(len(row[i]) for row in full) for i in range(len(table[0]))]
    widths[0] = max(len(row[0]) for row in table)
    out = [heading(part)]
    for row in table:
        if row[-1]:
            cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
            out.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]))
        else:
            out.append(f"{row[0].ljust(widths[0])}  {row[1]}")
    return out


def as_markdown(part: Part, plan: Plan) -> list[str]:
    head, *body = rows(part, plan)
    out = [heading(part), "", f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    return out + [f"| {' | '.join(row)} |" for row in body] + [""]


def as_json(parts: Sequence[Part], plan: Plan) -> dict[str, Any]:
    """Everything that was measured, seconds and bytes."""
    return {
        "plan": asdict(plan),
        "parts": [
            {
                "model": part.model,
                "threads": part.threads,
                "bandwidth": part.bandwidth,
                "others": part.others,
                "contenders": [_outcome_as_json(part, outcome, plan) for outcome in part.outcomes],
                "targets": [
                    {**asdict(target), "reached": target.reached} for target in targets(part, plan)
                ],
            }
            for part in parts
        ],
    }


def _outcome_as_json(part: Part, outcome: Outcome, plan: Plan) -> dict[str, Any]:
    return {
        "name": outcome.contender.name,
        "project": outcome.contender.project,
        "refused": outcome.refused,
        "weight_bytes": outcome.contender.weight_bytes,
        "seconds": outcome.runs,
        "share_of_bandwidth": {c: part.share(outcome, c, plan.tokens) for c in plan.contexts},
        "memory": outcome.memory,
        "correlation": outcome.correlation,
        "facts": outcome.facts,
    }


def _number(seconds: float | None, of: Any, digits: int = 1) -> str:
    return "-" if seconds is None else f"{of(seconds):.{digits}f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"
