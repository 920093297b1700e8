"""Schedules of the kernels for few rows: measured ones where there are any, else by rule.

schedules.json: {arch: {"few_rows": {"K,N,group,rows": {field: value}}}} for tiled weights, where
rows is the most that the kernel is for.

For them, the rule takes the cheapest schedule by a model of what bounds a kernel: the memory behind
all, the latency of what a warp has on its way, instructions, and the paths into and out of shared
memory. It is made of data sheets and of counts from disassembled kernels; a tuner on the machine at
hand knows better.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from tir_kernels.cuda.activations import Activations
from tir_kernels.cuda.epilogue import Sums
from tir_kernels.cuda.schedule import Machine, machine_of, measured_schedules
from tir_kernels.layouts import TILE_K, TILE_N, LinearShape

ROW_LIMITS = (1, 8, 16)  # a kernel for up to so many rows each; beyond, many_rows

_REGISTERS = 65536  # of a multiprocessor
_MOST_REGISTERS = 160  # of a lane

_LATENCY = 0.9e-6  # seconds from asking a busy memory to having
_STARTING = 0.4e-6  # of a block, until it asks
_SUMMING = 0.2e-6  # of a unit, while nothing is multiplied
_CLOCK = 1.6e9
_CACHE_BYTES = 40  # from the second-level cache, for a multiprocessor in a clock


@dataclass(frozen=True)
class TiledFewRows:
    """Of a kernel for at most `rows` rows (.tiled_few_rows).

    warps: of a block; they share K. stripes: of 16 outputs each, that a warp multiplies at once.
    depth: tiles of a stripe that a warp has on their way. blocks: that share the units of `stripes`
    stripes. resident: all activations stay in shared memory.
    """

    rows: int
    warps: int
    stripes: int
    depth: int
    blocks: int
    resident: bool

    def units(self, shape: LinearShape) -> int:
        """Groups of stripes."""
        return -(-shape.tile_rows // self.stripes)

    def share(self, shape: LinearShape) -> int:
        """Tiles of a stripe for each warp: as many as make whole groups."""
        whole = max(1, shape.group_size // TILE_K)
        return -(-shape.tile_columns // (self.warps * whole)) * whole

    def rounds(self, shape: LinearShape) -> int:
        """How many times a warp goes through `depth` tiles."""
        return -(-self.share(shape) // self.depth)

    def stages(self, shape: LinearShape) -> int:
        """Rounds whose activations a warp has room for."""
        return self.rounds(shape) if self.resident else 2

    def shared(self, shape: LinearShape) -> int:
        """Bytes of shared memory of a block."""
        activations = Activations(
            shape.K, self.rows, self.depth * TILE_K, self.stages(shape), False
        )
        kept = self.warps * activations.stages * activations.stage
        sums = 4 * Sums(self.rows, self.warps, self.stripes).floats
        return kept + sums if self.resident else max(kept, sums)

    def registers(self, shape: LinearShape) -> int:
        """About how many a lane has: fitted to the least that the compiler gets by with."""
        eights = -(-self.rows // 8)
        groups = self.depth * TILE_K // shape.group_size
        return 24 + self.stripes * (4 * self.depth + 8 * eights + 4 * groups + 4) + 4 * eights


def tiled_few_rows_schedule(capability: int, shape: LinearShape, rows: int) -> TiledFewRows:
    """For at most `rows` (1 to 16) rows of a tiled weight."""
    key = f"{shape.K},{shape.N},{shape.group_size},{rows}"
    found = measured_schedules(capability, "few_rows").get(key)
    if found is not None:
        return TiledFewRows(**found)
    machine = machine_of(capability)
    return min(
        tiled_few_rows_candidates(capability, shape, rows),
        key=lambda schedule: seconds(machine, shape, schedule),
    )


def tiled_few_rows_candidates(
    capability: int, shape: LinearShape, rows: int
) -> Iterator[TiledFewRows]:
    """All schedules that make sense, for the rule and for a tuner."""
    machine = machine_of(capability)
    for stripes, depth, warps, resident in itertools.product(
        (1, 2, 4), (1, 2, 4), range(1, 17), (True, False)
    ):
        if stripes > shape.tile_rows or depth * TILE_K % shape.group_size:
            continue
        units = -(-shape.tile_rows // stripes)
        one = TiledFewRows(rows, warps, stripes, depth, units, resident)
        at_once = _blocks_at_once(machine, shape, one)
        if at_once and one.registers(shape) <= _MOST_REGISTERS:
            # One wave of blocks that all have about as many units.
            each = -(-units // (machine.multiprocessors * at_once)) if resident else 1
            yield replace(one, blocks=-(-units // each))


def _blocks_at_once(machine: Machine, shape: LinearShape, schedule: TiledFewRows) -> int:
    """Blocks that a multiprocessor holds; 0 for blocks that are too large."""
    if schedule.shared(shape) > machine.shared_block:
        return 0
    # Registers are given out in eights, from the same number for each of four schedulers.
    registers = -(-schedule.registers(shape) // 8) * 8
    warps = _REGISTERS // (32 * registers) // 4 * 4
    return min(
        machine.blocks,
        machine.threads // (32 * schedule.warps),
        warps // schedule.warps,
        machine.shared_total // (schedule.shared(shape) + 1024),
    )


def seconds(machine: Machine, shape: LinearShape, schedule: TiledFewRows) -> float:
    """The model. What bounds a kernel goes on at the same time, but none of it perfectly so: the
    sum of fourth powers makes a schedule better that has something to spare."""
    units, blocks, rounds = schedule.units(shape), schedule.blocks, schedule.rounds(shape)
    stripes, eights = schedule.stripes, -(-schedule.rows // 8)
    each = -(-units // blocks)
    at_once = max(1, _blocks_at_once(machine, shape, schedule))
    multiprocessors = min(blocks, machine.multiprocessors)
    weights = shape.tile_rows * shape.tile_columns * 512 * (1 + 5 / shape.group_size)
    activations = (blocks if schedule.resident else units) * schedule.rows * shape.K * 2
    waves = -(-blocks // (machine.multiprocessors * at_once))
    latency = waves * (each * (rounds * _LATENCY + _SUMMING) + _STARTING)

    # Of the multiprocessor with the most blocks: tiles of inputs that its warps go through. One of
    # its four schedulers is busy as far as its warps are enough to fill the gaps of each.
    most = -(-blocks // machine.multiprocessors)
    tiles = most * each * schedule.warps * rounds * schedule.depth
    of_a_step, of_a_group = 10 + eights, 10 + 4 * eights
    of_a_tile = 4 * of_a_step + TILE_K / shape.group_size * of_a_group
    instructions = tiles * (4 + 2 * eights + stripes * of_a_tile)
    instructions += most * each * schedule.warps * (60 + stripes * schedule.rows)
    utilized = min(0.8, min(most, at_once) * schedule.warps / 4 * (0.1 + 0.05 * stripes))
    # Clocks of the path into and out of shared memory, 128 bytes each.
    path = tiles * (4 * stripes + 8 * eights) + activations / 64 / multiprocessors
    bounds = (
        weights / machine.bandwidth,
        (weights + activations) / (multiprocessors * _CACHE_BYTES * _CLOCK),
        latency,
        instructions / 4 / utilized / _CLOCK,
        path / _CLOCK,
    )
    return sum(bound**4 for bound in bounds) ** 0.25


@dataclass(frozen=True)
class StockFewRows:
    """Of a kernel for at most `rows` rows of a stock weight (.stock_few_rows).

    warps: of a block; they share K. words: neighbouring ones that a lane reads at once.
    """

    rows: int
    warps: int
    words: int

    def blocks(self, shape: LinearShape) -> int:
        """One for 8 * words words."""
        return -(-shape.words // (8 * self.words))

    def rounds(self, shape: LinearShape) -> int:
        """Of 64 inputs, for each warp."""
        return -(-shape.tile_columns // self.warps)

    def shared(self, shape: LinearShape) -> int:
        """Bytes of shared memory of a block."""
        activations = Activations(shape.K, self.rows, TILE_K, 2, False)
        sums = Sums(self.rows, self.warps, 4 * self.words)
        return max(self.warps * 2 * activations.stage, 4 * sums.floats)


def stock_few_rows_schedule(capability: int, shape: LinearShape, rows: int) -> StockFewRows:
    """For at most `rows` (1 to 16) rows of a stock weight.

    Two words at once halve the requests of a block and the blocks that there are.
    """
    machine = machine_of(capability)
    wide = rows <= 8 and shape.words % 2 == 0 and shape.words >= 16 * machine.multiprocessors
    words = 2 if wide else 1
    most = 8 if wide or rows > 8 else 16  # as many as registers allow
    rounds = -(-shape.tile_columns // most)
    return StockFewRows(rows, -(-shape.tile_columns // rounds), words)


@dataclass(frozen=True)
class DenseFewRows:
    """Of a kernel for at most `rows` rows of an unquantized weight (.dense_few_rows).

    warps: of a block; they share K. depth: loads of 32 inputs that a warp has on their way.
    """

    rows: int
    warps: int
    depth: int

    def share(self, K: int) -> int:
        """Loads of 32 inputs for each warp."""
        return -(-K // (32 * self.warps))


def dense_few_rows_schedule(capability: int, K: int, N: int, rows: int) -> DenseFewRows:
    """For at most `rows` (1 to 16) rows of a weight [N, K]: many warps where blocks are few."""
    stripes = -(-N // TILE_N)
    most = 8 if stripes >= 2 * machine_of(capability).multiprocessors else 16
    share = -(-K // (32 * most))
    return DenseFewRows(rows, -(-K // (32 * share)), min(4, share))
