"""What is looked at before a build begins, whoever compiles: places, disk, memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil

from mlcawq.build.chat_config import CONFIG_NAME
from mlcawq.build.verify import num_parameters
from mlcawq.checkpoint.config import ModelConfig
from mlcawq.checkpoint.writing import free_bytes
from mlcawq.errors import Problem, UserError

_LIBRARY_BYTES = 64 * 2**20  # room for the library and the tokenizer on the disk
_T = TypeVar("_T")


class Collector:
    """Runs checks one after another and gathers what they raise."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems

    def __call__(self, check: Callable[[], _T]) -> _T | None:
        try:
            return check()
        except UserError as error:
            self.problems += [p for p in error.problems if p not in self.problems]
            return None


def overwriting_problems(checkpoint: Path, out: Path, overwrite: bool) -> list[Problem]:
    """--overwrite replaces an earlier build, never the checkpoint or a folder of other things."""
    place, source = out.resolve(), checkpoint.resolve()
    if place == source or place in source.parents:
        return [Problem("the output would replace the checkpoint", str(out), "choose another -o")]
    full = out.is_dir() and any(out.iterdir())
    if overwrite and full and not (out / CONFIG_NAME).is_file():
        what = f"--overwrite replaces model folders only, and there is no {CONFIG_NAME}"
        return [Problem(what, str(out), "choose another -o, or remove the folder yourself")]
    return []


def disk_problems(out: Path, weights: int) -> list[Problem]:
    """weights: bytes that the converted parameters will take."""
    needed, free = weights + _LIBRARY_BYTES, free_bytes(out)
    if free >= needed:
        return []
    what = f"{needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free"
    return [Problem(what, str(out), "free some space, or choose another -o")]


def memory_problems(config: ModelConfig, weights: int) -> list[Problem]:
    """Verification holds one block and slices of the head in float32, beside `weights`: bytes of
    the library's (none where they are in a device's own memory) and of dequantized tables.
    """
    blocks = max(config.num_hidden_layers, 1)
    needed = weights + 4 * num_parameters(config) // blocks + 2**30
    available = psutil.virtual_memory().available
    if available >= needed:
        return []
    return [
        Problem(
            f"verification needs {needed / 1e9:.1f} GB of memory and {available / 1e9:.1f} GB are "
            "available",
            "",
            "close other programs, or pass --no-verify to build without comparing the logits",
        )
    ]
