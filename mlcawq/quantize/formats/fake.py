"""No storage of integers: the dequantized weights in float16, which any evaluator reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from mlcawq.errors import Problem
from mlcawq.quantize.formats.base import LinearSpec, half, listed
from mlcawq.quantize.integer import QuantizedWeight


class Fake:
    """See the module. A folder of it is read as an unquantized model is."""

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
