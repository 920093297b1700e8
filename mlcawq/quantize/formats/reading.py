"""A quantized folder read as the plain checkpoint that it stands for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlcawq.checkpoint.tensors import TensorInfo, TensorReader
from mlcawq.quantize.formats import stored_format
from mlcawq.quantize.formats.base import Format, LinearSpec
from mlcawq.quantize.integer import QuantizedWeight


class DequantizedReader:
    """Tensors of a folder by the names of the unquantized model, as `TensorReader` gives them.

    A quantized linear's weight is float32 [N, K], dequantized whenever it is asked for; everything
    else is what is stored. `linears`: the quantized ones, by full name.
    """

    def __init__(self, stored: TensorReader, config: Mapping[str, Any]) -> None:
        """config: the folder's `quantization_config`. Raises UserError as `Format.linears` does."""
        self.stored = stored
        self.format: Format = stored_format(config, str(stored.folder / "config.json"))
        self.linears: dict[str, LinearSpec] = self.format.linears(config, stored)
        hidden = {
            part for name, spec in self.linears.items() for part in self.format.parts(name, spec)
        }
        self._weights = {f"{name}.weight": name for name in self.linears}
        self._listed = [name for name in stored.listed if name not in hidden]
        self._listed += list(self._weights)
        self._known = frozenset(self._listed)

    @property
    def folder(self) -> Path:
        """See `TensorReader.folder`."""
        return self.stored.folder

    @property
    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._listed)

    @property
    def listed(self) -> list[str]:
        """All tensor names: what is stored as it is first, in the folder's order."""
        return list(self._listed)

    @property
    def total_bytes(self) -> int:
        """The size of all tensors in bytes, as they are stored."""
        return self.stored.total_bytes

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def info(self, name: str) -> TensorInfo:
        """Type and shape of a tensor as it is given; file, place and size as it is stored."""
        if name not in self._weights:
            return self.stored.info(name)
        linear = self._weights[name]
        spec = self.linears[linear]
        main = self.stored.info(self.format.parts(linear, spec)[0])
        shape = (spec.out_features, spec.in_features)
        return TensorInfo(name, "F32", shape, main.file, main.offset, self.format.bytes_of(spec))

    def quantized(self, linear: str) -> QuantizedWeight:
        """The integers of the quantized linear of that full name."""
        return self.format.read(linear, self.linears[linear], self.stored.torch)

    def zeros(self, linear: str) -> torch.Tensor:
        """The zero points of the quantized linear of that full name, uint8 [K/G, N]."""
        return self.format.zeros(linear, self.linears[linear], self.stored.torch)

    def torch_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """See `TensorReader.torch_rows`."""
        if name not in self._weights:
            return self.stored.torch_rows(name, rows)
        return self.torch(name)[rows]

    def numpy(self, name: str) -> np.ndarray:
        """See `TensorReader.numpy`."""
        if name not in self._weights:
            return self.stored.numpy(name)
        found: np.ndarray = self.torch(name).numpy()
        return found

    def torch(self, name: str) -> torch.Tensor:
        """See `TensorReader.torch`."""
        if name not in self._weights:
            return self.stored.torch(name)
        return self.quantized(self._weights[name]).dequantized().T.contiguous()


def open_weights(folder: Path, config: Mapping[str, Any]) -> TensorReader | DequantizedReader:
    """The tensors of a checkpoint folder by the unquantized model's names.

    config: config.json. Raises UserError for quantized folders in a format that is not read, and
    for one with tensors that are missing or not as its config means them.
    """
    reader = TensorReader(folder)
    quantization = config.get("quantization_config")
    return reader if quantization is None else DequantizedReader(reader, quantization)
