"""How the card, the page, the terminal and the comparison say the same things."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlcawq.quantize.report.data import Report, Storage

# The parts of a recipe that change the weights, in the order in which they are applied.
_PARTS = {
    "rotation": "rotated",
    "scale": "AWQ scales",
    "clip": "clipped ranges",
    "learning": "learned",
    "compensation": "rounded by GPTQ",
    "activations": "quantized activations",
}


def method_words(recipe: Mapping[str, Any]) -> str:
    """What a recipe does to the weights ("AWQ scales, clipped ranges, rounded by GPTQ")."""
    taken = [part for part in _PARTS if recipe.get(part) is not None]
    words = [_PARTS[part] for part in taken]
    if not {"learning", "compensation"} & set(taken):
        words.append("rounded to nearest")
    return ", ".join(words)


def grid_words(recipe: Mapping[str, Any]) -> str:
    """The integers of a recipe ("asymmetric 4-bit integers, groups of 128")."""
    kind = "symmetric" if recipe.get("symmetric") else "asymmetric"
    group = recipe.get("group_size")
    grouping = "one group a channel" if group == "channel" else f"groups of {group}"
    return f"{kind} {recipe.get('bits')}-bit integers, {grouping}"


def recipe_facts(recipe: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The options of a recipe by dotted names; what is left out says so."""
    rows = []
    for key, value in recipe.items():
        if isinstance(value, Mapping):
            rows += [(f"{key}.{option}", _plain(setting)) for option, setting in value.items()]
        else:
            rows.append((key, _plain(value)))
    return rows


def _plain(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value)) or "–"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(part)}" for key, part in value.items() if part is not None)
    return str(value)


def short_grid(report: Report) -> str:
    """The integers in a word ("w4 g128", "w4 g128 sym", "w3-4 g64-128" where linears differ)."""
    linears = [linear for _, linear in report.linears if linear.bits is not None]
    bits = sorted({linear.bits for linear in linears if linear.bits is not None})
    groups = sorted({str(linear.group_size) for linear in linears}, key=lambda g: (len(g), g))
    symmetric = {linear.symmetric for linear in linears}
    recipe = report.recipe
    if not linears:
        bits, groups = [recipe.get("bits", "?")], [str(recipe.get("group_size", "?"))]
        symmetric = {recipe.get("symmetric")}
    sign = " sym" if symmetric == {True} else ""
    return f"w{_range(bits)} g{_range(groups)}{sign}"


def _range(values: list[Any]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]}-{values[-1]}"


def count_words(count: int) -> str:
    """A large number for people ("3.93 million")."""
    for unit, name in ((10**9, "billion"), (10**6, "million")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:,}"


def size_words(count: float) -> str:
    """Bytes for people, in powers of ten."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return (
                f"{count / unit:.3g} {name}" if count < 100 * unit else f"{count / unit:.0f} {name}"
            )
    return f"{count / 1e3:.3g} kB"


def share_words(storage: Storage) -> str:
    """The output's size as a share of the original's ("29%")."""
    return f"{storage.output / storage.original:.0%}" if storage.original else ""


def sizes_words(storage: Storage) -> tuple[str, str]:
    """Size before and after, the latter with its share of the former."""
    return size_words(storage.original), f"{size_words(storage.output)} ({share_words(storage)})"


def time_words(seconds: float) -> str:
    """A length of time for people ("0.8 s", "42 s", "3 min 5 s", "2 h 10 min")."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def plural(count: int, singular: str, plural_form: str | None = None) -> str:
    """A count with its noun ("1 layer", "5 layers")."""
    return f"{count} {singular if count == 1 else plural_form or singular + 's'}"
