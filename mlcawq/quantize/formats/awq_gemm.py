"""AutoAWQ's "gemm" version: what its GEMM kernel, vLLM, SGLang, transformers and MLC read.

qweight int32 [K, N/8], qzeros int32 [K/G, N/8], scales float16 [K/G, N]. A word holds eight output
channels, in the order that lets a kernel take halves of it apart with few instructions.
"""

from __future__ import annotations

import torch

from mlcawq.quantize.formats import nibbles
from mlcawq.quantize.formats.awq import AwqStorage
from mlcawq.quantize.formats.base import Layout, LinearSpec
from mlcawq.quantize.integer import QuantizedWeight
from tir_kernels.layouts import ORDER, PACK

_BACK = [ORDER.index(column) for column in range(PACK)]


class AwqGemm(AwqStorage):
    """See the module."""

    name = "awq"
    version = "gemm"

    def layout(self, spec: LinearSpec) -> dict[str, Layout]:
        """See `AwqStorage.layout`."""
        K, N, groups = spec.in_features, spec.out_features, spec.groups
        return {
            "qweight": ("I32", (K, N // PACK)),
            "qzeros": ("I32", (groups, N // PACK)),
            "scales": ("F16", (groups, N)),
        }

    def features(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """See `AwqStorage.features`."""
        return shape[0], shape[1] * PACK

    def packed(self, weight: QuantizedWeight, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        """See `AwqStorage.packed`."""
        return {"qweight": _pack(weight.codes), "qzeros": _pack(weight.zero), "scales": scale}

    def codes(self, qweight: torch.Tensor) -> torch.Tensor:
        """See `AwqStorage.codes`."""
        return _unpack(qweight)

    def unpacked_zeros(self, spec: LinearSpec, stored: torch.Tensor) -> torch.Tensor:
        """See `AwqStorage.unpacked_zeros`."""
        return _unpack(stored)

    def unpacked_scale(self, spec: LinearSpec, stored: torch.Tensor) -> torch.Tensor:
        """See `AwqStorage.unpacked_scale`."""
        return stored


def _pack(values: torch.Tensor) -> torch.Tensor:
    """uint8 [R, N] -> int32 [R, N/8]."""
    words = values.reshape(len(values), -1, PACK)[:, :, list(ORDER)]
    return nibbles.pack(words, torch.int32).squeeze(-1)


def _unpack(words: torch.Tensor) -> torch.Tensor:
    """int32 [R, W] -> uint8 [R, 8W]."""
    values = nibbles.unpack(words).reshape(len(words), -1, PACK)
    return values[:, :, _BACK].reshape(len(words), -1)
