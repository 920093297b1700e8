"""Group-wise integers: which values a group of weights can take, and rounding to them.

Weights lie here as [K/G, G, N]: in_features K first, cut into groups of G, and out_features N
innermost. Reductions over a group and broadcasts of its parameters are then contiguous along N,
and the layout is already that of AWQ storage.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mlcawq.quantize.parallel import for_each

Part = tuple[slice, slice, slice]

# The smallest scale: 2^-20 is a float16 subnormal with four significant bits left. A group whose
# weights are all below about 7e-6 is treated as if it reached that far.
SMALLEST_SCALE = 2.0**-20
LARGEST_SCALE = 65504.0  # of float16
# Elements worked on at a time: small enough that a chunk of float32 stays in a core's cache.
CHUNK = 1 << 18
_GPU_CHUNK = 1 << 25  # there, small ones leave it idle


@dataclass(frozen=True)
class IntegerGrid:
    """Unsigned integers of `bits` bits; one scale and one zero point for `group_size` weights.

    A weight is (q - zero) * scale. symmetric: the zero point is fixed at the middle, 2^(bits-1).
    """

    bits: int
    group_size: int
    symmetric: bool = False

    @property
    def levels(self) -> int:
        """The largest integer."""
        return 2**self.bits - 1

    def grouped(self, weight: torch.Tensor) -> torch.Tensor:
        """[K, N] -> [K/G, G, N], a view where possible."""
        return weight.reshape(-1, self.group_size, weight.shape[-1])

    def parameters(
        self, low: torch.Tensor, high: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point for weights from `low` to `high`, both [..., 1, N].

        The scale is the float16 that will be stored, as float32: whoever searches with it knows
        the error of the file and not of something near it. Zero points are whole float32 numbers.
        """
        if self.symmetric:
            middle = 2 ** (self.bits - 1)
            scale = torch.maximum(high, -low) / (middle - 1)
            return _stored(scale), torch.full_like(scale, middle)
        # Zero is always within the range: the zero point must fit into the same bits.
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = _stored((high - low) / self.levels)
        return scale, (low / scale).round_().neg_().clamp_(0, self.levels)

    def codes_(
        self, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, out: torch.Tensor
    ) -> torch.Tensor:
        """The integers of `weight`, as float32 in `out`."""
        torch.addcmul(zero, weight, scale.reciprocal(), out=out)
        return out.round_().clamp_(0, self.levels)

    def values_(
        self, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, out: torch.Tensor
    ) -> torch.Tensor:
        """`weight` [..., G, N] rounded to what its group can hold, in `out`; scales [..., 1, N]."""
        return self.codes_(weight, scale, zero, out).sub_(zero).mul_(scale)

    def round_to_nearest_(self, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """`values_` with the range of each group taken from its smallest and largest weight.

        weight, out: [K/G, G, N].
        """

        def work(part: Part) -> None:
            given = weight[part]
            low, high = given.amin(1, keepdim=True), given.amax(1, keepdim=True)
            scale, zero = self.parameters(low, high)
            self.values_(given, scale, zero, out=out[part])

        for_each(work, chunks(weight))
        return out


@dataclass(frozen=True)
class QuantizedWeight:
    """A linear's weight as it is stored. codes uint8 [K, N]; scale f16 and zero uint8 [K/G, N]."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    grid: IntegerGrid

    def dequantized(self) -> torch.Tensor:
        """The weight as float32 [K, N]."""
        values = self.grid.grouped(self.codes.float())
        values = values.sub_(self.zero.float().unsqueeze(1))
        return values.mul_(self.scale.float().unsqueeze(1)).reshape(self.codes.shape)


def quantize_weight(
    weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, grid: IntegerGrid
) -> QuantizedWeight:
    """Round `weight` float32 [K, N] with given parameters [K/G, 1, N]."""
    grouped = grid.grouped(weight)
    codes = torch.empty_like(grouped, dtype=torch.uint8)

    def work(part: Part) -> None:
        floats = torch.empty_like(grouped[part])
        codes[part] = grid.codes_(grouped[part], scale[part], zero[part], out=floats).to(
            torch.uint8
        )

    for_each(work, chunks(grouped))
    return QuantizedWeight(
        codes.reshape(weight.shape),
        scale.squeeze(1).to(torch.float16),
        zero.squeeze(1).to(torch.uint8),
        grid,
    )


def full_range(weight: torch.Tensor, grid: IntegerGrid) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point [K/G, 1, N] of every group of `weight` [K, N], nothing clipped."""
    grouped = grid.grouped(weight)
    return grid.parameters(grouped.amin(1, keepdim=True), grouped.amax(1, keepdim=True))


def chunks(grouped: torch.Tensor) -> Iterator[Part]:
    """Index tuples that cut [K/G, G, N] along groups and columns into parts of about CHUNK."""
    groups, size, columns = grouped.shape
    elements = CHUNK if grouped.device.type == "cpu" else _GPU_CHUNK
    width = min(columns, max(256, elements // size))
    height = max(1, elements // (size * width))
    for first in range(0, groups, height):
        for start in range(0, columns, width):
            yield slice(first, first + height), slice(None), slice(start, start + width)


def _stored(scale: torch.Tensor) -> torch.Tensor:
    return scale.clamp_(SMALLEST_SCALE, LARGEST_SCALE).to(torch.float16).float()
