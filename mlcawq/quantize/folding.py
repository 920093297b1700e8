"""Folding scales into the operation before: the function of a block stays what it was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mlcawq.errors import UserError
from mlcawq.families import ScalingGroup


def channel_rows(block: nn.Module, group: ScalingGroup, head_dim: int) -> torch.Tensor | None:
    """Which output row of the operation before each channel of the readers comes from.

    Returns int64 [K], or None where channel c is row c. With grouped-query attention, the query
    heads that share a value head read the same rows.
    """
    if group.previous is None:
        return None
    previous, reader = (block.get_submodule(name) for name in (group.previous, group.linears[0]))
    if not isinstance(previous, nn.Linear) or previous.out_features == reader.in_features:
        return None
    rows = torch.arange(previous.out_features).view(-1, 1, head_dim)
    return rows.expand(-1, reader.in_features // previous.out_features, -1).reshape(-1)


def fold_scale(
    previous: nn.Module,
    readers: Sequence[nn.Module],
    scale: torch.Tensor,
    rows: torch.Tensor | None = None,
    *,
    where: str,
) -> torch.Tensor:
    """Divide the output of `previous` by `scale` and multiply the columns of `readers` by it.

    scale: [K], equal for channels that share a row; rows: of `channel_rows`.
    Returns the scale that was applied. Raises UserError naming `where` when it is not finite.
    """
    if isinstance(previous, nn.Linear):
        divisor = by_row(scale, rows, previous.out_features)
        previous.weight.detach().div_(divisor.unsqueeze(1))
        if previous.bias is not None:
            previous.bias.detach().div_(divisor)
    else:
        norm: Any = previous
        scale, rounded = storable_scale(scale, norm.weight.detach())
        norm.weight = nn.Parameter(rounded, requires_grad=False)
    for reader in readers:
        weight: Any = reader.weight
        weight.detach().mul_(scale)
        if not torch.isfinite(weight).all():
            raise UserError.one("scaling gave NaN or infinite weights", where)
    return scale


def by_row(scale: torch.Tensor, rows: torch.Tensor | None, count: int) -> torch.Tensor:
    """The scale [count] of every output row of the operation before; 1 for rows that nobody reads.

    scale: [K], by channel of the readers; rows: of `channel_rows`.
    """
    if rows is None:
        return scale
    divisor = scale.new_ones(count)
    divisor[rows] = scale
    return divisor


def storable_scale(scale: torch.Tensor, norm: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale that dividing a float16 norm weight really applies, and that weight.

    norm / scale has to be rounded to float16. Taking norm / rounded for the scale in its place
    leaves no error at all: the function of norm and linears together is kept. Returns
    (scale, rounded norm), both float32 [K]; channels where that is impossible keep scale 1.
    """
    rounded = (norm / scale).to(torch.float16).float()
    exact = norm / rounded
    usable = torch.isfinite(exact) & torch.isfinite(rounded) & (exact > 0)
    return torch.where(usable, exact, torch.ones_like(exact)), torch.where(usable, rounded, norm)
