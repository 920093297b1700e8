"""A checkpoint's tensors with some of them replaced by others in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from torch import Tensor

from mlcawq.checkpoint.tensors import TensorReader


class Overlay(TensorReader):
    """As TensorReader. tensors: float16 or float32, by names that `reader` has or has not."""

    def __init__(self, reader: TensorReader, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(reader.folder)
        self._below, self._tensors = reader, dict(tensors)
        self._infos = {name: reader.info(name) for name in reader.names}
        some = next(iter(self._infos.values()))
        for name, tensor in tensors.items():
            self._infos[name] = replace(
                some,
                name=name,
                dtype=f"F{8 * tensor.itemsize}",
                shape=tuple(tensor.shape),
                nbytes=tensor.nbytes,
            )

    def numpy(self, name: str) -> np.ndarray:
        """See TensorReader; of what is in memory, the thing itself."""
        return self._tensors[name].numpy() if name in self._tensors else self._below.numpy(name)

    def torch(self, name: str) -> Tensor:
        """See `numpy`."""
        return self._tensors[name] if name in self._tensors else self._below.torch(name)

    def torch_rows(self, name: str, rows: Tensor) -> Tensor:
        """See TensorReader."""
        if name in self._tensors:
            return self._tensors[name][rows]
        return self._below.torch_rows(name, rows)
