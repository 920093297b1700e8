"""The columns of a comparison, alike on the terminal and on the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlcawq.comparison.result import Result, Row
from mlcawq.evaluate.metrics import Estimate
from mlcawq.quantize.report.wording import size_words, time_words


@dataclass(frozen=True)
class Column:
    """title: with the unit. words: of a row, empty for what is not known."""

    title: str
    words: Callable[[Row], str]


_COLUMNS = (
    Column("recipe", lambda row: row.recipe or ""),
    Column("integers", lambda row: row.integers or ""),
    Column("format", lambda row: row.format or ""),
    Column("bits/weight", lambda row: _number(row.bits_per_weight, ".2f")),
    Column("size", lambda row: "" if row.size is None else size_words(row.size)),
    Column("KL, mnat/token", lambda row: _millinats(row.kl)),
    Column("behind best", lambda row: _millinats(row.behind, sign="+")),
    Column("same top token", lambda row: _number(row.top1, ".2%")),
    Column("perplexity", lambda row: _number(row.perplexity, ".5g")),
    Column("original", lambda row: _number(row.original_perplexity, ".5g")),
    Column("time", lambda row: "" if row.seconds is None else time_words(row.seconds)),
    Column("memory", lambda row: size_words(row.peak_memory) if row.peak_memory else ""),
)


def columns(result: Result) -> list[Column]:
    """Those in which rows differ; what they share is told by `shared_words`."""
    return [column for column in _COLUMNS if _shared(column, result) is None]


def shared_words(result: Result) -> str:
    """What is the same of all ("All alike: format awq, bits/weight 4.16."), or nothing."""
    shared = [(column.title, _shared(column, result)) for column in _COLUMNS]
    words = [f"{title} {value}" for title, value in shared if value]
    return f"All alike: {', '.join(words)}." if words else ""


def _shared(column: Column, result: Result) -> str | None:
    """The one value of a column, empty where nothing is known; None where rows differ."""
    found = {column.words(row) for row in result.rows}
    # One model alone shares nothing with others: whatever is known of it is shown.
    if len(found) > 1 or (len(result.rows) == 1 and found != {""}):
        return None
    return found.pop()


def cells(row: Row, shown: Sequence[Column]) -> list[str]:
    """A row's words in these columns."""
    return [column.words(row) for column in shown]


def measured_words(result: Result) -> str:
    """Where the divergences come from."""
    if result.text is None:
        return "As each quantization measured itself, on its own held-out tokens."
    return (
        f"All measured in one run on {result.tokens:,} tokens of {result.text}; differences from "
        "the best are paired, token by token, with their standard errors."
    )


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _millinats(value: Estimate | None, sign: str = "") -> str:
    if value is None:
        return ""
    text = format(1000 * value.mean, f"{sign}.2f")
    if value.standard_error is not None:
        text += f" ± {1000 * value.standard_error:.2f}"
    return text
