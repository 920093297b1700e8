"""The table of a run, and which targets it meets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.cases import Linear
from benchmarks.end_to_end import Decoding
from benchmarks.timing import Ceilings, Time

OURS = "ours"
HALF = "cuBLAS fp16"
GENERIC = "mlc_llm"
_MEMORY_BOUND = 16  # rows up to which the share of the copy bandwidth is shown
_COMPUTE_BOUND = 512  # rows from which the share of the matrix rate is shown


@dataclass
class Row:
    """One linear at m rows. times: of contenders by name; peers: those that ours is to beat."""

    linear: Linear
    m: int
    times: dict[str, Time] = field(default_factory=dict)

    def share(self, ceilings: Ceilings) -> float | None:
        """Ours, of the copy bandwidth or of the matrix rate; None where neither binds."""
        if OURS not in self.times:
            return None
        seconds = self.times[OURS].seconds
        if self.m <= _MEMORY_BOUND:
            return self.linear.bytes_read(self.m) / seconds / ceilings.copy
        if self.m >= _COMPUTE_BOUND:
            return self.linear.operations(self.m) / seconds / ceilings.multiply
        return None

    def ratio(self, name: str) -> float | None:
        """How many times as long as ours another takes."""
        if name not in self.times or OURS not in self.times:
            return None
        return self.times[name].seconds / self.times[OURS].seconds


@dataclass(frozen=True)
class Target:
    """worst: the worst value that was measured and where; None where nothing was."""

    name: str
    limit: float
    worst: tuple[float, str] | None

    @property
    def met(self) -> bool | None:
        return None if self.worst is None else self.worst[0] >= self.limit


def table(rows: Sequence[Row], names: Sequence[str], ceilings: Ceilings) -> list[str]:
    """Microseconds, contender by contender; a star where a CUDA graph could not be captured."""
    shown = [name for name in names if any(name in row.times for row in rows)]
    head = f"{'model':<13}{'linear':<14}{'K':>6}{'N':>7}{'m':>6}"
    out = [head + "".join(f"{name:>{_width(name)}}" for name in shown) + "   of ceiling"]
    for row in rows:
        linear = row.linear
        line = f"{linear.model:<13}{linear.name:<14}{linear.K:>6}{linear.N:>7}{row.m:>6}"
        for name in shown:
            line += f"{_microseconds(row.times.get(name)):>{_width(name)}}"
        share = row.share(ceilings)
        if share is not None:
            of = "copy" if row.m <= _MEMORY_BOUND else "matrix"
            line += f"   {share:4.0%} {of}"
        out.append(line)
    if any(not time.captured for row in rows for time in row.times.values()):
        out.append("* not captured as a CUDA graph: the CPU's launches are in the time")
    return out


def decoding_line(decoding: Decoding) -> str:
    """End to end, in a line."""
    return (
        f"8B-shaped model: {1 / decoding.step:.1f} tokens/s, {decoding.step * 1e3:.2f} ms a token, "
        f"of which kernels {decoding.kernels * 1e3:.2f} ms: {decoding.overhead:.0%} overhead"
    )


def targets(
    rows: Sequence[Row], peers: Iterable[str], ceilings: Ceilings, decoding: Decoding | None
) -> list[Target]:
    """What the kernels are meant to reach on an H200, and the worst of what they did."""
    peers = tuple(peers)

    def worst(values: Iterable[tuple[float | None, Row, str]]) -> tuple[float, str] | None:
        known = [
            (value, f"{row.linear.model} {row.linear.name} m={row.m}{extra}")
            for value, row, extra in values
            if value is not None
        ]
        return min(known, default=None)

    single = [row for row in rows if row.m == 1]
    few = [row for row in rows if row.m <= 64]
    many = [row for row in rows if row.m >= _COMPUTE_BOUND]
    large = [row for row in single if row.linear.is_large]
    found = [
        Target(
            "share of the copy bandwidth, m = 1, large shapes",
            0.80,
            worst((row.share(ceilings), row, "") for row in large),
        ),
        Target(
            "times as fast as every peer, m = 1 to 64",
            1.0,
            worst((row.ratio(peer), row, f" ({peer})") for row in few for peer in peers),
        ),
        Target(
            "times as fast as cuBLAS fp16, m >= 512",
            0.90,
            worst((row.ratio(HALF), row, "") for row in many),
        ),
        Target(
            "times as fast as mlc_llm's generic schedule, m = 1",
            5.0,
            worst((row.ratio(GENERIC), row, "") for row in single),
        ),
    ]
    share = None if decoding is None else (decoding.kernels / decoding.step, "8B-shaped decode")
    found.append(Target("share of a decode step that is kernels", 1 / 1.25, share))
    return found


def verdicts(found: Sequence[Target]) -> list[str]:
    """The targets as lines of text."""
    words = {True: "met", False: "MISSED", None: "not measured"}
    out = []
    for target in found:
        line = f"{words[target.met]:<13}{target.name}: at least {target.limit:.2f}"
        if target.worst is not None:
            line += f", worst {target.worst[0]:.2f} at {target.worst[1]}"
        out.append(line)
    return out


def as_json(rows: Sequence[Row], ceilings: Ceilings, found: Sequence[Target]) -> dict[str, Any]:
    """Everything that was measured, times in seconds."""
    return {
        "copy_bytes_per_second": ceilings.copy,
        "multiply_flops": ceilings.multiply,
        "rows": [
            {
                "model": row.linear.model,
                "linear": row.linear.name,
                "K": row.linear.K,
                "N": row.linear.N,
                "m": row.m,
                "seconds": {name: time.seconds for name, time in row.times.items()},
                "not_captured": [name for name, time in row.times.items() if not time.captured],
            }
            for row in rows
        ],
        "targets": [
            {"name": t.name, "limit": t.limit, "worst": t.worst, "met": t.met} for t in found
        ],
    }


def _microseconds(time: Time | None) -> str:
    if time is None:
        return "-"
    return f"{time.seconds * 1e6:.1f}{'' if time.captured else '*'}"


def _width(name: str) -> int:
    return max(len(name), 8) + 2
