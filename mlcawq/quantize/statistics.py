"""What the search needs to know of a block's activations, gathered in one pass over the data.

Everything is float32 and bounded: a mean per channel, the Gram matrix of every group of channels
(from which the error of any rounding of that group follows without touching a token again), and a
sample of the tokens. The activations themselves are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from mlcawq.errors import UserError


@dataclass
class InputStatistics:
    """The inputs X of the linears that read one tensor of K channels, over all T tokens.

    mean_abs: [K], mean of |X|.
    grams: by group size G, [K/G, G, G]: the sum over tokens of weight(t) x_g(t) x_g(t)^T for every
        group g of channels.
    tokens: [T', K], a sample in order of appearance; all of them when T is small.
    weights: [T'], the tokens' weights.
    seen: T.
    """

    mean_abs: torch.Tensor
    grams: dict[int, torch.Tensor]
    tokens: torch.Tensor
    weights: torch.Tensor
    seen: int


def token_weights(output: torch.Tensor, weighted: bool) -> torch.Tensor:
    """[B * T]: how much each token of a block's output [B, T, hidden] counts; see below."""
    size = output.float().square().mean(-1).flatten()
    if not weighted:
        return torch.ones_like(size)
    return size.clamp(min=torch.finfo(torch.float32).tiny).reciprocal()


class BlockStatistics:
    """Gathers InputStatistics of several modules of a block while it runs.

    readers: name -> module whose input is watched.
    group_sizes: name -> every G of its Gram matrices.
    where: name of the block, for messages.
    sample: how many tokens to keep of `total`, spread evenly over all of them.
    weighted: weight tokens by 1 / mean(h^2) of the hidden state h that the block leaves. The norm
        that follows divides by that size, so an error counts as much as it is felt; without it a
        few tokens with huge activations (the first one of most sequences) decide the search.
    """

    def __init__(
        self,
        readers: dict[str, nn.Module],
        group_sizes: Mapping[str, Collection[int]],
        *,
        total: int,
        sample: int,
        weighted: bool,
        where: str,
    ) -> None:
        self._group_sizes = group_sizes
        self._weighted = weighted
        self._where = where
        self._kept = torch.linspace(0, total - 1, min(total, sample)).round().long()
        self._total = total
        self._seen = 0
        self._inputs: dict[str, torch.Tensor] = {}
        self._sums: dict[str, torch.Tensor] = {}
        self._grams: dict[str, dict[int, torch.Tensor]] = {name: {} for name in readers}
        self._tokens: dict[str, list[torch.Tensor]] = {name: [] for name in readers}
        self._weights: list[torch.Tensor] = []
        self._hooks = [
            module.register_forward_pre_hook(self._watch(name)) for name, module in readers.items()
        ]

    def _watch(self, name: str) -> Callable[..., None]:
        def note(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            self._inputs[name] = arguments[0].detach().float()

        return note

    def take(self, output: torch.Tensor) -> None:
        """Account for what the watched modules saw on the way to `output` [B, T, hidden]."""
        weights = token_weights(output, self._weighted)
        count = weights.numel()
        kept = self._kept[(self._kept >= self._seen) & (self._kept < self._seen + count)]
        kept = kept - self._seen
        for name, inputs in self._inputs.items():
            inputs = inputs.flatten(0, -2)
            total = inputs.abs().sum(0, dtype=torch.float64)
            if not torch.isfinite(total).all():
                raise UserError.one(
                    "NaN or infinite activations",
                    f"{self._where}.{name}",
                    "the checkpoint is damaged, or overflows in the compute type",
                )
            self._sums[name] = self._sums[name] + total if name in self._sums else total
            grams = self._grams[name]
            for size in self._group_sizes[name]:
                groups = inputs.T.reshape(-1, size, count)
                gram = torch.bmm(groups * weights, groups.transpose(1, 2))
                grams[size] = grams[size].add_(gram) if size in grams else gram
            self._tokens[name].append(inputs[kept])
        self._weights.append(weights[kept])
        self._seen += count
        self._inputs.clear()

    def finish(self) -> dict[str, InputStatistics]:
        """Stop watching; the statistics by name."""
        for hook in self._hooks:
            hook.remove()
        weights = torch.cat(self._weights)
        return {
            name: InputStatistics(
                (self._sums[name] / self._seen).float(),
                self._grams[name],
                torch.cat(self._tokens[name]),
                weights,
                self._seen,
            )
            for name in self._sums
        }


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


class _ReachedError(Exception):
    """Carries a module's inputs out of a block that need not run any further."""

    def __init__(self, inputs: torch.Tensor) -> None:
        super().__init__()
        self.inputs = inputs


def _stop(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
    raise _ReachedError(arguments[0])


def diagonal_blocks(moment: torch.Tensor, size: int) -> torch.Tensor:
    """[K, K] -> [K/G, G, G]: what each group of channels has with itself."""
    groups = moment.view(-1, size, moment.shape[0] // size, size).diagonal(dim1=0, dim2=2)
    return groups.permute(2, 0, 1).contiguous()
