"""quantization_report.html: one file that tells a quantization, without network or scripts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, FileSystemLoader

from mlcawq.quantize.report import plots
from mlcawq.quantize.report.data import LinearReport, Report, Spread, mean_error
from mlcawq.quantize.report.wording import (
    count_words,
    grid_words,
    method_words,
    plural,
    recipe_facts,
    share_words,
    short_grid,
    size_words,
    sizes_words,
    time_words,
)
from mlcawq.resources import templates_dir

_LINEARS_SHOWN = 1200  # beyond that many, a page lists the worst ones only
_WORST_SHOWN = 200


@dataclass(frozen=True)
class Tile:
    """A number that is read first."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class PageTable:
    """Rows of a table, the first cell naming the row."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def render(template: str, **content: Any) -> str:
    """A page of templates/report. Text is escaped; only pictures are taken as they are."""
    loader = FileSystemLoader(templates_dir("report"))
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(template).render(**content)


def report_page(report: Report) -> str:
    """The page of one quantization."""
    experts = any("*" in linear.kind for _, linear in report.linears)
    layers = sum(not block.is_head for block in report.blocks)
    linears_title, linears = _linears(report)
    return render(
        "report.html.j2",
        title=f"{report.model}, {short_grid(report)}",
        lead=f"{report.model_type}, {plural(layers, 'layer')}: "
        f"{method_words(report.recipe)}; {grid_words(report.recipe)}.",
        summary=_summary(report),
        notes=report.all_warnings(),
        experts=experts,
        plots={
            "layers": plots.error_by_layer(report),
            "kinds": plots.error_by_kind(report),
            "linears": plots.error_panels(report),
            "scales": plots.scale_panels(report),
            "clips": plots.clip_panels(report),
            "bits": plots.bits_map(report),
            "tokens": plots.tokens_of_experts(report),
            "usage": plots.time_and_memory(report),
        },
        kinds=_kinds(report, experts),
        layers=_layers(report),
        linears=linears,
        linears_title=linears_title,
        sizes=_sizes(report),
        usage=_usage(report),
        recipe=recipe_facts(report.recipe),
        made_with=_made_with(report),
    )


def _summary(report: Report) -> list[Tile]:
    measured = report.measured
    where = "calibration tokens" if measured.seen else "held-out tokens"
    tiles = [
        Tile("KL divergence", f"{1000 * measured.kl:.2f}", "millinats a token"),
        Tile("same likeliest token", f"{measured.agreement:.2%}"),
        Tile(
            "perplexity",
            f"{measured.perplexity:.5g}",
            f"original {measured.original_perplexity:.5g}",
        ),
        Tile("measured on", f"{measured.tokens:,}", where),
    ]
    if report.storage is not None:
        before, share = size_words(report.storage.original), share_words(report.storage)
        tiles.append(
            Tile("size of the weights", size_words(report.storage.output), f"{share} of {before}")
        )
    bits = report.bits_per_weight()
    if bits is not None:
        tiles.append(Tile("stored bits a weight", f"{bits:.2f}", "of quantized linears"))
    if report.run is not None:
        tiles.append(Tile("time", time_words(report.run.total.seconds), report.run.device))
        if report.run.total.peak_memory:
            tiles.append(Tile("peak memory", size_words(report.run.total.peak_memory)))
    return tiles


def _kinds(report: Report, experts: bool) -> PageTable:
    columns = ["linear", "bits", "nearest", "as stored", "ratio", "scales", "clipped to", "size"]
    if experts:
        columns += ["linears", "worst", "fewest tokens"]
    rows = []
    for kind, layers in plots.by_kind(report).items():
        linears = [linear for layer in layers for linear in layer]
        mean = mean_error(kind, linears)
        clips = [linear.clip.mean for linear in linears if linear.clip is not None]
        sizes = [linear.stored_bytes for linear in linears if linear.stored_bytes is not None]
        row = [
            kind,
            _range_words([linear.bits for linear in linears]),
            f"{mean.nearest:.2%}",
            f"{mean.found:.2%}",
            f"{mean.found / mean.nearest:.2f}" if mean.nearest else "",
            _scale_words([linear.scale for linear in linears]),
            f"{sum(clips) / len(clips):.1%}" if clips else "",
            size_words(sum(sizes)) if sizes else "",
        ]
        if experts:
            tokens = [linear.tokens for linear in linears if linear.tokens is not None]
            row += [
                f"{len(linears):,}",
                f"{max(linear.found for linear in linears):.2%}",
                f"{min(tokens):,}" if tokens else "",
            ]
        rows.append(row)
    return PageTable(columns, rows)


def _layers(report: Report) -> PageTable:
    chosen = any(block.chosen for block in report.blocks)
    usage = report.run.blocks if report.run is not None else ()
    columns = ["layer", "output error", "linears, nearest", "as stored", "worst linear", ""]
    columns += ["recipe"] * chosen + ["time", "memory"] * bool(usage)
    rows = []
    for i, block in enumerate(report.blocks):
        row = [block.name, f"{block.error:.2%}"]
        if block.linears:
            mean = mean_error("", block.linears)
            worst = max(block.linears, key=lambda linear: linear.found)
            row += [f"{mean.nearest:.2%}", f"{mean.found:.2%}", worst.name, f"{worst.found:.2%}"]
        else:
            row += ["", "", "not quantized", ""]
        row += [block.chosen or ""] * chosen
        if usage:
            used = usage[i] if i < len(usage) else None
            row += [time_words(used.seconds), size_words(used.peak_memory)] if used else ["", ""]
        rows.append(row)
    return PageTable(columns, rows)


def _linears(report: Report) -> tuple[str, PageTable]:
    linears = report.linears
    title = f"{len(linears):,} linears"
    if len(linears) > _LINEARS_SHOWN:
        linears = sorted(linears, key=lambda entry: -entry[1].found)[:_WORST_SHOWN]
        count = f"{len(report.linears):,}"
        title = f"The {_WORST_SHOWN} linears of largest error (the JSON has all {count})"
    columns = ["linear", "integers", "nearest", "as stored", "scales", "clipped to", "tokens"]
    return title, PageTable(columns, [_linear(name, linear) for name, linear in linears])


def _linear(name: str, linear: LinearReport) -> list[str]:
    integers = "" if linear.bits is None else f"w{linear.bits} g{linear.group_size}"
    return [
        name,
        integers + " sym" * bool(linear.symmetric),
        f"{linear.nearest:.2%}",
        f"{linear.found:.2%}",
        _scale_words([linear.scale]),
        f"{linear.clip.mean:.1%}" if linear.clip is not None else "",
        f"{linear.tokens:,}" if linear.tokens is not None else "",
    ]


def _scale_words(scales: Sequence[Spread | None]) -> str:
    known = [scale for scale in scales if scale is not None]
    if not known:
        return ""
    low, high = min(s.minimum for s in known), max(s.maximum for s in known)
    return f"{low:.3g} … {high:.3g}"


def _range_words(values: Sequence[int | None]) -> str:
    known = sorted({value for value in values if value is not None})
    return ", ".join(map(str, known))


def _sizes(report: Report) -> str:
    words = []
    bits = report.bits_per_weight()
    if bits is not None:
        weights = sum(linear.weights or 0 for _, linear in report.linears)
        words.append(
            f"{len(report.linears):,} linears with {count_words(weights)} weights are stored "
            f"with {bits:.3f} bits a weight, scales and zero points included."
        )
    if report.storage is not None:
        before, after = sizes_words(report.storage)
        words.append(f"All weights together take {after} of {before}.")
    return " ".join(words)


def _usage(report: Report) -> str:
    if report.run is None:
        return ""
    total = report.run.total
    words = f"{time_words(total.seconds)} in all on {report.run.device}"
    if total.peak_memory:
        words += f", {size_words(total.peak_memory)} of memory at most"
    return words + ". These are of this run and machine."


def _made_with(report: Report) -> list[tuple[str, str]]:
    data = report.calibration
    return [
        ("format", report.format),
        ("calibration", f"{data['source']}, {data['sequences']:,} sequences"),
        ("tokens", f"{data['tokens']:,}"),
        ("SHA-256 of the tokens", data["digest"]),
        *((f"version of {name}", version) for name, version in report.versions.items()),
        ("fingerprint", report.fingerprint),
    ]
