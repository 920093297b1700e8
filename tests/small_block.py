"""A block small enough to be quantized in a moment, with outlier channels and shared rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mlcawq.families import ScalingGroup
from mlcawq.quantize import distributed
from mlcawq.quantize.block import BlockResult, quantize_block
from mlcawq.quantize.recipe import parse_recipe
from mlcawq.quantize.rounding import Original
from mlcawq.quantize.states import HiddenStates

WIDTH = 64
_SHAPES = [(2, 9), (2, 9), (1, 5)]
GROUPS = (
    ScalingGroup(previous="norm", linears=("up",), inspect="up"),
    # Two heads of down read one of up's, as with grouped-query attention.
    ScalingGroup(previous="up", linears=("down",), inspect="down"),
)


class SmallBlock(nn.Module):
    """A norm and two linears on a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 64)
        self.down = nn.Linear(128, WIDTH, bias=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        inner = torch.relu(self.up(self.norm(states))).unflatten(-1, (2, 1, 32))
        return states + self.down(inner.expand(*inner.shape[:-2], 2, -1).flatten(-3))


def make_block() -> SmallBlock:
    """The same block each time, in the CPU's memory."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("cpu"):
        block = SmallBlock().requires_grad_(False)
    for parameter in (block.up.weight, block.up.bias, block.down.weight):
        parameter.normal_(generator=generator).mul_(0.2)
    block.norm.weight[::16] *= 20
    block.up.weight[:, ::16] /= 20
    return block


def text() -> list[torch.Tensor]:
    """Hidden states [T, WIDTH] of every sequence."""
    generator = torch.Generator().manual_seed(1)
    shapes = [tokens for batch, tokens in _SHAPES for _ in range(batch)]
    return [torch.randn(tokens, WIDTH, generator=generator, device="cpu") for tokens in shapes]


def states_of(sequences: list[torch.Tensor]) -> HiddenStates:
    """Sequences as batches of one."""
    states = HiddenStates([(1, len(x)) for x in sequences], WIDTH, torch.device("cpu"))
    for j, sequence in enumerate(sequences):
        states[j] = sequence.unsqueeze(0)
    return states


def quantized(options: dict[str, Any], block: nn.Module | None = None) -> BlockResult:
    """The block quantized on this rank's share of the text, as recipe options say."""
    mine = list(distributed.share(text()))
    recipe = parse_recipe({"group_size": 32, **options})
    original = None
    if recipe.follows_original:
        original = Original(make_block(), states_of([1.1 * sequence for sequence in mine]))
    return quantize_block(
        block or make_block(),
        states_of(mine),
        lambda batch, tokens: {},
        GROUPS,
        recipe,
        name="block",
        full_name=lambda linear: f"block.{linear}",
        head_dim=32,
        original=original,
    )
