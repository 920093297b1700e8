"""AutoAWQ's "gemv_fast" version, whose kernels and packing are those of llm-awq's second version.

qweight int16 [N/4, K], scales and qzeros float16 [8W, N] with W as in "gemv". Four output channels
lie beside one another, 64 input channels of each in turn. A word holds input channels 8 apart:
of 32 channels 8i + 2j + e, word 2j + e holds i = 0..3. Zero points are stored as -scale * zero.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from mlcawq.quantize.formats import nibbles
from mlcawq.quantize.formats.awq import AwqStorage
from mlcawq.quantize.formats.awq_gemv import PACK, zero_words
from mlcawq.quantize.formats.base import Layout, LinearSpec
from mlcawq.quantize.integer import QuantizedWeight

_ROWS = 4  # output channels beside one another
_STEP = 64  # input channels of one of them in turn


class AwqGemvFast(AwqStorage):
    """See the module."""

    name = "awq-gemv-fast"
    version = "gemv_fast"
    group_sizes = (128,)
    in_multiple = _STEP
    scaled = True

    def layout(self, spec: LinearSpec) -> dict[str, Layout]:
        """See `AwqStorage.layout`."""
        K, N, width = spec.in_features, spec.out_features, zero_words(spec)
        return {
            "qweight": ("I16", (N // _ROWS, K)),
            self.zeros_part: ("F16", (width * PACK, N)),
            "scales": ("F16", (width * PACK, N)),
        }

    def features(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """See `AwqStorage.features`."""
        return shape[1], shape[0] * _ROWS

    def packed(self, weight: QuantizedWeight, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        """See `AwqStorage.packed`."""
        K, N = weight.codes.shape
        missing = zero_words(LinearSpec(K, N, weight.grid)) * PACK - len(scale)
        # [N/4, row, step, half of it, i, j, e] -> [N/4, step, row, half, j, e, i]
        split = weight.codes.T.reshape(N // _ROWS, _ROWS, K // _STEP, 2, 4, 4, 2)
        words = nibbles.pack(split.permute(0, 2, 1, 3, 5, 6, 4), torch.int16)
        scaled = (scale.float() * weight.zero.float()).neg().to(torch.float16)
        return {
            "qweight": words.reshape(N // _ROWS, K),
            self.zeros_part: pad(scaled, (0, 0, 0, missing)),
            "scales": pad(scale, (0, 0, 0, missing)),
        }

    def codes(self, qweight: torch.Tensor) -> torch.Tensor:
        """See `AwqStorage.codes`."""
        rows, K = qweight.shape
        split = nibbles.unpack(qweight).reshape(rows, K // _STEP, _ROWS, 2, 4, 2, 4)
        return split.permute(0, 2, 1, 3, 6, 4, 5).reshape(rows * _ROWS, K).T.contiguous()

    def unpacked_zeros(self, spec: LinearSpec, stored: torch.Tensor) -> torch.Tensor:
        """See `AwqStorage.unpacked_zeros`."""
        return stored[: spec.groups]

    def unpacked_scale(self, spec: LinearSpec, stored: torch.Tensor) -> torch.Tensor:
        """See `AwqStorage.unpacked_scale`."""
        return stored[: spec.groups]
