"""Quantized and dense linears against the numpy reference, for every path through m."""

from __future__ import annotations

import secrets

import numpy as np
import pytest

from tests.tir_kernels.kernels import HOST, Kernel, narrow_target, poisoned, relative_error
from tir_kernels import dispatch, reference
from tir_kernels._tvm import Target

ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 64, 127, 512)
TOLERANCE = {"float16": 2e-3, "float32": 2e-5}


def quantized(rng: np.random.Generator, K: int, N: int, group: int) -> tuple[np.ndarray, ...]:
    words = rng.integers(-(2**31), 2**31, (K, N // 8), dtype=np.int64).astype(np.int32)
    zeros = rng.integers(-(2**31), 2**31, (K // group, N // 8), dtype=np.int64).astype(np.int32)
    scales = (rng.random((K // group, N)) * 0.02 + 0.001).astype(np.float16)
    return words, zeros, scales


@pytest.mark.parametrize(
    ("K", "N", "group", "dtype", "bias"),
    [
        (96, 24, 32, "float16", False),
        (64, 8, 64, "float16", True),
        (256, 8 * 37, 64, "float16", True),
        (128, 520, 32, "float32", False),
        (384, 1024, 128, "float16", False),
    ],
)
def test_w4a16(K: int, N: int, group: int, dtype: str, bias: bool) -> None:
    _check_w4a16(HOST, K, N, group, dtype, bias, ROWS)


def test_w4a16_with_narrow_vectors() -> None:
    _check_w4a16(narrow_target(), 192, 104, 64, "float16", True, (1, 3, 8, 9, 33))


def _check_w4a16(
    target: Target, K: int, N: int, group: int, dtype: str, bias: bool, rows: tuple[int, ...]
) -> None:
    seed = secrets.randbits(32)
    rng = np.random.default_rng(seed)
    kernel = Kernel(dispatch.w4a16_linear(target, K, N, group, dtype, bias), target)
    weights = quantized(rng, K, N, group)
    offset = rng.standard_normal(N).astype(dtype) if bias else None
    for m in rows:
        x = rng.standard_normal((m, K)).astype(dtype)
        out = poisoned((m, N), dtype)
        kernel(x, *weights, *([offset] if bias else []), out)
        expected = reference.w4a16_linear(x, *weights, offset)
        error = relative_error(out, expected)
        assert error < TOLERANCE[dtype], (m, error, seed)


@pytest.mark.parametrize(
    ("K", "N", "dtype", "out_dtype", "bias"),
    [
        (128, 264, "float16", "float32", False),
        (100, 37, "float16", "float16", True),
        (6, 3, "float32", "float32", True),
        (256, 64, "float32", "float32", False),
    ],
)
def test_dense(K: int, N: int, dtype: str, out_dtype: str, bias: bool) -> None:
    seed = secrets.randbits(32)
    rng = np.random.default_rng(seed)
    kernel = Kernel(dispatch.dense_linear(HOST, K, N, dtype, bias, out_dtype))
    weight = rng.standard_normal((N, K)).astype(dtype)
    offset = rng.standard_normal(N).astype(dtype) if bias else None
    for m in (1, 2, 3, 4, 5, 7, 8, 17, 64):
        x = rng.standard_normal((m, K)).astype(dtype)
        out = poisoned((m, N), out_dtype)
        kernel(x, weight, *([offset] if bias else []), out)
        error = relative_error(out, reference.dense_linear(x, weight, offset))
        assert error < TOLERANCE[out_dtype], (m, error, seed)


def test_sums_are_fp32() -> None:
    # In fp16, 4096 ones added to 2048 stay 2048.
    K = 4096
    kernel = Kernel(dispatch.dense_linear(HOST, K, 8, "float16", False, "float32"))
    out = poisoned((1, 8), "float32")
    kernel(np.ones((1, K), np.float16), np.ones((8, K), np.float16), out)
    assert (out == K).all()


def test_equal_arguments_give_the_same_function() -> None:
    one = dispatch.w4a16_linear(HOST, 64, 8, 32)
    assert dispatch.w4a16_linear(HOST, 64, 8, 32) is one
    assert dispatch.w4a16_linear(HOST, 64, 16, 32) is not one


def test_refusals() -> None:
    with pytest.raises(NotImplementedError, match="metal"):
        dispatch.w4a16_linear(Target("metal"), 64, 8, 32)
    with pytest.raises(ValueError, match="autoawq"):
        dispatch.w4a16_linear(HOST, 64, 16, 32, layout="n16k64")
    with pytest.raises(ValueError, match="silu"):
        dispatch.w4a16_linear(HOST, 64, 16, 32, silu=True)
    with pytest.raises(ValueError, match="bfloat16"):
        dispatch.w4a16_linear(HOST, 64, 8, 32, "bfloat16")
    with pytest.raises(ValueError, match="group size"):
        dispatch.w4a16_linear(HOST, 64, 8, 16)
