"""`mlcawq compare`: several quantized models side by side."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlcawq.cli.bars import Bars
from mlcawq.errors import Problem, UserError

if TYPE_CHECKING:
    from rich.table import Table

    from mlcawq.comparison.result import Difference, Result

_LAYERS_SHOWN = 5


def compare(
    models: Annotated[
        list[Path],
        typer.Argument(
            help="Folders that `mlcawq quantize` wrote, or their reports.", metavar="A B …"
        ),
    ],
    against: Annotated[
        str | None,
        typer.Option("--against", help="Their original: measure all of them, with --text."),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option("--text", help="Text file to measure on, or wikitext2 (of the hub)."),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            "--window",
            min=2,
            help="Tokens in a window of text.  [default: 2048, or what models and text allow]",
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", min=2, help="Use only this many tokens of the text."),
    ] = None,
    device: Annotated[
        str, typer.Option("--device", help="Where built folders run: auto, cpu, cuda, vulkan:1, …")
    ] = "auto",
    html: Annotated[
        Path | None, typer.Option("--html", help="Also write a page with plots to this file.")
    ] = None,
    json_output: Annotated[
        bool, typer.Option("--json", help="One JSON document on stdout.")
    ] = False,
) -> None:
    """Put quantized models side by side, best first: what they cost, how far they are from fp16.

    The numbers are those that each quantization measured itself, on its own held-out tokens. With
    --against ORIGINAL --text FILE all of them are measured in one run on the same tokens, and
    their differences are paired, with standard errors.
    """
    if (against is None) != (text is None):
        raise typer.BadParameter("--against and --text go together")
    if len(models) < 2 and against is None:
        raise typer.BadParameter("give at least two models, or one with --against and --text")

    from mlcawq.comparison.measuring import Bench
    from mlcawq.comparison.result import compare as put_side_by_side
    from mlcawq.comparison.subjects import read_subjects

    problems = [] if html is None else _page_problems(html)
    try:
        subjects = read_subjects(models, measured=against is not None)
    except UserError as error:
        problems += error.problems
    if problems:
        raise UserError(*problems)
    measurements = None
    if against is not None and text is not None:
        bench = Bench(subjects, against, text, device=device, window=window, max_tokens=max_tokens)
        with Bars() as bars:
            measurements = bench.run(lambda done, total: bars("scoring text", done, total))
    result = put_side_by_side(subjects, measurements, text)
    if html is not None:
        from mlcawq.checkpoint.writing import write_file
        from mlcawq.comparison.page import comparison_page

        write_file(html, comparison_page(result))
    if json_output:
        print(json.dumps(result.to_json(), indent=2, ensure_ascii=False))
    else:
        _show(result, html)


def _page_problems(html: Path) -> list[Problem]:
    """Why a page could not be written there."""
    folder = html.absolute().parent
    if html.is_dir():
        return [Problem("is a folder", str(html), "name a file with --html")]
    if not folder.is_dir():
        return [Problem("no such folder", str(folder), "make it, or choose another --html")]
    if not os.access(folder, os.W_OK | os.X_OK):
        return [Problem("no permission to write there", str(folder), "choose another --html")]
    return []


def _show(result: Result, html: Path | None) -> None:
    from rich.console import Console

    from mlcawq.comparison.words import measured_words, shared_words

    console = Console()
    errors = Console(stderr=True)
    for warning in result.warnings:
        errors.print(f"note: {warning}", style="yellow", highlight=False, soft_wrap=True)
    console.print(measured_words(result), highlight=False)
    console.print(_summary(result))
    if shared_words(result):
        console.print(shared_words(result), highlight=False)
    if result.kinds:
        console.print("relative output error by linear, %", highlight=False)
        console.print(_differences(result, result.kinds))
    furthest = sorted(result.layers, key=lambda one: -one.ratio)[:_LAYERS_SHOWN]
    if furthest:
        console.print("of the blocks in which they differ most, %", highlight=False)
        console.print(_differences(result, furthest))
    if html is not None:
        errors.print(f"written to {html}", style="dim", highlight=False, soft_wrap=True)


def _summary(result: Result) -> Table:
    """A model a column where there are few, so that it fits a terminal."""
    from rich.table import Table

    from mlcawq.comparison.words import columns

    shown = columns(result)
    table = Table()
    table.add_column("")
    for row in result.rows:
        table.add_column(row.name, justify="right", overflow="fold")
    for column in shown:
        table.add_row(column.title, *(column.words(row) for row in result.rows))
    return table


def _differences(result: Result, differences: Sequence[Difference]) -> Table:
    from rich.table import Table

    table = Table()
    table.add_column("")
    for row in result.rows:
        table.add_column(row.name, justify="right", overflow="fold")
    for one in differences:
        cells = ("" if error is None else f"{100 * error:.2f}" for error in one.errors)
        table.add_row(one.where, *cells)
    return table
