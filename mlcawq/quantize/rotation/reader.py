"""A checkpoint's tensors as those of the rotated model, rotated when they are asked for."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod

import numpy as np
import torch
from torch import Tensor

from mlcawq.checkpoint.tensors import TensorReader
from mlcawq.quantize.rotation.hadamard import Rotation


@dataclass(frozen=True)
class HeadRotation:
    """The same rotation of every head. rows: int64 [heads, head_dim], the channels of each."""

    rows: Tensor
    rotation: Rotation

    def apply(self, values: Tensor) -> Tensor:
        """[..., K] with the channels of each head rotated, others as they are."""
        result = values.clone()
        result[..., self.rows] = self.rotation.apply(values[..., self.rows])
        return result


@dataclass(frozen=True)
class Change:
    """What becomes of a weight [N, K], or of a bias [N] that has outputs only.

    norm: the norm whose weights its columns take, by tensor name, and what that norm adds to them.
    reads, writes: what its inputs and its outputs are rotated by.
    """

    norm: tuple[str, float] | None = None
    reads: Rotation | HeadRotation | None = None
    writes: Rotation | HeadRotation | None = None


@dataclass
class Plan:
    """How the tensors of a checkpoint become those of the rotated model, by name.

    neutral: norms whose weights were moved away, and the value that does nothing in their place.
    copies: tensors that the checkpoint does not have, and what each is made from: the head of a
        model that has it tied to the embedding.
    """

    changes: dict[str, Change] = field(default_factory=dict)
    neutral: dict[str, float] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)


class RotatedReader(TensorReader):
    """As TensorReader; what is changed is float32. Nothing is kept between two calls."""

    def __init__(self, reader: TensorReader, plan: Plan) -> None:
        super().__init__(reader.folder)
        self._original, self._plan = reader, plan
        for name, source in plan.copies.items():
            self._infos[name] = replace(reader.info(source), name=name)
        for name in (*plan.changes, *plan.neutral):
            info = self._infos[name]
            self._infos[name] = replace(info, dtype="F32", nbytes=4 * prod(info.shape))

    @property
    def total_bytes(self) -> int:
        """The size of the checkpoint as it is stored, in bytes."""
        return self._original.total_bytes

    def numpy(self, name: str) -> np.ndarray:
        """See TensorReader."""
        if name in self._plan.changes or name in self._plan.neutral:
            return self.torch(name).numpy()
        return self._original.numpy(name)

    def torch(self, name: str) -> Tensor:
        """See TensorReader."""
        if name in self._plan.neutral:
            return torch.full(self.info(name).shape, self._plan.neutral[name])
        tensor = self._original.torch(self._plan.copies.get(name, name))
        return self._changed(name, tensor)

    def torch_rows(self, name: str, rows: Tensor) -> Tensor:
        """See TensorReader."""
        change = self._plan.changes.get(name)
        if change is not None and change.writes is not None:
            return self.torch(name)[rows]  # each row is made of all of them
        return self._changed(
            name, self._original.torch_rows(self._plan.copies.get(name, name), rows)
        )

    def _changed(self, name: str, tensor: Tensor) -> Tensor:
        change = self._plan.changes.get(name)
        if change is None:
            return tensor
        tensor = tensor.float()
        if change.norm is not None:
            norm, offset = change.norm
            tensor = tensor * (self._original.torch(norm).float() + offset)
        if change.reads is not None:
            tensor = change.reads.apply(tensor)
        if change.writes is not None:
            outputs_last = tensor.T if tensor.ndim == 2 else tensor
            tensor = change.writes.apply(outputs_last)
            tensor = tensor.T.contiguous() if tensor.ndim == 2 else tensor
        return tensor
