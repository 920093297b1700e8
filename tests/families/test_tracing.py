"""Tracing finds what the tables say, and works where there is no table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoder_blocks import CASES, decoder_blocks, distinct_blocks
from torch import nn

from mlcawq.families import ARCHITECTURES, Architecture, ScalingGroup
from mlcawq.families.rows import value_head_dim
from mlcawq.families.tracing import described, trace_block
from mlcawq.quantize.folding import channel_rows


def _compared(block: nn.Module, groups: tuple[ScalingGroup, ...], head_dim: int) -> set[Any]:
    """The groups with their row maps in numbers: some maps have two names."""
    found = set()
    for group in groups:
        rows = channel_rows(block, group, head_dim)
        found.add(
            (
                group.previous,
                frozenset(group.linears),
                frozenset(group.also),
                frozenset((group.inspect, *group.beside)),
                None if rows is None else tuple(rows.tolist()),
            )
        )
    return found


@pytest.mark.parametrize("case", CASES)
def test_tracing_finds_the_table(case: str) -> None:
    for block in distinct_blocks(case):
        head_dim = value_head_dim(block.config)
        traced = trace_block(block.module, block.arguments, block.config.hidden_size, head_dim)
        found = Architecture(model_type="traced", architectures=(), groups=traced)
        table = ARCHITECTURES[block.model_type]
        assert _compared(block.module, found.groups_of(block.module), head_dim) == _compared(
            block.module, table.groups_of(block.module), head_dim
        )


class _MadeUp(nn.Module):
    """A block that no release has: values are doubled and shuffled on their way, one norm feeds a
    linear and the residual stream at once, an MLP clamps.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first_norm, self.second_norm = nn.RMSNorm(32), nn.LayerNorm(32)
        self.mix, self.back = nn.Linear(32, 64), nn.Linear(32, 32)
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)
        self.register_buffer("order", torch.randperm(32))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        keys, values = self.mix(self.first_norm(hidden)).chunk(2, -1)
        weights = (keys @ keys.transpose(-1, -2)).tril().softmax(-1)
        hidden = hidden + self.back(2 * (weights @ values)[..., self.order])
        hidden = self.second_norm(hidden)
        return hidden + self.down(self.up(hidden).clamp(-1, 1))


def test_a_block_that_nobody_knows() -> None:
    block = _MadeUp()
    groups = trace_block(block, lambda batch, tokens: {}, 32, 16)
    assert [(group.previous, group.linears) for group in groups] == [
        ("first_norm", ("mix",)),
        ("mix", ("back",)),
        (None, ("up",)),  # its norm writes the residual stream
        (None, ("down",)),  # a clamped scale is no scale
    ]
    assert groups[1].rows == tuple((32 + block.order).tolist())
    assert described(groups) == [
        "mix: scaled by first_norm",
        "back: scaled by mix, by a row map",
        "up: nothing before can absorb a scale",
        "down: nothing before can absorb a scale",
    ]


def test_the_block_itself_is_left_alone() -> None:
    block = decoder_blocks("llama")[0]
    before = {name: tensor.clone() for name, tensor in block.module.state_dict().items()}
    trace_block(block.module, block.arguments, block.config.hidden_size, 16)
    for name, tensor in block.module.state_dict().items():
        assert torch.equal(tensor, before[name])
