"""A folder made by `mlcawq build`, run by the engine that `mlcawq chat` runs it with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


class EngineModel:
    """threads, weights: as `mlcawq chat` takes them. capacity: tokens in the cache.

    With weights "auto" they move into huge pages behind the first steps, which are not timed.
    """

    def __init__(self, folder: str, threads: int, capacity: int, weights: str) -> None:
        from mlcawq.engine.artifact import read_folder
        from mlcawq.engine.runtime_only import import_tvm_runtime

        import_tvm_runtime()
        from mlcawq.engine.runtime import ModelRuntime

        self._runtime = ModelRuntime(
            read_folder(Path(folder)),
            "cpu",
            max_batch=1,
            max_total_tokens=capacity,
            threads=threads,
            weights=weights,
        )
        self._runtime.add_sequence(0)

    def forget(self, kept: int, dropped: int) -> None:
        if kept == 0:
            self._runtime.clear()
            self._runtime.add_sequence(0)
        elif dropped:
            self._runtime.pop(0, dropped)

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        step = self._runtime.prefill_chunk_size
        for start in range(0, len(ids), step):
            logits = self._runtime.prefill([(0, ids[start : start + step])])
        return logits[0]

    def decode(self, token: int) -> np.ndarray:
        return self._runtime.decode([0], [token])[0]

    def facts(self) -> dict[str, Any]:
        metadata = {
            k: v for k, v in self._runtime.metadata.items() if k not in ("params", "kv_cache")
        }
        return {"weights": self._runtime.weights, "metadata": metadata}
