"""Our options in a parser of mlc_llm."""

from __future__ import annotations

import argparse

import pytest

from mlcawq.build.mlc_plugin.arguments import OurArguments, parser_class


def parser(step: str, given: OurArguments) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = parser_class(argparse.ArgumentParser, step, given)(step)
    made.add_argument("config")
    made.add_argument("--conv-template", required=True, choices=["chatml"])
    return made


def test_layout_is_ours_and_mlc_llm_never_sees_it() -> None:
    given = OurArguments()
    words = ["folder", "--conv-template", "chatml", "--weight-layout", "n16k64"]
    parsed = parser("compile", given).parse_args(words)
    assert given.weight_layout == "n16k64"
    assert vars(parsed) == {"config": "folder", "conv_template": "chatml"}


def test_template_may_be_a_file_or_left_out() -> None:
    assert parser("gen_config", OurArguments()).parse_args(["f"]).conv_template is None
    words = ["f", "--conv-template", "mine.json"]
    assert parser("gen_config", OurArguments()).parse_args(words).conv_template == "mine.json"


def test_unknown_layouts_are_usage_errors(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        parser("gen_config", OurArguments()).parse_args(["f", "--weight-layout", "rows"])
    assert stopped.value.code == 2
    assert "invalid choice: 'rows'" in capsys.readouterr().err


def test_help_lists_our_options(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        parser("gen_config", OurArguments()).parse_args(["--help"])
    text = capsys.readouterr().out
    assert "--weight-layout {autoawq,n16k64}" in text
    assert "a JSON file in MLC's" in text
