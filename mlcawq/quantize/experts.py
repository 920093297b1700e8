"""Routed experts: who they are, which tokens they are given, how much these count.

An expert says after every forward which tokens it was given and what its outputs were multiplied
by (`routed_tokens`, `routing_weights`). An error of an expert reaches the block's output times that
weight, so its square counts as much more or less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn


def expert_of(block: nn.Module, linear: str) -> str | None:
    """The name in the block of the routed expert that a linear belongs to; None where to none."""
    name = linear
    while "." in name:
        name = name.rpartition(".")[0]
        if hasattr(block.get_submodule(name), "routed_tokens"):
            return name
    return None


def routed(expert: Any, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the tokens that an expert was given in the last forward: which they are of all [B * T],
    and how much they count. weights: [B * T], how much every token counts.
    """
    tokens = expert.routed_tokens.to(weights.device)
    return tokens, weights[tokens] * expert.routing_weights.to(weights).square()


def inputs_in(module: nn.Module, linears: Iterable[str], run: Callable[[], object]) -> Any:
    """What linears of a module are given while `run` calls it, float32 [T, K] by name; those that
    are not called are left out.
    """
    seen: dict[str, torch.Tensor] = {}

    def note(name: str, _: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        seen[name] = arguments[0].detach().float().flatten(0, -2)

    with ExitStack() as hooks:
        for name in linears:
            linear = module.get_submodule(name)
            hooks.callback(linear.register_forward_pre_hook(partial(note, name)).remove)
        run()
    return seen


class RoutedInputs:
    """What the linears of a block's experts are given in one forward of the block.

    block: its experts leave `routed_tokens` and `routing_weights`. experts: by linear, the name of
    its expert. Collects while `run` calls the block.
    """

    def __init__(
        self, block: nn.Module, experts: Mapping[str, str], run: Callable[[], object]
    ) -> None:
        self._block, self._experts = block, experts
        self._tokens: dict[str, torch.Tensor] = {}
        with ExitStack() as hooks:
            for name in {expert.rpartition(".")[0] for expert in experts.values()}:
                container = block.get_submodule(name)
                note = partial(self._note, name)
                hooks.callback(container.register_forward_pre_hook(note).remove)
            self.seen: dict[str, torch.Tensor] = inputs_in(block, experts, run)

    def _note(self, container: str, _: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        self._tokens[container] = arguments[0].detach().flatten(0, -2)

    def given(self, linear: str, tokens: torch.Tensor) -> torch.Tensor:
        """What the linear would be given were its expert called with these of all tokens."""
        name = self._experts[linear]
        expert = self._block.get_submodule(name)
        states = self._tokens[name.rpartition(".")[0]][tokens]
        inner = linear.removeprefix(f"{name}.")
        inputs: torch.Tensor = inputs_in(expert, [inner], partial(expert, states))[inner]
        return inputs
