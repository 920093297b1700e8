"""The plots of one quantization: errors, scales, clips, bits, experts' tokens, time and memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median, quantiles

from mlcawq.quantize.report.data import LinearReport, Report, mean_error
from mlcawq.quantize.report.figures import (
    FOUND,
    NEAREST,
    SERIES,
    Line,
    Picture,
    draw_lines,
    from_zero,
    layer_axis,
    legend_above,
    log_ticks,
    one_panel,
    picture,
    rows_of_panels,
    share_limits,
    style,
)

# By layer: the linears of one kind, many where they are experts', none where a layer lacks them.
Layers = list[list[LinearReport]]


def by_kind(report: Report) -> dict[str, Layers]:
    """The linears of every kind ("mlp.experts.*.up_proj"), layer by layer."""
    kinds: dict[str, Layers] = {}
    for i, block in enumerate(report.blocks):
        for linear in block.linears:
            layers = kinds.setdefault(linear.kind, [[] for _ in report.blocks])
            layers[i].append(linear)
    return kinds


def error_by_layer(report: Report) -> Picture:
    """The blocks' errors, and the mean one of their linears beside that of rounding to nearest."""
    means = [mean_error("", block.linears) if block.linears else None for block in report.blocks]
    with style():
        figure, (left, right) = rows_of_panels(2, height=2.3)
        draw_lines(left, [Line([block.error for block in report.blocks], FOUND)])
        left.set_title("output of the block")
        lines = [
            Line([mean.nearest if mean else None for mean in means], NEAREST, "rounded to nearest"),
            Line([mean.found if mean else None for mean in means], FOUND, "as stored"),
        ]
        draw_lines(right, lines)
        right.set_title("outputs of its linears, root mean square")
        for axes in (left, right):
            from_zero(axes)
            axes.yaxis.set_major_formatter(_percent)
            axes.set_xlabel("layer")
        legend_above(figure, right)
        return picture(figure, "Relative output error by layer", "layer-errors")


def error_by_kind(report: Report) -> Picture | None:
    """Before and after, by kind of linear."""
    means = report.mean_errors()
    if not means:
        return None
    with style():
        figure, axes = one_panel(0.26 * len(means) + 0.5, [mean.name for mean in means])
        at = range(len(means))[::-1]
        nearest, found = [m.nearest for m in means], [m.found for m in means]
        axes.hlines(at, found, nearest, color=NEAREST, lw=2, alpha=0.35)
        axes.scatter(nearest, at, color=NEAREST, s=34, label="rounded to nearest", zorder=3)
        axes.scatter(found, at, color=FOUND, s=34, label="as stored", zorder=3)
        axes.set_yticks(at, [mean.name for mean in means])
        axes.set_ylim(-0.6, len(means) - 0.4)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(_percent)
        axes.grid(visible=False, axis="y")
        legend_above(figure, axes)
        return picture(figure, "Relative output error by linear", "kind-errors")


def error_panels(report: Report) -> Picture | None:
    """Before and after, linear by linear and layer by layer; experts as median and range."""
    kinds = by_kind(report)
    if not kinds:
        return None
    with style():
        figure, panels = rows_of_panels(len(kinds))
        for axes, (kind, layers) in zip(panels, kinds.items(), strict=True):
            lines = [
                _middle(layers, lambda linear: linear.nearest, NEAREST, "rounded to nearest"),
                _middle(layers, lambda linear: linear.found, FOUND, "as stored"),
            ]
            draw_lines(axes, lines, log=True)
            axes.set_title(short(kind))
        share_limits(panels)
        for axes in panels:
            log_ticks(axes, _percent)
        legend_above(figure, panels[0])
        return picture(figure, "Relative output error of every linear by layer", "linear-errors")


def scale_panels(report: Report) -> Picture | None:
    """Median, 5th to 95th percentile and extremes of the scales; linears with equal ones once."""
    found: dict[tuple[object, ...], list[str]] = {}
    kinds = by_kind(report)
    for kind, layers in kinds.items():
        spreads = tuple(linear.scale for layer in layers for linear in layer)
        if any(spreads):
            found.setdefault(spreads, []).append(kind)
    if not found:
        return None
    with style():
        figure, panels = rows_of_panels(len(found))
        for axes, names in zip(panels, found.values(), strict=True):
            spreads_by_layer = [
                [linear.scale for linear in layer if linear.scale is not None]
                for layer in kinds[names[0]]
            ]
            every = [None if not s else median(x.median for x in s) for s in spreads_by_layer]
            low = [None if not s else min(x.low for x in s) for s in spreads_by_layer]
            high = [None if not s else max(x.high for x in s) for s in spreads_by_layer]
            least = [None if not s else min(x.minimum for x in s) for s in spreads_by_layer]
            most = [None if not s else max(x.maximum for x in s) for s in spreads_by_layer]
            draw_lines(
                axes,
                [
                    Line(most, NEAREST, "largest and smallest"),
                    Line(every, FOUND, "median, 5th to 95th percentile", low, high),
                    Line(least, NEAREST),
                ],
                log=True,
            )
            log_ticks(axes, lambda value: f"{value:.3g}")
            axes.set_title(joined_names(names))
        legend_above(figure, panels[0])
        return picture(figure, "Scales of the input channels by layer", "scales")


def clip_panels(report: Report) -> Picture | None:
    """How much of their full range the groups of weights keep."""
    kinds = {
        kind: layers
        for kind, layers in by_kind(report).items()
        if any(linear.clip for layer in layers for linear in layer)
    }
    if not kinds:
        return None
    with style():
        figure, panels = rows_of_panels(len(kinds))
        for axes, (kind, layers) in zip(panels, kinds.items(), strict=True):
            clips = [[x.clip for x in layer if x.clip is not None] for layer in layers]
            line = Line(
                [None if not c else sum(x.mean for x in c) / len(c) for c in clips],
                FOUND,
                "mean, 5th to 95th percentile",
                [None if not c else min(x.low for x in c) for c in clips],
                [None if not c else max(x.high for x in c) for c in clips],
            )
            draw_lines(axes, [line])
            axes.yaxis.set_major_formatter(_percent)
            axes.set_title(short(kind))
        share_limits(panels)
        legend_above(figure, panels[0])
        return picture(figure, "Width of the stored range, of the full range", "clips")


def bits_map(report: Report) -> Picture | None:
    """Which linears have how many bits; None where all have the same."""
    kinds = by_kind(report)
    widths = sorted({linear.bits for _, linear in report.linears if linear.bits is not None})
    if len(widths) < 2:
        return None
    with style():
        figure, axes = one_panel(0.24 * len(kinds) + 0.6, list(kinds))
        for row, layers in enumerate(reversed(kinds.values())):
            for i, layer in enumerate(layers):
                bits = {linear.bits for linear in layer if linear.bits is not None}
                for part, width in enumerate(sorted(bits)):
                    axes.barh(
                        row,
                        0.92 / len(bits),
                        left=i - 0.46 + 0.92 * part / len(bits),
                        height=0.84,
                        color=SERIES[widths.index(width) % len(SERIES)],
                    )
        for i, width in enumerate(widths):
            axes.barh(0, 0, color=SERIES[i % len(SERIES)], label=f"{width} bits")
        axes.set_yticks(range(len(kinds)), list(reversed(kinds)))
        axes.set_xlabel("layer")
        layer_axis(axes, len(report.blocks))
        axes.grid(visible=False)
        legend_above(figure, axes)
        return picture(figure, "Bits of every linear by layer", "bits")


def tokens_of_experts(report: Report) -> Picture | None:
    """How many calibration tokens the experts of each layer were given."""
    seen = [
        [x.tokens for x in block.linears if "*" in x.kind and x.tokens is not None]
        for block in report.blocks
    ]
    if not any(seen):
        return None
    with style():
        figure, axes = one_panel(2.2)
        lines = [
            Line([float(max(s)) if s else None for s in seen], NEAREST, "most and fewest"),
            Line([float(median(s)) if s else None for s in seen], FOUND, "median expert"),
            Line([float(min(s)) if s else None for s in seen], NEAREST),
        ]
        draw_lines(axes, lines)
        axes.set_yscale("symlog", linthresh=1)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_xlabel("layer")
        legend_above(figure, axes)
        return picture(figure, "Calibration tokens that experts were given, by layer", "tokens")


def time_and_memory(report: Report) -> Picture | None:
    """Of every block."""
    if report.run is None or not report.run.blocks:
        return None
    blocks = report.run.blocks
    with style():
        figure, (left, right) = rows_of_panels(2, height=2.0)
        draw_lines(left, [Line([usage.seconds for usage in blocks], FOUND)])
        left.set_title("seconds a block")
        memory: list[float | None] = [usage.peak_memory / 1e9 or None for usage in blocks]
        draw_lines(right, [Line(memory, FOUND)])
        right.set_title("peak memory while it was quantized, GB")
        for axes in (left, right):
            from_zero(axes)
            axes.set_xlabel("layer")
        return picture(figure, "Time and memory by block", "usage")


def short(kind: str) -> str:
    """A kind without the room it shares with others ("self_attn.q_proj" -> "q_proj")."""
    parts = kind.split(".")
    return ".".join(parts[-3:]) if "*" in parts else parts[-1]


def joined_names(kinds: Sequence[str]) -> str:
    """Several kinds as a title ("q, k, v_proj")."""
    names = [short(kind) for kind in kinds]
    ending = "_proj"
    if len(names) > 1 and all(name.endswith(ending) for name in names):
        stem = names[0].rpartition(".")[0]
        rest = [name.rpartition(".")[2].removesuffix(ending) for name in names]
        return (f"{stem}." if stem else "") + ", ".join(rest) + ending
    return ", ".join(names)


def _middle(layers: Layers, value: Callable[[LinearReport], float], color: str, label: str) -> Line:
    """The median of each layer's linears; a band from the 10th to the 90th percentile of many."""
    values = [sorted(map(value, layer)) for layer in layers]
    many = any(len(layer) > 1 for layer in values)
    bands = [quantiles(v, n=10) if len(v) > 1 else [*v, *v] for v in values]
    return Line(
        [median(v) if v else None for v in values],
        color,
        label,
        [band[0] if band else None for band in bands] if many else None,
        [band[-1] if band else None for band in bands] if many else None,
    )


def _percent(value: float, _: object = None) -> str:
    return f"{100 * value:.3g}%"
