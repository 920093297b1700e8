"""The end of a kernel for few rows: add up what its warps have, offset, activate, store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tir_kernels._tvm import T
from tir_kernels.layouts import TILE_N

# Floats between two tokens' sums in shared memory: lanes that write at once (four pairs of tokens,
# eight outputs) meet 32 different banks.
PITCH = 20


@dataclass(frozen=True)
class Epilogue:
    """What becomes of the sums of N outputs; they are stored as `out_dtype`.

    silu: outputs g and g + 8 of a stripe of 16 are gate and up, and silu(gate) * up is stored.
    """

    N: int
    out_dtype: str
    silu: bool = False

    @property
    def stored(self) -> int:
        """Outputs that are stored."""
        return self.N // 2 if self.silu else self.N


@dataclass(frozen=True)
class Sums:
    """Sums of `warps` warps, each of `stripes` stripes of 16 outputs by `rows` tokens.

    They meet in shared memory, from float `at` on.
    """

    rows: int
    warps: int
    stripes: int
    at: int = 0

    @property
    def floats(self) -> int:
        """What they take there."""
        return self.warps * self.stripes * self.rows * PITCH

    def place(self, warp: Any, stripe: Any, token: Any) -> Any:
        """Where the 16 sums of a token are."""
        return self.at + ((warp * self.stripes + stripe) * self.rows + token) * PITCH

    def find(self, output: Any) -> tuple[Any, Any]:
        """The stripe, and the row of its 16, of an output of the block."""
        return output // TILE_N, output % TILE_N


@T.inline
def reduce_and_store(epilogue, sums, m, first, warp, lane, shared, total, bias, out):
    """Add the fragments total[stripes, tokens / 8, 4] of all warps, store what is inside out.

    first: the first stored output. bias: [N], in the order of a stock weight's outputs, or None.
    """
    for s in T.unroll(sums.stripes):
        for e in T.unroll(-(-sums.rows // 8)):
            for i in T.unroll(4):
                token = T.meta_var(e * 8 + lane % 4 * 2 + i % 2)
                if token < sums.rows:
                    shared[sums.place(warp, s, token) + lane // 4 + i // 2 * 8] = total[s, e, i]
    T.tvm_storage_sync("shared")
    width = T.meta_var(sums.stripes * (TILE_N // 2 if epilogue.silu else TILE_N))
    for j in T.unroll(-(-sums.rows * width // (sums.warps * 32))):
        index = T.meta_var(warp * 32 + lane + j * sums.warps * 32)
        token = T.meta_var(index // width)
        column = T.meta_var(first + index % width)
        gate_row = T.meta_var((index % width // 8, index % 8))
        place = T.meta_var(gate_row if epilogue.silu else sums.find(index % width))
        # The bound of rows is for threads beyond the last sum.
        if T.And(token < T.min(m, sums.rows), column < out.shape[1]):
            value = T.alloc_buffer((2,), "float32", scope="local")
            for h in T.unroll(2 if epilogue.silu else 1):
                value[h] = T.float32(0)
                if bias is not None:
                    value[h] = T.Cast("float32", bias[column + h * (epilogue.N // 2)])
                for w in T.unroll(sums.warps):
                    value[h] = value[h] + shared[sums.place(w, place[0], token) + place[1] + h * 8]
            if epilogue.silu:
                value[0] = value[0] / (T.float32(1) + T.exp(-value[0])) * value[1]
            out[token, column] = T.Cast(epilogue.out_dtype, value[0])
