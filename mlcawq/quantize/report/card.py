"""The model card: README.md of a quantized folder."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from mlcawq.quantize.report.data import Report
from mlcawq.quantize.report.wording import (
    grid_words,
    method_words,
    recipe_facts,
    sizes_words,
)


@dataclass(frozen=True)
class Use:
    """One way to load a folder. language: of the code ("python", "sh").

    only: the model types that it is for, None for all.
    """

    title: str
    language: str
    code: str
    only: Collection[str] | None = None


@dataclass(frozen=True)
class FormatCard:
    """What a card says of a storage format.

    description: how the weights lie in the folder, in a sentence. tag: what hubs find such folders
    by. uses: what loads the folder, which is called THIS_FOLDER there.
    """

    description: str
    tag: str | None
    uses: tuple[Use, ...]

    def usage(self, model_type: str) -> str:
        """The uses in Markdown."""
        return "\n\n".join(
            f"### {use.title}\n\n```{use.language}\n{textwrap.dedent(use.code).strip()}\n```"
            for use in self.uses
            if use.only is None or model_type in use.only
        )


def model_card(report: Report, fmt: FormatCard) -> str:
    """README.md, with the metadata that hubs read in front."""
    measured, recipe, data = report.measured, report.recipe, report.calibration
    bits = recipe.get("bits")
    tags = [tag for tag in (fmt.tag, f"{bits}-bit", "mlcawq") if tag is not None]
    text = "calibration tokens (none could be held out)" if measured.seen else "held-out tokens"
    parts = [
        f"""\
---
library_name: transformers
pipeline_tag: text-generation
tags: [{", ".join(tags)}]
---
# {report.model}, {bits} bits

Weights of {report.model} ({report.model_type}), quantized by mlcawq {report.versions["mlcawq"]}: \
{method_words(recipe)}, {grid_words(recipe)}. {fmt.description}""",
        f"""\
## Measured

Against the original model, on {measured.tokens} {text}:

| | original | quantized |
|---|---|---|
| perplexity | {measured.original_perplexity:.5g} | {measured.perplexity:.5g} |
| KL divergence, millinats per token | | {measured.kl * 1000:.3f} |
| same likeliest token | | {measured.agreement:.2%} |
{_size_row(report)}
Relative error of the linears' outputs on calibration tokens, root mean square over the blocks:

| linear | round to nearest | this model |
|---|---|---|
{_error_rows(report)}

`quantization_report.html` shows them layer by layer; `quantization_report.json` holds them all.""",
        _warnings(report),
        f"""\
## Made with

Calibration: {data["sequences"]} sequences, {data["tokens"]} tokens of {data["source"]} \
(SHA-256 of all tokens {data["digest"][:16]}…).

| recipe | |
|---|---|
{_recipe_rows(recipe)}""",
        f"## Use\n\n{fmt.usage(report.model_type)}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _size_row(report: Report) -> str:
    if report.storage is None:
        return ""
    original, output = sizes_words(report.storage)
    return f"| size of the weights | {original} | {output} |\n"


def _error_rows(report: Report) -> str:
    return "\n".join(
        f"| `{linear.name}` | {linear.nearest:.2%} | {linear.found:.2%} |"
        for linear in report.mean_errors()
    )


def _warnings(report: Report) -> str:
    warnings = report.all_warnings()
    if not warnings:
        return ""
    shown = "\n".join(f"- {warning}" for warning in warnings[:_WARNINGS_SHOWN])
    more = len(warnings) - _WARNINGS_SHOWN
    if more > 0:
        shown += f"\n- and {more} more, in `quantization_report.json`"
    return f"## To be known\n\n{shown}"


_WARNINGS_SHOWN = 10


def _recipe_rows(recipe: Mapping[str, Any]) -> str:
    return "\n".join(f"| {name} | {value} |" for name, value in recipe_facts(recipe))
