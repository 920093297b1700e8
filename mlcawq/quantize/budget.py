"""What a quantization takes of memory and disk, and how to do with what there is.

Everything is counted from the shapes of the block that takes most. The hidden states of the text
are either in memory or on the disk, and the text goes through a block in smaller batches where
memory is short.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import nn

from mlcawq import cgroup
from mlcawq.checkpoint.outline import Outline
from mlcawq.checkpoint.writing import free_bytes
from mlcawq.errors import Problem, UserError
from mlcawq.quantize.calibration import BATCH_TOKENS, CalibrationData
from mlcawq.quantize.integer import CHUNK
from mlcawq.quantize.recipe import LearningRecipe, Recipe

_JUDGED_TOKENS = 512  # of the text, whose inputs and outputs a block's linears keep
LOGIT_TOKENS = 512  # whose logits are in memory at a time
HEAD_BYTES = 128 * 2**20  # of the head's weights that are float32 at a time
_FLOAT = 4
_LIBRARIES = 64 * 2**20  # that are loaded on first use, and what the allocator keeps
_SPARE = 1.1  # of what is counted: freed memory is not always found again in one piece
_STEPPING = 1.5  # of what learning is counted to hold: its steps free and take in turns
SHARD_BYTES = 2 * 2**30
_LEAST_SHARD = 2**26


@dataclass(frozen=True)
class Needs:
    """What a quantization is expected to take, in bytes, and the way in which it is done.

    memory: peak of this process. disk: output and work folder together.
    batch_tokens: that go through a block together. on_disk: whether hidden states are in files.
    shard: of the output, which is in memory while it is written. notes: sentences on what makes
        them more than one would expect.
    """

    memory: int
    disk: int
    batch_tokens: int = BATCH_TOKENS
    on_disk: bool = False
    shard: int = SHARD_BYTES
    notes: tuple[str, ...] = ()


def fitting(
    outline: Outline, recipe: Recipe, stored: int, data: CalibrationData, limit: int
) -> Needs:
    """The way that stays within `limit` bytes of memory at the least cost in time, or else the
    most sparing one.

    stored: bytes of the output.
    """
    work = _Work(outline, recipe, data)
    ways = list(_ways(max(map(len, (*data.sequences, *data.held_out)))))
    found = [work.needs(stored, *way) for way in ways]
    return next((needs for needs in found if needs.memory <= limit), found[-1])


def _ways(longest: int) -> Iterator[tuple[int, bool, int]]:
    """Batch size, place and shard, from the fastest to the most sparing."""
    yield BATCH_TOKENS, False, SHARD_BYTES
    yield BATCH_TOKENS, True, SHARD_BYTES
    batch = BATCH_TOKENS
    while True:
        yield batch, True, _LEAST_SHARD
        if batch <= longest:
            return
        batch //= 2


class _Work:
    """The bytes of each thing that is in memory during the work on the largest block."""

    def __init__(self, outline: Outline, recipe: Recipe, data: CalibrationData) -> None:
        self._recipe, self._config, self._reader = recipe, outline.config, outline.reader
        self._tokens = sum(map(len, data.sequences))
        self._taught = max(map(len, data.sequences))
        self._held_out = sum(map(len, data.held_out))
        self._longest = max(map(len, data.held_out))
        blocks = [outline.bare_block(i) for i in range(outline.num_blocks)]
        sizes = [sum(value.numel() for value in block.state_dict().values()) for block in blocks]
        largest = sizes.index(max(sizes))
        self._block = max(sizes) * _FLOAT
        self._share = _share_of_experts(outline)
        self._linears = {
            name: (module.in_features, module.out_features)
            for name, module in blocks[largest].named_modules()
            if isinstance(module, nn.Linear)
        }
        self._widest = max(k * n for k, n in self._linears.values()) * _FLOAT
        self._groups = _sharing_inputs(outline, blocks[largest], self._linears)

    def needs(self, stored: int, batch: int, on_disk: bool, shard: int) -> Needs:
        """For one way of doing it."""
        hidden = self._tokens * self._config.hidden_size * _FLOAT
        held_out = 2 * self._held_out * self._config.hidden_size * _FLOAT
        followed = self._recipe.follows_original
        states = hidden * (2 + followed) + held_out
        kept = min(states, 4 * batch * self._config.hidden_size * _FLOAT) if on_disk else states
        steps = max(
            most for recipe in self._recipe.alternatives() for most in self._steps(recipe, batch)
        )
        work = kept + self._block * (1 + followed) + steps
        if self._recipe.choice is not None:  # the best so far, and copies of the text it is given
            work += self._block + 3 * hidden
        embedding = max(self._reader.info(name).nbytes for name in self._reader.names)
        judged = min(LOGIT_TOKENS, self._longest)
        logits = 4 * judged * self._config.vocab_size * _FLOAT
        # Writing copies a shard's bytes once more.
        head = min(HEAD_BYTES, self._config.vocab_size * self._config.hidden_size * _FLOAT)
        after = kept + max(embedding + head + logits, 2 * min(stored, shard) + embedding)
        memory = _now() + _LIBRARIES + int(_SPARE * max(work, after))
        journal = hidden * (1 + followed) + held_out
        spilled = states if on_disk else 0
        return Needs(memory, 2 * stored + 2 * journal + spilled, batch, on_disk, shard)

    def _steps(self, recipe: Recipe, batch: int) -> Iterator[int]:
        """The most that each step takes beside the block and the hidden states."""
        inputs = sum(k * self._part(name) for name, (k, _) in self._read())
        outputs = sum(n * self._part(name) for name, (_, n) in self._linears.items())
        widest_input = max(k for k, _ in self._linears.values())
        activations = (outputs + 4 * self._config.hidden_size) * batch * _FLOAT
        sample = int((inputs + outputs) * _JUDGED_TOKENS * _FLOAT)
        grams = sum(
            k * recipe.grid_of(name, k).group_size * _FLOAT for name, (k, _) in self._read()
        )
        threads = torch.get_num_threads() * 6 * CHUNK * _FLOAT
        yield self._widest  # one weight in the other order of its elements
        yield int(activations + (inputs + 2 * widest_input) * batch * _FLOAT) + sample + grams
        codes = self._block // _FLOAT
        searched = sample + grams + codes + threads
        candidates = max(
            (sum(self._linears[name][0] * self._linears[name][1] for name in group) * _FLOAT)
            for group in self._groups
        )
        if recipe.scale is not None:
            probe = (inputs + 3 * outputs) * max(recipe.scale.tokens, 256) * _FLOAT
            yield searched + candidates + int(probe)
        yield searched + 2 * self._widest
        yield int(activations) + codes
        if recipe.compensation is not None:
            moment = widest_input**2 * _FLOAT
            matrices = 3 + recipe.follows_original  # moment, its factor on the way, cross moment
            running = int(activations + 2 * widest_input * batch * _FLOAT)
            all_before = 0
            if not recipe.compensation.true_sequential:
                all_before = sum(k * k * _FLOAT for _, (k, _) in self._read())
            yield searched + all_before + max(matrices * moment + 3 * self._widest, running)
        if recipe.learning is not None:
            yield searched + int(_STEPPING * self._learning(recipe.learning))

    def _learning(self, recipe: LearningRecipe) -> int:
        """Beside the block: of every weight what it was rounded from, its offset, the gradient,
        Adam's averages and the rounded value; aims; and what autograd keeps of a step.
        """
        copies = 4 + 2 * (recipe.optimizer == "adam")
        aims = self._tokens * self._config.hidden_size * _FLOAT
        tokens = recipe.batch * self._taught
        kept = sum((k + 2 * n) * self._part(name) for name, (k, n) in self._linears.items())
        return copies * self._block + aims + int(kept * tokens * _FLOAT)

    def _read(self) -> list[tuple[str, tuple[int, int]]]:
        """One linear of each group that reads the same tensor."""
        return [(group[0], self._linears[group[0]]) for group in self._groups]

    def _part(self, linear: str) -> float:
        """How many of the tokens reach a linear."""
        return self._share if ".experts." in f".{linear}." else 1.0


def _share_of_experts(outline: Outline) -> float:
    """The part of the tokens that an expert sees, were all sought alike; 1 where not told."""
    text = outline.config.hf
    chosen = getattr(text, "num_experts_per_tok", None)
    count = next(
        (
            getattr(text, name)
            for name in ("num_experts", "num_local_experts", "n_routed_experts")
            if getattr(text, name, None)
        ),
        None,
    )
    return chosen / count if chosen and count else 1.0


def _sharing_inputs(
    outline: Outline, block: nn.Module, linears: dict[str, tuple[int, int]]
) -> Sequence[tuple[str, ...]]:
    """The linears of a block by the tensor that they read, each by itself where that is unknown."""
    if outline.table is None:
        return [(name,) for name in linears]
    return [group.linears for group in outline.table.groups_of(block)]


def _now() -> int:
    return psutil.Process().memory_info().rss


def limited(limit: int | None) -> int:
    """Bytes that this process may have in all: `limit`, or what the machine has left."""
    return limit or _now() + available_memory()


def machine_problems(needs: Needs, out: Path, limit: int | None = None) -> Iterator[Problem]:
    """Whether `needs` is more than the user allows or this machine has, now."""
    if limit is not None and needs.memory > limit:
        yield Problem(
            f"at least about {gigabytes(needs.memory)} are needed",
            f"--max-memory {gigabytes(limit)}",
            "allow more, or calibrate on shorter sequences (--calib-seq-len)",
        )
    wanted, available = needs.memory - _now(), available_memory()
    if wanted > available:
        yield Problem(
            f"needs about {gigabytes(wanted)} more, {gigabytes(available)} are available",
            "memory",
            "calibrate on shorter sequences (--calib-seq-len), or close other programs",
        )
    free = free_bytes(out)
    if needs.disk > free:
        yield Problem(
            f"needs about {gigabytes(needs.disk)} while it works, {gigabytes(free)} are free",
            str(out),
            "free some space, or choose another -o",
        )


def available_memory() -> int:
    """Bytes that this process can still take, shared with the other processes of a quantization on
    this machine.
    """
    return cgroup.available_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def gigabytes(size: float) -> str:
    """Bytes for people."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def parse_bytes(text: str, where: str) -> int:
    """ "8GB" -> 8e9; binary units (GiB) and fractions are understood, and bytes without a unit.

    Raises UserError naming `where` for anything else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if found is None or not float(found[1]):
        raise UserError.one(f"{text!r} is no size", where, "give one like 8GB or 500MB")
    return int(
        float(found[1]) * (1024 if found[3] else 1000) ** "_KMGT".index(found[2].upper() or "_")
    )
