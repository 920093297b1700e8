"""Tensors are made where their inputs are: a default device that holds nothing is in the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_block import quantized

from mlcawq.errors import UserError
from mlcawq.quantize.place import Place, find_device, find_dtype


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"symmetric": True, "clip": {"mode": "symmetric"}, "scale": {"objective": "linear"}},
        {"compensation": {}},
        {"compensation": {"act_order": False, "true_sequential": False}, "scale": None},
    ],
)
def test_no_tensor_is_made_on_the_default_device(options: dict[str, Any]) -> None:
    expected = quantized(options)
    with torch.device("meta"):
        found = quantized(options)
    for name, weight in expected.weights.items():
        assert torch.equal(found.weights[name].codes, weight.codes)
        assert torch.equal(found.weights[name].scale, weight.scale)
    assert found.error == expected.error


def test_arguments_of_a_block_are_moved() -> None:
    place = Place(torch.device("meta"))
    given = {"mask": torch.ones(2), "rotary": (torch.ones(1), [torch.ones(1)]), "cache": False}
    moved = place.moved(given)
    assert moved["mask"].is_meta
    assert moved["rotary"][0].is_meta
    assert moved["rotary"][1][0].is_meta
    assert moved["cache"] is False


def test_products_alone_are_in_the_chosen_type() -> None:
    linear = torch.nn.Linear(8, 8).requires_grad_(False)
    block = torch.nn.Sequential(linear)
    Place(torch.device("cpu"), torch.bfloat16).settle(block)
    inputs = torch.randn(3, 8)
    assert block(inputs).dtype == torch.bfloat16
    assert linear(inputs).dtype == linear.weight.dtype == torch.float32


def test_devices_and_types_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("auto") == find_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="no GPU"):
        find_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert find_device("auto") == torch.device("cuda", 1)
    assert find_device("cuda:0") == torch.device("cuda", 0)
    for name in ("cuda:2", "gpu"):
        with pytest.raises(UserError, match=name):
            find_device(name)
    assert find_dtype("bfloat16") == torch.bfloat16
    with pytest.raises(UserError, match="float8"):
        find_dtype("float8")
