"""Rounded weights with gradients: what a linear computes with while its integers are learned.

Rounding is flat almost everywhere. Its gradient is taken for that of the identity within the range
and for zero beyond (the straight-through estimator, arXiv 1308.3432).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mlcawq.quantize.integer import (
    LARGEST_SCALE,
    SMALLEST_SCALE,
    IntegerGrid,
    QuantizedWeight,
)


class _Rounded(torch.autograd.Function):
    """(clamp(round(position)) - zero) * scale, in one pass over the weights each way."""

    @staticmethod
    def forward(
        ctx: Any, position: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, levels: int
    ) -> torch.Tensor:
        """position: [K/G, G, N]; scale, zero: [K/G, 1, N]; codes reach from 0 to `levels`."""
        code = position.round()
        inside = (code >= 0) & (code <= levels)
        centred = code.clamp_(0, levels).sub_(zero)
        ctx.save_for_backward(centred, inside, scale)
        return centred * scale

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        centred, inside, scale = ctx.saved_tensors
        (gradient,) = gradients
        position = scaled = zero = None
        if ctx.needs_input_grad[1]:
            scaled = (gradient * centred).sum(1, keepdim=True)
        if ctx.needs_input_grad[2]:
            zero = -gradient.sum(1, keepdim=True) * scale
        if ctx.needs_input_grad[0]:
            position = (gradient * scale).mul_(inside)
        return position, scaled, zero, None


def rounded(
    position: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, grid: IntegerGrid
) -> torch.Tensor:
    """Weights [K, N] at `position` [K, N]: integers before rounding, zero point included.

    scale, zero: [K/G, 1, N].
    """
    value = _Rounded.apply(grid.grouped(position), scale, zero, grid.levels)
    return value.view_as(position)  # type: ignore[no-untyped-call, no-any-return]


class LearnedRounding(nn.Module):
    """Maps offsets [N, K] of the integers before rounding to weights [N, K] (SignRound).

    start: the rounding that is begun with. position: [K, N], what its integers were rounded from.

    scale_change: parameter [K/G, 1, N], relative. Integers stay as they are when it moves: rounded
    anew in a range that is hardly another, weights lose what the search of that range had found.
    """

    def __init__(self, start: QuantizedWeight, position: torch.Tensor) -> None:
        super().__init__()
        self._grid, self._position = start.grid, position
        self._scale, self._zero = start.scale.float().unsqueeze(1), start.zero.float().unsqueeze(1)
        self.scale_change = nn.Parameter(torch.zeros_like(self._scale))

    def forward(self, offset: torch.Tensor) -> torch.Tensor:
        position = self._position + offset.T
        return rounded(position, self._new_scale(), self._zero, self._grid).T

    def quantized(self, offset: torch.Tensor) -> QuantizedWeight:
        """What is stored for `offset`."""
        code = (self._position + offset.T).round_().clamp_(0, self._grid.levels)
        return QuantizedWeight(
            code.to(torch.uint8),
            self._new_scale().squeeze(1).to(torch.float16),
            self._zero.squeeze(1).to(torch.uint8),
            self._grid,
        )

    def _new_scale(self) -> torch.Tensor:
        scale = self._scale * (1 + self.scale_change)
        return _Stored.apply(scale)  # type: ignore[no-untyped-call, no-any-return]


class _Stored(torch.autograd.Function):
    """Scales as the float16 that is stored; the gradient passes."""

    @staticmethod
    def forward(ctx: Any, scale: torch.Tensor) -> torch.Tensor:
        return scale.clamp(SMALLEST_SCALE, LARGEST_SCALE).half().float()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0]
