"""A quantized folder in another storage format: the same integers, nothing calibrated."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from mlcawq.checkpoint.hf_config import portable_config
from mlcawq.checkpoint.outline import Outline
from mlcawq.checkpoint.source import copy_side_files
from mlcawq.checkpoint.tensors import TensorReader
from mlcawq.checkpoint.writing import (
    check_output,
    free_bytes,
    replacing_problems,
    staged_folder,
    write_json,
)
from mlcawq.errors import Problem, UserError, raise_all
from mlcawq.quantize.formats import find_format
from mlcawq.quantize.formats.base import Format, LinearSpec, half
from mlcawq.quantize.formats.folder import companions, kept_linears, weights_writer
from mlcawq.quantize.report import REPORT_FILE, BlockReport, read_report
from mlcawq.quantize.report.files import write_report
from mlcawq.quantize.report.wording import size_words

_WIDER = ("BF16", "F32", "F64")  # types with values that float16 does not hold


class Progress(Protocol):
    """Told how many tensors of the model are written; returns at once."""

    def __call__(self, done: int, total: int) -> None: ...


@dataclass(frozen=True)
class Repacked:
    """What was written.

    source, format: names of formats. linears: how many are quantized. before, after: bytes.
    """

    source: str
    format: str
    linears: int
    before: int
    after: int


def repack(
    src: Path,
    out: Path,
    fmt: str,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Repacked:
    """Write the quantized folder `src` to the folder `out` in the format of that name.

    Integers, zero points and scales are those of `src`, so that both stand for the same weights;
    scales that are not float16 are rounded to it. Holds one linear at a time. `out` appears whole
    or not at all. Raises UserError with everything that is in the way, before any work.
    """
    src, out = Path(src), Path(out)
    target = find_format(fmt)
    outline = _checked(src, out, target, overwrite)
    source = outline.stored.format
    assert source is not None  # `_checked` has looked at it
    linears = _linears(outline)
    names = [name for name in outline.stored.names if name != _spare_head(outline, target)]
    with staged_folder(out, overwrite=overwrite) as stage:
        writer = weights_writer(stage, target, names)
        for done, name in enumerate(names):
            for key, tensor in _repacked(outline, target, linears, name):
                writer.add(key, tensor)
            if progress is not None:
                progress(done + 1, len(names))
        for key, tensor in companions(outline, target):
            writer.add(key, tensor)
        writer.close()
        size = TensorReader(stage).total_bytes
        config = portable_config(outline.config, dtype="float16")
        del config["quantization_config"]
        entry = target.quantization_config(linears, kept_linears(outline, linears))
        if entry is not None:
            config["quantization_config"] = entry
        write_json(stage / "config.json", config)
        copy_side_files(src, stage)
        _write_report(src, stage, target, linears, size)
    return Repacked(source.name, target.name, len(linears), outline.reader.total_bytes, size)


def _spare_head(outline: Outline, target: Format) -> str | None:
    """A head that is stored apart though it is the embedding, where a format has no use for it."""
    tied = outline.config.tie_word_embeddings and not target.one_file
    return f"{outline.names.stored_name(outline.skeleton.head)}.weight" if tied else None


def _checked(src: Path, out: Path, target: Format, overwrite: bool) -> Outline:
    """What `src` holds. Raises UserError with everything in the way of repacking it to `out`."""
    problems: list[Problem] = []
    outline: Outline | None = None
    try:
        outline = Outline(src)
    except UserError as error:
        problems.extend(error.problems)
    if outline is not None:
        problems.extend(_folder_problems(outline, target))
    for check in (
        lambda: raise_all(replacing_problems(src, out, overwrite)),
        lambda: check_output(out, overwrite=overwrite),
    ):
        try:
            check()
        except UserError as error:
            problems.extend(error.problems)
    if outline is not None and not problems:
        problems.extend(_disk_problems(outline, target, out))
    raise_all(dict.fromkeys(problems))
    assert outline is not None
    return outline


def _folder_problems(outline: Outline, target: Format) -> Iterator[Problem]:
    yield from outline.problems()
    if not outline.readable:
        return
    stored = outline.stored
    if stored.format is None:
        yield Problem(
            "the checkpoint is not quantized",
            str(outline.reader.folder),
            "quantize it first: mlcawq quantize",
        )
        return
    if stored.format is target:
        yield Problem(f"is stored as {target.name} already", str(outline.reader.folder))
    yield from target.problems(stored.linears)
    for name in outline.reader.names:
        if stored.unquantized(name) == name and outline.reader.info(name).dtype in _WIDER:
            try:
                half(outline.reader.torch(name), name)
            except UserError as error:
                yield from error.problems


def _disk_problems(outline: Outline, target: Format, out: Path) -> Iterator[Problem]:
    stored, reader = outline.stored, outline.reader
    kept = (name for name in reader.names if stored.unquantized(name) == name)
    needed = sum(reader.info(name).nbytes for name in kept)
    needed += sum(target.bytes_of(spec) for spec in stored.linears.values())
    free = free_bytes(out)
    if needed > free:
        yield Problem(
            f"needs about {size_words(needed)}, {size_words(free)} are free",
            str(out),
            "free some space, or choose another -o",
        )


def _linears(outline: Outline) -> dict[str, LinearSpec]:
    """The quantized linears; symmetric where the zero points are the middle in all of them.

    AWQ's formats store zero points even so, and a format that need not should not.
    """
    linears = outline.stored.linears
    middles = {name: 2 ** (spec.grid.bits - 1) for name, spec in linears.items()}
    if any(bool((outline.stored.zeros(name) != middles[name]).any()) for name in linears):
        return dict(linears)
    return {
        name: replace(spec, grid=replace(spec.grid, symmetric=True))
        for name, spec in linears.items()
    }


def _repacked(
    outline: Outline, target: Format, linears: Mapping[str, LinearSpec], name: str
) -> Iterator[tuple[str, torch.Tensor]]:
    """What is stored of a tensor, by its unquantized name."""
    linear = name.removesuffix(".weight")
    if name != linear and linear in linears:
        weight = replace(outline.stored.quantized(linear), grid=linears[linear].grid)
        yield from target.tensors(linear, weight, linears[linear]).items()
    else:
        yield name, half(outline.reader.torch(name), name)


def _write_report(
    src: Path, stage: Path, target: Format, linears: Mapping[str, LinearSpec], size: int
) -> None:
    """The report and card of a folder of ours, as they are true of the new one."""
    if not (src / REPORT_FILE).is_file():
        return
    report = read_report(src)
    blocks = tuple(_block_report(block, target, linears) for block in report.blocks)
    # Not what quantizing to this format would have been given, though the same weights.
    fingerprint = hashlib.sha256(f"{report.fingerprint} {target.name}".encode()).hexdigest()
    storage = report.storage and replace(report.storage, output=size)
    report = replace(
        report, blocks=blocks, format=target.name, storage=storage, fingerprint=fingerprint
    )
    write_report(stage, report)


def _block_report(
    block: BlockReport, target: Format, linears: Mapping[str, LinearSpec]
) -> BlockReport:
    found = []
    for linear in block.linears:
        spec = linears.get(block.full_name(linear))
        size = linear.stored_bytes if spec is None else target.bytes_of(spec)
        found.append(replace(linear, stored_bytes=size))
    return replace(block, linears=tuple(found))
