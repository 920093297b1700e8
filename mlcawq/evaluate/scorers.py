"""The one way in which models of all kinds are scored: logits, a few positions at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from mlcawq.checkpoint.config import load_json, read_config
from mlcawq.errors import Problem

Kind = Literal["checkpoint", "built"]

CHAT_CONFIG = "mlc-chat-config.json"


class Scorer(Protocol):
    """A model that can be asked what it predicts after every token of a text.

    label: what the model is, for a table ("float16", "awq w4 g128", "q4f16_autoawq").
    vocab_size: V, the width of its logits.
    longest: the most tokens that it takes in one window.
    """

    label: str
    vocab_size: int
    longest: int

    def logits(self, windows: np.ndarray, rows: int) -> Iterator[np.ndarray]:
        """For token ids int64 [W, T]: the logits that predict tokens 1 to T-1 of each window.

        Yields float32 [t, V] with t <= rows, in order: the first T-1 positions of the first
        window in runs of `rows` (the last run is what is left), then those of the next window.
        """
        ...


def rows_at_once(vocab_size: int) -> int:
    """How many positions to hold at a time, so that float64 [rows, V] stays near 64 MiB."""
    return max(16, min(512, 2**23 // vocab_size))


def folder_kind(folder: Path) -> Kind | Problem:
    """What a model folder is, by the files in it alone; a Problem when it is neither kind."""
    where = str(folder)
    if not folder.is_dir():
        fix = "give a folder: a Hugging Face checkpoint, or one that `mlcawq build` wrote"
        return Problem("no such folder", where, fix)
    if (folder / CHAT_CONFIG).is_file():
        return "built"
    if (folder / "config.json").is_file():
        return "checkpoint"
    return Problem(
        f"neither {CHAT_CONFIG} nor config.json is in it",
        where,
        "give a Hugging Face checkpoint, or a folder that `mlcawq build` wrote",
    )


def open_scorer(folder: Path, kind: Kind) -> Scorer:
    """A scorer for the folder. Raises UserError for a folder that is not whole."""
    if kind == "built":
        from mlcawq.evaluate.built_scorer import BuiltScorer

        return BuiltScorer(folder)
    from mlcawq.evaluate.checkpoint_scorer import CheckpointScorer

    return CheckpointScorer(folder)


def folder_label(folder: Path, kind: Kind) -> str:
    """What a table calls the model: q4f16_autoawq, awq w4 g128, or the type of its weights."""
    if kind == "built":
        return str(load_json(folder / CHAT_CONFIG).get("quantization", "built"))
    config = read_config(folder)
    awq = config.quantization
    return config.dtype if awq is None else f"awq w{awq.bits} g{awq.group_size}"
