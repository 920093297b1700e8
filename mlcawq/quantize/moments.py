"""Second moments of linears' inputs, as the block under quantization gives them by now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from mlcawq.quantize.calls import inputs_of
from mlcawq.quantize.distributed import sum_
from mlcawq.quantize.experts import RoutedInputs, routed
from mlcawq.quantize.statistics import token_weights
from mlcawq.quantize.workspace import Workspace

# Sums over tokens, weighted, [K, K]: of x' x'^T with the inputs x' that the block as it is now
# gives to a linear, and of x' x^T with the original model's x for the same tokens, scaled like x';
# None where there is no original.
Moments = tuple[torch.Tensor, torch.Tensor | None]

_AT_ONCE = 2**30  # bytes of the moments of experts that are gathered in one pass over the text


@dataclass(frozen=True)
class Original:
    """A block as it was, and what it is given in the original model, [B, T, hidden_size] each."""

    block: nn.Module
    hidden: Sequence[torch.Tensor]


def readers_at_once(work: Workspace) -> list[list[str]]:
    """The readers of the workspace in their order, those together that one pass can serve.

    Experts do not read each other: their first linears are together, and so are their last.
    """
    batches: list[list[str]] = []
    members: set[str] = set()
    size = 0
    for readers in work.readers:
        expert = work.experts.get(readers[0])
        K = work.linears[readers[0]].in_features
        size += 8 * K * K
        if expert is None or not members or expert in members or size > _AT_ONCE:
            batches.append([])
            members, size = set(), 8 * K * K
        if expert is not None:
            members.add(expert)
        batches[-1].append(readers[0])
    return batches


def gather_moments(
    work: Workspace, readers: Sequence[str], original: Original | None
) -> dict[str, Moments]:
    """Moments of the inputs of each reader: one linear, or several of different experts."""
    sums: dict[str, Moments] = {}
    for reader in readers:
        weight = work.weight(reader)
        moment = weight.new_zeros(len(weight), len(weight))
        sums[reader] = moment, None if original is None else torch.zeros_like(moment)
    busy = [reader for reader in readers if work.experts.get(reader) not in work.neglected]
    for reader in [reader for reader in readers if reader not in busy]:
        moment, _ = sums[reader]
        inputs = work.tokens(reader)
        moment.addmm_((inputs * work.seen_by(reader).weights.unsqueeze(1)).T, inputs)
        sums[reader] = moment, None
    for j in range(len(work.hidden) if busy else 0):
        weights = token_weights(work.targets[j], work.weighted)
        if busy[0] in work.experts:
            _add_routed(work, busy, j, weights, original, sums)
        else:
            _add(work, busy[0], j, weights, original, sums[busy[0]])
    for moment, cross in [sums[reader] for reader in readers]:
        sum_(moment) if cross is None else sum_(moment, cross)
    return sums


def _add(
    work: Workspace,
    reader: str,
    j: int,
    weights: torch.Tensor,
    original: Original | None,
    sums: Moments,
) -> None:
    """Account for batch j of the text, for a linear that is given all tokens, [B * T] weights."""
    moment, cross = sums
    inputs = inputs_of(work.linears[reader], partial(work.run, work.hidden[j]))
    counted = (inputs * weights.unsqueeze(1)).T
    moment.addmm_(counted, inputs)
    if original is not None and cross is not None:
        linear = original.block.get_submodule(reader)
        meant = inputs_of(linear, partial(_run_original, work, original, j))
        cross.addmm_(counted, _scaled(work, reader, meant))


def _add_routed(
    work: Workspace,
    readers: Sequence[str],
    j: int,
    weights: torch.Tensor,
    original: Original | None,
    sums: dict[str, Moments],
) -> None:
    """As `_add`, for linears of experts: each sees the tokens that it is given now, and the
    original is asked what it would make of these, wherever it sends them itself.
    """
    experts = {reader: work.experts[reader] for reader in readers}
    found = RoutedInputs(work.block, experts, partial(work.run, work.hidden[j]))
    meant = None
    if original is not None:
        meant = RoutedInputs(original.block, experts, partial(_run_original, work, original, j))
    for reader, inputs in found.seen.items():
        moment, cross = sums[reader]
        tokens, counts = routed(work.block.get_submodule(experts[reader]), weights)
        counted = (inputs * counts.unsqueeze(1)).T
        moment.addmm_(counted, inputs)
        if meant is not None and cross is not None:
            cross.addmm_(counted, _scaled(work, reader, meant.given(reader, tokens)))


def _run_original(work: Workspace, original: Original, j: int) -> None:
    states = original.hidden[j]
    original.block(states, **work.arguments(*states.shape[:2]))


def _scaled(work: Workspace, reader: str, inputs: torch.Tensor) -> torch.Tensor:
    return inputs / work.input_scale[reader] if reader in work.input_scale else inputs
