"""The page: complete, by itself, and readable at any size of model."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from statistics import median

import pytest
from made_up_reports import block, linear, report

from mlcawq.quantize.report import Report, Spread
from mlcawq.quantize.report.page import report_page

_VOID = {"meta", "br", "link", "img", "hr", "input"}


class _Checked(HTMLParser):
    """Fails on tags that do not close in order, and collects ids and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in _VOID:
            self.open.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def _checked(given: Report) -> tuple[str, _Checked]:
    page = report_page(given)
    parser = _Checked()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    assert len(parser.ids) == len(set(parser.ids)), "ids of two figures are the same"
    for target in re.findall(r'(?:href="#|url\(#)([^")]*)', page):
        assert target in parser.ids
    return page, parser


def test_a_page_stands_alone_and_says_what_was_measured() -> None:
    page, parser = _checked(report())
    text = " ".join(parser.text)
    for expected in ("33.10", "94.00%", "acme/model, w4 g128", "self_attn.q_proj", "25% of 4 MB"):
        assert expected in text
    assert not re.findall(r'(?:src|href)="(?!#)[^"]*"|@import|<script', page)
    assert "#0101" not in page, "every colour is the page's"
    assert page.count("<svg") == 6


def test_names_are_text_and_never_markup() -> None:
    page = report_page(report(model="<b>x</b>", warnings=("<script>",)))
    assert "<b>x</b>" not in page
    assert "<script>" not in page


def test_experts_are_put_together() -> None:
    blocks = (
        block(0),
        *(
            replace(
                block(i, experts=60),
                warnings=(f"mlp.experts.{i}: saw 2 tokens",),
            )
            for i in range(1, 12)
        ),
        *(block(i, experts=60) for i in range(12, 20)),
    )
    page, parser = _checked(report(model_type="qwen3_moe", blocks=blocks, run=None))
    text = " ".join(parser.text)
    assert "mlp.experts.*.down_proj" in text
    assert "Calibration tokens that experts were given" in text
    assert "The 200 linears of largest error (the JSON has all 3,503)" in text
    assert "mlp.experts.11: saw 2 tokens" in text
    assert "Time and memory" not in text
    assert len(page) < 700_000


def test_what_was_not_recorded_is_left_out() -> None:
    bare = tuple(
        replace(
            made,
            linears=tuple(
                linear(one.name, scale=None, clip=None, stored_bytes=None, bits=None)
                for one in made.linears
            ),
        )
        for made in report(1).blocks
    )
    page, parser = _checked(report(1, blocks=bare, storage=None, run=None))
    assert page.count("<svg") == 3
    assert "Scales and clips" not in " ".join(parser.text)


def test_different_bits_are_shown() -> None:
    blocks = (block(0), block(1, bits=8))
    page, parser = _checked(report(blocks=blocks))
    assert "w4-8 g128" in " ".join(parser.text)
    assert "Bits of every linear by layer" in page


def test_nothing_quantized_in_a_layer() -> None:
    _, parser = _checked(report(blocks=(block(0), replace(block(1), linears=()))))
    assert "not quantized" in " ".join(parser.text)
    page, _ = _checked(report(1, blocks=(replace(block(0), linears=()),)))
    assert page.count("<svg") == 2


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("error", [0.0, math.nan])
def test_errors_that_no_scale_holds(error: float) -> None:
    """Experts that were given no token have none; a report must not fail on what it reports."""
    nowhere = Spread(1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    options = {"nearest": error, "found": error, "tokens": 0, "scale": nowhere, "clip": nowhere}
    page, _ = _checked(report(1, blocks=(block(0, experts=2, error=error, **options),)))
    assert page.count("<svg") == 7


def test_curves_hold_the_numbers() -> None:
    """The height of a curve in the SVG is linear in what is plotted."""
    blocks = tuple(block(i, error=error) for i, error in enumerate((0.01, 0.02, 0.04)))
    page = report_page(report(blocks=blocks))
    first = page[page.index("<svg") :]
    curve = next(
        path
        for path in re.findall(r'<path d="([^"]*)"[^>]*stroke: var\(--found\)', first)
        if path.count("L") == 2
    )
    heights = [float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", curve)]
    assert heights[0] > heights[1] > heights[2]
    assert (heights[1] - heights[2]) / (heights[0] - heights[1]) == pytest.approx(2, rel=1e-3)
    assert median(heights) == heights[1]
