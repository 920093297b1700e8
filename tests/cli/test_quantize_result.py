"""The end of `mlcawq quantize` for models of any size, on a terminal of 80 columns."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from made_up_reports import block, report
from rich.console import Console

from mlcawq.cli.quantize_result import show
from mlcawq.quantize.report import Report


def _shown(given: Report) -> tuple[str, str]:
    out, log = io.StringIO(), io.StringIO()
    show(given, Path("out"), Console(file=out, width=80), Console(file=log, width=80))
    return out.getvalue(), log.getvalue()


@pytest.mark.parametrize(("layers", "experts"), [(2, 0), (80, 0), (24, 60)])
def test_it_fits(layers: int, experts: int) -> None:
    blocks = tuple(block(i, experts, error=0.01 + 0.001 * i) for i in range(layers))
    text, _ = _shown(report(layers, experts, blocks=blocks))
    tables = text.partition("on 2048 held-out tokens")[0]
    assert max(map(len, tables.splitlines())) <= 80
    assert len(text.splitlines()) <= 48
    assert f"model.layers.{layers - 1} " in text, "the worst block is there"
    assert ("mlp.experts.*.down_proj" in text) == bool(experts)


def test_what_was_found_is_said() -> None:
    text, log = _shown(report())
    for part in ("33.100 millinats", "94.00%", "8.2 -> 8.4", "4.16 bits a weight of 14 linears"):
        assert part in text
    assert "all weights 4 MB -> 1 MB (25%), 8.0 s, 2 GB of memory" in text
    assert "mlcawq build out -o out-mlc" in text
    assert log == ""
    assert "mlcawq eval out" in _shown(report(format="fake"))[0]


def test_notes_are_cut() -> None:
    warned = replace(block(0), warnings=tuple(f"expert {i}: 2 tokens" for i in range(11)))
    _, log = _shown(report(blocks=(warned,)))
    assert "note: model.layers.0: expert 7: 2 tokens" in log
    assert "expert 8" not in log
    assert "and 3 more notes" in log


def test_layers_without_quantized_linears() -> None:
    text, _ = _shown(report(blocks=(block(0), replace(block(1), linears=()))))
    assert "model.layers.1" in text
