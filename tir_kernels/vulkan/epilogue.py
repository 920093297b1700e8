"""The end of a kernel: sums are added up, offset, activated, rounded and stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tir_kernels._tvm import T


@dataclass(frozen=True)
class Epilogue:
    """What becomes of the sums of N outputs.

    silu: outputs g and g + 8 of every 16 are gate and up, and silu(gate) * up is stored.
    """

    N: int
    out_dtype: str
    bias: bool
    silu: bool = False

    @property
    def width(self) -> int:
        """Columns of out."""
        return self.columns(self.N)

    def columns(self, outputs: Any) -> Any:
        """Columns of out that come of that many outputs."""
        return outputs // 2 if self.silu else outputs

    def linear(self, bias: Any, column: Any, total: Any) -> Any:
        """What to store for a sum."""
        return T.Cast(self.out_dtype, self._offset(bias, column, total))

    def silu_multiply(self, bias: Any, column: Any, gate: Any, up: Any) -> Any:
        """What to store in column `column` of out for the sums of gate and up."""
        gate = self._offset(bias, column, gate)
        up = self._offset(bias, column + self.N // 2, up)
        # WGSL does not promise infinities: the argument of exp stays where it has none.
        sigmoid = T.float32(1) + T.exp(T.min(-gate, T.float32(80)))
        return T.Cast(self.out_dtype, gate / sigmoid * up)

    def _offset(self, bias: Any, column: Any, total: Any) -> Any:
        return total + T.Cast("float32", bias[column]) if self.bias else total


def store_pair(epilogue: Epilogue):
    """An inline builder (row, first, second, pair [2], bias, out) for two outputs of a row.

    It stores what lies inside of N: pair[0] to column `first` and pair[1] to `second`, or, for
    silu, what becomes of both to column `first`.
    """
    width = epilogue.width

    @T.inline
    def store(row, first, second, pair, bias, out):
        if epilogue.silu:
            if first < width:
                out[row, first] = epilogue.silu_multiply(bias, first, pair[0], pair[1])
        else:
            if first < width:
                out[row, first] = epilogue.linear(bias, first, pair[0])
            if second < width:
                out[row, second] = epilogue.linear(bias, second, pair[1])

    return store


@dataclass(frozen=True)
class Sums:
    """How a workgroup of `invocations` holds the sums of its outputs for `rows` rows in parts.

    Outputs come in pairs. An invocation has partial sums of `pairs` of them for each row, and
    `members` invocations have parts of the same: pair p of the workgroup is the sum over c of the
    pair slot(p) of invocation member(p, c). Its outputs are columns(p), counted from the first of
    the workgroup; for silu the first of them is that of the result.
    """

    rows: int
    invocations: int
    pairs: int
    members: int
    slot: Callable[[Any], Any]
    member: Callable[[Any, Any], Any]
    columns: Callable[[Any], tuple[Any, Any]]

    @property
    def row_pairs(self) -> int:
        """Of outputs."""
        return self.invocations * self.pairs // self.members

    @property
    def row_bytes(self) -> int:
        """Workgroup memory for a row. The pitch is odd, so that slots do not share their banks."""
        return 8 * self.pairs * (self.invocations + 1)


def reduce_and_store(sums: Sums, epilogue: Epilogue, workgroup_bytes: int):
    """An inline builder (m, first, thread, total [rows * pairs * 2], bias, out).

    It adds up the parts and stores what is inside of out [m, width]. first: the column of out where
    the workgroup begins. workgroup_bytes: how much may be used.
    """
    rows, pairs, members = sums.rows, sums.pairs, sums.members
    at_once = min(rows, workgroup_bytes // sums.row_bytes)
    if not at_once:
        raise ValueError(f"{workgroup_bytes} bytes of workgroup memory are too few for sums")
    pitch = sums.invocations + 1
    unrolled = 4 if members % 4 == 0 else 1
    store = store_pair(epilogue)

    @T.inline
    def reduce(m, first, thread, total, bias, out):
        # Not of the activations' type: TVM reuses memory for types that differ in lanes only, and
        # then declares it as one of them.
        partial = T.alloc_buffer((at_once * pairs * pitch,), "float32x2", scope="shared")
        pair = T.alloc_buffer((2,), "float32", scope="local")
        for start in T.unroll(-(-rows // at_once)):
            row = T.meta_var(start * at_once)
            if start > 0:
                T.tvm_storage_sync("shared")
            for r in T.unroll(at_once):
                for p in T.unroll(pairs):
                    if row + r < rows:
                        partial[(r * pairs + p) * pitch + thread] = total[
                            T.ramp(((row + r) * pairs + p) * 2, 1, 2)
                        ]
            T.tvm_storage_sync("shared")
            for j in T.unroll(-(-at_once * sums.row_pairs // sums.invocations)):
                index = T.meta_var(thread + j * sums.invocations)
                r = T.meta_var(index // sums.row_pairs)
                p = T.meta_var(index % sums.row_pairs)
                if T.And(r < at_once, row + r < m):
                    pair[T.ramp(0, 1, 2)] = T.Broadcast(T.float32(0), 2)
                    for c in range(members // unrolled):
                        for u in T.unroll(unrolled):
                            pair[T.ramp(0, 1, 2)] = (
                                pair[T.ramp(0, 1, 2)]
                                + partial[
                                    (r * pairs + sums.slot(p)) * pitch
                                    + sums.member(p, c * unrolled + u)
                                ]
                            )
                    columns = T.meta_var(sums.columns(p))
                    store(row + r, first + columns[0], first + columns[1], pair, bias, out)

    return reduce
