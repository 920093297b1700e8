"""AutoAWQ's "gemv" version, for its kernel of one token at a time.

qweight int32 [N, K/8], qzeros int32 [N, W], scales float16 [N, 8W]. A word holds eight input
channels in their order. The kernel loads zero points of several words at once: W is K/G/8 rounded
up to 1, 2 or 4 words for groups of 128, 64 or 32, and what is beyond the last group is zero.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from mlcawq.quantize.formats import nibbles
from mlcawq.quantize.formats.awq import AwqStorage
from mlcawq.quantize.formats.base import Layout, LinearSpec
from mlcawq.quantize.integer import QuantizedWeight

PACK = 8


def zero_words(spec: LinearSpec) -> int:
    """W: words of zero points for an output channel, padding included."""
    at_once = max(1, 128 // spec.grid.group_size)
    return -(-spec.groups // (PACK * at_once)) * at_once


class AwqGemv(AwqStorage):
    """See the module."""

    name = "awq-gemv"
    version = "gemv"
    group_sizes = (64, 128)
    in_multiple = PACK

    def layout(self, spec: LinearSpec) -> dict[str, Layout]:
        """See `AwqStorage.layout`."""
        K, N, width = spec.in_features, spec.out_features, zero_words(spec)
        return {
            "qweight": ("I32", (N, K // PACK)),
            "qzeros": ("I32", (N, width)),
            "scales": ("F16", (N, width * PACK)),
        }

    def features(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """See `AwqStorage.features`."""
        return shape[1] * PACK, shape[0]

    def packed(self, weight: QuantizedWeight, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        """See `AwqStorage.packed`."""
        K, N = weight.codes.shape
        missing = zero_words(LinearSpec(K, N, weight.grid)) * PACK - len(scale)
        return {
            "qweight": nibbles.pack(weight.codes.T, torch.int32),
            "qzeros": nibbles.pack(pad(weight.zero.T, (0, missing)), torch.int32),
            "scales": pad(scale.T, (0, missing)),
        }

    def codes(self, qweight: torch.Tensor) -> torch.Tensor:
        """See `AwqStorage.codes`."""
        return nibbles.unpack(qweight).T.contiguous()

    def unpacked_zeros(self, spec: LinearSpec, stored: torch.Tensor) -> torch.Tensor:
        """See `AwqStorage.unpacked_zeros`."""
        return nibbles.unpack(stored)[:, : spec.groups].T.contiguous()

    def unpacked_scale(self, spec: LinearSpec, stored: torch.Tensor) -> torch.Tensor:
        """See `AwqStorage.unpacked_scale`."""
        return stored[:, : spec.groups].T
