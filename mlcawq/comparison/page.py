"""The comparison as a page, in the style of a quantization's own."""

from __future__ import annotations

from collections.abc import Sequence

from mlcawq.comparison.result import Difference, Result, Row
from mlcawq.comparison.words import cells, columns, measured_words, shared_words
from mlcawq.quantize.report.figures import (
    SERIES,
    Line,
    Picture,
    draw_lines,
    from_zero,
    legend_above,
    one_panel,
    picture,
    style,
)
from mlcawq.quantize.report.page import PageTable, render
from mlcawq.quantize.report.wording import plural

_LAYERS_SHOWN = 12


def comparison_page(result: Result) -> str:
    """HTML that needs nothing beside itself."""
    shown = columns(result)
    return render(
        "compare.html.j2",
        title="Quantizations compared: " + ", ".join(row.name for row in result.rows),
        heading=f"{plural(len(result.rows), 'quantization')} compared",
        lead=measured_words(result),
        shared=shared_words(result),
        notes=result.warnings,
        summary=PageTable(
            ["model", *(column.title for column in shown)],
            [[row.name, *cells(row, shown)] for row in result.rows],
        ),
        divergences=_divergences(result.rows),
        layers=_layer_lines(result),
        layer_table=_table("layer", result, _furthest(result.layers)),
        kinds=_kind_points(result),
        kind_table=_table("linear", result, result.kinds),
        recipes=PageTable(
            ["option", *(row.name for row in result.rows)],
            [[name, *(value or "" for value in values)] for name, values in result.recipes.items()],
        ),
    )


def _furthest(differences: Sequence[Difference]) -> list[Difference]:
    """Those at which the subjects differ most."""
    return sorted(differences, key=lambda one: -one.ratio)[:_LAYERS_SHOWN]


def _table(what: str, result: Result, differences: Sequence[Difference]) -> PageTable:
    rows = [
        [one.where, *("" if e is None else f"{e:.2%}" for e in one.errors), f"{one.ratio:.2f}"]
        for one in differences
    ]
    return PageTable([what, *(row.name for row in result.rows), "largest / smallest"], rows)


def _color(i: int) -> str:
    return SERIES[i % len(SERIES)]


def _divergences(rows: Sequence[Row]) -> Picture | None:
    """Bars, with a standard error where there is one."""
    known = [(i, row.name, row.kl) for i, row in enumerate(rows) if row.kl is not None]
    if not known:
        return None
    with style():
        figure, axes = one_panel(0.3 * len(known) + 0.4, [name for _, name, _ in known])
        for place, (i, _, kl) in enumerate(reversed(known)):
            error = 1000 * kl.standard_error if kl.standard_error is not None else None
            axes.barh(place, 1000 * kl.mean, height=0.66, color=_color(i), xerr=error)
        axes.set_yticks(range(len(known)), [name for _, name, _ in reversed(known)])
        axes.set_xlim(left=0)
        axes.grid(visible=False, axis="y")
        return picture(figure, "KL divergence from the original, millinats a token", "divergence")


def _layer_lines(result: Result) -> Picture | None:
    if not any(result.layers):
        return None
    with style():
        figure, axes = one_panel(2.6)
        lines = [
            Line([one.errors[i] for one in result.layers], _color(i), row.name)
            for i, row in enumerate(result.rows)
        ]
        draw_lines(axes, lines)
        from_zero(axes)
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
        axes.set_xlabel("layer")
        legend_above(figure, axes)
        return picture(figure, "Relative output error of the blocks", "layers")


def _kind_points(result: Result) -> Picture | None:
    if not result.kinds:
        return None
    names = [one.where for one in result.kinds]
    with style():
        figure, axes = one_panel(0.28 * len(names) + 0.5, names)
        for i, row in enumerate(result.rows):
            known = [
                (one.errors[i], len(names) - 1 - place)
                for place, one in enumerate(result.kinds)
                if one.errors[i] is not None
            ]
            axes.scatter(
                [error for error, _ in known],
                [place for _, place in known],
                color=_color(i),
                s=34,
                alpha=0.85,
                label=row.name,
                zorder=3,
            )
        axes.set_yticks(range(len(names)), list(reversed(names)))
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
        legend_above(figure, axes)
        title = "Relative output error by linear, root mean square over the layers"
        return picture(figure, title, "kinds")
