"""What the search needs to know of a block's activations, gathered in one pass over the data.

Everything is float32 and bounded: a mean per channel, the Gram matrix of every group of channels
(from which the error of any rounding of that group follows without touching a token again), and a
sample of the tokens. The activations themselves are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from mlcawq.errors import UserError
from mlcawq.quantize import distributed
from mlcawq.quantize.experts import routed
from mlcawq.quantize.probes import Sample

# An expert sees some of the tokens: it keeps those of a sample so many times as large.
_LARGER = 4


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

    readers: name -> linear, or router, whose input is watched.
    group_sizes: name -> every G of its Gram matrices; those that are not named have none.
    experts: name -> the routed expert that the reader is in, which sees its own tokens only.
    where: name of the block, for messages.
    total: tokens that this rank will see. sample: how many to keep of those of all ranks, spread
        evenly over all of them.
    weighted: weight tokens by 1 / mean(h^2) of the hidden state h that the block leaves. The norm
        that follows divides by that size, so an error counts as much as it is felt; without it a
        few tokens with huge activations (the first one of most sequences) decide the search.
    """

    def __init__(
        self,
        readers: Mapping[str, nn.Module],
        group_sizes: Mapping[str, Collection[int]],
        *,
        experts: Mapping[str, nn.Module] = MappingProxyType({}),
        total: int,
        sample: int,
        weighted: bool,
        where: str,
    ) -> None:
        self._weighted = weighted
        self._where = where
        self._seen = distributed.before(total)
        self._total = int(distributed.total(total))
        self._experts = experts
        self._kept = self._spread(sample)
        self._kept_routed = self._spread(sample * _LARGER)
        self._inputs: dict[str, torch.Tensor] = {}
        self._sums: dict[str, torch.Tensor] = {}
        self._counts = dict.fromkeys(readers, 0)
        self._grams: dict[str, dict[int, torch.Tensor]] = {}
        self._tokens: dict[str, list[torch.Tensor]] = {}
        self._weights: dict[str, list[torch.Tensor]] = {}
        for name, module in readers.items():
            weight: Any = module.weight
            K = weight.shape[1]
            self._sums[name] = weight.new_zeros(K, dtype=torch.float64)
            self._grams[name] = {
                size: weight.new_zeros(K // size, size, size, dtype=torch.float32)
                for size in group_sizes.get(name, ())
            }
            self._tokens[name] = [weight.new_empty(0, K, dtype=torch.float32)]
            self._weights[name] = [weight.new_empty(0, dtype=torch.float32)]
        self._hooks = [
            module.register_forward_pre_hook(self._watch(name)) for name, module in readers.items()
        ]

    def _spread(self, sample: int) -> torch.Tensor:
        """Which tokens of all ranks' to keep, evenly spread."""
        count = min(self._total, sample)
        places = torch.linspace(0, self._total - 1, count, dtype=torch.float64, device="cpu")
        return places.round().long()

    def _watch(self, name: str) -> Callable[..., None]:
        def note(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            self._inputs[name] = arguments[0].detach().float()

        return note

    def take(self, output: torch.Tensor) -> None:
        """Account for what the watched modules saw on the way to `output` [B, T, hidden]."""
        weights = token_weights(output, self._weighted)
        kept = self._kept_of(self._kept, weights)
        kept_routed = self._kept_of(self._kept_routed, weights)
        for name, inputs in self._inputs.items():
            if name in self._experts:
                tokens, counted = routed(self._experts[name], weights)
                self._add(name, inputs.flatten(0, -2), counted, kept_routed[tokens])
            else:
                self._add(name, inputs.flatten(0, -2), weights, kept)
        self._seen += weights.numel()
        self._inputs.clear()

    def _kept_of(self, places: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Which of these tokens are among the places to keep, [B * T]."""
        count = weights.numel()
        here = places[(places >= self._seen) & (places < self._seen + count)] - self._seen
        kept = torch.zeros(count, dtype=torch.bool, device=weights.device)
        kept[here.to(weights.device)] = True
        return kept

    def _add(
        self, name: str, inputs: torch.Tensor, weights: torch.Tensor, kept: torch.Tensor
    ) -> None:
        """Tokens [t, K] with their weights, and whether to keep them, [t] each."""
        total = inputs.abs().sum(0, dtype=torch.float64)
        if not torch.isfinite(total).all():
            raise UserError.one(
                "NaN or infinite activations",
                f"{self._where}.{name}",
                "the checkpoint is damaged, or overflows in the compute type",
            )
        self._sums[name] += total
        self._counts[name] += len(inputs)
        for size, gram in self._grams[name].items():
            groups = inputs.T.reshape(-1, size, len(inputs))
            gram.baddbmm_(groups * weights, groups.transpose(1, 2))
        self._tokens[name].append(inputs[kept])
        self._weights[name].append(weights[kept])

    def finish(self) -> dict[str, InputStatistics]:
        """Stop watching; the statistics by name."""
        for hook in self._hooks:
            hook.remove()
        return {
            name: _summed(
                sums,
                self._counts[name],
                self._grams[name],
                torch.cat(self._tokens[name]),
                torch.cat(self._weights[name]),
            )
            for name, sums in self._sums.items()
        }


def statistics_of(
    tokens: torch.Tensor, weights: torch.Tensor, group_sizes: Collection[int]
) -> InputStatistics:
    """Of these tokens [T, K] of this rank's and nothing else, all of them in the sample."""
    grams = {}
    for size in group_sizes:
        groups = tokens.T.reshape(-1, size, len(tokens))
        grams[size] = torch.bmm(groups * weights, groups.transpose(1, 2))
    sums = tokens.abs().sum(0, dtype=torch.float64)
    return _summed(sums, len(tokens), grams, tokens, weights)


def _summed(
    sums: torch.Tensor,
    count: int,
    grams: dict[int, torch.Tensor],
    tokens: torch.Tensor,
    weights: torch.Tensor,
) -> InputStatistics:
    """Of all ranks, from the sums over the tokens of this one."""
    distributed.sum_(sums, *grams.values())
    seen, kept = int(distributed.total(count)), len(tokens)
    sample = Sample(tokens, weights, distributed.before(kept), int(distributed.total(kept)))
    return InputStatistics((sums / max(seen, 1)).float(), grams, sample, seen)


def diagonal_blocks(moment: torch.Tensor, size: int) -> torch.Tensor:
    """[K, K] -> [K/G, G, G]: what each group of channels has with itself."""
    groups = moment.view(-1, size, moment.shape[0] // size, size).diagonal(dim1=0, dim2=2)
    return groups.permute(2, 0, 1).contiguous()
