"""What a storage format is: which integers it holds, its tensors, its entry in config.json."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from mlcawq.checkpoint.tensors import TensorInfo
from mlcawq.errors import Problem, UserError
from mlcawq.quantize.integer import IntegerGrid, QuantizedWeight
from mlcawq.quantize.patterns import kind_of

Get = Callable[[str], torch.Tensor]
# safetensors' name of the element type, and the shape
Layout = tuple[str, tuple[int, ...]]

FLOATS = ("F16", "BF16", "F32")
_ELEMENT_BYTES = {"I64": 8, "I32": 4, "F32": 4, "I16": 2, "F16": 2, "BF16": 2, "I8": 1, "U8": 1}


@dataclass(frozen=True)
class LinearSpec:
    """A linear [K, N] and the integers that it is stored in.

    grid.group_size K means one group for each output channel.
    activation_bits: its inputs are rounded to symmetric integers of so many bits, token by token,
        as the model runs; None leaves them as they are.
    """

    in_features: int
    out_features: int
    grid: IntegerGrid
    activation_bits: int | None = None

    @property
    def groups(self) -> int:
        """Groups along the input channels, K/G."""
        return self.in_features // self.grid.group_size


class Headers(Protocol):
    """What tensors a folder holds, and what their headers say; `TensorReader` is one."""

    @property
    def names(self) -> list[str]: ...

    def __contains__(self, name: object) -> bool: ...

    def info(self, name: str) -> TensorInfo: ...

    def numpy(self, name: str) -> np.ndarray: ...


class Format(Protocol):
    """One way of storing quantized linears in a Hugging Face folder.

    name: what --format takes. one_file: its readers want all weights in model.safetensors, a head
    that is tied to the embedding included. scales_activations: they divide some activations by
    scales, which have to be stored (see `formats.folder.companions`).
    """

    name: str
    one_file: bool
    scales_activations: bool

    def problems(self, linears: Mapping[str, LinearSpec]) -> Iterator[Problem]:
        """Why these linears, by full name, cannot be stored; every offender is named."""

    def tensors(self, name: str, weight: QuantizedWeight, spec: LinearSpec) -> dict[str, Any]:
        """What is stored of the linear of that full name, by full tensor name.

        Raises UserError where a value does not fit the format's element types.
        """

    def bytes_of(self, spec: LinearSpec) -> int:
        """The size of a linear's tensors."""

    def quantization_config(
        self, linears: Mapping[str, LinearSpec], kept: Sequence[str]
    ) -> dict[str, Any] | None:
        """config.json's entry. kept: full names of the linears that stay as they are."""


@runtime_checkable
class IntegerFormat(Format, Protocol):
    """A format whose folders give the integers back."""

    def reads(self, config: Mapping[str, Any]) -> bool:
        """Whether a folder with that `quantization_config` is in this format."""

    def label(self, config: Mapping[str, Any]) -> str:
        """What a table calls a folder with that `quantization_config` ("awq w4 g128")."""

    def linears(self, config: Mapping[str, Any], headers: Headers) -> dict[str, LinearSpec]:
        """The quantized linears of a folder by full name, from headers and stored shapes alone.

        Raises UserError naming every tensor that is missing or not as the config means it.
        """

    def neutral(self, headers: Headers) -> list[str]:
        """Names of stored tensors that change nothing, and that a plain checkpoint does not have.

        Raises UserError for such a tensor that does change something.
        """

    def parts(self, name: str, spec: LinearSpec) -> list[str]:
        """Full names of the tensors that hold a linear."""

    def zeros(self, name: str, spec: LinearSpec, get: Get) -> torch.Tensor:
        """The zero points of a stored linear, uint8 [K/G, N]."""

    def read(self, name: str, spec: LinearSpec, get: Get) -> QuantizedWeight:
        """A stored linear; `get` returns a tensor by full name. Scales keep their stored type."""


def half(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """`tensor` as float16. Raises UserError naming it where a value does not fit."""
    if tensor.dtype == torch.float16 or not tensor.is_floating_point():
        return tensor
    result = tensor.to(torch.float16)
    if not torch.isfinite(result).all():
        raise UserError.one(
            "holds values that are not finite in float16, in which weights are stored",
            name,
            "this model cannot be stored in float16",
        )
    return result


def stored_scale(weight: QuantizedWeight, name: str) -> torch.Tensor:
    """The scales [K/G, N] as float16; UserError where one is lost in it, by size or to zero."""
    scale = half(weight.scale, name)
    if bool(((scale == 0) & (weight.scale != 0)).any()):
        raise UserError.one("holds scales too small for float16", name)
    return scale


def nbytes(layout: Mapping[str, Layout]) -> int:
    """The bytes of tensors of these types and shapes."""
    return sum(prod(shape) * _ELEMENT_BYTES[dtype] for dtype, shape in layout.values())


def layout_problems(
    wanted: Mapping[str, Layout], headers: Headers, *, floats: Iterable[str] = FLOATS
) -> Iterator[Problem]:
    """Every tensor that is missing or is not as `wanted`; any of `floats` stands for F16."""
    for name, (dtype, shape) in wanted.items():
        if name not in headers:
            yield Problem("tensor is missing", name, "download the checkpoint again")
            continue
        info = headers.info(name)
        if tuple(info.shape) != shape:
            found, meant = list(info.shape), list(shape)
            yield Problem(f"shape {found} where quantization_config means {meant}", name)
        if info.dtype != dtype and not (dtype == "F16" and info.dtype in floats):
            yield Problem(f"type {info.dtype} where quantization_config means {dtype}", name)


def listed(names: Iterable[str]) -> str:
    """Linears for a message, once for all blocks."""
    return ", ".join(dict.fromkeys(map(kind_of, names)))
