"""A module of a decoder block called as the block calls it, on other inputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Arguments = Callable[[int, int], dict[str, Any]]


def takes_one_tensor(module: nn.Module) -> bool:
    """Whether a module computes each token from that token alone, given nothing but it.

    Attentions take masks and positions too, and some MLPs the residual stream.
    """
    named = [
        parameter
        for parameter in inspect.signature(module.forward).parameters.values()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    return len(named) == 1


class InnerCall:
    """Calls a module with given inputs [B, T, K] in place of what its block would give it.

    Whatever else the module takes, positions, masks, the residual stream, it is given as the block
    gives it for B sequences of T tokens; what of that depends on hidden states, depends on random
    ones, always the same.

    block: a decoder layer; module: the name of one of its modules; reader: that of a linear in the
    module which is given the module's input as it is. arguments: keyword arguments of the block
    for a batch and a number of tokens.

    Raises ValueError where the block does not give the module what the reader takes.
    """

    def __init__(self, block: nn.Module, module: str, reader: str, arguments: Arguments) -> None:
        self._block, self._arguments = block, arguments
        self._module, self._reader = block.get_submodule(module), block.get_submodule(reader)
        self._calls: dict[tuple[int, ...], tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._place: int | str | None = None

    def __call__(self, inputs: torch.Tensor) -> Any:
        args, kwargs = self._recorded(inputs)
        if isinstance(self._place, int):
            return self._module(*args[: self._place], inputs, *args[self._place + 1 :], **kwargs)
        return self._module(*args, **{**kwargs, str(self._place): inputs})

    def _recorded(self, inputs: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        shape = tuple(inputs.shape)
        if shape not in self._calls:
            generator = torch.Generator().manual_seed(0)
            states = torch.randn(shape, generator=generator).to(inputs)
            self._calls[shape] = self._record(states)
        return self._calls[shape]

    def _record(self, states: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        hooks = (
            self._module.register_forward_pre_hook(
                lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
            ),
            self._reader.register_forward_pre_hook(_stop),
        )
        try:
            self._block(states, **self._arguments(*states.shape[:2]))
        except _ReachedError as reached:
            args, kwargs = calls[-1]
            self._place = _place_of(reached.inputs, args, kwargs)
            return args, kwargs
        finally:
            for hook in hooks:
                hook.remove()
        raise ValueError("the block does not use the module")


def _place_of(inputs: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str:
    """Where among the arguments of a call `inputs` is: an index or a key."""
    places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for place, value in places:
        if (
            isinstance(value, torch.Tensor)
            and value.numel() == inputs.numel()
            and value.shape[-1] == inputs.shape[-1]
            and torch.equal(value.reshape(inputs.shape), inputs)
        ):
            return place
    raise ValueError("the module is not given what the linear reads")


class _ReachedError(Exception):
    """Carries a linear's inputs out of a block that need not run any further."""

    def __init__(self, inputs: torch.Tensor) -> None:
        super().__init__()
        self.inputs = inputs


def inputs_of(linear: nn.Module, run: Callable[[], object]) -> torch.Tensor:
    """What a linear of a block is given, float32 [T, K]. run: calls the block, and is ended where
    the linear begins.
    """
    hook = linear.register_forward_pre_hook(_stop)
    try:
        run()
    except _ReachedError as reached:
        return reached.inputs.detach().float().flatten(0, -2)
    finally:
        hook.remove()
    raise ValueError("the block does not use the linear")


def _stop(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
    raise _ReachedError(arguments[0])
