"""Schedule parameters of the Vulkan kernels, and the rule by which they are chosen.

The rule knows the shape and the device's limits and nothing else, so that a library runs on every
device that has these limits. It was made for GPUs as they are, of which WebGPU promises 256
invocations and 16 KiB of workgroup memory in a workgroup:

- Few rows are bound by memory. Invocations ask for 16 bytes several times before they wait, and a
  workgroup has few outputs, so that a small linear still makes workgroups enough for many cores.
  Where it makes few, they get as large as they may be, if K is long. K is cut so that little of the
  last chunk is in vain.
- Several rows share the weights that an invocation has unpacked. Each row costs a load from
  workgroup memory for every four weights of an output, so two stripes share these loads where that
  leaves workgroups enough.
- Many rows are bound by arithmetic and by workgroup memory. An invocation has 8, 16 or 32 sums,
  which with their operands stay inside of 128 registers. Up to 64 rows, two slices of K keep more
  of the device busy.
"""

from __future__ import annotations

from dataclasses import dataclass

from tir_kernels.layouts import LinearShape
from tir_kernels.vulkan.limits import Limits

LANES = 32  # invocations that share a tile of the layout n16k64, or an output
COLUMNS = 64  # outputs of a workgroup for many rows
TEAM = 128  # invocations of a slice for many rows

_ENOUGH = 64  # workgroups of few rows, below which they get smaller
_LONG = 32  # tiles along K, from which eight slices have enough to do


@dataclass(frozen=True)
class TiledFewRows:
    """rows: of x, at most. slices: parts of K that a workgroup sums side by side, 32 invocations
    each. depth: tiles of a stripe, one after the other, that an invocation asks for at once.
    stripes: of 16 outputs, in a workgroup.
    """

    rows: int
    slices: int
    depth: int
    stripes: int

    @property
    def invocations(self) -> int:
        return self.slices * LANES


@dataclass(frozen=True)
class StockFewRows:
    """rows: of x, at most. words: of 8 outputs, in a workgroup. slices: parts of K, an invocation
    for each word. depth: fours of inputs whose words an invocation asks for at once.
    """

    rows: int
    words: int
    slices: int
    depth: int

    @property
    def invocations(self) -> int:
        return self.slices * self.words


@dataclass(frozen=True)
class DenseFewRows:
    """rows: of x, at most. teams: of 32 invocations, with `outputs` outputs each. depth: reads of
    each output that an invocation asks for at once.
    """

    rows: int
    teams: int
    outputs: int
    depth: int

    @property
    def invocations(self) -> int:
        return self.teams * LANES


@dataclass(frozen=True)
class ManyRows:
    """A workgroup computes `rows` rows by 64 outputs, an invocation `tall` rows by `wide` outputs.
    slices: parts of K that a workgroup sums side by side, 128 invocations each. up_to: rows of x.
    """

    rows: int
    tall: int
    wide: int
    slices: int
    up_to: int | None = None

    @property
    def across(self) -> int:
        """Invocations that share a row."""
        return COLUMNS // self.wide

    @property
    def down(self) -> int:
        """Invocations that share an output."""
        return self.rows // self.tall


def tiled_few_rows(shape: LinearShape, limits: Limits) -> list[TiledFewRows]:
    """For 1, 4 and 8 rows."""
    tiles = shape.tile_columns
    few = shape.tile_rows < 2 * _ENOUGH
    slices = _teams(limits) if few and tiles >= _LONG else 4
    depth = min((4, 2, 1), key=lambda depth: _vain(tiles, slices * depth))
    return [
        TiledFewRows(1, slices, depth, 1),
        TiledFewRows(4, 4, 2, 1 if few else 2),
        TiledFewRows(8, 4, 1, 1 if few else 2),
    ]


def stock_few_rows(limits: Limits) -> list[StockFewRows]:
    """For 1, 4 and 8 rows."""
    words = 8
    slices = min(limits.invocations, 256) // words
    return [
        StockFewRows(1, words, slices, 2),
        StockFewRows(4, words, slices // 2, 2),
        StockFewRows(8, words, slices // 2, 1),
    ]


def dense_few_rows(K: int, N: int, width: int, limits: Limits) -> list[DenseFewRows]:
    """For 1, 4 and 8 rows. width: elements of a read."""
    teams = _teams(limits)
    outputs = 4 if N // (teams * 4) >= _ENOUGH else 2
    depth = min((2, 1), key=lambda depth: _vain(-(-K // (LANES * width)), depth))
    return [
        DenseFewRows(1, teams, outputs, depth),
        DenseFewRows(4, teams, outputs, depth),
        DenseFewRows(8, teams, outputs, 1),
    ]


def many_rows(limits: Limits) -> list[ManyRows]:
    """For up to 16, up to 64, and more rows."""
    slices = 2 if limits.invocations >= 2 * TEAM else 1
    return [
        ManyRows(16, 2, 4, slices, 16),
        ManyRows(32, 4, 4, slices, 64),
        ManyRows(64, 4, 8, 1),
    ]


def _teams(limits: Limits) -> int:
    """Of 32 invocations, in a workgroup that is as large as it may be."""
    return 8 if limits.invocations >= 8 * LANES else 4


def _vain(tiles: int, chunk: int) -> int:
    """How much of the last chunk lies beyond the tiles, in sixteenths of the tiles, rounded."""
    return round(16 * (-tiles % chunk) / tiles)
