"""The output folder of a quantization, written from its journal and checked."""

from __future__ import annotations

import glob
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch

from mlcawq.checkpoint.hf_config import portable_config
from mlcawq.checkpoint.source import copy_side_files
from mlcawq.checkpoint.writing import staged_folder, write_json
from mlcawq.quantize.budget import LOGIT_TOKENS
from mlcawq.quantize.formats.base import LinearSpec, half
from mlcawq.quantize.formats.folder import companions, kept_linears, weights_writer
from mlcawq.quantize.metering import joined
from mlcawq.quantize.quantization import Quantization
from mlcawq.quantize.report import Report, Run, Storage, Usage
from mlcawq.quantize.report.files import write_report
from mlcawq.quantize.specs import head_name, linear_specs
from mlcawq.quantize.verification import check_function, check_weights


def clear_beside(out: Path, kind: str) -> None:
    """Remove what a killed run has left: this process alone holds the lock of `out`.

    kind: "partial" outputs, or "old" ones that a new output was about to replace.
    """
    for leftover in out.parent.glob(f".{glob.escape(out.name)}.{kind}-*"):
        # An old output was moved aside into a folder of its own: nothing else looks like that.
        if kind == "partial" or {path.name for path in leftover.iterdir()} <= {out.name}:
            shutil.rmtree(leftover, ignore_errors=True)


def write_output(done: Quantization, out: Path, report: Report, *, overwrite: bool) -> Report:
    """The output folder `out`, whole or not at all: from the journal, and what was left alone.

    done: all of its blocks are finished. Returns the report with what is only known now. Raises
    UserError where what was written is not what was computed.
    """
    model = done.model
    with staged_folder(out, overwrite=overwrite) as stage:
        writer = weights_writer(stage, done.fmt, model.outline.stored.names, done.needs.shard)
        size = 0
        beside = companions(model.outline, done.fmt)
        if done.recipe.head:  # which is in the journal, not the embedding's twin
            head = f"{head_name(model.outline)}.weight"
            beside = (item for item in beside if item[0] != head)
        for name, tensor in chain(_tensors(done), beside):
            writer.add(name, tensor)
            size += tensor.nbytes
        writer.close()
        config = portable_config(model.config, dtype="float16")
        if done.recipe.head:
            config["tie_word_embeddings"] = False
        linears = _quantized(done)
        entry = done.fmt.quantization_config(linears, kept_linears(model.outline, linears))
        if entry is not None:
            config["quantization_config"] = entry
        write_json(stage / "config.json", config)
        copy_side_files(model.folder, stage)
        report = replace(report, storage=Storage(model.reader.total_bytes, size), run=_usage(done))
        write_report(stage, report)
        _check(done, stage)
    clear_beside(out, "old")
    return report


def _quantized(done: Quantization) -> dict[str, LinearSpec]:
    """The linears that were quantized, by full name."""
    model, blocks = done.model, done.block_reports()[: done.model.num_blocks]
    specs = linear_specs(model.outline, done.recipe)
    names = [
        model.checkpoint_name(i, linear.name)
        for i, report in enumerate(blocks)
        for linear in report.linears
    ]
    if done.recipe.head:
        names.append(head_name(model.outline))
    return {name: specs[name] for name in names}


def _check(done: Quantization, folder: Path) -> None:
    """Read what was written, and compare it with what was computed."""
    digests = [entry["digests"] for entry in done.journal.reports]
    check_weights(folder, {name: digest for part in digests for name, digest in part.items()})
    if done.held_out and done.recipe.activations is None:
        original, quantized = (
            done.states[name][0][0, :LOGIT_TOKENS].cpu() for name in ("original", "quantized")
        )
        logits = done.quantized_head(quantized)
        ids = done.held_out[0][0, :LOGIT_TOKENS]
        check_function(folder, done.model, ids, original, logits)


def _tensors(done: Quantization) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the result: blocks from the journal, the rest as it was, in float16."""
    model, reader = done.model, done.model.reader
    blocks = {i: model.block_tensors(i) for i in range(model.num_blocks)}
    of_blocks = {name for names in blocks.values() for name in names}
    head: dict[str, torch.Tensor] = {}
    if done.recipe.head:
        head = done.journal.block_tensors(model.num_blocks)
        of_blocks.add(f"{head_name(model.outline)}.weight")
    for name in reader.names:
        if name not in of_blocks and name not in head:
            yield name, half(reader.torch(name), name)
    yield from sorted(head.items())
    reports = done.block_reports()[: model.num_blocks]
    for (i, names), report in zip(blocks.items(), reports, strict=True):
        tensors = done.journal.block_tensors(i)
        replaced = {model.checkpoint_name(i, f"{linear.name}.weight") for linear in report.linears}
        kept = {
            name: half(reader.torch(name), name)
            for name in names
            if name not in tensors and name not in replaced
        }
        yield from sorted({**tensors, **kept}.items())


def _usage(done: Quantization) -> Run:
    """Times and memory, of earlier, interrupted runs too."""
    blocks = [Usage(**entry["usage"]) for entry in done.journal.reports]
    total = joined([done.before, *blocks, done.meter.lap()])
    return Run(device=str(done.place.device), total=total, blocks=tuple(blocks))
