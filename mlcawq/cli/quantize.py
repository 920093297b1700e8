"""`mlcawq quantize`: a Hugging Face model to 4-bit AWQ."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from mlcawq.quantize.budget import Needs
    from mlcawq.quantize.report import BlockReport


def quantize(
    model: Annotated[str, typer.Argument(help="A Hugging Face checkpoint folder, or a hub name.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")],
    recipe: Annotated[
        str,
        typer.Option(
            "--recipe",
            help="A recipe that `mlcawq recipes` lists, as awq, awq+gptq or best, or a YAML file.",
        ),
    ] = "awq",
    bits: Annotated[
        int | None, typer.Option("--bits", help="Bits of a weight.  [default: the recipe's, 4]")
    ] = None,
    group_size: Annotated[
        str | None,
        typer.Option(
            "--group-size",
            help="Weights that share a scale: 32, 64, 128, or channel: all of an output channel.  "
            "[default: the recipe's, 128]",
        ),
    ] = None,
    symmetric: Annotated[
        bool | None,
        typer.Option(
            "--symmetric/--asymmetric",
            help="Without or with a zero point for each group.  [default: the recipe's]",
        ),
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(
            "--override",
            help="Other integers for linears in whose name a regular expression is found: "
            "'down_proj$=bits=8,group=32,symmetric=true'; repeatable, later ones win.",
        ),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            "--keep",
            help="Leave linears in whose name this regular expression is found in fp16; "
            "repeatable.",
        ),
    ] = None,
    quantize_head: Annotated[
        bool,
        typer.Option(
            "--quantize-head",
            help="Quantize the output head too. Few engines read such a head.",
        ),
    ] = False,
    calib: Annotated[
        str,
        typer.Option(
            "--calib",
            help="Calibration text: bundled, a .txt or .jsonl file, pileval or wikitext.",
        ),
    ] = "bundled",
    calib_samples: Annotated[
        int, typer.Option("--calib-samples", min=1, help="Calibration sequences, at most.")
    ] = 128,
    calib_seq_len: Annotated[
        int | None,
        typer.Option(
            "--calib-seq-len",
            min=2,
            help="Tokens in each.  [default: 512, or what the model allows]",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the choice of text.")] = 0,
    fmt: Annotated[
        str,
        typer.Option(
            "--format",
            help="awq (AutoAWQ's gemm), awq-gemv, awq-gemv-fast, llm-awq, compressed-tensors, or "
            "fake: the dequantized weights in float16, for measuring any --bits.",
        ),
    ] = "awq",
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            help="Of --recipe best, how long the blocks may take in all, as 30m: fewer recipes are "
            "tried where it is short.  [default: all are tried]",
        ),
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option(
            "--max-memory",
            help="What this process may take, as 8GB: where it is little, hidden states go to the "
            "disk and batches get smaller.  [default: what is free]",
        ),
    ] = None,
    device: Annotated[
        str, typer.Option("--device", help="auto (a GPU where there is one), cpu, cuda or cuda:1.")
    ] = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype",
            help="Of a running block's products: auto, float32 or bfloat16. Searches are float32.",
        ),
    ] = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an output folder that exists.")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Discard what an interrupted run has left.")
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
    """Quantize MODEL to a complete folder, in AutoAWQ's "gemm" format or another.

    An interrupted run goes on after its last finished block when the same command is run again.
    Several processes share the work: torchrun --nproc-per-node 2 -m mlcawq quantize ...
    """
    from mlcawq.checkpoint.source import load_tokenizer, resolve
    from mlcawq.quantize.budget import parse_bytes
    from mlcawq.quantize.choosing import within
    from mlcawq.quantize.formats import find_format
    from mlcawq.quantize.patterns import parse_override
    from mlcawq.quantize.place import find_device, find_dtype
    from mlcawq.quantize.recipe import extended, load_recipe

    find_format(fmt)
    size = int(group_size) if group_size and group_size.isdigit() else group_size
    options: dict[str, Any] = {"bits": bits, "group_size": size, "symmetric": symmetric}
    options["head"] = quantize_head or None
    options = {key: value for key, value in options.items() if value is not None}
    chosen = load_recipe(recipe, options)
    further: dict[str, list[Any]] = {
        "overrides": [parse_override(text) for text in override or ()],
        "modules_to_not_convert": list(keep or ()),
    }
    chosen = extended(chosen, further)
    if budget is not None:
        chosen = within(chosen, budget)
    memory = parse_bytes(max_memory, "--max-memory") if max_memory else None
    place, products = find_device(device), find_dtype(dtype)

    _quiet_libraries()
    from rich.console import Console

    from mlcawq.checkpoint.decoder_config import read_decoder_config
    from mlcawq.quantize import distributed
    from mlcawq.quantize.calibration import load_calibration
    from mlcawq.quantize.pipeline import check_checkpoint, quantize_checkpoint

    with distributed.session():
        folder = resolve(model, trust_pickle=trust_pickle, revision=revision)

        check_checkpoint(folder, output, chosen, fmt, overwrite=overwrite)
        console = Console(stderr=True, quiet=not distributed.is_first())
        length = calib_seq_len or min(512, read_decoder_config(folder).max_position_embeddings)
        console.print("reading calibration text", style="dim", highlight=False)
        calibration = load_calibration(
            calib,
            load_tokenizer(folder),
            samples=calib_samples,
            seq_len=length,
            seed=seed,
        )
        try:
            with _Bar(console) as progress:
                report = quantize_checkpoint(
                    folder,
                    output,
                    chosen,
                    calibration,
                    name=folder.resolve().name if Path(model).expanduser().exists() else model,
                    fmt=fmt,
                    overwrite=overwrite,
                    restart=restart,
                    progress=progress,
                    max_memory=memory,
                    device=place,
                    dtype=products,
                )
        except KeyboardInterrupt:
            console.print(
                "interrupted; the finished blocks are kept: run the same command again to go on",
                highlight=False,
            )
            sys.exit(130)
        if not distributed.is_first():
            return
        if json_output:
            print(json.dumps({"output": str(output), **report.to_json()}, indent=2))
        else:
            from mlcawq.cli.quantize_result import show

            show(report, output, Console(), console)


def _quiet_libraries() -> None:
    """transformers and the hub may not write into our output."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


class _Bar:
    """A progress bar on a terminal, a line for each block elsewhere."""

    def __init__(self, console: Console) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            speed_estimate_period=24 * 3600,  # blocks can take minutes each
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("block", total=None, loss="")
        self._blocks = self._left = 0
        self._begun: float | None = None

    def __enter__(self) -> _Bar:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def traced(self, model_type: str, groups: Sequence[str]) -> None:
        self._say(f"{model_type} has no table; its blocks were traced instead:")
        for line in groups:
            self._say(f"  {line}")

    def planned(self, needs: Needs) -> None:
        from mlcawq.quantize.budget import gigabytes

        self._say(
            f"about {gigabytes(needs.memory)} of memory and {gigabytes(needs.disk)} of disk "
            f"needed, {needs.batch_tokens} tokens at a time, hidden states "
            f"{'on the disk' if needs.on_disk else 'in memory'}; the time is told after a block"
        )
        for note in needs.notes:
            self._say(note)

    def started(self, blocks: int, finished: int) -> None:
        self._blocks, self._left = blocks, blocks - finished
        self._begun = time.monotonic()
        self._bar.update(self._task, total=blocks, completed=finished)
        if finished:
            self._say(f"going on after {finished} finished blocks of {blocks}")

    def block_done(self, report: BlockReport) -> None:
        self._left -= 1
        if self._begun is not None and self._left:
            each = time.monotonic() - self._begun
            self._say(f"{_time(each)} for a block, about {_time(each * self._left)} for the rest")
        self._begun = None  # the first block is the measure
        self._bar.update(self._task, advance=1, loss=f"loss {report.error:.4f}")
        if not self._console.is_terminal:
            self._say(f"{report.name}: relative output error {report.error:.4f}")

    def stage(self, name: str) -> None:
        self._bar.update(self._task, description=name, loss="")

    def _say(self, line: str) -> None:
        self._console.print(line, style="dim", highlight=False)


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
