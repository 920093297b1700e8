"""How wrong a module's output is while some of its linears hold candidate weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

_QUICK = 4  # a quick look takes one of so many tokens, or sequences


class ModuleProbe:
    """The relative squared error of one module's output.

    module: called with inputs [..., K]; `arguments` gives the keyword arguments for a batch.
    inputs: [T, K] tokens, or [S, T, K] sequences for a module that mixes tokens.
    weights: [T] or [S, T], how much each token's error counts.

    The reference is the module's output at construction.
    """

    def __init__(
        self,
        module: nn.Module,
        inputs: torch.Tensor,
        weights: torch.Tensor,
        arguments: Callable[[int, int], dict[str, Any]] | None = None,
    ) -> None:
        self._module = module
        self._inputs = inputs
        self._arguments = arguments
        self._weights = weights.unsqueeze(-1)
        step = min(_QUICK, inputs.shape[0])
        self._quick = slice(None, None, step)
        self._reference = self._run(inputs)
        # A module that gives nothing but zeros (a block made by expanding a model) is judged by
        # the error itself.
        self._norm = self._weighted(self._reference, self._weights) or 1.0

    def error(self, scale: torch.Tensor, *, quick: bool) -> float:
        part = self._quick if quick else slice(None)
        inputs = self._inputs[part] / scale
        difference = self._run(inputs).sub_(self._reference[part])
        return self._weighted(difference, self._weights[part]) / self._norm

    def _run(self, inputs: torch.Tensor) -> torch.Tensor:
        if self._arguments is None:
            output = self._module(inputs)
        else:
            output = self._module(inputs, **self._arguments(*inputs.shape[:2]))
        return output[0] if isinstance(output, tuple) else output

    @staticmethod
    def _weighted(values: torch.Tensor, weights: torch.Tensor) -> float:
        return float((values.square().mul_(weights)).sum(dtype=torch.float64))


class SumProbe:
    """The sum of several probes' errors: linears judged one by one."""

    def __init__(self, probes: Sequence[ModuleProbe]) -> None:
        self._probes = probes

    def error(self, scale: torch.Tensor, *, quick: bool) -> float:
        return sum(probe.error(scale, quick=quick) for probe in self._probes)


def mixes_tokens(module: nn.Module) -> bool:
    """Whether a module is an attention, to be called with rotary embeddings and a mask."""
    return "position_embeddings" in inspect.signature(module.forward).parameters
