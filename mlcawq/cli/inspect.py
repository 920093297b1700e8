"""`mlcawq inspect`: what a folder or file is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mlcawq.inspection import Description

_NOT_SHOWN = ("metadata",)  # in full with --json only


def inspect(
    path: Annotated[
        Path,
        typer.Argument(help="A checkpoint or model folder, a compiled library, or a weight file."),
    ],
    json_output: Annotated[
        bool, typer.Option("--json", help="One JSON document on stdout.")
    ] = False,
) -> None:
    """Show what a folder or file is, whether it is whole, and what can be done with it.

    Exits with 1 where something keeps it from being used.
    """
    from mlcawq.inspection import describe

    description = describe(path)
    if json_output:
        print(json.dumps(description.as_json(), indent=2, ensure_ascii=False))
    else:
        print("\n".join(_lines(description)))
    if description.problems:
        raise typer.Exit(1)


def _lines(description: Description) -> list[str]:
    shown = {key: value for key, value in description.facts.items() if key not in _NOT_SHOWN}
    width = max(map(len, shown), default=0)
    lines = [f"{description.path}: {description.kind}"]
    lines += [f"  {key.ljust(width)}  {_text(key, value)}" for key, value in shown.items()]
    if description.problems:
        lines.append("problems:")
        for problem in description.problems:
            lines += [f"  {line}" for line in str(problem).splitlines()]
    elif description.next_step:
        lines.append(f"next: {description.next_step}")
    return lines


def _text(key: str, value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_number(key, count)}" for name, count in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "unknown"
    return _number(key, value)


def _number(key: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int):
        return str(value)
    if key == "parameters":
        return f"{value:,}" if value < 1e6 else f"{value:,} ({value / 1e6:.1f} M)"
    if key.startswith("bytes"):
        from mlcawq.inspection.description import size

        return size(value)
    return str(value)
