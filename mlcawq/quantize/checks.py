"""Everything that can be known to fail before the first weight is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mlcawq.checkpoint.decoder_config import DecoderConfig
from mlcawq.checkpoint.outline import Outline, Shape
from mlcawq.errors import Problem
from mlcawq.quantize.budget import gigabytes
from mlcawq.quantize.calibration import CalibrationData
from mlcawq.quantize.distributed import ranks
from mlcawq.quantize.formats import find_format
from mlcawq.quantize.patterns import kind_of, naming_problems
from mlcawq.quantize.recipe import Recipe
from mlcawq.quantize.specs import final_norm, head_name, linear_specs


def recipe_problems(outline: Outline, recipe: Recipe, fmt: str) -> Iterator[Problem]:
    """Why a model cannot be quantized by a recipe, every offending linear included."""
    if outline.config.quantization is not None:
        yield Problem(
            "the checkpoint is already quantized", "config.json", "start from the original model"
        )
    yield from _naming_problems(outline, recipe, outline.all_quantizable())
    alike = {  # linears that differ in the numbers of block and expert only are one
        (kind_of(name), spec.in_features, spec.grid.group_size)
        for name, spec in linear_specs(outline, recipe).items()
    }
    for name, in_features, size in sorted(alike):
        linear = name.rpartition("*.")[2]
        if in_features % size:
            fitting = [size for size in (128, 64, 32) if in_features % size == 0]
            yield Problem(
                f"in_features {in_features} is not a multiple of the group size {size}",
                name,
                f"use --group-size {fitting[0]}"
                if fitting
                else f"leave it as it is: --keep {linear}",
            )
    yield from _merged_problems(outline, recipe)
    if recipe.head:
        yield from _head_problems(outline, recipe)
    yield from find_format(fmt).problems(linear_specs(outline, recipe))


def _merged_problems(outline: Outline, recipe: Recipe) -> Iterator[Problem]:
    """Linears that the checkpoint has no tensor for: a quantized one would have no name."""
    found = {
        (kind_of(full), kind_of(holders[0]))
        for i in range(outline.num_blocks)
        for name, holders in outline.merged(i).items()
        if recipe.converts(full := outline.checkpoint_name(i, name))
    }
    for name, holder in sorted(found):
        yield Problem(
            f"its weight is a part of the tensor {holder}, and a quantized linear is stored by "
            "itself",
            name,
            f"leave it as it is: --keep {name.rpartition('*.')[2]}",
        )


def _head_problems(outline: Outline, recipe: Recipe) -> Iterator[Problem]:
    name, leave = head_name(outline), "leave the head as it is: without --quantize-head"
    if recipe.activations is not None:
        yield Problem("a head that takes integers is read by no engine", name, leave)
    if outline.table is not None and final_norm(outline, outline.table) is None:
        yield Problem("reads no norm that is known to come before it", name, leave)


def _naming_problems(
    outline: Outline, recipe: Recipe, linears: Mapping[str, Shape]
) -> Iterator[Problem]:
    """Patterns that choose nothing, a slip of the pen, or that keep everything."""
    if not linears:
        yield Problem(
            f"the decoder blocks of {outline.config.model_type!r} have no linears that can be "
            "quantized",
            "config.json",
        )
        return
    names = (outline.skeleton.head, outline.skeleton.embedding)
    # Recipes say lm_head for the head, whatever the model calls it.
    known = [*linears, "lm_head", *map(outline.names.stored_name, names)]
    yield from naming_problems(recipe.modules_to_not_convert, known, "--keep")
    overridden = [override.match for override in recipe.overrides]
    yield from naming_problems(overridden, list(linears), "--override")
    if not any(map(recipe.converts, linears)):
        yield Problem("nothing is left to quantize", "--keep", "keep fewer linears")


def calibration_problems(data: CalibrationData, config: DecoderConfig) -> Iterator[Problem]:
    """Why a model cannot be run on calibration text."""
    if len(data.sequences) < ranks():
        yield Problem(
            f"{len(data.sequences)} calibration sequences for {ranks()} processes",
            data.source,
            "start fewer processes, or calibrate on more, shorter sequences (--calib-seq-len)",
        )
    largest = max(int(sequence.max()) for sequence in (*data.sequences, *data.held_out))
    if largest >= config.vocab_size:
        yield Problem(
            f"the tokenizer gives token {largest}, and the model knows {config.vocab_size} tokens",
            data.source,
            "the tokenizer belongs to another model: copy the right one into the folder",
        )


def stored_bytes(outline: Outline, recipe: Recipe, fmt: str) -> int:
    """The size of the output's weights."""
    reader = outline.reader
    kept = sum(
        reader.info(name).nbytes
        if reader.info(name).dtype != "F32"
        else reader.info(name).nbytes // 2
        for name in reader.names
    )
    specs = linear_specs(outline, recipe)
    quantized = sum(map(find_format(fmt).bytes_of, specs.values()))
    plain = sum(
        2 * spec.in_features * spec.out_features
        for name, spec in specs.items()
        if not (name == head_name(outline) and outline.config.tie_word_embeddings)
    )
    return max(kept - plain, 0) + quantized


def notes(outline: Outline, recipe: Recipe, fmt: str) -> Iterator[str]:
    """What makes the output more than one would expect."""
    config, head = outline.config, head_name(outline)
    if (recipe.rotation is not None or recipe.head) and config.hf.tie_word_embeddings:
        spec = linear_specs(outline, recipe).get(head)
        size = 2 * config.vocab_size * config.hidden_size
        if spec is not None:
            size = find_format(fmt).bytes_of(spec)
        yield (
            "the head, which this model has in common with its embedding, becomes a tensor of its "
            f"own: {gigabytes(size)} more in the output"
        )
