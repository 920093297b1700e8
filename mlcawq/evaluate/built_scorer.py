"""Scoring a built folder: its own library runs, as it would in a chat."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mlcawq.engine.artifact import read_folder
from mlcawq.engine.devices import choose_device
from mlcawq.engine.runtime import ModelRuntime
from mlcawq.evaluate.folders import folder_label

_UNBOUNDED = 2**31 - 1  # tokens that a model with a sliding window takes
_SEQUENCE = 0


class BuiltScorer:
    """A `Scorer` over a folder of `mlcawq build` (or of mlc_llm).

    The folder's files are checked here; weights are loaded when the first logits are asked for.
    Raises UserError for a folder that is not whole, and for a device that is not there.
    """

    def __init__(self, folder: Path, device: str = "auto") -> None:
        self._built, self._device = read_folder(folder), device
        choose_device(self._built, device)
        context = int(self._built.config["context_window_size"])
        self.label = folder_label(folder, "built")
        self.vocab_size = self._built.vocab_size
        self.longest = context if context > 0 else _UNBOUNDED

    def logits(self, windows: np.ndarray, rows: int) -> Iterator[np.ndarray]:
        """See `Scorer.logits`. Every window is a new sequence in the paged KV cache."""
        length = windows.shape[1]
        runtime = ModelRuntime(self._built, self._device, max_batch=1, max_total_tokens=length)
        piece = min(rows, runtime.score_chunk)
        for window in windows:
            known = window[:-1].tolist()
            runtime.add_sequence(_SEQUENCE)
            for start in range(0, len(known), rows):
                run = known[start : start + rows]
                yield np.concatenate(
                    [
                        runtime.score(_SEQUENCE, run[first : first + piece])
                        for first in range(0, len(run), piece)
                    ]
                )
            runtime.remove_sequence(_SEQUENCE)
