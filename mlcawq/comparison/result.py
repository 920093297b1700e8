"""What a comparison says, as plain rows: for the terminal, for JSON, for the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import inf
from typing import Any

from mlcawq.comparison.measuring import Measurement
from mlcawq.comparison.subjects import Subject, differences
from mlcawq.evaluate.metrics import Estimate
from mlcawq.quantize.report import Report
from mlcawq.quantize.report.wording import recipe_facts, short_grid


@dataclass(frozen=True)
class Row:
    """One subject; None for what is not known of it.

    kl: nats a token, with its standard error where it was measured here. behind: its divergence
    less that of the best, token by token. size: bytes of all weights.
    """

    name: str
    recipe: str | None
    integers: str | None
    format: str | None
    bits_per_weight: float | None
    size: int | None
    kl: Estimate | None
    behind: Estimate | None
    top1: float | None
    perplexity: float | None
    original_perplexity: float | None
    seconds: float | None
    peak_memory: int | None


@dataclass(frozen=True)
class Difference:
    """Relative output errors of the subjects at one place, in the rows' order."""

    where: str
    errors: tuple[float | None, ...]

    @property
    def ratio(self) -> float:
        """Of the largest to the smallest one that is known."""
        known = [error for error in self.errors if error is not None]
        if len(known) < 2 or max(known) == 0:
            return 1.0
        return max(known) / min(known) if min(known) else inf


@dataclass(frozen=True)
class Result:
    """rows: best first, by divergence. kinds: by linear, root mean square over the layers.

    layers: of the blocks' outputs. recipes: the options in which the subjects differ, by dotted
    names. text: what was measured on, None where the numbers are those of the reports.
    """

    rows: tuple[Row, ...]
    warnings: tuple[str, ...]
    kinds: tuple[Difference, ...]
    layers: tuple[Difference, ...]
    recipes: dict[str, tuple[str | None, ...]]
    text: str | None = None
    tokens: int | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    subjects: Sequence[Subject],
    measurements: Sequence[Measurement] | None = None,
    text: str | None = None,
) -> Result:
    """Put subjects side by side. measurements: of each of them, on `text`."""
    measured = list(measurements) if measurements is not None else [None] * len(subjects)
    pairs = [(subject, _row(subject, one)) for subject, one in zip(subjects, measured, strict=True)]
    pairs.sort(key=lambda pair: pair[1].kl.mean if pair[1].kl is not None else inf)
    reports = [subject.report for subject, _ in pairs]
    first = measured[0]
    return Result(
        rows=tuple(row for _, row in pairs),
        warnings=tuple(differences(subjects, measured=measurements is not None)),
        kinds=_kinds(reports),
        layers=_layers(reports),
        recipes=_recipes(reports),
        text=text,
        tokens=None if first is None else first.comparison.model.tokens,
    )


def _row(subject: Subject, measurement: Measurement | None) -> Row:
    report = subject.report
    kl = top1 = perplexity = original = behind = None
    if report is not None:
        kl, top1 = Estimate(report.measured.kl, None), report.measured.agreement
        perplexity = report.measured.perplexity
        original = report.measured.original_perplexity
    if measurement is not None:
        comparison, behind = measurement.comparison, measurement.behind
        assert comparison.divergence is not None
        assert comparison.reference is not None
        kl, top1 = comparison.divergence.kl, comparison.divergence.top1.mean
        perplexity = comparison.model.perplexity
        original = comparison.reference.perplexity
    storage, run = (report.storage, report.run) if report is not None else (None, None)
    return Row(
        name=subject.name,
        recipe=None if report is None else str(report.recipe.get("name", "?")),
        integers=None if report is None else short_grid(report),
        format=None if report is None else report.format,
        bits_per_weight=None if report is None else report.bits_per_weight(),
        size=None if storage is None else storage.output,
        kl=kl,
        behind=behind,
        top1=top1,
        perplexity=perplexity,
        original_perplexity=original,
        seconds=None if run is None else run.total.seconds,
        peak_memory=None if run is None else run.total.peak_memory,
    )


def _kinds(reports: Sequence[Report | None]) -> tuple[Difference, ...]:
    means = [
        {} if report is None else {mean.name: mean.found for mean in report.mean_errors()}
        for report in reports
    ]
    kinds = dict.fromkeys(kind for mean in means for kind in mean)
    return tuple(Difference(kind, tuple(mean.get(kind) for mean in means)) for kind in kinds)


def _layers(reports: Sequence[Report | None]) -> tuple[Difference, ...]:
    errors = [
        {} if report is None else {block.name: block.error for block in report.blocks}
        for report in reports
    ]
    layers = dict.fromkeys(name for error in errors for name in error)
    return tuple(Difference(name, tuple(error.get(name) for error in errors)) for name in layers)


def _recipes(reports: Sequence[Report | None]) -> dict[str, tuple[str | None, ...]]:
    options = [{} if report is None else dict(recipe_facts(report.recipe)) for report in reports]
    names = dict.fromkeys(name for option in options for name in option)
    rows = {name: tuple(option.get(name) for option in options) for name in names}
    return {
        name: values
        for name, values in rows.items()
        if len({v for v, report in zip(values, reports, strict=True) if report is not None}) > 1
    }
