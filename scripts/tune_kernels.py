#!/usr/bin/env python
"""Find the fastest schedules of our CUDA kernels on the GPU at hand, and keep them as data.

    python scripts/tune_kernels.py                         # compile here, measure here
    python scripts/tune_kernels.py --prepare DIR --target cuda:sm_90
    python scripts/tune_kernels.py --prebuilt DIR          # on the machine with the GPU
    python scripts/tune_kernels.py --dry-run --target cuda:sm_90   # without a GPU

For every linear of the models (4 bits, groups of 128, tiled layout) and every range of rows, the
schedules that the rule in tir_kernels/cuda thinks best are compiled, checked against float64 on
random data, and timed with weights that no cache holds: medians of replays of a CUDA graph. The
winners go into tir_kernels/cuda/schedules.json, which the kernels look schedules up in; shapes that
it lacks are left to the rule.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from benchmarks.cases import MODELS
from benchmarks.prebuilt import Prebuilt, PreparedError
from benchmarks.rounds import JUDGED, Contest, Outcome, contests_of, hold

SCHEDULES = Path(__file__).parents[1] / "tir_kernels" / "cuda" / "schedules.json"


def main() -> None:
    arguments = _arguments()
    if arguments.prepare is not None:
        _prepare(arguments.prepare, arguments)
    elif arguments.dry_run:
        _dry_run(arguments)
    elif not torch.cuda.is_available():
        sys.exit("error: no GPU that torch can use\n  -> --dry-run, or --prepare DIR for another")
    elif arguments.prebuilt is not None:
        _tune(arguments, Prebuilt(arguments.prebuilt))
    else:
        with tempfile.TemporaryDirectory(prefix="mlcawq-tune-") as folder:
            _prepare_apart(Path(folder))
            _tune(arguments, Prebuilt(Path(folder)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument(
        "--limits", nargs="+", choices=JUDGED, default=list(JUDGED), help="kernels, by most rows"
    )
    parser.add_argument("--most", type=int, default=24, help="schedules of a kernel and linear")
    parser.add_argument("--target", default="cuda", help="cuda, or cuda:sm_XX without a GPU")
    parser.add_argument("--prepare", type=Path, metavar="DIR", help="compile into DIR, no more")
    parser.add_argument("--prebuilt", type=Path, metavar="DIR", help="measure what DIR holds")
    parser.add_argument("--dry-run", action="store_true", help="compile and list what would run")
    parser.add_argument("--output", type=Path, default=SCHEDULES, metavar="FILE", help="JSON")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------ preparing


def _prepare(folder: Path, arguments: argparse.Namespace) -> list[Contest]:
    from benchmarks.tuning import prepare_contests

    from mlcawq.errors import UserError

    linears = [linear for name in arguments.models for linear in MODELS[name]]
    try:
        return prepare_contests(
            folder, arguments.target, linears, arguments.limits, arguments.most, _say
        )
    except UserError as error:
        sys.exit(f"error: {error}")


def _prepare_apart(folder: Path) -> None:
    """In a process of its own: TVM and what only runs its libraries do not share one."""
    command = [sys.executable, __file__, *sys.argv[1:], "--prepare", str(folder)]
    if subprocess.run(command, check=False).returncode:
        sys.exit(1)


def _dry_run(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="mlcawq-tune-") as folder:
        contests = _prepare(Path(folder), arguments)
    for contest in contests:
        rows = ", ".join(map(str, JUDGED[contest.limit]))
        print(f"{contest.kernel} {contest.key}, judged at m = {rows}")
        for schedule in contest.schedules.values():
            print(f"  {_fields(schedule)}")


# ------------------------------------------------------------------------------------ measuring


def _tune(arguments: argparse.Namespace, prebuilt: Prebuilt) -> None:
    gpu = torch.cuda.get_device_properties(0)
    try:
        arch = prebuilt.manifest["arch"].removesuffix("a")
    except PreparedError as error:
        sys.exit(f"error: {error}")
    if arch != f"sm_{gpu.major}{gpu.minor}":
        sys.exit(f"error: prepared for {arch}, and this GPU is sm_{gpu.major}{gpu.minor}")
    print(f"{gpu.name}, {arch}, seed {arguments.seed}")
    outcomes = []
    for contest in contests_of(prebuilt):
        outcome = hold(prebuilt, contest, arguments.seed)
        outcomes.append(outcome)
        wrong = f", {outcome.wrong} WRONG" if outcome.wrong else ""
        print(
            f"{contest.kernel} {contest.key}: {outcome.seconds * 1e6:.1f} us, "
            f"{outcome.gain:.2f} times as fast as the rule{wrong}: {_fields(outcome.winner)}",
            flush=True,
        )
        torch.cuda.empty_cache()
    save(arguments.output, arch, outcomes)
    _say(f"wrote {arguments.output}")
    if any(outcome.wrong for outcome in outcomes):
        sys.exit("error: some schedules gave wrong results")


def save(path: Path, arch: str, outcomes: Iterable[Outcome]) -> None:
    """Put the winners into the file; what it has of other shapes and architectures stays."""
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for outcome in outcomes:
        kernels = content.setdefault(arch, {}).setdefault(outcome.contest.kernel, {})
        kernels[outcome.contest.key] = dict(outcome.winner)
    path.write_text(_as_lines(content) + "\n")


def _as_lines(content: Any, depth: int = 0) -> str:
    """JSON, sorted, with a schedule a line."""
    if depth == 3:
        return json.dumps(content)
    inner = ",\n".join(
        f"{' ' * (2 * depth + 2)}{json.dumps(key)}: {_as_lines(content[key], depth + 1)}"
        for key in sorted(content)
    )
    return "{\n" + inner + "\n" + " " * (2 * depth) + "}"


def _fields(schedule: Any) -> str:
    return ", ".join(f"{name} {value}" for name, value in schedule.items())


if __name__ == "__main__":
    main()
