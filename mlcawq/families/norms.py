"""What a norm does with its weight: there are as many classes of norms as architectures."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.func import functional_call


def weight_offset(norm: nn.Module) -> float:
    """What a norm adds to its weight before it multiplies by it: 1 in Gemma and Nemotron, else 0.

    Found by calling it. Raises ValueError for a module that does neither.
    """
    weight: Any = norm.weight
    inputs = torch.linspace(-1, 2, weight.numel(), dtype=weight.dtype, device=weight.device)
    # Gated norms take a second tensor of that shape.
    given = (inputs.unsqueeze(0),) * max(1, len(_required(norm)))

    def normalized(value: float) -> torch.Tensor:
        state = {"weight": torch.full_like(weight, value)}
        bias = getattr(norm, "bias", None)
        if bias is not None:
            state["bias"] = torch.zeros_like(bias)
        return functional_call(norm, state, given)

    with torch.no_grad():
        without, one = normalized(0.0), normalized(1.0)
    if not without.any() and one.any():
        return 0.0
    if without.any() and torch.allclose(one, 2 * without):
        return 1.0
    raise ValueError(f"{type(norm).__name__} is no norm that multiplies by its weight")


def multiplies_by_weight(module: nn.Module) -> bool:
    """Whether `weight_offset` knows what a module does with its weight."""
    try:
        weight_offset(module)
    except Exception:  # whatever a class that was not meant finds wrong with the call
        return False
    return True


def _required(module: nn.Module) -> list[str]:
    return [
        name
        for name, parameter in inspect.signature(module.forward).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
