"""4-bit experts on the stock AutoAWQ layout: workgroups of a linear's kernels, each at an expert.

One token's rows, and few rows in general, have workgroups of their own, as a linear has for one
row: where there are more experts than rows there is little to share. More rows go in blocks that
belong to one expert (`tir_kernels.experts`), larger ones the more rows an expert has on average.

Weights that are larger than a storage binding are handed over some experts at a time, one launch
each, in which workgroups of other experts have nothing to do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tir_kernels._tvm import PrimFunc, T, Target
from tir_kernels.experts import clipped, find_expert, part, row_number, tile_number, tiles_of
from tir_kernels.gpu.blocks import bytes_of
from tir_kernels.layouts import ExpertsShape
from tir_kernels.memo import memoized
from tir_kernels.vulkan import schedule
from tir_kernels.vulkan.epilogue import Epilogue
from tir_kernels.vulkan.launch import by_rows
from tir_kernels.vulkan.limits import Limits, limits_of, rows_in_binding, window_address
from tir_kernels.vulkan.many_rows import many_rows_workgroup
from tir_kernels.vulkan.reading import Reader, widest_read
from tir_kernels.vulkan.schedule import COLUMNS, TEAM, ManyRows, StockFewRows
from tir_kernels.vulkan.stages import stock_weights
from tir_kernels.vulkan.stock_few_rows import stock_few_rows_workgroup

ALONE = 8  # rows up to which each has workgroups of its own


@memoized
def w4a16_experts_decode(
    target: Target,
    shape: ExpertsShape,
    x_rows: int,
    rows: int,
    act_dtype: str,
    out_dtype: str,
    *,
    scale_dtype: str = "float16",
) -> PrimFunc:
    """(x [x_rows, K], chosen int32 [1, rows], qweight, qzeros, scales, out [rows, N]).

    Raises NotImplementedError where an expert is larger than a storage binding.
    """
    K, N, words, groups, experts = shape.K, shape.N, shape.words, shape.groups, shape.experts
    kernels = _Kernels(target, shape, act_dtype, out_dtype, scale_dtype)

    @T.inline
    def find(r, chosen, found):
        found[0] = clipped(chosen[0, r], experts)

    single_rows = kernels.single_rows(find, shared=x_rows == 1)

    @T.prim_func(private=True, s_tir=True)
    def decode(
        x: T.Buffer((x_rows, K), act_dtype),
        chosen: T.Buffer((1, rows), "int32"),
        qweight: T.Buffer((experts, K, words), "int32"),
        qzeros: T.Buffer((experts, groups, words), "int32"),
        scales: T.Buffer((experts, groups, N), scale_dtype),
        out: T.Buffer((rows, N), out_dtype),
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        single_rows(rows, x, (chosen, qweight, qzeros, scales), None, out)

    return decode


@memoized
def w4a16_experts_grouped(
    target: Target,
    shape: ExpertsShape,
    act_dtype: str,
    out_dtype: str,
    *,
    scale_dtype: str = "float16",
) -> PrimFunc:
    """(x [m, K], indptr int32 [experts + 1], qweight, qzeros, scales, out [m, N]).

    Raises NotImplementedError where an expert is larger than a storage binding.
    """
    K, N, words, groups, experts = shape.K, shape.N, shape.words, shape.groups, shape.experts
    kernels = _Kernels(target, shape, act_dtype, out_dtype, scale_dtype)
    limits = limits_of(target)
    find_row = find_expert(experts, row_number)
    _, few, _ = schedule.stock_few_rows(limits)
    *small, large = schedule.many_rows(limits)
    multiply = by_rows(
        [
            (ALONE, kernels.single_rows(find_row, shared=False)),
            (experts * few.rows // 2, kernels.few_rows(few)),
            *((experts * s.up_to, kernels.many_rows(s)) for s in small),
        ],
        kernels.many_rows(large),
    )

    @T.prim_func(private=True, s_tir=True)
    def grouped(
        x_handle: T.handle,
        indptr: T.Buffer((experts + 1,), "int32"),
        qweight: T.Buffer((experts, K, words), "int32"),
        qzeros: T.Buffer((experts, groups, words), "int32"),
        scales: T.Buffer((experts, groups, N), scale_dtype),
        out_handle: T.handle,
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        m = T.int64()
        x = T.match_buffer(x_handle, (m, K), act_dtype)
        out = T.match_buffer(out_handle, (m, N), out_dtype)
        multiply(T.Cast("int32", m), x, (indptr, qweight, qzeros, scales), None, out)

    return grouped


@dataclass(frozen=True)
class _Kernels:
    """Linears (see `launch`) of E experts. parameters: (routing, qweight, qzeros, scales), where
    routing tells the experts of rows; bias: None.
    """

    target: Target
    shape: ExpertsShape
    act_dtype: str
    out_dtype: str
    scale_dtype: str

    def single_rows(self, find: Any, *, shared: bool) -> Any:
        """Rows one by one. find: an inline builder (row, routing, found). shared: x is one row."""
        one, _, _ = schedule.stock_few_rows(self._limits)
        reader, workgroup = self._few_rows_workgroup(one)
        run = self._run(reader, workgroup)

        @T.inline
        def kernel(m, start, count, x_view, routing, operands, out):
            for block in T.thread_binding(-(-self.shape.words // one.words), thread="blockIdx.x"):
                for r in T.thread_binding(m, thread="blockIdx.y"):
                    for thread in T.thread_binding(one.invocations, thread="threadIdx.x"):
                        found = T.alloc_buffer((1,), "int32", scope="local")
                        find(r, routing, found)
                        expert: T.let[T.int32] = found[0] - start
                        if T.And(expert >= 0, expert < count):
                            place = T.meta_var((block, thread))
                            run(place, expert, 0 if shared else r, r, 1, x_view, operands, out)

        return self._launches(reader, kernel)

    def few_rows(self, schedule: StockFewRows) -> Any:
        """Rows sorted by expert, in blocks of few."""
        reader, workgroup = self._few_rows_workgroup(schedule)
        run = self._run_block(reader, workgroup, schedule.rows)
        blocks = -(-self.shape.words // schedule.words)

        @T.inline
        def kernel(m, start, count, x_view, indptr, operands, out):
            for block in T.thread_binding(blocks, thread="blockIdx.x"):
                for number in T.thread_binding(
                    tiles_of(m, self.shape.experts, schedule.rows), thread="blockIdx.y"
                ):
                    for thread in T.thread_binding(schedule.invocations, thread="threadIdx.x"):
                        place = T.meta_var((block, thread))
                        run(place, number, start, count, x_view, indptr, operands, out)

        return self._launches(reader, kernel)

    def many_rows(self, schedule: ManyRows) -> Any:
        """Rows sorted by expert, in larger blocks."""
        reader = Reader(self.shape.K, self.act_dtype, most=widest_read(self.target))
        weights = stock_weights(self.shape)
        workgroup = many_rows_workgroup(reader, weights, schedule, self._epilogue)
        run = self._run_block(reader, workgroup, schedule.rows)
        blocks = -(-self.shape.N // COLUMNS)

        @T.inline
        def kernel(m, start, count, x_view, indptr, operands, out):
            for block in T.thread_binding(blocks, thread="blockIdx.x"):
                for number in T.thread_binding(
                    tiles_of(m, self.shape.experts, schedule.rows), thread="blockIdx.y"
                ):
                    for slice_ in T.thread_binding(schedule.slices, thread="threadIdx.y"):
                        for thread in T.thread_binding(TEAM, thread="threadIdx.x"):
                            place = T.meta_var((block, 0, slice_, thread))
                            run(place, number, start, count, x_view, indptr, operands, out)

        return self._launches(reader, kernel)

    @property
    def _limits(self) -> Limits:
        return limits_of(self.target)

    @property
    def _epilogue(self) -> Epilogue:
        return Epilogue(self.shape.N, self.out_dtype, bias=False)

    def _few_rows_workgroup(self, schedule: StockFewRows) -> tuple[Reader, Any]:
        reader = Reader(self.shape.K, self.act_dtype, most=4)
        return reader, stock_few_rows_workgroup(
            self.shape, reader, schedule, self._epilogue, self._limits
        )

    def _run_block(self, reader: Reader, workgroup: Any, tile: int) -> Any:
        """An inline builder (place, number, start, count, x_view, indptr, operands, out).

        It runs the workgroup for the rows of block `number`, if it has any and its expert is one of
        `count` from `start` on.
        """
        first_number = tile_number(tile)
        find, run = find_expert(self.shape.experts, first_number), self._run(reader, workgroup)

        @T.inline
        def run_block(place, number, start, count, x_view, indptr, operands, out):
            found = T.alloc_buffer((1,), "int32", scope="local")
            find(number, indptr, found)
            expert: T.let[T.int32] = found[0]
            first: T.let[T.int32] = indptr[expert] + (number - first_number(indptr, expert)) * tile
            rows: T.let[T.int32] = T.min(indptr[expert + 1] - first, tile)
            # By way of memory: TVM would find `start` in every index, and share what it makes of it
            # with the address of the launch's weights, out of its scope.
            found[0] = expert - start
            own: T.let[T.int32] = found[0]
            if T.And(rows > 0, T.And(own >= 0, own < count)):
                run(place, own, first, first, rows, x_view, operands, out)

        return run_block

    def _run(self, reader: Reader, workgroup: Any) -> Any:
        """An inline builder (place, expert, x_row, out_row, m, x_view, operands, out): the
        workgroup at a place, for an expert of the operands and m rows from x_row and out_row on.
        """
        K, N, words, groups = self.shape.K, self.shape.N, self.shape.words, self.shape.groups
        _, x_vectors = reader.view_shape(1)

        @T.inline
        def run(place, expert, x_row, out_row, m, x_view, operands, out):
            qweight, qzeros, scales = T.meta_var(operands)
            own_qweight = part(qweight, expert * (K * words), (K, words))
            own_qzeros = part(qzeros, expert * (groups * words), (groups, words))
            own_scales = part(scales, expert * (groups * N // 2), (groups, N // 2))
            own_x = part(x_view, x_row * x_vectors, (m, x_vectors))
            own_out = part(out, out_row * N, (m, N))
            own = T.meta_var((own_qweight, own_qzeros, own_scales))
            workgroup(place, m, words, 0, own_x, own, None, own_out)

        return run

    def _launches(self, reader: Reader, kernel: Any) -> Any:
        """The linear of a kernel (m, start, count, x_view, routing, operands, out) for `count`
        experts from `start` on, whose weights are the operands.
        """
        K, N, words, groups = self.shape.K, self.shape.N, self.shape.words, self.shape.groups
        sizes = (K * words * 4, groups * words * 4, groups * N * bytes_of(self.scale_dtype))
        whole = 256 // math.gcd(256, *sizes)
        at_once = rows_in_binding(self.target, self.shape.experts, *sizes, multiple=whole)
        launches = -(-self.shape.experts // at_once)
        address = T.address_of if launches == 1 else window_address

        @T.inline
        def linear(m, x, parameters, bias, out):
            routing, qweight, qzeros, scales = T.meta_var(parameters)
            x_view = T.decl_buffer(
                reader.view_shape(x.shape[0]), reader.view, data=T.address_of(x[0, 0])
            )
            for launch in range(launches):
                start = T.meta_var(launch * at_once)
                words_view = T.decl_buffer(
                    (at_once, K, words), "int32", data=address(qweight[start, 0, 0])
                )
                zeros_view = T.decl_buffer(
                    (at_once, groups, words), "int32", data=address(qzeros[start, 0, 0])
                )
                scales_view = T.decl_buffer(
                    (at_once, groups, N // 2),
                    f"{self.scale_dtype}x2",
                    data=address(scales[start, 0, 0]),
                )
                kernel(
                    m, start, T.min(at_once, self.shape.experts - start),
                    x_view, routing, (words_view, zeros_view, scales_view), out,
                )  # fmt: skip

        return linear
