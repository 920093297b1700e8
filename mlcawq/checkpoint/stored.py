"""The tensors of a checkpoint by their unquantized names, quantized linears dequantized.

The one place where reading a model meets the storage formats.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from mlcawq.checkpoint.tensors import TensorReader
from mlcawq.errors import Problem
from mlcawq.quantize.formats import stored_format
from mlcawq.quantize.formats.base import IntegerFormat, LinearSpec
from mlcawq.quantize.integer import QuantizedWeight


class StoredTensors:
    """What a reader holds, by the unquantized names.

    quantization: config.json's `quantization_config`, None for a plain checkpoint.
    format: that of the quantized linears, None for a plain checkpoint.
    linears: the quantized linears by full name.

    Raises UserError for a format that is not read, and naming every tensor of a quantized linear
    that is missing or not as its config means it.
    """

    def __init__(self, reader: TensorReader, quantization: Mapping[str, Any] | None) -> None:
        self.reader = reader
        self.format: IntegerFormat | None = None
        self.linears: dict[str, LinearSpec] = {}
        self._owner: dict[str, str] = {}
        self._neutral: frozenset[str] = frozenset()
        if quantization is not None:
            self.format = stored_format(quantization, str(reader.folder / "config.json"))
            self.linears = self.format.linears(quantization, reader)
            self._owner = {
                part: name
                for name, spec in self.linears.items()
                for part in self.format.parts(name, spec)
            }
            self._neutral = frozenset(self.format.neutral(reader))

    def is_quantized(self, linear: str) -> bool:
        """Whether the linear of that full name is stored in integers."""
        return linear in self.linears

    @property
    def names(self) -> list[str]:
        """Every tensor that computes something, sorted: a quantized linear once, as its weight."""
        return sorted({self.unquantized(n) for n in self.reader.names if n not in self._neutral})

    def unquantized(self, name: str) -> str:
        """A stored name -> the unquantized one that it is, or is a part of."""
        return f"{self._owner[name]}.weight" if name in self._owner else name

    def parts(self, name: str) -> list[str]:
        """An unquantized name -> the stored ones."""
        linear = self._linear(name)
        if linear is None:
            return [name]
        assert self.format is not None
        parts = self.format.parts(linear, self.linears[linear])
        return [part for part in parts if part in self.reader]

    def as_stored(self, name: str) -> torch.Tensor:
        """A tensor in its stored type, a quantized weight [N, K] dequantized in float32."""
        linear = self._linear(name)
        if linear is None:
            return self.reader.torch(name)
        return self.quantized(linear).dequantized().T.contiguous()

    def quantized(self, linear: str) -> QuantizedWeight:
        """The integers of a quantized linear, by its full name."""
        assert self.format is not None
        return self.format.read(linear, self.linears[linear], self.reader.torch)

    def zeros(self, linear: str) -> torch.Tensor:
        """The zero points of a quantized linear, uint8 [K/G, N]."""
        assert self.format is not None
        return self.format.zeros(linear, self.linears[linear], self.reader.torch)

    def shape_problems(self, name: str, shape: Sequence[int]) -> Iterator[Problem]:
        """What is wrong where a tensor, by its unquantized name, should be of `shape`."""
        linear, wanted = self._linear(name), list(shape)
        if linear is not None:
            spec = self.linears[linear]
            found = [spec.out_features, spec.in_features]
        elif name in self.reader:
            found = list(self.reader.info(name).shape)
        else:
            yield Problem("tensor is missing", name, "download the checkpoint again")
            return
        if found != wanted:
            yield Problem(f"shape {found} where config.json means {wanted}", name)

    def _linear(self, name: str) -> str | None:
        linear, _, kind = name.rpartition(".")
        return linear if kind == "weight" and linear in self.linears else None
