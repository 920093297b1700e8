"""Everything that can be known to fail before the first weight is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from mlcawq.checkpoint.decoder_config import DecoderConfig
from mlcawq.checkpoint.outline import Outline, Shape
from mlcawq.checkpoint.writing import free_bytes
from mlcawq.errors import Problem
from mlcawq.quantize.calibration import CalibrationData
from mlcawq.quantize.patterns import naming_problems
from mlcawq.quantize.recipe import Recipe

Format = Literal["awq", "fake"]
LOGIT_TOKENS = 512  # whose logits are in memory at a time
_FLOAT = 4  # bytes of what is computed in
_PROCESS = 600 * 2**20  # interpreter, torch, transformers


@dataclass(frozen=True)
class Needs:
    """Estimated bytes, and what makes them more than one would expect.

    memory: peak of this process. disk: output and work folder together. notes: sentences.
    """

    memory: int
    disk: int
    notes: tuple[str, ...] = ()


def recipe_problems(outline: Outline, recipe: Recipe, fmt: Format) -> Iterator[Problem]:
    """Why a model cannot be quantized by a recipe, every offending linear included."""
    if outline.config.quantization is not None:
        yield Problem(
            "the checkpoint is already quantized", "config.json", "start from the original model"
        )
    if fmt == "awq" and recipe.bits != 4:
        yield Problem(
            f"AWQ storage holds 4 bits, not {recipe.bits}",
            "--bits",
            "use 4, or --format fake to write the dequantized weights in float16",
        )
    linears = outline.all_quantizable()
    yield from _naming_problems(outline, recipe, linears)
    alike = {  # linears that differ in the numbers of block and expert only are one
        (_numbers_left_out(name), shape, recipe.grid_of(name, shape[0]).group_size)
        for name, shape in linears.items()
        if recipe.converts(name)
    }
    for name, (in_features, out_features), size in sorted(alike):
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
        if fmt == "awq" and out_features % 8:
            yield Problem(
                f"out_features {out_features} is not a multiple of 8, which AWQ storage packs",
                name,
                f"leave it as it is: --keep {linear}",
            )


def _numbers_left_out(name: str) -> str:
    """model.layers.3.mlp.up_proj -> model.layers.*.mlp.up_proj"""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _naming_problems(
    outline: Outline, recipe: Recipe, linears: Mapping[str, Shape]
) -> Iterator[Problem]:
    """Patterns that choose nothing, a slip of the pen, or that keep everything."""
    names = (outline.skeleton.head, outline.skeleton.embedding)
    known = [*linears, *map(outline.names.stored_name, names)]
    yield from naming_problems(recipe.modules_to_not_convert, known, "--keep")
    overridden = [override.match for override in recipe.overrides]
    yield from naming_problems(overridden, list(linears), "--override")
    if not any(map(recipe.converts, linears)):
        yield Problem("nothing is left to quantize", "--keep", "keep fewer linears")


def calibration_problems(data: CalibrationData, config: DecoderConfig) -> Iterator[Problem]:
    """Why a model cannot be run on calibration text."""
    largest = max(int(sequence.max()) for sequence in (*data.sequences, *data.held_out))
    if largest >= config.vocab_size:
        yield Problem(
            f"the tokenizer gives token {largest}, and the model knows {config.vocab_size} tokens",
            data.source,
            "the tokenizer belongs to another model: copy the right one into the folder",
        )


def estimate(outline: Outline, recipe: Recipe, fmt: Format, tokens: int) -> Needs:
    """What quantizing takes. tokens: calibration and held-out tokens together."""
    config, reader = outline.config, outline.reader
    blocks = [outline.linear_shapes(i) for i in range(outline.num_blocks)]
    sizes = [sum(k * n for k, n in shapes.values()) for shapes in blocks]
    block = max(sizes)
    shapes = blocks[sizes.index(block)]
    widest = max(k * n for k, n in shapes.values())
    hidden = tokens * config.hidden_size * _FLOAT
    batch = 2048 * (6 * config.hidden_size + 3 * config.intermediate_size) * _FLOAT
    sample = 2048 * sum(k + n for k, n in shapes.values()) * _FLOAT
    logits = 4 * LOGIT_TOKENS * config.vocab_size * _FLOAT
    embedding = max(reader.info(name).nbytes for name in reader.names)
    # Weights of a block, their rounded copies during a search, and the last conversion's copy.
    work = (block + 3 * widest) * _FLOAT + 3 * hidden + batch + sample
    states = 2 * hidden  # that the journal keeps, of the calibration and the held-out text
    if recipe.compensation:  # a second moment, and what factorizing it takes
        work += 5 * max(k for k, _ in shapes.values()) ** 2 * _FLOAT
    if recipe.follows_original:  # that block, what it is given and what it makes of it
        work += block * _FLOAT + 2 * hidden
        states += hidden
    memory = _PROCESS + max(work, embedding + logits)

    kept = sum(
        reader.info(name).nbytes
        if reader.info(name).dtype != "F32"
        else reader.info(name).nbytes // 2
        for name in reader.names
    )
    quantized = 0
    for name, (k, n) in outline.all_quantizable().items():
        grid = recipe.grid_of(name, k)
        packed = k * n * grid.bits // 8 + 3 * (k // grid.group_size) * n
        quantized += packed if fmt == "awq" and recipe.converts(name) else 2 * k * n
    output = max(kept - 2 * sum(sizes), 0) + quantized
    return Needs(memory, output + quantized + states, tuple(_notes(outline, recipe)))


def _notes(outline: Outline, recipe: Recipe) -> Iterator[str]:
    config = outline.config
    if recipe.rotation is not None and config.hf.tie_word_embeddings:
        size = 2 * config.vocab_size * config.hidden_size
        yield (
            "the head, which this model has in common with its embedding, becomes a tensor of its "
            f"own: {gigabytes(size)} more in the output"
        )


def machine_problems(needs: Needs, out: Path) -> Iterator[Problem]:
    """Whether this machine has what `needs` says, now."""
    available = available_memory()
    if needs.memory > available:
        yield Problem(
            f"needs about {gigabytes(needs.memory)}, {gigabytes(available)} are available",
            "memory",
            "calibrate on less (--calib-samples, --calib-seq-len), or close other programs",
        )
    free = free_bytes(out)
    if needs.disk > free:
        yield Problem(
            f"needs about {gigabytes(needs.disk)} while it works, {gigabytes(free)} are free",
            str(out),
            "free some space, or choose another -o",
        )


def available_memory() -> int:
    """Bytes that this process can still take: what is free, or left of a container's limit."""
    available = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            # File pages count as used there, and are given back when memory is wanted.
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            used = int((group / "memory.current").read_text()) - int(stat.get("file", 0))
            available = min(available, int(limit) - used)
    except (OSError, ValueError):
        pass  # no version 2 control group: nothing more is known
    return available


def gigabytes(size: float) -> str:
    """Bytes for people."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
