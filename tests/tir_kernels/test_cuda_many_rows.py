"""CUDA's kernels for more than 16 rows against the numpy reference, on emulated GPUs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.tir_kernels.backends import Random
from tests.tir_kernels.cuda_emulator import emulate, why_not
from tests.tir_kernels.cuda_linears import check_dense, check_w4a16, target_of
from tests.tir_kernels.kernels import poisoned
from tir_kernels.cuda import schedule as cuda_schedule
from tir_kernels.cuda.dense import dense_function
from tir_kernels.cuda.dense_weight import DenseWeight
from tir_kernels.cuda.epilogue import Epilogue
from tir_kernels.cuda.many_rows import many_rows
from tir_kernels.cuda.many_rows_entry import dense_problem, many_rows_kernels, w4a16_problem
from tir_kernels.cuda.many_rows_schedule import (
    MANY_ROW_LIMITS,
    Problem,
    candidates,
    many_rows_schedule,
    resident_blocks,
)
from tir_kernels.cuda.tile import ManyRows
from tir_kernels.layouts import AUTOAWQ, TILED, LinearShape

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

ROWS = (17, 31, 64, 127)
ARCHS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90")


def w4a16(
    shape: LinearShape, layout: str, dtype: str, arch: str, schedule: ManyRows | None = None
) -> Any:
    """What `check_w4a16` takes: kernels as chosen, or one with a given schedule."""
    capability = int(arch[3:])

    def multiply(epilogue: Epilogue) -> Any:
        problem = w4a16_problem(shape, dtype, epilogue, layout)
        if schedule is None:
            return many_rows_kernels(capability, problem, dtype)
        return kernel_of(problem, dtype, capability, schedule)

    return multiply


def kernel_of(problem: Problem, dtype: str, capability: int, schedule: ManyRows) -> Any:
    return many_rows(
        problem.make(schedule),
        problem.K,
        dtype,
        problem.epilogue,
        resident=resident_blocks(capability, problem, schedule),
        asynchronous=capability >= 80,
    )


@pytest.mark.parametrize("rows", [ROWS, pytest.param((512,), marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("K", "N", "group", "layout", "dtype", "bias", "silu", "arch"),
    [
        # K ends within a tile, N within a stripe.
        (416, 88, 32, TILED, "float16", True, False, "sm_80"),
        (448, 144, 64, TILED, "bfloat16", True, True, "sm_90"),
        (384, 136, 128, TILED, "float16", True, False, "sm_90"),
        (320, 72, 32, AUTOAWQ, "float16", True, False, "sm_80"),
        (384, 160, 128, AUTOAWQ, "bfloat16", False, False, "sm_90"),
    ],
)
def test_w4a16_as_chosen(
    rng: Random,
    rows: tuple[int, ...],
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
    multiply = w4a16(shape, layout, dtype, arch)
    check_w4a16(
        rng, shape, multiply, rows, layout=layout, dtype=dtype, bias=bias, silu=silu, arch=arch
    )


@pytest.mark.parametrize(
    ("K", "N", "group", "layout", "schedule", "rows"),
    [
        # A split that gets nothing: nine tiles for four splits of three.
        (576, 72, 64, TILED, ManyRows(16, 64, 2, stages=2, blocks=8), (9, 17)),
        # Warps along all three ways, each split ending within a round.
        (832, 136, 64, TILED, ManyRows(32, 128, 2, 2, 2, stages=3, blocks=8), (20, 50)),
        # Four tiles a round, more splits than the rows leave room for.
        (2112, 64, 32, TILED, ManyRows(32, 64, 1, 1, 4, stages=3, blocks=3), (30, 70)),
        # More stages than rounds; all warps along the tokens.
        (128, 64, 128, TILED, ManyRows(128, 64, 1, 4, 1, stages=8), (129,)),
        (640, 64, 128, AUTOAWQ, ManyRows(64, 64, 2, 1, 2, stages=4, blocks=4), (50, 65)),
        # Words of a row are not aligned.
        (96, 136, 32, AUTOAWQ, ManyRows(32, 128, 4, 1, 1, stages=3), (33,)),
        (1088, 128, 64, AUTOAWQ, ManyRows(64, 256, 4, 2, 1, stages=2, blocks=4), (40,)),
    ],
)
def test_schedules(
    rng: Random,
    K: int,
    N: int,
    group: int,
    layout: str,
    schedule: ManyRows,
    rows: tuple[int, ...],
) -> None:
    shape = LinearShape(K, N, group)
    multiply = w4a16(shape, layout, "float16", "sm_80", schedule)
    check_w4a16(rng, shape, multiply, rows, layout=layout, bias=True)


@pytest.mark.parametrize(
    ("K", "N", "group", "dtype", "schedule", "rows"),
    [
        (544, 80, 32, "float16", ManyRows(64, 64, 4, stages=3, wgmma=True), (70,)),
        (704, 264, 64, "bfloat16", ManyRows(128, 256, 8, stages=4, blocks=4, wgmma=True), (100,)),
        (256, 136, 128, "float16", ManyRows(256, 128, 8, stages=5, wgmma=True), (300,)),
        (1024, 128, 128, "float16", ManyRows(16, 128, 8, stages=9, blocks=4, wgmma=True), (17,)),
    ],
)
def test_wgmma(
    rng: Random,
    K: int,
    N: int,
    group: int,
    dtype: str,
    schedule: ManyRows,
    rows: tuple[int, ...],
) -> None:
    shape = LinearShape(K, N, group)
    multiply = w4a16(shape, TILED, dtype, "sm_90", schedule)
    check_w4a16(rng, shape, multiply, rows, dtype=dtype, silu=N % 16 == 0, arch="sm_90")


@pytest.mark.parametrize("layout", [TILED, AUTOAWQ])
def test_before_sm_80(rng: Random, layout: str) -> None:
    shape = LinearShape(288, 136, 32)
    multiply = w4a16(shape, layout, "float16", "sm_75")
    check_w4a16(rng, shape, multiply, (17, 64, 100), layout=layout, bias=True, arch="sm_75")


@pytest.mark.parametrize(
    ("K", "N", "dtype", "out_dtype", "bias", "arch"),
    [
        (520, 264, "float16", "float32", False, "sm_80"),
        (264, 136, "bfloat16", "bfloat16", True, "sm_90"),
        (101, 37, "float16", "float16", True, "sm_80"),  # no load is aligned
        (100, 72, "float16", "float32", False, "sm_75"),
    ],
)
def test_dense_as_chosen(
    rng: Random, K: int, N: int, dtype: str, out_dtype: str, bias: bool, arch: str
) -> None:
    def multiply(epilogue: Epilogue) -> Any:
        return many_rows_kernels(int(arch[3:]), dense_problem(K, N, epilogue), dtype)

    check_dense(rng, K, N, multiply, (17, 33, 127), dtype, out_dtype, bias, arch)


def test_dense_with_splits(rng: Random) -> None:
    K, N, schedule = 1000, 72, ManyRows(32, 64, 2, 1, 2, stages=3, blocks=6)

    def multiply(epilogue: Epilogue) -> Any:
        return kernel_of(dense_problem(K, N, epilogue), "float16", 80, schedule)

    check_dense(rng, K, N, multiply, (20, 45), "float16", "float16", True)


def test_splits_give_the_same_every_time(rng: Random) -> None:
    # Blocks come in random order; with sums added as they come, the last bits would differ.
    K, N, m = 2048, 64, 32
    epilogue = Epilogue(N, "float32")
    schedule = ManyRows(32, 64, 2, stages=3, blocks=8)
    problem = dense_problem(K, N, epilogue)
    assert schedule.most_splits(K, N) == 8
    function = dense_function(
        K, "float16", False, epilogue, kernel_of(problem, "float16", 80, schedule)
    )
    kernel = emulate(function, target_of("sm_80"))
    x, weight = rng.floats(m, K, dtype=np.float16), rng.floats(N, K, dtype=np.float16)
    results = []
    for _ in range(4):
        results.append(poisoned((m, N), "float32"))
        kernel(x, weight, results[-1])
    assert all((result == results[0]).all() for result in results), rng.seed


def test_any_number_of_rows(rng: Random) -> None:
    # Through the entry, across the limits of its kernels.
    shape = LinearShape(128, 40, 64)

    def multiply(epilogue: Epilogue) -> Any:
        return many_rows_kernels(80, w4a16_problem(shape, "float16", epilogue, TILED), "float16")

    check_w4a16(rng, shape, multiply, (16, 32, 33, 65, 128, 130))


def test_sums_are_fp32() -> None:
    # In fp16, 4096 ones added to 2048 stay 2048.
    K, N, m = 4096, 8, 20
    epilogue = Epilogue(N, "float32")
    multiply = kernel_of(dense_problem(K, N, epilogue), "float16", 80, ManyRows(32, 64, 2))
    kernel = emulate(dense_function(K, "float16", False, epilogue, multiply), target_of("sm_80"))
    x, weight, out = (
        np.ones((m, K), "float16"),
        np.ones((N, K), "float16"),
        poisoned((m, N), "float32"),
    )
    kernel(x, weight, out)
    assert (out == K).all()


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kind", [TILED, AUTOAWQ, "dense"])
def test_the_rule_has_a_schedule_for_every_shape(rng: Random, arch: str, kind: str) -> None:
    capability = int(arch[3:])
    for _ in range(10):
        K, N = 32 * int(rng.integers(1, 500)), 8 * int(rng.integers(1, 20000))
        epilogue = Epilogue(N, "float16")
        if kind == "dense":
            problem = dense_problem(K + int(rng.integers(0, 32)), N + 1, epilogue)
        else:
            group = 128 if K % 128 == 0 else 32
            problem = w4a16_problem(LinearShape(K, N, group), "float16", epilogue, kind)
        for limit in (*MANY_ROW_LIMITS, None):
            schedule = many_rows_schedule(capability, problem, limit)
            assert limit is None or schedule.tokens == limit, (problem.key(limit), rng.seed)
            assert schedule.wgmma <= (capability == 90), (problem.key(limit), rng.seed)


def test_measured_schedules_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = dense_problem(512, 512, Epilogue(512, "float16"))
    chosen = many_rows_schedule(80, problem, 32)
    other = next(one for one in candidates(80, problem, 32) if one != chosen)
    measured = {"sm_80": {"many_rows": {problem.key(32): vars(other)}}}
    monkeypatch.setattr(cuda_schedule, "_measured", lambda: measured)
    assert many_rows_schedule(80, problem, 32) == other
    assert many_rows_schedule(80, problem, 64).tokens == 64
    assert many_rows_schedule(90, problem, 32) != other


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"outputs": 72}, "multiples of 16"),
        ({"stages": 1}, "stages"),
        ({"warps_n": 1}, "evenly"),
        ({"blocks": 4096}, "workspace"),
        ({"wgmma": True}, "groups of four warps"),
    ],
)
def test_schedules_that_cannot_be(fields: dict[str, Any], complaint: str) -> None:
    good: dict[str, Any] = {"tokens": 64, "outputs": 64, "warps_n": 2, "stages": 3}
    ManyRows(**good)
    with pytest.raises(ValueError, match=complaint):
        ManyRows(**{**good, **fields})


def test_weights_refuse_schedules_that_they_cannot_serve() -> None:
    thin = ManyRows(32, 256, 2, stages=3)
    problem = w4a16_problem(LinearShape(64, 256, 32), "float16", Epilogue(256, "float16"), TILED)
    with pytest.raises(ValueError, match="too few threads"):
        problem.make(thin)
    assert DenseWeight(64, 256, thin).bytes == 256 * 128
