"""The tables against transformers' own modules."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import make_tiny_model
from transformers import AutoModelForCausalLM

from mlcawq.checkpoint.config import read_config
from mlcawq.families import (
    FAMILIES,
    expected_tensors,
    find_family,
    linear_biases,
    linear_shapes,
)


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_tables_describe_the_module(tmp_path: Path, family: str, tie: bool, bias: bool) -> None:
    folder = make_tiny_model(tmp_path, family, tie=tie, bias=bias, head_dim=16, layers=1)
    config = read_config(folder)
    table = find_family(config)
    model = AutoModelForCausalLM.from_pretrained(folder)

    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if tie:
        del state["lm_head.weight"]
    assert expected_tensors(config) == state

    block = model.get_submodule(table.block.format(0))
    linears = {n: m for n, m in block.named_modules() if isinstance(m, torch.nn.Linear)}
    assert {n: (m.in_features, m.out_features) for n, m in linears.items()} == linear_shapes(config)
    assert {n: m.bias is not None for n, m in linears.items()} == linear_biases(config)


@pytest.mark.parametrize("table", FAMILIES.values(), ids=list(FAMILIES))
def test_groups_and_fusions_cover_the_linears(table) -> None:
    scaled = [name for group in table.groups for name in group.linears]
    assert sorted(scaled) == sorted(table.linears)
    for fused, parts in table.fusions.items():
        assert set(parts) <= set(table.linears)
        assert all(table.fused_name(part) == fused for part in parts)
    assert table.fused_name("mlp.down_proj") == "mlp.down_proj"
