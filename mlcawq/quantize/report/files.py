"""The three files that tell of a quantization, beside the weights."""

from __future__ import annotations

from pathlib import Path

from mlcawq.checkpoint.writing import write_file, write_json
from mlcawq.quantize.report.card import model_card
from mlcawq.quantize.report.data import REPORT_FILE, REPORT_PAGE, Report
from mlcawq.quantize.report.format_cards import FORMAT_CARDS
from mlcawq.quantize.report.page import report_page


def write_report(folder: Path, report: Report) -> None:
    """The report as JSON and as a page, and the model card of its format."""
    write_json(folder / REPORT_FILE, report.to_json())
    write_file(folder / REPORT_PAGE, report_page(report))
    write_file(folder / "README.md", model_card(report, FORMAT_CARDS[report.format]))
