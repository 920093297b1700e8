"""Folding scales into the operation before: the function of a block stays what it was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mlcawq.families import ScalingGroup
from mlcawq.families.norms import weight_offset
from mlcawq.families.rows import rows_of
from mlcawq.quantize.guards import NotFiniteError


def channel_rows(block: nn.Module, group: ScalingGroup, head_dim: int) -> torch.Tensor | None:
    """Which output row of the operation before each channel of the readers comes from.

    head_dim: of a value head. Returns int64 [K], or None where channel c is row c, as it is after
    most norms. With grouped-query attention, the query heads that share a value head read the same
    rows.
    """
    if group.previous is None:
        return None
    previous, reader = (block.get_submodule(name) for name in (group.previous, group.linears[0]))
    if not isinstance(group.rows, str):
        return torch.tensor(group.rows, device=reader.weight.device)
    if not isinstance(previous, nn.Linear):
        return None
    channels = int(reader.in_features)
    if group.rows == "heads" and previous.out_features == channels:
        return None
    rows = rows_of(group.rows, channels, previous.out_features, head_dim)
    return rows.to(previous.weight.device)


def fold_scale(
    previous: nn.Module,
    readers: Sequence[nn.Module],
    scale: torch.Tensor,
    rows: torch.Tensor | None = None,
    *,
    where: str,
) -> torch.Tensor:
    """Divide the output of `previous` by `scale` and multiply the columns of `readers` by it.

    previous: a linear, or a norm that multiplies by its weight, or by 1 + weight.
    readers: modules with a weight [N, K]: linears, routers.
    scale: [K], equal for channels that share a row; rows: of `channel_rows`.
    Returns the scale that was applied. Raises NotFiniteError naming `where` when it is not.
    """
    owner: Any = previous
    divisor = by_row(scale, rows, len(owner.weight))
    if isinstance(previous, nn.Linear):
        previous.weight.detach().div_(divisor.unsqueeze(1))
    else:
        divisor, rounded = storable_scale(divisor, owner.weight.detach(), weight_offset(owner))
        owner.weight = nn.Parameter(rounded, requires_grad=False)
        scale = divisor if rows is None else divisor[rows]
    bias = getattr(previous, "bias", None)
    if bias is not None:
        bias.detach().div_(divisor)
    for reader in readers:
        weight: Any = reader.weight
        weight.detach().mul_(scale)
        if not torch.isfinite(weight).all():
            raise NotFiniteError.one("scaling gave NaN or infinite weights", where)
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


def storable_scale(
    scale: torch.Tensor, norm: torch.Tensor, offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale that dividing a float16 norm weight really applies, and that weight.

    (norm + offset) / scale - offset has to be rounded to float16. Taking the quotient of what the
    norm multiplied by and what it multiplies by now for the scale leaves no error at all: the
    function of norm and linears together is kept. Returns (scale, rounded norm), both float32 [K];
    channels where that is impossible keep scale 1.
    """
    rounded = ((norm + offset) / scale - offset).to(torch.float16).float()
    exact = (norm + offset) / (rounded + offset)
    usable = torch.isfinite(exact) & torch.isfinite(rounded) & (exact > 0)
    return torch.where(usable, exact, torch.ones_like(exact)), torch.where(usable, rounded, norm)
