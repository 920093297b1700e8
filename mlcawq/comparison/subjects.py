"""What is compared: quantized folders and reports, and whether they belong together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlcawq.errors import Problem, UserError, raise_all
from mlcawq.quantize.report import REPORT_FILE, Report, read_report


@dataclass(frozen=True)
class Subject:
    """One model of a comparison.

    name: what tables call it, unlike all others. folder: None where only a report was given.
    """

    name: str
    folder: Path | None
    report: Report | None


def read_subjects(paths: Sequence[Path], *, measured: bool) -> list[Subject]:
    """Folders that `mlcawq quantize` wrote, or reports of such.

    measured: the models themselves are going to be run: a folder needs no report then, and a
    report alone is not enough.
    Raises UserError with everything that is wrong with any of them.
    """
    problems: list[Problem] = []
    found = []
    for path, name in zip(paths, _names(paths), strict=True):
        try:
            found.append(_read(path, name, measured=measured))
        except UserError as error:
            problems.extend(error.problems)
    places = [path.resolve() for path in paths]
    twice = {
        str(path) for path, place in zip(paths, places, strict=True) if places.count(place) > 1
    }
    problems += [Problem("is named twice", path, "name each once") for path in sorted(twice)]
    raise_all(problems)
    return found


def _read(path: Path, name: str, *, measured: bool) -> Subject:
    if path.is_dir():
        bare = measured and not (path / REPORT_FILE).is_file()
        return Subject(name, path, None if bare else read_report(path))
    report = read_report(path)
    if measured:
        raise UserError.one(
            "a report alone cannot be measured", str(path), "give the folder, or no --against"
        )
    return Subject(name, None, report)


def _names(paths: Sequence[Path]) -> list[str]:
    """The last parts of paths, as many as tell them apart; those of a report's folder."""
    parts = [(path.parent if path.name == REPORT_FILE else path).absolute().parts for path in paths]
    names = []
    for own in parts:
        count = 1
        while count < len(own) and sum(other[-count:] == own[-count:] for other in parts) > 1:
            count += 1
        names.append("/".join(own[-count:]))
    return names


def differences(subjects: Sequence[Subject], *, measured: bool) -> Iterator[str]:
    """Why numbers of these subjects should not be set against each other without a thought.

    measured: their divergences come from one and the same text.
    """
    reports = [(s.name, s.report) for s in subjects if s.report is not None]
    yield from _unlike(reports, "of different models", lambda r: f"{r.model} ({r.model_type})")
    yield from _unlike(reports, "of different numbers of layers", lambda r: str(len(r.blocks)))
    if not measured:
        yield from _unlike(
            reports,
            "measured on different tokens, so their divergences and perplexities are too "
            "(--against and --text measure all on one text)",
            lambda r: r.calibration.get("source", "?"),
            by=lambda r: str(r.calibration.get("digest")),
        )
    yield from _unlike(
        [(name, report) for name, report in reports if report.run is not None],
        "made on different devices, so times and memory differ with them",
        lambda r: r.run.device if r.run is not None else "",
    )


def _unlike(
    reports: Sequence[tuple[str, Report]],
    what: str,
    words: Callable[[Report], str],
    by: Callable[[Report], str] | None = None,
) -> Iterator[str]:
    by = by or words
    if len({by(report) for _, report in reports}) > 1:
        each = ", ".join(f"{name}: {words(report)}" for name, report in reports)
        yield f"{what} ({each})"
