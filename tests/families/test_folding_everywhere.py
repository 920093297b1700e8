"""Scales folded into every block of every architecture change nothing that it computes."""

from __future__ import annotations

import pytest
import torch
from decoder_blocks import CASES, distinct_blocks

from mlcawq.families import ARCHITECTURES
from mlcawq.families.base import linear_names
from mlcawq.families.rows import value_head_dim
from mlcawq.quantize.folding import channel_rows, fold_scale


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_folding_keeps_the_function(case: str) -> None:
    for block in distinct_blocks(case):
        groups = ARCHITECTURES[block.model_type].groups_of(block.module)
        hidden = torch.randn(2, 7, block.config.hidden_size)
        before = block(hidden)
        weights = {
            name: block.module.get_submodule(name).weight.clone()
            for name in linear_names(block.module)
        }
        for group in groups:
            if group.previous is None:
                continue
            previous = block.module.get_submodule(group.previous)
            readers = [block.module.get_submodule(name) for name in (*group.linears, *group.also)]
            rows = channel_rows(block.module, group, value_head_dim(block.config))
            channels = readers[0].weight.shape[1]
            drawn = torch.empty(channels if rows is None else int(rows.max()) + 1)
            drawn.uniform_(0.25, 4.0)
            fold_scale(previous, readers, drawn if rows is None else drawn[rows], rows, where="")
        after = block(hidden)
        assert float((after - before).norm() / before.norm()) < 1e-5
        scaled = {name for group in groups if group.previous for name in group.linears}
        for name, weight in weights.items():
            if name in scaled:
                assert not torch.allclose(block.module.get_submodule(name).weight, weight)
