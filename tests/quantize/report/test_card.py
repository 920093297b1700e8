"""The model card."""

from __future__ import annotations

from dataclasses import replace

import pytest
import yaml
from made_up_reports import block, report

from mlcawq.quantize.formats import FORMATS
from mlcawq.quantize.report.card import model_card
from mlcawq.quantize.report.format_cards import FORMAT_CARDS
from mlcawq.quantize.report.wording import (
    count_words,
    grid_words,
    method_words,
    size_words,
    time_words,
)


@pytest.mark.parametrize("fmt", sorted(FORMAT_CARDS))
def test_a_card_says_what_was_done_and_how_to_load_it(fmt: str) -> None:
    card = model_card(report(format=fmt), FORMAT_CARDS[fmt])
    _, head, text = card.split("---\n", 2)
    tags = yaml.safe_load(head)["tags"]
    assert tags[-2:] == ["4-bit", "mlcawq"]
    for expected in ("33.100", "94.00%", "scale.grid", "THIS_FOLDER", "512 tokens of bundled"):
        assert expected in text
    assert text.count("```") % 2 == 0
    assert "{" not in text.partition("| recipe |")[0]


def test_every_format_has_a_card() -> None:
    assert sorted(FORMAT_CARDS) == sorted(FORMATS)


def test_only_what_can_be_compiled_is_said_to_be() -> None:
    assert "mlcawq chat" in model_card(report(), FORMAT_CARDS["awq"])
    card = model_card(report(experts=2), FORMAT_CARDS["awq"])
    assert "mlcawq chat" not in card
    assert "--via mlc-llm" in card


def test_many_warnings_are_cut() -> None:
    warned = replace(block(0), warnings=tuple(f"expert {i}: few tokens" for i in range(14)))
    card = model_card(report(blocks=(warned,)), FORMAT_CARDS["awq"])
    assert "- model.layers.0: expert 9: few tokens" in card
    assert "expert 10" not in card
    assert "and 4 more" in card


def test_words() -> None:
    assert method_words({"scale": {}, "clip": None}) == "AWQ scales, rounded to nearest"
    assert method_words({"compensation": {}}) == "rounded by GPTQ"
    assert grid_words({"bits": 3, "group_size": "channel", "symmetric": True}) == (
        "symmetric 3-bit integers, one group a channel"
    )
    assert [time_words(t) for t in (0.84, 42, 185, 7800)] == [
        "0.8 s",
        "42 s",
        "3 min 5 s",
        "2 h 10 min",
    ]
    assert [count_words(n) for n in (14336, 3_930_000, 6_950_000_000)] == [
        "14,336",
        "3.93 million",
        "6.95 billion",
    ]
    assert [size_words(n) for n in (5e3, 12.34e6, 15.2e9, 251e9)] == [
        "5 kB",
        "12.3 MB",
        "15.2 GB",
        "251 GB",
    ]
