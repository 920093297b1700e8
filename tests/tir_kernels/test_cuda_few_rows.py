"""CUDA's kernels for at most 16 rows against the numpy reference, on emulated GPUs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.tir_kernels.backends import Random
from tests.tir_kernels.cuda_emulator import counted_matrix_loads, emulate, why_not
from tests.tir_kernels.cuda_linears import check_dense, check_w4a16, target_of
from tests.tir_kernels.kernels import poisoned
from tir_kernels import dispatch
from tir_kernels.cuda.by_rows import by_rows
from tir_kernels.cuda.dense import dense_function
from tir_kernels.cuda.dense_few_rows import dense_few_rows
from tir_kernels.cuda.epilogue import Epilogue
from tir_kernels.cuda.few_rows_schedule import (
    ROW_LIMITS,
    DenseFewRows,
    StockFewRows,
    TiledFewRows,
    dense_few_rows_schedule,
    stock_few_rows_schedule,
    tiled_few_rows_schedule,
)
from tir_kernels.cuda.stock_few_rows import stock_few_rows
from tir_kernels.cuda.tiled_few_rows import tiled_few_rows
from tir_kernels.layouts import AUTOAWQ, TILED, LinearShape

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

ROWS = (*range(1, 10), 15, 16)


def chosen(schedule_of: Any, kernel_of: Any) -> Any:
    """As the entries do it: a kernel for each range of rows, scheduled by rule."""
    *most, last = (kernel_of(schedule_of(rows)) for rows in ROW_LIMITS)
    return by_rows(ROW_LIMITS[:-1], most, last)


@pytest.mark.parametrize(
    ("K", "N", "group", "layout", "dtype", "bias", "silu", "arch"),
    [
        (96, 24, 32, TILED, "float16", False, False, "sm_80"),
        (384, 40, 128, TILED, "bfloat16", True, False, "sm_90"),
        (192, 48, 64, TILED, "float16", True, True, "sm_86"),
        (160, 40, 32, AUTOAWQ, "float16", True, False, "sm_80"),
        (256, 24, 64, AUTOAWQ, "bfloat16", False, False, "sm_90"),
    ],
)
def test_w4a16_as_chosen(
    rng: Random,
    K: int,
    N: int,
    group: int,
    layout: str,
    dtype: str,
    bias: bool,
    silu: bool,
    arch: str,
) -> None:
    shape = LinearShape(K, N, group)
    capability = int(arch[3:])

    def multiply(epilogue: Epilogue) -> Any:
        if layout == TILED:
            return chosen(
                lambda rows: tiled_few_rows_schedule(capability, shape, rows),
                lambda schedule: tiled_few_rows(shape, dtype, schedule, epilogue),
            )
        return chosen(
            lambda rows: stock_few_rows_schedule(capability, shape, rows),
            lambda schedule: stock_few_rows(shape, dtype, schedule, epilogue),
        )

    check_w4a16(
        rng, shape, multiply, ROWS, layout=layout, dtype=dtype, bias=bias, silu=silu, arch=arch
    )


@pytest.mark.parametrize(
    ("K", "N", "group", "silu", "schedule"),
    [
        # Two units a block, rounds of which the last lacks a tile for some warps.
        (704, 88, 64, False, TiledFewRows(8, 3, 1, 2, blocks=3, resident=True)),
        # Stripes run out: the last unit of five is moved back; a ring of two.
        (1024, 152, 128, False, TiledFewRows(16, 2, 2, 2, blocks=5, resident=False)),
        # Half a tile at the end of K, one unit more in some blocks than in others.
        (416, 208, 32, False, TiledFewRows(16, 2, 4, 1, blocks=3, resident=True)),
        # A warp without tiles.
        (640, 16, 128, False, TiledFewRows(1, 4, 1, 4, blocks=1, resident=True)),
        # Some units a block with silu.
        (512, 256, 128, True, TiledFewRows(8, 4, 2, 2, blocks=3, resident=True)),
    ],
)
def test_tiled_schedules(
    rng: Random, K: int, N: int, group: int, silu: bool, schedule: TiledFewRows
) -> None:
    shape = LinearShape(K, N, group)
    with counted_matrix_loads() as loads:
        check_w4a16(
            rng,
            shape,
            lambda epilogue: tiled_few_rows(shape, "float16", schedule, epilogue),
            (1, schedule.rows // 2 + 1, schedule.rows),
            silu=silu,
        )
    assert loads.wavefronts == loads.matrices > 0, "tokens meet in the same banks"


@pytest.mark.parametrize(
    ("K", "N", "group", "schedule"),
    [
        (352, 176, 32, StockFewRows(8, 2, words=2)),
        (640, 136, 128, StockFewRows(16, 3, words=1)),
    ],
)
def test_stock_schedules(rng: Random, K: int, N: int, group: int, schedule: StockFewRows) -> None:
    shape = LinearShape(K, N, group)
    check_w4a16(
        rng,
        shape,
        lambda epilogue: stock_few_rows(shape, "float16", schedule, epilogue),
        (1, schedule.rows - 1, schedule.rows),
        layout=AUTOAWQ,
    )


@pytest.mark.parametrize("layout", [TILED, AUTOAWQ])
def test_before_sm_80(rng: Random, layout: str) -> None:
    shape = LinearShape(192, 40, 32)

    def multiply(epilogue: Epilogue) -> Any:
        if layout == TILED:
            schedule = tiled_few_rows_schedule(75, shape, 16)
            return tiled_few_rows(shape, "float16", schedule, epilogue)
        return stock_few_rows(shape, "float16", stock_few_rows_schedule(75, shape, 16), epilogue)

    check_w4a16(rng, shape, multiply, (2, 13), layout=layout, bias=True, arch="sm_75")


@pytest.mark.parametrize(
    ("K", "N", "dtype", "out_dtype", "bias"),
    [
        (256, 264, "float16", "float32", False),
        (104, 37, "bfloat16", "bfloat16", True),
        (101, 16, "float16", "float16", False),  # no load is aligned
    ],
)
def test_dense_as_chosen(
    rng: Random, K: int, N: int, dtype: str, out_dtype: str, bias: bool
) -> None:
    def multiply(epilogue: Epilogue) -> Any:
        return chosen(
            lambda rows: dense_few_rows_schedule(80, K, N, rows),
            lambda schedule: dense_few_rows(K, dtype, schedule, epilogue),
        )

    check_dense(rng, K, N, multiply, ROWS, dtype, out_dtype, bias)


def test_dense_with_some_rounds(rng: Random) -> None:
    schedule = DenseFewRows(8, warps=2, depth=2)

    def multiply(epilogue: Epilogue) -> Any:
        return dense_few_rows(424, "float16", schedule, epilogue)

    check_dense(rng, 424, 40, multiply, (1, 7, 8), "float16", "float16", True)


def test_sums_are_fp32() -> None:
    # In fp16, 4096 ones added to 2048 stay 2048.
    K = 4096
    multiply = dense_few_rows(
        K, "float16", dense_few_rows_schedule(80, K, 8, 8), Epilogue(8, "float32")
    )
    kernel = emulate(
        dense_function(K, "float16", False, Epilogue(8, "float32"), multiply), target_of("sm_80")
    )
    out = poisoned((1, 8), "float32")
    kernel(np.ones((1, K), np.float16), np.ones((8, K), np.float16), out)
    assert (out == K).all()


def test_refusals() -> None:
    with pytest.raises(ValueError, match="bfloat16"):
        dispatch.w4a16_linear(target_of("sm_75"), 64, 16, 32, "bfloat16", layout=TILED)
    with pytest.raises(ValueError, match="bfloat16"):
        dispatch.dense_linear(target_of("sm_75"), 64, 16, "bfloat16")
    with pytest.raises(ValueError, match="sm_70 is not supported"):
        dispatch.dense_linear(target_of("sm_70"), 64, 16)
    with pytest.raises(ValueError, match="scales"):
        dispatch.w4a16_linear(target_of("sm_80"), 64, 16, 32, scale_dtype="float32")
