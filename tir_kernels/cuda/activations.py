"""Activations of the kernels for few rows, in shared memory, as operands of `mma`.

Every warp has a part of the inputs, and a place of its own with room for some rounds of `inputs`
inputs each. Rounds are copied asynchronously, 16 bytes a lane. A round lies token by token, 16
bytes further apart than its inputs take, so that the eight tokens that ldmatrix reads at once meet
all banks. Inputs beyond the warp's part are zeros. Tokens beyond m are the last one again: a column
of a product depends on no other column, and nobody stores them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tir_kernels._tvm import T
from tir_kernels.cuda import device

CHUNK = 8  # 16-bit elements in the 16 bytes that a lane copies


@dataclass(frozen=True)
class Activations:
    """Of x [m, K], m <= rows; a warp has room for `stages` rounds of `inputs` (64, 128 or 256).

    exact: the rounds of all warps are whole.
    """

    K: int
    rows: int
    inputs: int
    stages: int
    exact: bool

    @property
    def eights(self) -> int:
        """Operands: eight tokens each."""
        return -(-self.rows // 8)

    @property
    def pitch(self) -> int:
        """Bytes from token to token."""
        return (self.inputs + CHUNK) * 2

    @property
    def stage(self) -> int:
        """Bytes of a round."""
        return self.rows * self.pitch

    @property
    def chunks(self) -> int:
        """Chunks of a token in a round; a divisor of 32."""
        return self.inputs // CHUNK

    def seek(self) -> Any:
        """An inline (state, m, x, shared, warp, lane, first, last): go to inputs first..last-1.

        state: a uint64[1] and int32[2], where the lane reads next and which input that is; a
        uint32[1], where it writes; a uint32[eights], its rows of matrices.
        """

        @T.inline
        def seek(state, m, x, shared, warp, lane, first, last):
            source, k, place, matrices = state
            own = T.meta_var(warp * self.stages * self.stage)
            k[0] = first + lane % self.chunks * CHUNK
            k[1] = last
            source[0] = device.global_cursor(T.address_of(x[lane // self.chunks, k[0]]))
            chunk = T.meta_var(lane // self.chunks * self.pitch + lane % self.chunks * 16)
            place[0] = device.shared_cursor(device.shared_address(shared, (own + chunk) // 4))
            for e in T.unroll(self.eights):
                row = T.meta_var(T.min(e * 8 + lane % 8, m - 1) * self.pitch + lane // 8 * 16)
                matrices[e] = device.shared_cursor(device.shared_address(shared, (own + row) // 4))

        return seek

    def copy(self) -> Any:
        """An inline (state, m, lane, stage): ask for the next round, to go to a stage."""
        at_once = 32 // self.chunks

        @T.inline
        def copy(state, m, lane, stage):
            source, k, place = state[:3]
            for j in T.serial(T.ceildiv(m, at_once), annotations={"disable_unroll": True}):
                if lane // self.chunks + j * at_once < m:
                    device.copy_async_at(
                        place[0] + T.Cast("uint32", stage * self.stage + j * at_once * self.pitch),
                        0,
                        source[0] + T.Cast("uint64", j * at_once * self.K * 2),
                        0,
                        16 if self.exact else T.if_then_else(k[0] < k[1], 16, 0),
                    )
            device.commit_copies()
            source[0] = source[0] + T.uint64(self.inputs * 2)
            k[0] = k[0] + self.inputs

        return copy

    def load(self) -> Any:
        """An inline (state, b, stage, step): operands b[eights, 4] of two steps of 16 inputs."""

        @T.inline
        def load(state, b, stage, step):
            matrices = T.meta_var(state[3])
            for e in T.unroll(self.eights):
                device.load_matrices_at(
                    device.registers(b, e, 0),
                    matrices[e] + T.Cast("uint32", stage * self.stage),
                    step * 32,
                )

        return load
