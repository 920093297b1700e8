"""Reading rows of activations and unquantized weights as fp32, in vectors.

WGSL has no vectors of eight, so sixteen bytes of float16 are read as four words and taken apart
with unpack2x16float. (A bitcast of a word to two float16 is wrong in Mesa 22's software driver.)
A read comes in two steps, so that kernels can ask for values long before they use
them: `fetch` puts what memory has into registers, `convert` makes fp32 of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tir_kernels._tvm import T, Target


def widest_read(target: Target) -> int:
    """Elements that a read of float16 may get: `unpack2x16float` is a function of WGSL."""
    return 8 if target.kind.name == "webgpu" else 4


@dataclass(frozen=True)
class Reader:
    """How rows of K elements of `dtype` are read.

    tiled: in the order of the layout n16k64, where a read at k, k % 16 in (0, 2, 4, 6), gets the
    elements k, k + 1, k + 8, k + 9; else a read at k gets `width` neighbours, and k is a multiple
    of that. Beyond K, `fetch` gets zeros. most: bounds the width (`widest_read`).
    """

    K: int
    dtype: str
    tiled: bool = False
    most: int = 8

    def __post_init__(self) -> None:
        if self.tiled and self.K % 16:
            raise ValueError(f"rows of {self.K} elements do not fit the tiled layout")

    @property
    def width(self) -> int:
        """Elements of a read: 8 or 4."""
        neighbours = not self.tiled and self.dtype == "float16" and self.K % 8 == 0
        return 8 if neighbours and self.most == 8 else 4

    @property
    def fours(self) -> int:
        """Vectors of four fp32 that a read makes."""
        return self.width // 4

    @property
    def _lanes(self) -> int:
        """Elements of `dtype` that a load gets."""
        if self.tiled:
            return 2
        return self.width if self.K % 4 == 0 else 1

    @property
    def register(self) -> str:
        """dtype of the registers between `fetch` and `convert`."""
        return "uint32" if self.width == 8 else self.dtype

    @property
    def view(self) -> str:
        """dtype under which a kernel sees the tensor."""
        if self.width == 8:
            return "uint32x4"
        return self.dtype if self._lanes == 1 else f"{self.dtype}x{self._lanes}"

    def view_shape(self, rows: Any) -> tuple[Any, int]:
        """Shape of the view of a tensor [rows, K]."""
        return rows, self.K // self._lanes

    def fetch(self, exact: bool, zeros: bool = True) -> Any:
        """An inline builder (view, row, k, registers, n): the n-th four registers get a read.

        exact: nothing is asked for beyond K. zeros: what is beyond K is zero, else anything that
        the row has.
        """
        K, lanes = self.K, self._lanes
        loads = 2 if self.tiled else 4 if lanes == 1 else 1
        stride = 8 if self.tiled else 1
        register, length = self.register, 4 // loads
        zero = T.Cast(register, T.float32(0))
        nothing = zero if length == 1 else T.Broadcast(zero, length)

        def load(view: Any, row: Any, k: Any) -> Any:
            if exact:
                return view[row, k // lanes]
            if not zeros:
                return view[row, T.min(k // lanes, K // lanes - 1)]
            return T.if_then_else(k < K, view[row, k // lanes], nothing)

        @T.inline
        def fetch(view, row, k, registers, n):
            for i in T.unroll(loads):
                if length == 1:
                    registers[n * 4 + i] = load(view, row, k + i * stride)
                else:
                    registers[T.ramp(n * 4 + i * length, 1, length)] = load(
                        view, row, k + i * stride
                    )

        return fetch

    def convert(self) -> Any:
        """An inline builder (registers, n, values): all values of the n-th read, fp32 [width]."""
        width, tiled = self.width, self.tiled

        @T.inline
        def convert(registers, n, values):
            if tiled:
                # In twos, as they were loaded: registers that are accessed in one way only are
                # declared as vectors, and loads of vectors stay whole.
                for i in T.unroll(2):
                    values[T.ramp(2 * i, 1, 2)] = T.Cast(
                        "float32x2", registers[T.ramp(n * 4 + 2 * i, 1, 2)]
                    )
            elif width == 8:
                for i in T.unroll(4):
                    values[T.ramp(2 * i, 1, 2)] = T.call_pure_extern(
                        "float32x2", "unpack2x16float", registers[n * 4 + i]
                    )
            else:
                values[T.ramp(0, 1, 4)] = T.Cast("float32x4", registers[T.ramp(n * 4, 1, 4)])

        return convert
