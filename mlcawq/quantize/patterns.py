"""Names of linears: what they have in common, and regular expressions that choose among them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from mlcawq.errors import Problem, UserError

# What an override's settings are called on the command line, and in a recipe.
_SETTINGS = {"bits": "bits", "group": "group_size", "symmetric": "symmetric"}
_OVERRIDE = re.compile(
    rf"(?P<match>.+?)=(?P<settings>(?:{'|'.join(_SETTINGS)})=[^=,]*(?:,\w+=[^=,]*)*)"
)
_EXAMPLE = "--override 'down_proj$=bits=8,group=32'"


def kind_of(name: str) -> str:
    """A module's name with "*" for every number ("model.layers.*.mlp.experts.*.up_proj"): what its
    likes in other blocks and experts share.
    """
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def naming_problems(
    patterns: Collection[str], names: Collection[str], option: str
) -> Iterator[Problem]:
    """The patterns that are found in no name, each with the names that it is nearly in."""
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in names):
            near = _near(pattern, names)
            example = next(iter(names), "model.layers.0.mlp.down_proj")
            yield Problem(
                f"{pattern!r} is in no linear's name",
                option,
                f"did you mean {' or '.join(near)}?" if near else f"a name is like {example}",
            )


def _near(pattern: str, names: Collection[str]) -> list[str]:
    """Names and parts of names that are spelt like `pattern`."""
    parts: dict[str, None] = {}
    for name in names:
        steps = [step for step in name.split(".") if not step.isdigit()]
        parts |= dict.fromkeys([*steps, ".".join(steps[-2:])])
    plain = re.sub(r"[\^$\\()*+?]", "", pattern)
    return difflib.get_close_matches(plain, parts, n=2, cutoff=0.7)


def parse_override(text: str) -> Mapping[str, Any]:
    """REGEX=bits=8,group=32,symmetric=true -> the Override of a recipe, as plain data.

    group: 32, 64, 128 or channel. Raises UserError for a text of another form.
    """
    found = _OVERRIDE.fullmatch(text)
    override: dict[str, Any] = {}
    for setting in found["settings"].split(",") if found else ():
        name, _, value = setting.partition("=")
        if name in _SETTINGS and _SETTINGS[name] not in override:
            override[_SETTINGS[name]] = _value(value)
        else:
            found = None
    if found is None:
        raise UserError.one(
            f"not of the form REGEX=SETTING=VALUE,..., with settings {', '.join(_SETTINGS)}",
            f"--override {text}",
            f"for example {_EXAMPLE}",
        )
    return {"match": found["match"], **override}


def _value(text: str) -> Any:
    if text.isdigit():
        return int(text)
    return {"true": True, "false": False}.get(text, text)
