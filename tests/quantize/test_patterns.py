"""Patterns on linears' names, and overrides as they are typed."""

from __future__ import annotations

import pytest

from mlcawq.errors import UserError
from mlcawq.quantize.patterns import naming_problems, parse_override

NAMES = [
    f"model.layers.{i}.{linear}"
    for i in range(2)
    for linear in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
]


def test_patterns_that_are_found_are_no_problem() -> None:
    patterns = ["up_proj$", r"layers\.[01]\.self", "mlp", ""]
    assert not list(naming_problems(patterns, NAMES, "--keep"))


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [("dwon_proj", "down_proj"), (r"mlp\.upproj$", "mlp.up_proj"), ("self_atn", "self_attn")],
)
def test_slips_of_the_pen(pattern: str, meant: str) -> None:
    (problem,) = naming_problems([pattern, "up"], NAMES, "--keep")
    assert repr(pattern) in problem.what
    assert problem.where == "--keep"
    assert meant in problem.fix


def test_nothing_near() -> None:
    (problem,) = naming_problems(["embeddings"], NAMES, "--override")
    assert NAMES[0] in problem.fix


@pytest.mark.parametrize(
    ("text", "override"),
    [
        ("down_proj$=bits=8", {"match": "down_proj$", "bits": 8}),
        (
            r"layers\.0\.=bits=8,group=channel,symmetric=true",
            {"match": r"layers\.0\.", "bits": 8, "group_size": "channel", "symmetric": True},
        ),
        ("(?=a)b=group=32", {"match": "(?=a)b", "group_size": 32}),
    ],
)
def test_overrides(text: str, override: dict[str, object]) -> None:
    assert parse_override(text) == override


@pytest.mark.parametrize(
    "text", ["down_proj", "down_proj=8", "=bits=8", "a=bits=8,colour=red", "a=bits=8,bits=4"]
)
def test_malformed_overrides(text: str) -> None:
    with pytest.raises(UserError, match="for example --override"):
        parse_override(text)
