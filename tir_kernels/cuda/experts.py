"""4-bit experts on the stock AutoAWQ layout: blocks of a linear's kernels, each at an expert.

One token's rows, and few rows in general, have blocks of their own, as a linear has for one row.
More rows go in tiles that belong to one expert (`tir_kernels.experts`): of 8, as many as an `mma`
takes at no cost, and larger ones the more rows an expert has on average.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tir_kernels._tvm import PrimFunc, T, Target
from tir_kernels.cuda.by_rows import by_rows
from tir_kernels.cuda.epilogue import Epilogue
from tir_kernels.cuda.few_rows_schedule import StockFewRows, stock_few_rows_schedule
from tir_kernels.cuda.many_rows import many_rows_block
from tir_kernels.cuda.many_rows_entry import w4a16_problem
from tir_kernels.cuda.many_rows_schedule import resident_blocks, rule
from tir_kernels.cuda.schedule import capability_for
from tir_kernels.cuda.stock_few_rows import stock_few_rows_block
from tir_kernels.experts import clipped, find_expert, part, row_number, tile_number, tiles_of
from tir_kernels.layouts import AUTOAWQ, ExpertsShape
from tir_kernels.memo import memoized

ALONE = 8  # rows up to which each has blocks of its own
FEW, MORE = 8, 32  # rows of a tile, and of an expert on average, up to which the tile serves


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

    Raises ValueError for what the architecture does not have, and for scales that are not float16.
    """
    kernels = _kernels(target, shape, act_dtype, out_dtype, scale_dtype)
    qweight_shape, qzeros_shape, scales_shape = (s for s, _ in shape.parameters().values())

    @T.inline
    def find(r, chosen, found):
        found[0] = clipped(chosen[0, r], shape.experts)

    single_rows = kernels.single_rows(find, shared=x_rows == 1)

    @T.prim_func(private=True, s_tir=True)
    def decode(
        x: T.Buffer((x_rows, shape.K), act_dtype),
        chosen: T.Buffer((1, rows), "int32"),
        qweight: T.Buffer(qweight_shape, "int32"),
        qzeros: T.Buffer(qzeros_shape, "int32"),
        scales: T.Buffer(scales_shape, "float16"),
        out: T.Buffer((rows, shape.N), out_dtype),
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

    Raises ValueError for what the architecture does not have, and for scales that are not float16.
    """
    kernels = _kernels(target, shape, act_dtype, out_dtype, scale_dtype)
    qweight_shape, qzeros_shape, scales_shape = (s for s, _ in shape.parameters().values())
    multiply = by_rows(
        (ALONE, shape.experts * FEW, shape.experts * MORE),
        (
            kernels.single_rows(find_expert(shape.experts, row_number), shared=False),
            kernels.few_rows(),
            kernels.many_rows(MORE),
        ),
        kernels.many_rows(None),
    )

    @T.prim_func(private=True, s_tir=True)
    def grouped(
        x_handle: T.handle,
        indptr: T.Buffer((experts + 1,), "int32"),
        qweight: T.Buffer(qweight_shape, "int32"),
        qzeros: T.Buffer(qzeros_shape, "int32"),
        scales: T.Buffer(scales_shape, "float16"),
        out_handle: T.handle,
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        m = T.int64()
        x = T.match_buffer(x_handle, (m, shape.K), act_dtype)
        out = T.match_buffer(out_handle, (m, shape.N), out_dtype)
        multiply(T.Cast("int32", m), x, (indptr, qweight, qzeros, scales), None, out)

    return grouped


def _kernels(
    target: Target,
    shape: ExpertsShape,
    act_dtype: str,
    out_dtype: str,
    scale_dtype: str,
) -> _Kernels:
    capability = capability_for(target, act_dtype)
    if scale_dtype != "float16":
        raise ValueError(f"scales of CUDA kernels are float16, not {scale_dtype}")
    return _Kernels(capability, shape, act_dtype, Epilogue(shape.N, out_dtype))


@dataclass(frozen=True)
class _Kernels:
    """Inline builders (m, x, (routing, qweight, qzeros, scales), bias, out) for E experts.

    routing tells the experts of rows; bias is None.
    """

    capability: int
    shape: ExpertsShape
    act_dtype: str
    epilogue: Epilogue

    def single_rows(self, find: Any, *, shared: bool) -> Any:
        """Rows one by one. find: an inline builder (row, routing, found). shared: x is one row."""
        shape = self.shape
        schedule = stock_few_rows_schedule(self.capability, shape, 1)
        run = self._run(self._few_rows_block(schedule))

        @T.inline
        def kernel(m, x, parameters, bias, out):
            for block in T.thread_binding(schedule.blocks(shape), thread="blockIdx.x"):
                for r in T.thread_binding(m, thread="blockIdx.y"):
                    for warp in T.thread_binding(schedule.warps, thread="threadIdx.y"):
                        for lane in T.thread_binding(32, thread="threadIdx.x"):
                            found = T.alloc_buffer((1,), "int32", scope="local")
                            find(r, parameters[0], found)
                            expert: T.let[T.int32] = found[0]
                            place = T.meta_var((block, warp, lane))
                            run(place, expert, 0 if shared else r, r, 1, x, parameters, out)

        return kernel

    def few_rows(self) -> Any:
        """Rows sorted by expert, in tiles of as many as an `mma` takes."""
        shape = self.shape
        schedule = stock_few_rows_schedule(self.capability, shape, FEW)
        run = self._run_tile(self._few_rows_block(schedule), FEW)

        @T.inline
        def kernel(m, x, parameters, bias, out):
            for block in T.thread_binding(schedule.blocks(shape), thread="blockIdx.x"):
                for number in T.thread_binding(
                    tiles_of(m, self.shape.experts, FEW), thread="blockIdx.y"
                ):
                    for warp in T.thread_binding(schedule.warps, thread="threadIdx.y"):
                        for lane in T.thread_binding(32, thread="threadIdx.x"):
                            run((block, warp, lane), number, x, parameters, out)

        return kernel

    def many_rows(self, limit: int | None) -> Any:
        """Rows sorted by expert, in tiles of `limit` or, for None, of the best size for many."""
        shape, experts = self.shape, self.shape.experts
        problem = w4a16_problem(shape, self.act_dtype, self.epilogue, AUTOAWQ)
        # All experts together are as many outputs, so there are blocks enough without splitting K.
        all_experts = replace(problem, N=experts * shape.N)
        schedule = replace(rule(self.capability, all_experts, limit), blocks=0)
        resident = resident_blocks(self.capability, problem, schedule)
        run = self._run_tile(self._many_rows_block(problem.make(schedule)), schedule.tokens)
        blocks = -(-shape.N // schedule.outputs)

        @T.inline
        def kernel(m, x, parameters, bias, out):
            # Tiles first: blocks that run at the same time share weights.
            for number in T.thread_binding(
                tiles_of(m, experts, schedule.tokens), thread="blockIdx.x"
            ):
                for block in T.thread_binding(blocks, thread="blockIdx.y"):
                    for warp in T.thread_binding(schedule.warps, thread="threadIdx.y"):
                        for lane in T.thread_binding(32, thread="threadIdx.x"):
                            with T.attr(0, "tirx.launch_bounds_min_blocks_per_sm", resident):
                                run((block, warp, lane), number, x, parameters, out)

        return kernel

    def _few_rows_block(self, schedule: StockFewRows) -> Any:
        body = stock_few_rows_block(self.shape, self.act_dtype, schedule, self.epilogue)

        @T.inline
        def run(place, m, x, parameters, out):
            block, warp, lane = T.meta_var(place)
            body(m, x, parameters, None, out, block, warp, lane)

        return run

    def _many_rows_block(self, weight: Any) -> Any:
        body = many_rows_block(
            weight, self.shape.K, self.act_dtype, self.epilogue, asynchronous=self.capability >= 80
        )

        @T.inline
        def run(place, m, x, parameters, out):
            block, warp, lane = T.meta_var(place)
            body(m, x, parameters, None, out, 0, block, 0, warp, lane)

        return run

    def _run_tile(self, block: Any, tile: int) -> Any:
        """An inline builder (place, number, x, parameters, out): the block, for the rows of tile
        `number` if there are any.
        """
        first_number = tile_number(tile)
        find, run = find_expert(self.shape.experts, first_number), self._run(block)

        @T.inline
        def run_tile(place, number, x, parameters, out):
            indptr = T.meta_var(parameters[0])
            found = T.alloc_buffer((1,), "int32", scope="local")
            find(number, indptr, found)
            expert: T.let[T.int32] = found[0]
            first: T.let[T.int32] = indptr[expert] + (number - first_number(indptr, expert)) * tile
            rows: T.let[T.int32] = T.min(indptr[expert + 1] - first, tile)
            if rows > 0:
                run(place, expert, first, first, rows, x, parameters, out)

        return run_tile

    def _run(self, block: Any) -> Any:
        """An inline builder (place, expert, x_row, out_row, m, x, parameters, out): the block at a
        place, for m rows of an expert from x_row and out_row on.
        """
        K, N, words, groups = self.shape.K, self.shape.N, self.shape.words, self.shape.groups

        @T.inline
        def run(place, expert, x_row, out_row, m, x, parameters, out):
            _, qweight, qzeros, scales = T.meta_var(parameters)
            own_qweight = part(qweight, expert * (K * words), (K, words))
            own_qzeros = part(qzeros, expert * (groups * words), (groups, words))
            own_scales = part(scales, expert * (groups * N), (groups, N))
            own_x = part(x, x_row * K, (m, K))
            own_out = part(out, out_row * N, (m, N))
            own = T.meta_var((own_qweight, own_qzeros, own_scales))
            block(place, m, own_x, own, own_out)

        return run
