"""No storage of integers: the dequantized weights in float16, which any evaluator reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from mlcawq.errors import Problem
from mlcawq.quantize.formats.base import Get, Headers, LinearSpec, half, listed
from mlcawq.quantize.integer import QuantizedWeight


class Fake:
    """See the module. Reading such a folder is reading an unquantized model."""

    name = "fake"
    one_file = False
    scales_activations = False

    def problems(self, linears: Mapping[str, LinearSpec]) -> Iterator[Problem]:
        """See `Format.problems`."""
        active = [name for name, spec in linears.items() if spec.activation_bits is not None]
        if active:
            yield Problem(
                "a folder of plain weights would be measured without its quantized activations",
                listed(active),
                "--format compressed-tensors holds them",
            )

    def tensors(
        self, name: str, weight: QuantizedWeight, spec: LinearSpec
    ) -> dict[str, torch.Tensor]:
        """See `Format.tensors`."""
        key = f"{name}.weight"
        return {key: half(weight.dequantized().T, key).contiguous()}

    def bytes_of(self, spec: LinearSpec) -> int:
        """See `Format.bytes_of`."""
        return 2 * spec.in_features * spec.out_features

    def quantization_config(
        self, linears: Mapping[str, LinearSpec], kept: Sequence[str]
    ) -> dict[str, Any] | None:
        """None: the model is a plain one."""
        return None

    def reads(self, config: Mapping[str, Any]) -> bool:
        """Never: a folder in this format says nothing of quantization."""
        return False

    def label(self, config: Mapping[str, Any]) -> str:
        """See `Format.label`."""
        return self.name

    def linears(self, config: Mapping[str, Any], headers: Headers) -> dict[str, LinearSpec]:
        """None that could be told from others."""
        return {}

    def neutral(self, headers: Headers) -> list[str]:
        """None."""
        return []

    def parts(self, name: str, spec: LinearSpec) -> list[str]:
        """See `Format.parts`."""
        return [f"{name}.weight"]

    def zeros(self, name: str, spec: LinearSpec, get: Get) -> torch.Tensor:
        """Not stored."""
        raise NotImplementedError("integers are not in this format")

    def read(self, name: str, spec: LinearSpec, get: Get) -> QuantizedWeight:
        """Not stored."""
        raise NotImplementedError("integers are not in this format")
