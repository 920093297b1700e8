"""transformers' model in bfloat16, computed by PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache


class TorchModel:
    """cache: "growing" concatenates keys and values, "static" has room for `capacity` from the
    start. compiled: decoding by torch.compile, which wants the static cache.
    """

    def __init__(
        self, folder: str, threads: int, capacity: int, cache: str, compiled: bool
    ) -> None:
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self._model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
        config = self._model.config
        self._static = cache == "static"
        self._cache = StaticCache(config, capacity) if self._static else DynamicCache(config=config)
        self._step = torch.compile(self._model, dynamic=False) if compiled else self._model

    def forget(self, kept: int, dropped: int) -> None:
        if self._static:
            for layer in self._cache.layers:
                layer.cumulative_length.fill_(kept)
        elif dropped:
            self._cache.crop(-dropped)

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        return self._forward(self._model, torch.from_numpy(ids.astype(np.int64))[None])

    def decode(self, token: int) -> np.ndarray:
        return self._forward(self._step, torch.tensor([[token]]))

    def _forward(self, model: Any, ids: torch.Tensor) -> np.ndarray:
        out = model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        return out.logits[0, -1].float().numpy()

    def facts(self) -> dict[str, Any]:
        return {"torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability()}
