"""AWQ's scales found and folded, one scaling group of a block after another."""

from __future__ import annotations

import math

import torch
from torch import nn

from mlcawq.families import ScalingGroup
from mlcawq.quantize.calls import InnerCall, takes_one_tensor
from mlcawq.quantize.distributed import before, largest, total
from mlcawq.quantize.folding import by_row, channel_rows, fold_scale
from mlcawq.quantize.probes import ModuleProbe, Sample, SumProbe
from mlcawq.quantize.recipe import ScaleRecipe
from mlcawq.quantize.scaling import Probe, search_scale
from mlcawq.quantize.states import shapes_of
from mlcawq.quantize.statistics import BlockStatistics
from mlcawq.quantize.workspace import Workspace

_PROBE_LENGTH = 256  # tokens of each sequence that judges an attention


def balance(work: Workspace, recipe: ScaleRecipe, head_dim: int) -> None:
    """Scale every group's channels where that lowers the error, and note it in the workspace."""
    for group in work.groups:
        if work.quantizes(group) and group.previous is not None:
            _balance_group(work, group, group.previous, recipe, head_dim)


def _balance_group(
    work: Workspace, group: ScalingGroup, before: str, recipe: ScaleRecipe, head_dim: int
) -> None:
    linears = [work.linears[linear] for linear in group.linears]
    also = [work.block.get_submodule(name) for name in group.also]
    previous = work.block.get_submodule(before)
    rows = channel_rows(work.block, group, head_dim)
    with work.exact():
        probe = _probe(work, group, recipe)
    found = search_scale(
        linears,
        [work.grids.get(linear) for linear in group.linears],
        work.seen_together(group).mean_abs,
        probe,
        recipe,
        rows=rows,
        also=also,
    )
    if not math.isfinite(found.unscaled):
        work.warnings.append(f"{group.linears[0]}: its outputs are not finite; left unscaled")
    if not found.error < found.unscaled:
        return
    where = f"{work.name}.{before}"
    scale = fold_scale(previous, [*linears, *also], found.scale, rows, where=where)
    work.input_scale.update(dict.fromkeys(group.linears, scale))
    if isinstance(previous, nn.Linear):
        work.output_scale[before] = by_row(scale, rows, previous.out_features)


def _probe(work: Workspace, group: ScalingGroup, recipe: ScaleRecipe) -> Probe:
    if recipe.objective == "block":
        try:
            probes = [
                _module_probe(work, group, module, recipe.tokens)
                for module in (group.inspect, *group.beside)
            ]
        except ValueError:  # the module's call cannot be made again with other inputs
            pass
        else:
            return probes[0] if len(probes) == 1 else SumProbe(probes, absolute=True)
    return SumProbe(
        [
            ModuleProbe(work.linears[linear], _some(work.seen_by(linear).sample, recipe.tokens))
            for linear in group.linears
            if linear in work.grids
        ]
    )


def _module_probe(work: Workspace, group: ScalingGroup, name: str, count: int) -> ModuleProbe:
    module = work.block.get_submodule(name)
    if takes_one_tensor(module):
        return ModuleProbe(module, _some(work.seen_together(group).sample, count))
    reader = next(linear for linear in group.linears if linear.startswith(f"{name}."))
    call = InnerCall(work.block, name, reader, work.arguments)
    return ModuleProbe(module, _sequences(work, reader, count), call)


def _some(sample: Sample, count: int) -> Sample:
    return sample.every(max(1, sample.count // count))


def _sequences(work: Workspace, linear: str, count: int) -> Sample:
    """Inputs [S, T, K] of `linear` and weights [S, T] on beginnings of whole sequences."""
    shapes = shapes_of(work.hidden)
    length = min(_PROBE_LENGTH, largest(max(tokens for _, tokens in shapes)))
    places = [
        (j, row)
        for j, (batch, tokens) in enumerate(shapes)
        for row in range(batch)
        if tokens >= length
    ]
    first, sequences = before(len(places)), int(total(len(places)))
    step = max(1, sequences * length // count)
    chosen = places[-first % step :: step]
    gather = BlockStatistics(
        {linear: work.linears[linear]},
        {},
        total=length * len(chosen),
        sample=length * sequences,
        weighted=work.weighted,
        where=work.name,
    )
    if chosen:
        states = torch.stack([work.hidden[j][row, :length] for j, row in chosen])
        gather.take(work.run(states))
    seen = gather.finish()[linear]
    return Sample(
        seen.tokens.unflatten(0, (len(chosen), length)),
        seen.weights.view(len(chosen), length),
        -(-first // step),
        -(-sequences // step),
    )
