"""Quantized linears of a checkpoint that a model computes unquantized.

AutoAWQ quantizes the routers of families that it does not know as mixtures of experts (Qwen3's);
mlc_llm's models hold all routers in the type of the activations.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from mlcawq.build.mlc_plugin.mapping import PARTS
from mlcawq.checkpoint.tensors import TensorInfo, TensorReader
from tir_kernels.layouts import PACK
from tir_kernels.reference import dequantize


class DequantizingReader(TensorReader):
    """A checkpoint in which quantized linears that are wanted as such are weights, float32 [N, K].

    wanted: names of tensors. Those that are there, and those whose quantized arrays are not, or do
    not fit each other, are left as they are.
    """

    def __init__(self, folder: Path, wanted: Iterable[str]) -> None:
        super().__init__(folder)
        self._stored = TensorReader(folder)
        self._parts: dict[str, list[str]] = {}
        for weight in wanted:
            parts = [f"{weight.removesuffix('.weight')}.{part}" for part in PARTS]
            if weight not in self and all(part in self for part in parts):
                self._replace(weight, parts)

    def _replace(self, weight: str, parts: list[str]) -> None:
        infos = [self.info(part) for part in parts]
        shape = _stands_for(infos)
        if shape is None:
            return
        for part in parts:
            del self._infos[part]
        self._infos[weight] = replace(infos[0], name=weight, dtype="F32", shape=shape)
        self._parts[weight] = parts

    @property
    def listed(self) -> list[str]:
        places = {parts[0]: weight for weight, parts in self._parts.items()}
        names = [places.get(name, name) for name in self._stored.listed]
        return [name for name in names if name in self]

    def numpy(self, name: str) -> np.ndarray:
        parts = self._parts.get(name)
        if parts is None:
            return super().numpy(name)
        qweight, qzeros, scales = (self._stored.numpy(part) for part in parts)
        return np.ascontiguousarray(dequantize(qweight, qzeros, scales, np.float32).T)


def _stands_for(infos: list[TensorInfo]) -> tuple[int, int] | None:
    """[N, K] of the weight, or None where the arrays do not fit each other."""
    if any(len(info.shape) != 2 for info in infos):
        return None
    (K, words), zeros, scales = (info.shape for info in infos)
    groups, N = zeros[0], words * PACK
    fits = (zeros, scales) == ((groups, words), (groups, N)) and groups > 0 and K % groups == 0
    return (N, K) if fits else None
