"""Our options in the parsers of mlc_llm's commands."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlcawq.graph.settings import MLC_LAYOUTS


@dataclass
class OurArguments:
    """weight_layout: --weight-layout, None where it was left out."""

    weight_layout: str | None = None


def parser_class(base: type, step: str, given: OurArguments) -> type:
    """mlc_llm's ArgumentParser with our options for `step`, which it leaves in `given`."""

    class Parser(base):  # type: ignore[misc]
        def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
            group = self.add_argument_group("mlcawq")
            group.add_argument(
                "--weight-layout",
                choices=MLC_LAYOUTS,
                help="how AWQ weights lie in memory: autoawq is the stock layout, n16k64 what "
                "kernels for GPUs load best (default: "
                + (
                    "autoawq)"
                    if step == "gen_config"
                    else "what mlc-chat-config.json says, else autoawq)"
                ),
            )
            if step == "gen_config":
                _free_template(self)
            parsed = super().parse_args(args, namespace)
            given.weight_layout = vars(parsed).pop("weight_layout")
            return parsed

    return Parser


def _free_template(parser: argparse.ArgumentParser) -> None:
    """--conv-template may be left out, and may be a file or a name that only we have."""
    for action in parser._actions:
        if action.dest == "conv_template":
            action.required = False
            action.choices = None
            action.help = (
                "Conversation template: a name of mlc_llm or mlcawq, or a JSON file in MLC's "
                "schema (default: found from the model's own chat template)"
            )
