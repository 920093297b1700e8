"""`mlcawq doctor`: what works here, what does not, and the fix."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

if TYPE_CHECKING:
    from rich.console import Console

    from mlcawq.doctor import Report

_MARKS = {
    "ok": ("ok", "green"),
    "info": ("-", "dim"),
    "warning": ("warning", "yellow"),
    "missing": ("missing", "red"),
    "broken": ("broken", "red"),
}


def doctor(
    json_output: Annotated[
        bool, typer.Option("--json", help="One JSON document on stdout.")
    ] = False,
) -> None:
    """Show what this machine and environment can do, and what to install for the rest.

    Exits with 1 when quantizing, building or chatting on the CPU is not possible here.
    """
    from mlcawq.doctor import examine

    report = examine()
    if json_output:
        print(json.dumps(report.as_json(), indent=2, ensure_ascii=False))
    else:
        _show(report)
    if not all(c.works for c in report.capabilities if "CPU" in c.name):
        raise typer.Exit(1)


def _show(report: Report) -> None:
    from rich.console import Console

    # Nothing is wrapped: the fixes are commands to be copied.
    console = Console(highlight=False, soft_wrap=True)
    width = max(len(finding.name) for finding in report.findings)
    area = ""
    for finding in report.findings:
        if finding.area != area:
            area = finding.area
            console.print(f"[bold]{area}[/bold]")
        word, style = _MARKS[finding.status]
        name, value = finding.name.ljust(width), escape(finding.value)
        console.print(f"  {name}  [{style}]{word:<7}[/{style}]  {value}")
        _show_fix(console, finding.fix, width + 13)
    console.print("\n[bold]what works here[/bold]")
    width = max(len(capability.name) for capability in report.capabilities)
    for capability in report.capabilities:
        mark = "[green]yes[/green]" if capability.works else "[yellow]no [/yellow]"
        name = capability.name.ljust(width)
        console.print(f"  {name}  {mark}  {escape(capability.lacks)}".rstrip())
        _show_fix(console, capability.fix, width + 9)


def _show_fix(console: Console, fix: str, indent: int) -> None:
    if fix:
        console.print(f"{' ' * indent}-> [cyan]{escape(fix)}[/cyan]")
