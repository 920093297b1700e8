"""The one way in which models of all kinds are scored: logits, a few positions at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from mlcawq.evaluate.folders import Kind


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


def open_scorer(folder: Path, kind: Kind, device: str = "auto") -> Scorer:
    """A scorer for the folder. device: what a built folder runs on, as for an engine.

    Raises UserError for a folder that is not whole, and for a device that is not there.
    """
    if kind == "built":
        from mlcawq.evaluate.built_scorer import BuiltScorer

        return BuiltScorer(folder, device)
    from mlcawq.evaluate.checkpoint_scorer import CheckpointScorer

    return CheckpointScorer(folder)
