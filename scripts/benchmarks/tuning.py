"""What a tuner tries: schedules of our kernels for a linear, compiled into a folder.

A contest is between schedules of one kernel for one linear: the most promising ones by the rule's
own estimate. Its library has a function for each that the compiler makes without spills; the first
is the rule's choice.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import tvm

from benchmarks.cases import GROUP_SIZE, Linear
from benchmarks.prebuilt import MANIFEST
from benchmarks.prepare import Say, copy_runtime
from benchmarks.rounds import Contest
from mlcawq.build.cuda_compiler import find_cuda_compiler
from mlcawq.build.cuda_library import export_cuda_library, keeping_cuda_source
from mlcawq.build.cuda_target import cuda_target
from mlcawq.build.link import find_compiler
from tir_kernels.cuda import few_rows_schedule, many_rows_schedule
from tir_kernels.cuda.epilogue import Epilogue
from tir_kernels.cuda.few_rows_schedule import ROW_LIMITS
from tir_kernels.cuda.many_rows import many_rows
from tir_kernels.cuda.many_rows_entry import w4a16_problem
from tir_kernels.cuda.many_rows_schedule import MORE
from tir_kernels.cuda.schedule import compute_capability, machine_of
from tir_kernels.cuda.tile import ManyRows
from tir_kernels.cuda.tiled_few_rows import tiled_few_rows
from tir_kernels.cuda.w4a16 import w4a16_function
from tir_kernels.layouts import TILED, LinearShape

DTYPE = "float16"
_ALIKE = 3  # schedules of a contest that differ in stages and splits only


@dataclass(frozen=True)
class Trial:
    """A schedule, and the inline builder of its kernel."""

    schedule: Any
    kernel: Any


def prepare_contests(
    folder: Path,
    target_name: str,
    linears: Sequence[Linear],
    limits: Sequence[str],
    most: int,
    say: Say,
) -> list[Contest]:
    """Compile at most `most` schedules of each kernel of each linear into `folder`.

    limits: which kernels, by the most rows that they are for. Several processes share the work.
    Raises UserError where there is no compiler for the target.
    """
    target = cuda_target(target_name)
    arch = str(target.attrs["arch"])
    compiler = find_cuda_compiler(arch)
    folder.mkdir(parents=True, exist_ok=True)
    shapes = list({linear.key: linear for linear in linears}.values())
    jobs = [(folder, target_name, linear, limit, most) for linear in shapes for limit in limits]
    contests = []
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        for contest, dropped in pool.map(_compile_contest, *zip(*jobs, strict=True)):
            contests.append(contest)
            count = len(contest.schedules)
            say(f"{contest.name}: {count} schedules, {dropped} with spills left out")
    copy_runtime(folder)
    manifest = {
        "arch": arch,
        "compiler": compiler.describe,
        "tvm": tvm.__version__,
        "libraries": {contest.name: sorted(contest.schedules) for contest in contests},
        "contests": [asdict(contest) for contest in contests],
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return contests


def _compile_contest(
    folder: Path, target_name: str, linear: Linear, limit: str, most: int
) -> tuple[Contest, int]:
    """The contest, and how many schedules it lacks because of spills."""
    target = cuda_target(target_name)
    arch = str(target.attrs["arch"])
    shape = LinearShape(linear.K, linear.N, GROUP_SIZE)
    kernel, key, trials = _trials(compute_capability(target), shape, limit, most)
    name = f"{linear.key}_{limit}"
    functions = {
        f"{name}_{i}": w4a16_function(
            shape, TILED, DTYPE, False, Epilogue(shape.N, DTYPE), trial.kernel
        )
        for i, trial in enumerate(trials)
    }
    module = tvm.IRModule({n: f.with_attr("global_symbol", n) for n, f in functions.items()})
    with keeping_cuda_source(), target:
        executable = tvm.compile(module, target=target)
    compiler, linker = find_cuda_compiler(arch), find_compiler()
    made = export_cuda_library(executable.mod, folder / f"{name}.so", arch, compiler, linker)
    spilling = {
        report.name.removesuffix("_kernel")
        for cubin in made
        for report in cubin.kernels
        if report.spill_loads or report.spill_stores
    }
    schedules = {
        n: asdict(trial.schedule)
        for n, trial in zip(functions, trials, strict=True)
        if n not in spilling
    }
    return Contest(name, linear, limit, kernel, key, schedules), len(spilling)


def _trials(
    capability: int, shape: LinearShape, limit: str, most: int
) -> tuple[str, str, list[Trial]]:
    """The kernel's name and its key in schedules.json, and what to try, best estimate first."""
    epilogue = Epilogue(shape.N, DTYPE)
    if limit in map(str, ROW_LIMITS):
        machine, rows = machine_of(capability), int(limit)
        few = sorted(
            few_rows_schedule.tiled_few_rows_candidates(capability, shape, rows),
            key=lambda one: few_rows_schedule.seconds(machine, shape, one),
        )
        trials = [Trial(s, tiled_few_rows(shape, DTYPE, s, epilogue)) for s in few[:most]]
        return "few_rows", f"{shape.K},{shape.N},{shape.group_size},{rows}", trials
    problem = w4a16_problem(shape, DTYPE, epilogue, TILED)
    most_rows = None if limit == MORE else int(limit)
    rule = many_rows_schedule.rule(capability, problem, most_rows)

    def rank(schedule: ManyRows) -> tuple[bool, float]:
        return schedule != rule, many_rows_schedule.cost(capability, problem, most_rows, schedule)

    everything = many_rows_schedule.candidates(capability, problem, most_rows, all_wgmma=True)
    many = _varied(sorted(everything, key=rank))
    trials = [
        Trial(
            schedule,
            many_rows(
                problem.make(schedule),
                problem.K,
                DTYPE,
                epilogue,
                resident=many_rows_schedule.resident_blocks(capability, problem, schedule),
                asynchronous=capability >= 80,
            ),
        )
        for schedule in many[:most]
    ]
    return "many_rows", problem.key(most_rows), trials


def _varied(schedules: Iterable[ManyRows]) -> list[ManyRows]:
    """Without those that are too much like earlier ones."""
    seen: Counter[ManyRows] = Counter()
    kept = []
    for schedule in schedules:
        shape = replace(schedule, stages=4, blocks=0)
        seen[shape] += 1
        if seen[shape] <= _ALIKE:
            kept.append(schedule)
    return kept
