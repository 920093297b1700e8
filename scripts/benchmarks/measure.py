"""Every contender on every linear: checked against float64, then timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from benchmarks.cases import Case, Linear, relative_error
from benchmarks.contenders import Apply, Contender, TorchHalf, UnavailableError
from benchmarks.report import Row
from benchmarks.timing import Time, copies_needed, measure


@dataclass
class Results:
    """rows: in the order of linears and m. refused: contender (and linear) -> why no time."""

    rows: list[Row] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


def measure_linear(
    linear: Linear,
    contenders: Sequence[Contender],
    ms: Sequence[int],
    seed: int,
    into: Results,
    device: str = "cuda",
) -> None:
    """Adds a row for every m."""
    case = Case(linear, device, seed)
    reference = case.dense(torch.float64)
    inputs = [case.activations(m) for m in ms]
    expected = [x.double() @ reference for x in inputs]
    del reference
    rows = [Row(linear, m) for m in ms]
    for contender in contenders:
        if contender.name in into.refused:
            continue
        try:
            _measure_contender(contender, case, rows, inputs, expected)
        except UnavailableError as error:
            into.refused[contender.name] = str(error)
        except Exception as error:  # another project's code may fail in any way
            lines = str(error).strip().splitlines() or [type(error).__name__]
            into.refused[f"{contender.name}, {linear.model} {linear.name}"] = lines[0]
        torch.cuda.empty_cache()
    into.rows += rows


def _measure_contender(
    contender: Contender,
    case: Case,
    rows: Sequence[Row],
    inputs: Sequence[torch.Tensor],
    expected: Sequence[torch.Tensor],
) -> None:
    copy = contender.load(case)
    copies = [copy()]
    for row, x, right in zip(rows, inputs, expected, strict=True):
        row.times[contender.name] = _measure_one(contender, row, copy, copies, x, right)


def _measure_one(
    contender: Contender,
    row: Row,
    copy: Callable[[], Apply],
    copies: list[Apply],
    x: torch.Tensor,
    expected: torch.Tensor,
) -> Time:
    """Check, then time. copies: grows to as many as no cache holds."""
    own = x.to(contender.dtype)
    error = relative_error(copies[0](own), expected)
    if not error <= contender.tolerance:  # NaN is no small error
        raise ArithmeticError(
            f"wrong at m={row.m}: relative error {error:.1e}, {contender.tolerance:.0e} allowed"
        )
    weights = row.linear.K * row.linear.N
    wanted = copies_needed(2 * weights if isinstance(contender, TorchHalf) else weights // 2)
    while len(copies) < wanted:
        copies.append(copy())
    return measure([lambda apply=apply: apply(own) for apply in copies[:wanted]])
