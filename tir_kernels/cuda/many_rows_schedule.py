"""Schedules of the kernels for many rows: measured ones where there are any, else by rule.

schedules.json: {arch: {"many_rows": {"LAYOUT,K,N,group,rows": {field: value}}}}, where rows is the
most that the kernel is for, or "more", and group is 0 for a dense weight.

The rule takes the cheapest schedule by a model of what bounds a kernel: the tensor cores, the
instructions around them, the paths from memory, from the second-level cache and from shared memory,
and the latency of what is under way. It is made of data sheets and of counts from disassembled
kernels (a 64 x 64 part of a product: 13 instructions to dequantize a fragment, one mma for each 8
tokens of it, one ldmatrix for each 16); a tuner on the machine at hand knows better.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tir_kernels.cuda.epilogue import Epilogue
from tir_kernels.cuda.schedule import machine_of, measured_schedules
from tir_kernels.cuda.shared_plan import SharedPlan, Staged
from tir_kernels.cuda.tile import STEPS, ManyRows
from tir_kernels.layouts import AUTOAWQ, TILE_K, TILED

MANY_ROW_LIMITS = (32, 64)  # a kernel for up to so many rows each, and one for more
MORE = "more"
_MORE_ROWS = (128, 512, 2048)  # what the kernel for more is judged by

# Multiply-adds of a multiprocessor in a clock, sums in fp32. sm_86, sm_89: GeForce's, which is half
# of what the workstation cards have; sm_90: by mma.sync, and by wgmma four fifths of the peak.
_MACS = {75: 512, 80: 1024, 86: 256, 89: 256, 90: 1200}
_WGMMA_MACS = 1640
_CLOCK = 1.6e9
_CACHE_BYTES = 40  # from the second-level cache, for a multiprocessor in a clock
_SHARED_BYTES = 128  # in a clock
_LATENCY = 1400  # clocks from asking a busy memory to having
_STARTING = 1600  # clocks of a block before its first product and after its last
_BARRIER = 60  # clocks of a round in which a block's warps wait for each other
_SPLIT_STEP = 1200  # clocks from the last store of sums to the first of them being read


@dataclass(frozen=True)
class Problem:
    """A linear: weights of `kind` (TILED, "autoawq" or "dense"), [K, N], group_size or 0.

    make: the weight operand of a schedule; it raises ValueError for one that it cannot serve.
    """

    kind: str
    K: int
    N: int
    group_size: int
    epilogue: Epilogue
    make: Callable[[ManyRows], Staged]

    def key(self, limit: int | None) -> str:
        """In schedules.json."""
        return f"{self.kind},{self.K},{self.N},{self.group_size},{limit or MORE}"

    @property
    def weight_bits(self) -> float:
        """Of a weight in memory, with its part of scale and zero point."""
        return 4 + 20 / self.group_size if self.group_size else 16


def many_rows_schedule(capability: int, problem: Problem, limit: int | None) -> ManyRows:
    """For at most `limit` rows, or any number of them."""
    found = measured_schedules(capability, "many_rows").get(problem.key(limit))
    return ManyRows(**found) if found is not None else rule(capability, problem, limit)


def rule(capability: int, problem: Problem, limit: int | None) -> ManyRows:
    """The schedule that the model takes for the cheapest."""
    return min(
        candidates(capability, problem, limit),
        key=lambda schedule: cost(capability, problem, limit, schedule),
    )


def cost(capability: int, problem: Problem, limit: int | None, schedule: ManyRows) -> float:
    """The logarithm of the estimated seconds, at the rows that the kernel is judged by."""
    rows = _MORE_ROWS if limit is None else (limit,)
    return sum(math.log(seconds(capability, problem, schedule, m)) for m in rows)


def candidates(
    capability: int, problem: Problem, limit: int | None, *, all_wgmma: bool = False
) -> Iterator[ManyRows]:
    """All schedules that make sense, for the rule and for a tuner.

    The rule takes wgmma only where tokens are many: with few, weights take the time, and warps
    along the inputs dequantize them faster. A tuner may try it everywhere.
    """
    machine = machine_of(capability)
    asynchronous = capability >= 80
    wgmma = capability == 90 and problem.kind == TILED and (limit is None or all_wgmma)
    for shape in _shapes(limit, asynchronous, wgmma):
        for stages in range(3, 9) if asynchronous else (2,):
            for wave in (0, 1, 2):
                blocks = wave * machine.multiprocessors
                try:
                    schedule = ManyRows(**shape, stages=stages, blocks=blocks)
                    plan = SharedPlan(
                        problem.make(schedule), problem.K, problem.epilogue, asynchronous
                    )
                except ValueError:
                    continue
                never_split = schedule.most_splits(problem.K, problem.N) == 1
                if plan.bytes <= machine.shared_block and not (blocks and never_split):
                    yield schedule


def _shapes(limit: int | None, asynchronous: bool, wgmma: bool) -> Iterator[dict[str, Any]]:
    """Tokens, outputs and warps, some of which no schedule can have."""
    # Sums, fragments on their way and addresses in 255 registers; without cp.async, also copies.
    most_sums = 128 if asynchronous else 64
    warps = itertools.product((1, 2, 4, 8), (1, 2, 4), (1, 2, 4))
    tokens = (64, 128) if limit is None else (limit,)
    for t, outputs, (n, m, k) in itertools.product(tokens, (64, 128, 256), warps):
        if 4 <= n * m * k <= 8 and 16 <= t * outputs // (32 * n * m) <= most_sums:
            yield {"tokens": t, "outputs": outputs, "warps_n": n, "warps_m": m, "warps_k": k}
    if wgmma:
        tokens = (128, 256) if limit is None else (limit,)
        for t, outputs, n in itertools.product(tokens, (128, 256), (8, 16)):
            if 16 <= t * outputs // (32 * n) <= most_sums:
                yield {"tokens": t, "outputs": outputs, "warps_n": n, "wgmma": True}


def resident_blocks(capability: int, problem: Problem, schedule: ManyRows) -> int:
    """Blocks that a multiprocessor holds."""
    machine = machine_of(capability)
    plan = SharedPlan(problem.make(schedule), problem.K, problem.epilogue, capability >= 80)
    registers = _registers(capability, schedule)
    return max(
        1,
        min(
            machine.blocks,
            machine.threads // schedule.threads,
            65536 // (schedule.threads * registers),
            machine.shared_total // (plan.bytes + 1024),
        ),
    )


def _registers(capability: int, schedule: ManyRows) -> int:
    """What a thread needs without spilling any, found with ptxas."""
    sums = schedule.warp_stripes * schedule.warp_tokens // 2
    if sums > 64:
        return 256
    # Before sm_80, copies pass through registers; sm_90 has two more for every address in memory.
    more = 40 if capability < 80 else 8 if capability >= 90 and not schedule.wgmma else 0
    return (128 if sums > 32 else 104) + more


def seconds(capability: int, problem: Problem, schedule: ManyRows, m: int) -> float:
    """The model. What bounds a kernel goes on at the same time, but none of it perfectly so: the
    sum of fourth powers makes a schedule better that has something to spare."""
    machine = machine_of(capability)
    plan = SharedPlan(problem.make(schedule), problem.K, problem.epilogue, capability >= 80)
    tiles = -(-m // schedule.tokens) * -(-problem.N // schedule.outputs)
    most = schedule.most_splits(problem.K, problem.N)
    splits = max(1, min(schedule.blocks // tiles, most))
    rounds = -(-problem.K // (TILE_K * schedule.warps_k * splits))
    blocks = tiles * splits
    present = resident_blocks(capability, problem, schedule)
    each = -(-blocks // machine.multiprocessors)  # of the busiest multiprocessor
    at_once = min(each, present)

    round_bounds = (
        *_round_clocks(capability, problem, schedule, plan, at_once),
        # Latency is hidden by what is asked ahead of time, of all blocks that are there.
        (_LATENCY / plan.ahead) / at_once,
        (_BARRIER + 8 * STEPS * schedule.warp_stripes) / at_once,
    )
    clocks = each * rounds * sum(bound**4 for bound in round_bounds) ** 0.25
    clocks += -(-each // present) * _STARTING
    sums = schedule.tokens * schedule.outputs * 4
    if splits > 1:
        clocks += _SPLIT_STEP + (splits + each) * sums / _CACHE_BYTES
    weights = problem.K * problem.N * problem.weight_bits / 8
    memory = (weights + 2 * m * (problem.K + problem.N)) / machine.bandwidth
    return float(((clocks / _CLOCK) ** 4 + memory**4) ** 0.25)


def _round_clocks(
    capability: int, problem: Problem, schedule: ManyRows, plan: SharedPlan, at_once: int
) -> tuple[float, ...]:
    """What a block's round takes of a multiprocessor's tensor cores, schedulers, shared memory and
    share of the second-level cache, each if it were alone."""
    known = max(c for c in _MACS if c <= capability)
    SN, TM, k = schedule.warp_stripes, schedule.warp_tokens, schedule.warps_k
    inputs = TILE_K * k
    rate = _WGMMA_MACS if schedule.wgmma else _MACS[known]
    products = schedule.tokens * schedule.outputs * inputs / rate

    loads = 1 if problem.kind == "dense" else 13 if problem.kind == TILED else 2
    multiplying = 3 * SN if schedule.wgmma else TM // 16 * (1 + 2 * SN)
    copies = (plan.rows.bytes + plan.weight.bytes) / (16 * schedule.threads)
    instructions = schedule.warps * (STEPS * (SN * loads + multiplying) + 4 * copies + 50)
    if problem.kind == AUTOAWQ:
        # Dequantizing into shared memory: a word at a time, eight weights.
        instructions += inputs * schedule.outputs / 8 / 32 * 16
    # Four schedulers, each as busy as its warps fill the gaps of one another.
    utilized = min(0.85, at_once * schedule.warps / 4 * 0.3)
    issue = instructions / 4 / utilized

    fragments = schedule.warps * (TM * 128 if not schedule.wgmma else SN * schedule.tokens * 32)
    words = schedule.warps * SN * (2048 if problem.kind != TILED else 512)
    shared = (plan.rows.bytes + plan.weight.bytes + fragments + words) / _SHARED_BYTES
    cache = (plan.rows.bytes + plan.weight.bytes) / _CACHE_BYTES
    return products, issue, shared, cache
