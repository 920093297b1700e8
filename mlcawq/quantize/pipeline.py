"""A checkpoint from end to end: checks, blocks, measurement, output; resumable in between."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from mlcawq.checkpoint.outline import Outline
from mlcawq.checkpoint.source import require_tokenizer
from mlcawq.checkpoint.streaming import StreamedModel
from mlcawq.checkpoint.writing import check_output, replacing_problems
from mlcawq.errors import Problem, UserError, raise_all
from mlcawq.families import ARCHITECTURES
from mlcawq.families.tracing import described
from mlcawq.quantize.budget import fitting, limited, machine_problems
from mlcawq.quantize.calibration import CalibrationData
from mlcawq.quantize.checks import calibration_problems, notes, recipe_problems, stored_bytes
from mlcawq.quantize.distributed import everywhere, on_first
from mlcawq.quantize.fingerprint import already_done, digest, fingerprint_of, versions
from mlcawq.quantize.formats import find_format
from mlcawq.quantize.journal import Journal
from mlcawq.quantize.metering import Meter
from mlcawq.quantize.output import clear_beside, write_output
from mlcawq.quantize.place import Place
from mlcawq.quantize.progress import Progress, Silent
from mlcawq.quantize.quantization import Quantization
from mlcawq.quantize.recipe import Recipe
from mlcawq.quantize.report import REPORT_FILE, Report
from mlcawq.quantize.rotation import rotated_model, rotation_problems
from mlcawq.quantize.shortage import shortage_told


def check_checkpoint(
    src: Path, out: Path, recipe: Recipe, fmt: str = "awq", *, overwrite: bool = False
) -> None:
    """Raise UserError with everything in the way of quantizing `src` to `out`. Reads no weights.

    An `out` that mlcawq wrote passes: whether it is this very result is known only once the
    calibration text has been read.
    """
    problems: list[Problem] = []
    ours = (out / REPORT_FILE).is_file()
    for check in (
        lambda: require_tokenizer(src),
        lambda: raise_all(_checkpoint_problems(_outline(src), recipe, fmt)),
        lambda: raise_all(replacing_problems(src, out, overwrite)),
        lambda: check_output(out, overwrite=overwrite or ours),
    ):
        try:
            check()
        except UserError as error:
            problems.extend(error.problems)
    raise_all(problems)


def _checkpoint_problems(outline: Outline, recipe: Recipe, fmt: str) -> Iterator[Problem]:
    yield from recipe_problems(outline, recipe, fmt)
    yield from outline.problems()
    if recipe.rotation is not None and outline.table is not None:
        yield from rotation_problems(outline, outline.table)


def _outline(src: Path) -> Outline:
    """Of a checkpoint folder; with what a table would say, where there is none."""
    outline = Outline(src)
    if outline.table is None and not any(outline.problems()):
        outline.table = StreamedModel(src).architecture
    return outline


def quantize_checkpoint(
    src: Path,
    out: Path,
    recipe: Recipe,
    calibration: CalibrationData,
    *,
    name: str | None = None,
    fmt: str = "awq",
    overwrite: bool = False,
    restart: bool = False,
    progress: Progress | None = None,
    max_memory: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Report:
    """Quantize the checkpoint folder `src` into the folder `out`.

    name: what the model card calls the model; the folder's name when None.
    fmt: the storage format, one of `formats.FORMATS`.
    overwrite: replace an `out` that is not empty.
    restart: discard what an earlier, unfinished run has left.
    max_memory: bytes that this process may take; hidden states go to the disk, and batches get
        smaller, where it is little. What the machine has left when None.
    device: where blocks are run and searched. dtype: of the matrix products of the original and of
        the quantized block; searches and all sums are in float32.

    Holds one decoder block and the hidden states of the text. Killed at any moment, the same call
    goes on after the last finished block and ends with the same bytes. Raises UserError for
    everything that a user can act on; `out` appears whole or not at all.

    Several processes (distributed.py) make the same call, with the same data: each takes its share
    of it, and the first one writes.
    """
    with shortage_told(Path(out)):
        return _quantize_checkpoint(
            Path(src),
            Path(out),
            recipe,
            calibration,
            name=name,
            fmt=fmt,
            overwrite=overwrite,
            restart=restart,
            progress=progress or Silent(),
            max_memory=max_memory,
            place=Place(torch.device(device), dtype),
        )


def _quantize_checkpoint(
    src: Path,
    out: Path,
    recipe: Recipe,
    calibration: CalibrationData,
    *,
    name: str | None,
    fmt: str,
    overwrite: bool,
    restart: bool,
    progress: Progress,
    max_memory: int | None,
    place: Place,
) -> Report:
    meter = Meter(place.device)
    everywhere(lambda: check_checkpoint(src, out, recipe, fmt, overwrite=overwrite))
    model = StreamedModel(src)
    if recipe.rotation is not None:
        model = rotated_model(model, recipe.rotation)
    if model.config.model_type not in ARCHITECTURES:
        layouts = (model.architecture.groups, *model.architecture.layouts)
        lines = [line for groups in layouts for line in described(groups)]
        progress.traced(model.config.model_type, list(dict.fromkeys(lines)))
    raise_all(calibration_problems(calibration, model.config))
    fingerprint = fingerprint_of(model, recipe, calibration, fmt)
    done = on_first(lambda: already_done(out, fingerprint))
    if done is not None and not overwrite:
        with Journal(out, fingerprint, restart=restart) as journal:
            journal.discard()
        return done
    on_first(lambda: check_output(out, overwrite=overwrite))
    stored = stored_bytes(model.outline, recipe, fmt)
    needs = fitting(model.outline, recipe, stored, calibration, limited(max_memory))
    needs = replace(needs, notes=tuple(notes(model.outline, recipe, fmt)))
    everywhere(lambda: raise_all(machine_problems(needs, out, max_memory)))
    progress.planned(needs)

    with Journal(out, fingerprint, restart=restart) as journal:
        on_first(lambda: clear_beside(journal.out, "partial"))
        run = Quantization(
            model, recipe, calibration, find_format(fmt), journal, meter, needs, place
        )
        progress.started(model.num_blocks, journal.finished)
        for i in range(journal.finished, model.num_blocks):
            progress.block_done(run.block(i))
        if recipe.head and journal.finished == model.num_blocks:
            progress.stage("head")
            run.head()
        progress.stage("measuring")
        measured = run.measure()
        report = Report(
            model=name or src.resolve().name,
            model_type=model.config.model_type,
            recipe=recipe.model_dump(mode="json"),
            calibration={
                "source": calibration.source,
                "sequences": len(calibration.sequences),
                "tokens": calibration.tokens,
                "digest": calibration.digest,
            },
            versions=versions(),
            fingerprint=digest(fingerprint),
            blocks=run.block_reports(),
            measured=measured,
            format=fmt,
            warnings=run.warnings(measured),
        )
        progress.stage("writing")
        report = on_first(lambda: write_output(run, out, report, overwrite=overwrite))
        journal.discard()
    return report
