"""What `mlcawq quantize` shows at its end: what fits a terminal, whatever the size of the model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from mlcawq.families import FAMILIES
from mlcawq.quantize.report.data import REPORT_PAGE, BlockReport, LinearReport, mean_error
from mlcawq.quantize.report.wording import plural, size_words, sizes_words, time_words

if TYPE_CHECKING:
    from mlcawq.quantize.report import Report

_BLOCKS_SHOWN = 16  # of more, those of largest error
_WARNINGS_SHOWN = 8


def show(report: Report, output: Path, out: Console, log: Console) -> None:
    """Tables and summary on `out`, warnings on `log`."""
    warnings = report.all_warnings()
    for warning in warnings[:_WARNINGS_SHOWN]:
        log.print(f"note: {warning}", style="yellow", highlight=False, soft_wrap=True)
    if len(warnings) > _WARNINGS_SHOWN:
        more = plural(len(warnings) - _WARNINGS_SHOWN, "more note")
        log.print(f"and {more} in {output / REPORT_PAGE}", style="yellow", highlight=False)
    out.print(_by_linear(report))
    out.print(_by_block(report))
    out.print(_summary(report, output), highlight=False, soft_wrap=True)


def _by_linear(report: Report) -> Table:
    """Experts of a layer, and layers, put together."""
    table = Table(title="relative output error, %, root mean square over the blocks")
    table.add_column("linear")
    for title in ("nearest", "stored", "worst"):
        table.add_column(title, justify="right")
    table.add_column("in", overflow="fold")
    worst: dict[str, tuple[str, LinearReport]] = {}
    for block in report.blocks:
        for linear in block.linears:
            if linear.kind not in worst or linear.found > worst[linear.kind][1].found:
                worst[linear.kind] = block.name, linear
    for mean in report.mean_errors():
        block_name, linear = worst[mean.name]
        cells = (f"{100 * error:.2f}" for error in (mean.nearest, mean.found, linear.found))
        expert = re.search(r"\.(\d+)\.", linear.name)
        place = f"{block_name}, {expert[1]}" if expert else block_name
        table.add_row(mean.name, *cells, place)
    return table


def _by_block(report: Report) -> Table:
    blocks: Sequence[BlockReport] = report.blocks
    title = "by block, %"
    if len(blocks) > _BLOCKS_SHOWN:
        title = f"{_BLOCKS_SHOWN} of {len(blocks)} blocks, those of largest output error, %"
        worst = sorted(blocks, key=lambda block: -block.error)[:_BLOCKS_SHOWN]
        blocks = [block for block in blocks if block in worst]
    table = Table(title=title)
    table.add_column("block")
    for column in ("output", "linears, nearest", "stored"):
        table.add_column(column, justify="right")
    for block in blocks:
        cells = ["", ""]
        if block.linears:
            mean = mean_error(block.name, block.linears)
            cells = [f"{100 * mean.nearest:.2f}", f"{100 * mean.found:.2f}"]
        table.add_row(block.name, f"{100 * block.error:.2f}", *cells)
    return table


def _summary(report: Report, output: Path) -> str:
    measured = report.measured
    where = "calibration tokens" if measured.seen else "held-out tokens"
    lines = [
        f"on {measured.tokens} {where}: KL divergence {1000 * measured.kl:.3f} millinats a token, "
        f"same likeliest token {measured.agreement:.2%}, perplexity "
        f"{measured.original_perplexity:.5g} -> {measured.perplexity:.5g}"
    ]
    costs = []
    bits = report.bits_per_weight()
    if bits is not None:
        costs.append(f"{bits:.2f} bits a weight of {plural(len(report.linears), 'linear')}")
    if report.storage is not None:
        costs.append("all weights {} -> {}".format(*sizes_words(report.storage)))
    if report.run is not None:
        costs.append(time_words(report.run.total.seconds))
        if report.run.total.peak_memory:
            costs.append(f"{size_words(report.run.total.peak_memory)} of memory")
    if costs:
        lines.append(", ".join(costs))
    lines.append(f"written to {output}, told in {output / REPORT_PAGE}")
    if report.format == "awq" and report.model_type in FAMILIES:
        lines.append(f"next: mlcawq build {output} -o {output}-mlc --target cpu")
    else:
        lines.append(f"next: mlcawq eval {output} --text wikitext2")
    return "\n".join(lines)
