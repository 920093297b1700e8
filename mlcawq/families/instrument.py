"""A decoder block under observation: what its modules are given, and what if that were scaled."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator

Arguments = Callable[[int, int], dict[str, Any]]


@dataclass(frozen=True)
class Call:
    """One module's call. inputs: every floating tensor that it was given."""

    inputs: tuple[torch.Tensor, ...]
    output: torch.Tensor


class InstrumentedBlock:
    """A copy of a decoder block with random weights, in float64 where its operations have that.

    Random ones, for what is looked for is a matter of architecture: real weights have dead
    channels and near-zero norms, of which no scale can be told.

    arguments: keyword arguments of the block for a batch and a number of tokens.
    """

    def __init__(self, block: nn.Module, arguments: Arguments, hidden_size: int) -> None:
        self.block = copy.deepcopy(block).eval().requires_grad_(False)
        self._arguments = arguments
        self._hidden_size = hidden_size
        self._generator = torch.Generator().manual_seed(0)
        self._randomize()
        self._dtype = torch.float64
        self.block.double()
        try:
            self.run(self.hidden(1, 2))
        except RuntimeError:  # kernels of some architectures are for smaller types only
            self._dtype = torch.float32
            self.block.float()

    def _randomize(self) -> None:
        for name, weight in self.block.named_parameters():
            drawn = torch.randn(weight.shape, generator=self._generator)
            if name.endswith("bias"):
                drawn *= 0.2
            elif weight.ndim == 1:  # far from 0, where norms that add 1 begin, and from -1
                drawn = 1 + 0.2 * drawn.clamp(-2, 2)
            else:
                drawn *= weight.shape[-1] ** -0.5
            weight.data.copy_(drawn)

    def hidden(self, batch: int, tokens: int) -> torch.Tensor:
        """Random hidden states [batch, tokens, hidden_size]."""
        shape = (batch, tokens, self._hidden_size)
        return torch.randn(shape, generator=self._generator).to(self._dtype)

    def uniform(self, count: int, low: float, high: float) -> torch.Tensor:
        """Random numbers [count], evenly spread on a logarithmic scale and all different."""
        order = torch.randperm(count, generator=self._generator)
        return torch.logspace(0, 1, count, base=high / low, dtype=self._dtype)[order] * low

    @torch.no_grad()
    def run(
        self,
        hidden: torch.Tensor,
        *,
        inputs: Mapping[str, torch.Tensor] | None = None,
        outputs: Mapping[str, torch.Tensor] | None = None,
        watch: dict[str, Call] | None = None,
    ) -> torch.Tensor:
        """The block's output for hidden states [B, T, hidden_size].

        inputs, outputs: by a module's name, what its input or output is multiplied by, [K] or [N].
        watch: filled with the calls of all modules in the block, in their order.
        """
        modules = dict(self.block.named_modules())
        with ExitStack() as hooks:
            for name, factor in (inputs or {}).items():
                hooks.enter_context(_removed(_scale_input(modules[name], factor)))
            for name, factor in (outputs or {}).items():
                hooks.enter_context(_removed(_scale_output(modules[name], factor)))
            if watch is not None:
                for name, module in modules.items():
                    if name:
                        hooks.enter_context(_removed(_note(module, name, watch)))
            arguments = _converted(self._arguments(*hidden.shape[:2]), self._dtype)
            output = self.block(hidden, **arguments)
        return output[0] if isinstance(output, tuple) else output

    def inputs_of(
        self, reader: str, hidden: torch.Tensor, *, outputs: Mapping[str, torch.Tensor]
    ) -> torch.Tensor | None:
        """What a module is given, [T, K], the outputs of others being multiplied as in `run`; None
        where it is not called. The block is left there.
        """
        module = self.block.get_submodule(reader)
        with _removed(module.register_forward_pre_hook(_stop)):
            try:
                self.run(hidden, outputs=outputs)
            except _ReachedError as reached:
                return reached.inputs.flatten(0, -2)
        return None


class _ReachedError(Exception):
    """Carries a module's inputs out of a block that need not run any further."""

    def __init__(self, inputs: torch.Tensor) -> None:
        super().__init__()
        self.inputs = inputs


def _stop(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
    raise _ReachedError(args[0])


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _scale_input(module: nn.Module, factor: torch.Tensor) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (args[0] * factor, *args[1:]), kwargs
        first = next(key for key, value in kwargs.items() if isinstance(value, torch.Tensor))
        return args, {**kwargs, first: kwargs[first] * factor}

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _scale_output(module: nn.Module, factor: torch.Tensor) -> Any:
    return module.register_forward_hook(lambda _, args, output: output * factor)


def _note(module: nn.Module, name: str, calls: dict[str, Call]) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = (*args, *kwargs.values())
        tensors = tuple(
            value.detach().clone()
            for value in given
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim > 1
        )
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, torch.Tensor):
            calls[name] = Call(tensors, first.detach().clone())

    return module.register_forward_hook(hook, with_kwargs=True)


def _converted(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(_converted(item, dtype) for item in value)
    if isinstance(value, dict):
        return {key: _converted(item, dtype) for key, item in value.items()}
    return value
