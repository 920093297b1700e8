"""Scoring a Hugging Face checkpoint, plain or AWQ, in float32 and one decoder block at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from mlcawq.checkpoint.streaming import StreamedModel
from mlcawq.evaluate.folders import folder_label

# Hidden states kept at a time: for each such portion of the text, every block is read once.
_HIDDEN_BYTES = 2**30
# Logits made at a time: for each such portion, the head is read once.
_LOGIT_BYTES = 2**29
_BATCH_TOKENS = 2048


class CheckpointScorer:
    """A `Scorer` over a checkpoint folder; AWQ weights are dequantized as they are read.

    Raises UserError for a folder that is no whole checkpoint of a decoder of transformers.
    """

    def __init__(self, folder: Path) -> None:
        self._model = StreamedModel(folder)
        config = self._model.config
        self.label = folder_label(folder, "checkpoint")
        self.vocab_size = config.vocab_size
        self.longest = config.max_position_embeddings

    def logits(self, windows: np.ndarray, rows: int) -> Iterator[np.ndarray]:
        """See `Scorer.logits`. The model is read once for every GiB of hidden states."""
        count, length = windows.shape
        window_bytes = length * self._model.config.hidden_size * 4
        at_once = max(1, min(count, _HIDDEN_BYTES // window_bytes))
        batch = max(1, _BATCH_TOKENS // length)
        runs_at_once = max(1, _LOGIT_BYTES // (4 * self.vocab_size * rows))
        for start in range(0, count, at_once):
            ids = torch.from_numpy(windows[start : start + at_once])
            for hidden in self._model.hidden_states(ids.split(batch)):
                for window in hidden:
                    for part in window[:-1].split(rows * runs_at_once):
                        for run in self._model.head(part).split(rows):
                            yield run.numpy()
