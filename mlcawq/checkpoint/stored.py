"""The tensors of a checkpoint by their unquantized names, AWQ linears dequantized."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mlcawq.checkpoint.config import AwqConfig
from mlcawq.checkpoint.tensors import TensorReader
from mlcawq.errors import Problem
from tir_kernels.layouts import SYMMETRIC_ZEROS
from tir_kernels.reference import dequantize

if TYPE_CHECKING:
    import torch

_ALWAYS = ("qweight", "scales")
_PARTS = (*_ALWAYS, "qzeros")


class StoredTensors:
    """What a reader holds, under the names that the unquantized checkpoint would have.

    quantization: config.json's; without one, a tensor called qweight is just that.
    """

    def __init__(self, reader: TensorReader, quantization: AwqConfig | None) -> None:
        self.reader = reader
        self._quantization = quantization

    def is_quantized(self, linear: str) -> bool:
        """Whether the linear of that full name is stored as AWQ."""
        return self._quantization is not None and f"{linear}.qweight" in self.reader

    @property
    def names(self) -> list[str]:
        """Every tensor, sorted: an AWQ linear once, as its weight."""
        return sorted({self.unquantized(name) for name in self.reader.names})

    def unquantized(self, name: str) -> str:
        """A stored name -> the unquantized one that it is, or is a part of."""
        linear, _, part = name.rpartition(".")
        return f"{linear}.weight" if part in _PARTS and self.is_quantized(linear) else name

    def parts(self, name: str) -> list[str]:
        """An unquantized name -> the stored ones."""
        linear, _, kind = name.rpartition(".")
        if kind == "weight" and self.is_quantized(linear):
            return [f"{linear}.{part}" for part in _PARTS if f"{linear}.{part}" in self.reader]
        return [name]

    def as_stored(self, name: str) -> torch.Tensor:
        """A tensor in its stored type, an AWQ weight [N, K] dequantized in float32."""
        import torch

        linear, _, kind = name.rpartition(".")
        if kind != "weight" or not self.is_quantized(linear):
            return self.reader.torch(name)
        qweight, scales = (self.reader.numpy(f"{linear}.{part}") for part in _ALWAYS)
        zeros = f"{linear}.qzeros"
        if zeros in self.reader:
            qzeros = self.reader.numpy(zeros)
        else:
            qzeros = np.full((scales.shape[0], qweight.shape[1]), SYMMETRIC_ZEROS, np.int32)
        weight = dequantize(qweight, qzeros, scales, np.float32)
        return torch.from_numpy(weight).T.contiguous()

    def shape_problems(self, name: str, shape: Sequence[int]) -> Iterator[Problem]:
        """What is wrong with the stored parts of a tensor that should be of `shape`."""
        wanted: dict[str, tuple[int, ...]] = {name: tuple(shape)}
        linear, _, kind = name.rpartition(".")
        if kind == "weight" and self.is_quantized(linear):
            assert self._quantization is not None
            n, k = shape
            groups = k // self._quantization.group_size
            wanted = {
                f"{linear}.qweight": (k, n // 8),
                f"{linear}.qzeros": (groups, n // 8),
                f"{linear}.scales": (groups, n),
            }
            if not self._quantization.zero_point and f"{linear}.qzeros" not in self.reader:
                del wanted[f"{linear}.qzeros"]
        for part, size in wanted.items():
            if part not in self.reader:
                yield Problem("tensor is missing", part, "download the checkpoint again")
            elif tuple(self.reader.info(part).shape) != size:
                found = list(self.reader.info(part).shape)
                yield Problem(f"shape {found} where config.json means {list(size)}", part)
