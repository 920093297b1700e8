"""How wrong a module's output is while some of its linears hold candidate weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mlcawq.quantize.distributed import total

_QUICK = 4  # a quick look takes one of so many tokens, or sequences


@dataclass(frozen=True)
class Sample:
    """This rank's part of the inputs that judge a module.

    inputs: [T, K] tokens, or [S, T, K] sequences for a module that mixes tokens.
    weights: [T] or [S, T], how much each token's error counts.
    first: which of all ranks' tokens, or sequences, is the first here. count: how many all have.
    """

    inputs: torch.Tensor
    weights: torch.Tensor
    first: int
    count: int

    def every(self, step: int) -> Sample:
        """One of `step` tokens or sequences, the same ones however they are spread over ranks."""
        part = slice(-self.first % step, None, step)
        return Sample(
            self.inputs[part], self.weights[part], -(-self.first // step), -(-self.count // step)
        )


class ModuleProbe:
    """The relative squared error of one module's output.

    module: computes each token from that token alone, unless `call` makes of inputs like the
        sample's what it gives.

    The reference is the module's output at construction.
    """

    def __init__(
        self,
        module: nn.Module,
        sample: Sample,
        call: Callable[[torch.Tensor], Any] | None = None,
    ) -> None:
        self._module, self._call = module, call
        self._all = self._judged(sample)
        step = min(_QUICK, sample.count)
        self._few = self._judged(sample.every(step)) if step > 1 else self._all
        # A module that gives nothing but zeros (a block made by expanding a model) is judged by
        # the error itself.
        _, reference, weights = self._all
        self._norm = self._weighted(reference, weights) or 1.0

    @property
    def size(self) -> float:
        """The weighted square of the module's output, a token."""
        inputs, _, _ = self._all
        tokens = total(inputs.numel() // inputs.shape[-1])
        return self._norm / max(tokens, 1)

    def _judged(self, sample: Sample) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return sample.inputs, self._run(sample.inputs), sample.weights.unsqueeze(-1)

    def error(self, scale: torch.Tensor, *, quick: bool) -> float:
        inputs, reference, weights = self._few if quick else self._all
        difference = self._run(inputs / scale).sub_(reference)
        return self._weighted(difference, weights) / self._norm

    def _run(self, inputs: torch.Tensor) -> torch.Tensor:
        if not len(inputs):  # another rank has them
            return inputs.clone()
        if self._call is not None:
            output = self._call(inputs)
        elif isinstance(self._module, nn.Linear):
            return self._module(inputs)
        else:  # mixtures of experts want to be given sequences
            output = self._module(inputs.unsqueeze(0))
        output = output[0] if isinstance(output, tuple) else output
        return output.view(*inputs.shape[:-1], -1)

    @staticmethod
    def _weighted(values: torch.Tensor, weights: torch.Tensor) -> float:
        return total(float((values.square().mul_(weights)).sum(dtype=torch.float64)))


class SumProbe:
    """The sum of several probes' errors.

    absolute: modules whose outputs are added, each error as large as it is beside all outputs;
        otherwise linears judged one by one.
    """

    def __init__(self, probes: Sequence[ModuleProbe], *, absolute: bool = False) -> None:
        sizes = [probe.size if absolute else 1.0 for probe in probes]
        shares = [size / sum(sizes) if absolute else 1.0 for size in sizes]
        self._probes = list(zip(probes, shares, strict=True))

    def error(self, scale: torch.Tensor, *, quick: bool) -> float:
        return sum(share * probe.error(scale, quick=quick) for probe, share in self._probes)


def mixes_tokens(module: nn.Module) -> bool:
    """Whether a module is an attention, to be called with rotary embeddings and a mask."""
    return "position_embeddings" in inspect.signature(module.forward).parameters
