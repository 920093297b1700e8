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
from mlcawq.quantize import distributed
from mlcawq.quantize.probes import Sample


@dataclass
class InputStatistics:
    """The inputs X of linears that read one tensor of K channels, over all T tokens of all ranks.

    mean_abs: [K], mean of |X|.
    grams: by group size G, [K/G, G, G]: the sum over tokens of weight(t) x_g(t) x_g(t)^T for every
        group g of channels.
    sample: some tokens [T', K] in order of appearance; all of them when T is small.
    seen: T.
    """

    mean_abs: torch.Tensor
    grams: dict[int, torch.Tensor]
    sample: Sample
    seen: int

    @property
    def tokens(self) -> torch.Tensor:
        """[T', K], this rank's part of the sample."""
        return self.sample.inputs

    @property
    def weights(self) -> torch.Tensor:
        """[T'], how much each of those tokens counts."""
        return self.sample.weights


def token_weights(output: torch.Tensor, weighted: bool) -> torch.Tensor:
    """[B * T]: how much each token of a block's output [B, T, hidden] counts; see below."""
    size = output.float().square().mean(-1).flatten()
    if not weighted:
        return torch.ones_like(size)
    return size.clamp(min=torch.finfo(torch.float32).tiny).reciprocal()


class BlockStatistics:
    """Gathers InputStatistics of several linears of a block while it runs.

    readers: name -> linear whose input is watched.
    group_sizes: name -> every G of its Gram matrices.
    where: name of the block, for messages.
    total: tokens that this rank will see. sample: how many to keep of those of all ranks, spread
        evenly over all of them.
    weighted: weight tokens by 1 / mean(h^2) of the hidden state h that the block leaves. The norm
        that follows divides by that size, so an error counts as much as it is felt; without it a
        few tokens with huge activations (the first one of most sequences) decide the search.
    """

    def __init__(
        self,
        readers: Mapping[str, nn.Linear],
        group_sizes: Mapping[str, Collection[int]],
        *,
        total: int,
        sample: int,
        weighted: bool,
        where: str,
    ) -> None:
        self._weighted = weighted
        self._where = where
        self._seen = distributed.before(total)
        self._total = int(distributed.total(total))
        count = min(self._total, sample)
        kept = torch.linspace(0, self._total - 1, count, dtype=torch.float64, device="cpu")
        self._kept = kept.round().long()
        self._first = int((self._kept < self._seen).sum())
        self._inputs: dict[str, torch.Tensor] = {}
        self._sums: dict[str, torch.Tensor] = {}
        self._grams: dict[str, dict[int, torch.Tensor]] = {}
        self._tokens: dict[str, list[torch.Tensor]] = {}
        for name, module in readers.items():
            weight, K = module.weight, module.in_features
            self._sums[name] = weight.new_zeros(K, dtype=torch.float64)
            self._grams[name] = {
                size: weight.new_zeros(K // size, size, size, dtype=torch.float32)
                for size in group_sizes[name]
            }
            self._tokens[name] = [weight.new_empty(0, K, dtype=torch.float32)]
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
            self._sums[name] += total
            for size, gram in self._grams[name].items():
                groups = inputs.T.reshape(-1, size, count)
                gram.baddbmm_(groups * weights, groups.transpose(1, 2))
            self._tokens[name].append(inputs[kept])
        self._weights.append(weights[kept])
        self._seen += count
        self._inputs.clear()

    def finish(self) -> dict[str, InputStatistics]:
        """Stop watching; the statistics by name."""
        for hook in self._hooks:
            hook.remove()
        found = {}
        for name, sums in self._sums.items():
            distributed.sum_(sums, *self._grams[name].values())
            tokens = torch.cat(self._tokens[name])
            weights = torch.cat([tokens.new_empty(0), *self._weights])
            found[name] = InputStatistics(
                (sums / self._total).float(),
                self._grams[name],
                Sample(tokens, weights, self._first, len(self._kept)),
                self._total,
            )
        return found


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
