"""A quantization from block to block."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from mlcawq.checkpoint.streaming import StreamedModel
from mlcawq.errors import Problem, UserError, raise_all
from mlcawq.families import ARCHITECTURES
from mlcawq.families.rows import value_head_dim
from mlcawq.quantize.block import BlockResult, quantize_block
from mlcawq.quantize.budget import Needs
from mlcawq.quantize.calibration import CalibrationData, batched
from mlcawq.quantize.choosing import Chooser, Part, Trial, distance, divided
from mlcawq.quantize.distributed import everywhere, is_first, on_first, share
from mlcawq.quantize.formats.base import Format, LinearSpec, half
from mlcawq.quantize.guards import quantize_guarded
from mlcawq.quantize.head import quantize_head
from mlcawq.quantize.head_of_model import head_of, norm_tensors, with_head
from mlcawq.quantize.journal import Journal
from mlcawq.quantize.measuring import compare_predictions
from mlcawq.quantize.metering import Meter
from mlcawq.quantize.place import Place, give_back_memory, run_exactly
from mlcawq.quantize.recipe import Recipe
from mlcawq.quantize.report import BlockReport, LinearReport, ModelReport
from mlcawq.quantize.rounding import Original
from mlcawq.quantize.specs import head_name, linear_specs
from mlcawq.quantize.states import HiddenStates, shapes_of
from mlcawq.quantize.verification import digest_of

# Of the vocabulary: a perplexity above it says that a model makes nothing of what it is given.
_GUESSING = 0.5


class Quantization:
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
    def quantized_head(self) -> Callable[[torch.Tensor], torch.Tensor]:
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

    def measure(self) -> ModelReport:
        """Compare both models' predictions on the held-out tokens."""
        return compare_predictions(
            self.held_out,
            (self.model.head, self.states["original"]),
            (self.quantized_head, self.states["quantized"]),
            seen=self.seen,
        )


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
