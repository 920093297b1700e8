"""How a kernel for many rows uses shared memory: stages, sums that warps hand over, the output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from tir_kernels.cuda.epilogue import Epilogue
from tir_kernels.cuda.staging import Rows
from tir_kernels.cuda.store_tile import TileStore
from tir_kernels.cuda.tile import ManyRows


class Staged(Protocol):
    """What a weight wants of shared memory, in bytes: for each stage, and besides them."""

    @property
    def schedule(self) -> ManyRows: ...
    @property
    def bytes(self) -> int: ...
    @property
    def scratch(self) -> int: ...


@dataclass(frozen=True)
class SharedPlan:
    """Of a kernel that multiplies activations [m, K] with `weight`."""

    weight: Staged
    K: int
    epilogue: Epilogue
    asynchronous: bool

    @property
    def rows(self) -> Rows:
        """The activations of a stage, which come first in it."""
        schedule = self.weight.schedule
        return Rows(schedule.tokens, schedule.warps_k, schedule.threads, self.K)

    @property
    def store(self) -> TileStore:
        """The last step, which has all shared memory to itself."""
        return TileStore(self.weight.schedule, self.epilogue)

    @property
    def stages(self) -> int:
        """Without cp.async, what is not in shared memory is in registers, and two will do."""
        return self.weight.schedule.stages if self.asynchronous else 2

    @property
    def ahead(self) -> int:
        """Rounds from asking for one to multiplying it."""
        return self.stages - (2 if self.weight.schedule.wgmma else 1)

    @property
    def alignment(self) -> int:
        """Of stages: places in a row are found by exclusive or with an address; wgmma does so in
        eight rows."""
        return 1024 if self.weight.schedule.wgmma else 128

    @property
    def stage(self) -> int:
        """Bytes of a stage."""
        return _aligned(self.rows.bytes + self.weight.bytes, self.alignment)

    @property
    def scratch_at(self) -> int:
        """Where the weight's own part begins."""
        return self.stages * self.stage

    @property
    def sums(self) -> int:
        """Bytes of the sums that warps along the inputs hand over, a fragment after the other."""
        schedule = self.weight.schedule
        return (schedule.warps_k - 1) * schedule.tokens * schedule.outputs * 4

    @property
    def bytes(self) -> int:
        """Of a block."""
        staged = self.scratch_at + self.weight.scratch
        return max(self.alignment + max(staged, self.sums), _aligned(self.store.bytes, 16))


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
