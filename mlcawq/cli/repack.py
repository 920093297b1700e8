"""`mlcawq repack`: a quantized folder in another storage format."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def repack(
    model: Annotated[str, typer.Argument(help="A quantized checkpoint folder, or a hub name.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")],
    fmt: Annotated[
        str,
        typer.Option(
            "--format",
            help="awq, awq-gemv, awq-gemv-fast, llm-awq, compressed-tensors, or fake: the "
            "dequantized weights in float16.",
        ),
    ],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an output folder that exists.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Of a hub name: branch, tag or commit.")
    ] = None,
    trust_pickle: Annotated[
        bool,
        typer.Option("--trust-pickle", help="Read pickle weights where there are no safetensors."),
    ] = False,
    json_output: Annotated[
        bool, typer.Option("--json", help="One JSON document on stdout.")
    ] = False,
) -> None:
    """Write the integers of a quantized MODEL in another format, without calibrating again.

    Reads AutoAWQ's gemm, gemv and gemv_fast, llm-awq and compressed-tensors, whoever wrote them.
    """
    from mlcawq.quantize.formats import find_format

    find_format(fmt)  # before anything is downloaded

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    from mlcawq.checkpoint.source import resolve
    from mlcawq.quantize.repack import repack as run
    from mlcawq.quantize.report.wording import size_words

    folder = resolve(model, trust_pickle=trust_pickle, revision=revision)
    console = Console(stderr=True)
    columns = (TextColumn("repacking"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=None)
        done = run(
            folder,
            output,
            fmt,
            overwrite=overwrite,
            progress=lambda count, total: bar.update(task, completed=count, total=total),
        )
    if json_output:
        print(json.dumps({"output": str(output), **asdict(done)}, indent=2))
    else:
        print(
            f"{done.linears} linears from {done.source} to {done.format}, "
            f"{size_words(done.before)} -> {size_words(done.after)}\nwritten to {output}"
        )
