"""Rounding of activations: linears compute with integers on both sides, as W8A8 kernels do.

Each token has a scale of its own, from its largest magnitude, and nothing about it is stored: the
kernels find it as the model runs. What is done here to floats gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

_SMALLEST = 1e-10  # of a scale; a token of zeros stays one of zeros


def round_tokens(inputs: torch.Tensor, bits: int) -> torch.Tensor:
    """`inputs` [..., K] rounded to symmetric integers of `bits` bits, one scale for each token.

    Gradients pass as if nothing were rounded.
    """
    largest = 2 ** (bits - 1) - 1
    given = inputs.detach()
    scale = given.abs().amax(-1, keepdim=True).div_(largest).clamp_(min=_SMALLEST)
    rounded = (given / scale).round_().clamp_(-largest, largest).mul_(scale)
    return inputs + (rounded - inputs).detach() if inputs.requires_grad else rounded


class RoundedInputs:
    """Makes linears round what they are given, from now on."""

    def __init__(self, linears: Iterable[nn.Linear], bits: int) -> None:
        self._bits = bits
        self._off = False
        for linear in linears:
            linear.register_forward_pre_hook(self._round)

    def _round(self, _: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        if self._off:
            return arguments
        return (round_tokens(arguments[0], self._bits), *arguments[1:])

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within it the linears take their inputs as they are."""
        self._off = True
        try:
            yield
        finally:
            self._off = False
