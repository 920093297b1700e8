"""A checkpoint from block to block: original in, AWQ folder out, resumable in between."""

from __future__ import annotations

import glob
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from torch import nn

import mlcawq
from mlcawq.checkpoint.hf_config import portable_config
from mlcawq.checkpoint.outline import Outline
from mlcawq.checkpoint.source import SIDE_FILES, copy_side_files, require_tokenizer
from mlcawq.checkpoint.streaming import StreamedModel
from mlcawq.checkpoint.tensors import TensorReader
from mlcawq.checkpoint.writing import (
    check_output,
    replacing_problems,
    staged_folder,
    write_json,
)
from mlcawq.errors import Problem, UserError, raise_all
from mlcawq.families import ARCHITECTURES
from mlcawq.families.rows import value_head_dim
from mlcawq.families.tracing import described
from mlcawq.quantize.block import BlockResult, quantize_block
from mlcawq.quantize.budget import (
    LOGIT_TOKENS,
    Needs,
    fitting,
    limited,
    machine_problems,
)
from mlcawq.quantize.calibration import CalibrationData, batched
from mlcawq.quantize.checks import (
    calibration_problems,
    notes,
    recipe_problems,
    stored_bytes,
)
from mlcawq.quantize.choosing import Chooser, Part, Trial, distance, divided
from mlcawq.quantize.distributed import everywhere, is_first, on_first, share, total
from mlcawq.quantize.formats import find_format
from mlcawq.quantize.formats.base import Format, LinearSpec, half
from mlcawq.quantize.formats.folder import companions, kept_linears, weights_writer
from mlcawq.quantize.guards import quantize_guarded
from mlcawq.quantize.head import quantize_head
from mlcawq.quantize.head_of_model import head_of, norm_tensors, with_head
from mlcawq.quantize.journal import Journal
from mlcawq.quantize.metering import Meter, joined
from mlcawq.quantize.place import Place, give_back_memory, run_exactly
from mlcawq.quantize.recipe import Recipe
from mlcawq.quantize.report import (
    REPORT_FILE,
    BlockReport,
    LinearReport,
    ModelReport,
    Report,
    Run,
    Storage,
    Usage,
)
from mlcawq.quantize.report.files import write_report
from mlcawq.quantize.rotation import rotated_model, rotation_problems
from mlcawq.quantize.rounding import Original
from mlcawq.quantize.shortage import shortage_told
from mlcawq.quantize.specs import head_name, linear_specs
from mlcawq.quantize.states import HiddenStates, shapes_of
from mlcawq.quantize.verification import check_function, check_weights, digest_of

# Of the vocabulary: a perplexity above it says that a model makes nothing of what it is given.
_GUESSING = 0.5


class Progress(Protocol):
    """Told what happens; every method returns at once."""

    def traced(self, model_type: str, groups: Sequence[str]) -> None:
        """The architecture has no table; its scaling groups were found by tracing, a line each."""

    def planned(self, needs: Needs) -> None:
        """The checks have passed; work begins."""

    def started(self, blocks: int, finished: int) -> None:
        """`finished` blocks were done by an earlier run."""

    def block_done(self, report: BlockReport) -> None: ...

    def stage(self, name: str) -> None:
        """What is done after the blocks."""


class Silent:
    """Progress for nobody."""

    def traced(self, model_type: str, groups: Sequence[str]) -> None: ...

    def planned(self, needs: Needs) -> None: ...

    def started(self, blocks: int, finished: int) -> None: ...

    def block_done(self, report: BlockReport) -> None: ...

    def stage(self, name: str) -> None: ...


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
    fingerprint = _fingerprint(model, recipe, calibration, fmt)
    done = on_first(lambda: _already_done(out, fingerprint))
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
        run = _Run(model, recipe, calibration, find_format(fmt), journal, meter, needs, place)
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
            versions=_versions(),
            fingerprint=_digest(fingerprint),
            blocks=run.block_reports(),
            measured=measured,
            format=fmt,
            warnings=run.warnings(measured),
        )
        progress.stage("writing")
        report = on_first(lambda: run.write(out, report, overwrite=overwrite))
        journal.discard()
    return report


class _Run:
    """The state of a quantization between two blocks."""

    def __init__(
        self,
        model: StreamedModel,
        recipe: Recipe,
        calibration: CalibrationData,
        fmt: Format,
        journal: Journal,
        meter: Meter,
        needs: Needs,
        place: Place,
    ) -> None:
        self.meter, self.needs, self.place = meter, needs, place
        self.model, self.recipe, self.fmt, self.journal = model, recipe, fmt, journal
        self.seen = calibration.held_out_is_seen
        if is_first():
            self._clear_beside("partial")
        text, self.held_out = (
            batched(share(sorted(sequences, key=len, reverse=True)), needs.batch_tokens)
            for sequences in (calibration.sequences, calibration.held_out)
        )
        self.states = {"calibration": self._room(text), "original": self._room(self.held_out)}
        self.states["quantized"] = self._room(self.held_out)
        if recipe.follows_original:  # what the original model makes of the calibration text
            self.states["reference"] = self._room(text)
        self.chooser: Chooser | None = None
        if recipe.choice is not None:
            self.chooser = Chooser(recipe.choice, model.num_blocks, journal.reports)
        if journal.finished:
            journal.load(self.states)
        else:
            everywhere(lambda: raise_all(_unstorable(model)))
            for name, states in self.states.items():
                batches = text if name in ("calibration", "reference") else self.held_out
                for j, ids in enumerate(batches):
                    states[j] = model.embed(ids)
        self.before = meter.lap()

    def _room(self, batches: Sequence[torch.Tensor]) -> HiddenStates:
        """For the hidden states of token ids [B, T] each."""
        folder = self.journal.folder if self.needs.on_disk else None
        size = self.model.config.hidden_size
        return HiddenStates(shapes_of(batches), size, self.place.device, folder)

    def _clear_beside(self, kind: str) -> None:
        """Remove what a killed run has left: this process alone holds the journal's lock.

        kind: "partial" outputs, or "old" ones that a new output was about to replace.
        """
        out = self.journal.out
        for leftover in out.parent.glob(f".{glob.escape(out.name)}.{kind}-*"):
            # An old output was moved aside into a folder of its own: nothing else looks like that.
            if kind == "partial" or {path.name for path in leftover.iterdir()} <= {out.name}:
                shutil.rmtree(leftover, ignore_errors=True)

    def block(self, i: int) -> BlockReport:
        """Quantize block i and commit it to the journal."""
        model = self.model
        name = model.block_name(i)
        block = self._load(i)
        self._advance("original", block, i)
        original = self._load(i) if self.recipe.follows_original else None
        trials: list[Trial] = []
        if self.chooser is not None and original is not None:
            block, result, retreats, trials = self._choose(i, original)
            self._advance("calibration", block, i)
        else:
            block, result, retreats = quantize_guarded(
                block,
                lambda: self._load(i),
                self.recipe,
                partial(self._quantize, i, original, None),
                name,
            )
            assert isinstance(result.outputs, HiddenStates)
            self.states["calibration"] = result.outputs
        self._advance("quantized", block, i)
        if original is not None:
            self._advance("reference", original, i)
        del block, original
        stored = self._stored(i, result)
        linears = tuple(
            _with_size(linear, model.checkpoint_name(i, linear.name), stored)
            for linear in result.linears
        )
        chosen = min(trials, key=lambda trial: trial.error).name if trials else None
        report = BlockReport(
            name, result.error, linears, chosen, warnings=(*retreats, *result.warnings)
        )
        digests = {
            model.checkpoint_name(i, linear): digest_of(weight)
            for linear, weight in result.weights.items()
            if is_first()
        }
        usage = asdict(self.meter.lap())
        entry = {"report": asdict(report), "usage": usage, "digests": digests}
        if self.chooser is not None:
            seconds = on_first(lambda: usage["seconds"])
            entry["choice"] = self.chooser.record(trials, seconds)
        self.journal.commit(stored, self.states, entry)
        give_back_memory()
        return report

    def head(self) -> None:
        """Quantize the head and commit it to the journal, as one block more."""
        model = self.model
        name = head_name(model.outline)
        result = quantize_head(
            head_of(model, self.place.device), self.states["calibration"], self.recipe
        )
        stored = self.fmt.tensors(
            name, result.weight, linear_specs(model.outline, self.recipe)[name]
        )
        stored |= {key: half(value, key) for key, value in norm_tensors(model, result.norm).items()}
        linear = _with_size(result.linear, name, stored)
        report = BlockReport(name, linear.found, (linear,))
        entry = {"report": asdict(report), "usage": asdict(self.meter.lap()), "digests": {}}
        self.journal.commit(stored, self.states, entry)

    @cached_property
    def _quantized_head(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Once all is quantized: what the result makes of hidden states, as StreamedModel.head."""
        if not self.recipe.head:
            return self.model.head
        spec = linear_specs(self.model.outline, self.recipe)[head_name(self.model.outline)]
        tensors = on_first(lambda: self.journal.block_tensors(self.model.num_blocks))
        return with_head(self.model, tensors, self.fmt, spec).head

    def _load(self, i: int) -> nn.Module:
        """Block i with its original weights, where it is to be run."""
        return self.place.settle(self.model.block(i))

    def _choose(
        self, i: int, original: nn.Module
    ) -> tuple[nn.Module, BlockResult, tuple[str, ...], list[Trial]]:
        """Block i by the candidate that is closest to the original model on text held back."""
        assert self.chooser is not None
        assert self.recipe.choice is not None
        given, meant = self.states["calibration"], self.states["reference"]
        fitted, judging = divided(given, self.recipe.choice.hold_back)
        candidates = {recipe.name: recipe for recipe in self.recipe.alternatives()}

        def run(block: nn.Module, text: Part) -> Iterator[torch.Tensor]:
            for states in text:
                yield run_exactly(block, states, self._arguments(i, *states.shape[:2]))

        def attempt(
            name: str,
        ) -> tuple[tuple[nn.Module, BlockResult, tuple[str, ...]], Trial]:
            started = time.perf_counter()
            result = quantize_guarded(
                self._load(i),
                lambda: self._load(i),
                candidates[name],
                partial(self._quantize, i, original, fitted),
                self.model.block_name(i),
            )
            error = distance(
                run(result[0], Part(given, judging)),
                run(original, Part(meant, judging)),
                weighted=self.recipe.token_weighting == "residual",
            )
            return result, Trial(name, on_first(lambda: time.perf_counter() - started), error)

        (block, result, retreats), trials = self.chooser.choose(attempt)
        return block, result, retreats, trials

    def _quantize(
        self,
        i: int,
        unchanged: nn.Module | None,
        numbers: Sequence[int] | None,
        block: nn.Module,
        recipe: Recipe,
    ) -> BlockResult:
        """numbers: of the sequences that it is calibrated on, None for all."""
        model = self.model
        given: Sequence[torch.Tensor] = self.states["calibration"]
        if numbers is not None:
            given = Part(given, numbers)
        original = None
        if unchanged is not None and recipe.follows_original:
            meant: Sequence[torch.Tensor] = self.states["reference"]
            original = Original(unchanged, meant if numbers is None else Part(meant, numbers))
        return quantize_block(
            block,
            given,
            partial(self._arguments, i),
            model.architecture.groups_of(block),
            recipe,
            name=model.block_name(i),
            full_name=lambda linear: model.checkpoint_name(i, linear),
            head_dim=value_head_dim(model.config.hf),
            original=original,
        )

    def _arguments(self, i: int, batch: int, tokens: int) -> dict[str, Any]:
        """What block i is called with beside the hidden states of a batch."""
        return self.place.moved(self.model.layer_arguments(i, batch, tokens))

    def _advance(self, name: str, block: nn.Module, i: int) -> None:
        """Take some of the states through block i."""
        given = self.states[name]
        made = given.next()
        for j, states in enumerate(given):
            made[j] = run_exactly(block, states, self._arguments(i, *states.shape[:2]))
        self.states[name] = made

    def block_reports(self) -> tuple[BlockReport, ...]:
        """Of the finished blocks, those of earlier runs included."""
        return tuple(BlockReport.from_json(entry["report"]) for entry in self.journal.reports)

    def warnings(self, measured: ModelReport) -> tuple[str, ...]:
        """What the reader of the report should know of the whole model."""
        found = list(self.needs.notes)
        if self.model.config.model_type not in ARCHITECTURES:
            found.append(
                f"{self.model.config.model_type} has no table: which linears read what, and what "
                "scales them, was found by tracing its blocks"
            )
        if self.seen:
            found.append(
                "the calibration text is too short to hold any of it out: the model is measured "
                "on tokens that it was calibrated on"
            )
        if measured.original_perplexity > _GUESSING * self.model.config.vocab_size:
            found.append(
                f"the original model's perplexity is {measured.original_perplexity:.5g}, hardly "
                "better than guessing: its tokenizer may be another model's, or the text of a "
                "kind that it does not know"
            )
        return tuple(found)

    def _usage(self) -> Run:
        blocks = [Usage(**entry["usage"]) for entry in self.journal.reports]
        total = joined([self.before, *blocks, self.meter.lap()])
        return Run(device="cpu", total=total, blocks=tuple(blocks))

    def _stored(self, i: int, result: BlockResult) -> dict[str, torch.Tensor]:
        """What block i has become, by the checkpoint's names."""
        tensors: dict[str, torch.Tensor] = {}
        for linear, weight in result.weights.items():
            name = self.model.checkpoint_name(i, linear)
            active = self.recipe.activations.bits if self.recipe.activations else None
            K, N = weight.codes.shape
            tensors |= self.fmt.tensors(name, weight, LinearSpec(K, N, weight.grid, active))
        for key, value in result.changed.items():
            name = self.model.checkpoint_name(i, key)
            tensors[name] = half(value, name)
        return tensors

    @torch.no_grad()
    def measure(self) -> ModelReport:
        """Compare both models' predictions on the held-out tokens."""
        divergence = agreeing = loss = original_loss = 0.0
        tokens = predicted = 0
        heads = self.model.head, self._quantized_head
        for ids, original, quantized in zip(
            self.held_out, self.states["original"], self.states["quantized"], strict=True
        ):
            for j in range(len(ids)):
                for start in range(0, ids.shape[1], LOGIT_TOKENS):
                    part = slice(start, start + LOGIT_TOKENS)
                    expected, found = (
                        head(states[j, part].cpu()).log_softmax(-1)
                        for head, states in zip(heads, (original, quantized), strict=True)
                    )
                    divergence += float(
                        (expected.exp() * (expected - found)).sum(dtype=torch.float64)
                    )
                    agreeing += float((expected.argmax(-1) == found.argmax(-1)).sum())
                    following = ids[j, start + 1 : start + 1 + LOGIT_TOKENS].unsqueeze(-1)
                    known = len(following)
                    loss -= float(found[:known].gather(-1, following).sum(dtype=torch.float64))
                    original_loss -= float(
                        expected[:known].gather(-1, following).sum(dtype=torch.float64)
                    )
                    tokens += len(found)
                    predicted += known
        divergence, agreeing, loss, original_loss = map(
            total, (divergence, agreeing, loss, original_loss)
        )
        tokens, predicted = int(total(tokens)), max(int(total(predicted)), 1)
        return ModelReport(
            tokens,
            divergence / tokens,
            agreeing / tokens,
            _perplexity(loss / predicted),
            _perplexity(original_loss / predicted),
            self.seen,
        )

    def write(self, out: Path, report: Report, *, overwrite: bool) -> Report:
        """The output folder, from the journal and whatever quantization left alone.

        Returns the report with what is only known now.
        """
        model = self.model
        with staged_folder(out, overwrite=overwrite) as stage:
            writer = weights_writer(stage, self.fmt, model.outline.stored.names, self.needs.shard)
            size = 0
            beside = companions(model.outline, self.fmt)
            if self.recipe.head:  # which is in the journal, not the embedding's twin
                head = f"{head_name(model.outline)}.weight"
                beside = (item for item in beside if item[0] != head)
            for name, tensor in chain(self._tensors(), beside):
                writer.add(name, tensor)
                size += tensor.nbytes
            writer.close()
            config = portable_config(model.config, dtype="float16")
            if self.recipe.head:
                config["tie_word_embeddings"] = False
            linears = self._quantized()
            entry = self.fmt.quantization_config(linears, kept_linears(model.outline, linears))
            if entry is not None:
                config["quantization_config"] = entry
            write_json(stage / "config.json", config)
            copy_side_files(model.folder, stage)
            report = replace(
                report, storage=Storage(model.reader.total_bytes, size), run=self._usage()
            )
            write_report(stage, report)
            self._check(stage)
        self._clear_beside("old")
        return report

    def _quantized(self) -> dict[str, LinearSpec]:
        """The linears that were quantized, by full name."""
        model, blocks = self.model, self.block_reports()[: self.model.num_blocks]
        specs = linear_specs(model.outline, self.recipe)
        names = [
            model.checkpoint_name(i, linear.name)
            for i, report in enumerate(blocks)
            for linear in report.linears
        ]
        if self.recipe.head:
            names.append(head_name(model.outline))
        return {name: specs[name] for name in names}

    def _check(self, folder: Path) -> None:
        """Read what was written, and compare it with what was computed."""
        digests = [entry["digests"] for entry in self.journal.reports]
        check_weights(folder, {name: digest for part in digests for name, digest in part.items()})
        if self.held_out and self.recipe.activations is None:
            original, quantized = (
                self.states[name][0][0, :LOGIT_TOKENS].cpu() for name in ("original", "quantized")
            )
            logits = self._quantized_head(quantized)
            ids = self.held_out[0][0, :LOGIT_TOKENS]
            check_function(folder, self.model, ids, original, logits)

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the result: blocks from the journal, the rest as it was, in float16."""
        model, reader = self.model, self.model.reader
        blocks = {i: model.block_tensors(i) for i in range(model.num_blocks)}
        of_blocks = {name for names in blocks.values() for name in names}
        head: dict[str, torch.Tensor] = {}
        if self.recipe.head:
            head = self.journal.block_tensors(model.num_blocks)
            of_blocks.add(f"{head_name(model.outline)}.weight")
        for name in reader.names:
            if name not in of_blocks and name not in head:
                yield name, half(reader.torch(name), name)
        yield from sorted(head.items())
        reports = self.block_reports()[: model.num_blocks]
        for (i, names), report in zip(blocks.items(), reports, strict=True):
            tensors = self.journal.block_tensors(i)
            replaced = {
                model.checkpoint_name(i, f"{linear.name}.weight") for linear in report.linears
            }
            kept = {
                name: half(reader.torch(name), name)
                for name in names
                if name not in tensors and name not in replaced
            }
            yield from sorted({**tensors, **kept}.items())


def _with_size(
    linear: LinearReport, full_name: str, stored: Mapping[str, torch.Tensor]
) -> LinearReport:
    """With what it takes in the output."""
    prefix = f"{full_name}."
    return replace(
        linear,
        stored_bytes=sum(
            tensor.nbytes
            for name, tensor in stored.items()
            if name.startswith(prefix) and name != f"{prefix}bias"
        ),
    )


def _unstorable(model: StreamedModel) -> Iterator[Problem]:
    """The tensors outside the blocks that float16 cannot hold; blocks are checked one by one."""
    blocks = {name for i in range(model.num_blocks) for name in model.block_tensors(i)}
    for name in model.reader.names:
        if name not in blocks and model.reader.info(name).dtype != "F16":
            try:
                half(model.reader.torch(name), name)
            except UserError as error:
                yield from error.problems


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # a finite number, which JSON can hold, for any model


def _versions() -> dict[str, str]:
    return {
        "mlcawq": mlcawq.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _fingerprint(
    model: StreamedModel, recipe: Recipe, calibration: CalibrationData, fmt: str
) -> dict[str, Any]:
    """What the output's bytes depend on, by topic."""
    reader = model.reader
    headers = [
        [name, info.dtype, list(info.shape), info.file.name, info.offset]
        for name in reader.names
        for info in [reader.info(name)]
    ]
    files = sorted({reader.info(name).file for name in reader.names})
    stamps = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    beside = [model.folder / name for name in SIDE_FILES]
    copied = [
        [file.name, hashlib.sha256(file.read_bytes()).hexdigest()]
        for file in beside
        if file.is_file()
    ]
    return {
        "model": _digest([model.config.raw, headers, stamps]),
        "tokenizer or generation config": _digest(copied),
        "recipe": {"format": fmt, **recipe.model_dump(mode="json")},
        "calibration text": calibration.digest,
        "software version": _versions(),
    }


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _already_done(out: Path, fingerprint: dict[str, Any]) -> Report | None:
    """The report of an `out` that this very work has already written, else None.

    A run killed between placing the output and removing its journal has nothing left to do.
    """
    try:
        content = json.loads((out / REPORT_FILE).read_text(encoding="utf-8"))
        if content["fingerprint"] != _digest(fingerprint):
            return None
        TensorReader(out)  # the weights are still there
        return Report.from_json(content)
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return None
