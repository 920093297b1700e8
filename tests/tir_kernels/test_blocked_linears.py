"""Linears on the blocked layout against the numpy reference, on every instruction set here."""

from __future__ import annotations

import secrets

import numpy as np
import pytest

from tests.tir_kernels.kernels import (
    Kernel,
    in_eight_bits,
    narrow_target,
    poisoned,
    relative_error,
    targets_that_run_here,
)
from tests.tir_kernels.test_linears import quantized
from tir_kernels import dispatch, reference
from tir_kernels._tvm import Target
from tir_kernels.cpu.blocked import blocked_linear
from tir_kernels.cpu.blocked_tiles import blocks_at_a_time
from tir_kernels.layouts import BLOCKED, LinearShape

LEVELS = targets_that_run_here()
ROWS = (1, 2, 3, 4, 5, 8, 9, 17, 31, 100, 513)
TOLERANCE = {"float16": 1e-3, "float32": 2e-4}


def check(
    target: Target, K: int, N: int, group: int, dtype: str, bias: bool, bits: int, rows=ROWS
) -> None:
    seed = secrets.randbits(32)
    rng = np.random.default_rng(seed)
    shape = LinearShape(K, N, group)
    kernel = Kernel(blocked_linear(target, shape, dtype, dtype, bias, act_bits=bits), target)
    stock = quantized(rng, K, N, group)
    weights = reference.block(*stock)
    offset = rng.standard_normal(N).astype(dtype) if bias else None
    for m in rows:
        x = rng.standard_normal((m, K)).astype(dtype)
        out = poisoned((m, N), dtype)
        kernel(x, *weights, *([offset] if bias else []), out)
        # In 16 bits the activations keep more than float16 does; in 8 bits they do not.
        exact = x if bits == 16 else rounded(x, group)
        error = relative_error(out, reference.w4a16_linear(exact, *stock, offset))
        assert error < TOLERANCE[dtype], (m, error, seed)


def rounded(x: np.ndarray, group: int) -> np.ndarray:
    """What 8 bits leave of activations, [m, K] in float64."""
    integers, scales = in_eight_bits(x, group)
    return (integers * scales.astype(np.float64)[..., None]).reshape(x.shape)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("K", "N", "group", "dtype", "bias", "bits"),
    [
        (128, 40, 32, "float16", True, 16),
        (384, 128, 128, "float32", False, 16),
        (192, 8, 64, "float16", False, 8),
    ],
)
def test_against_the_reference(
    level: str, K: int, N: int, group: int, dtype: str, bias: bool, bits: int
) -> None:
    check(LEVELS[level], K, N, group, dtype, bias, bits)


@pytest.mark.skipif("amx" not in LEVELS, reason="no AMX here")
def test_so_many_outputs_that_a_thread_takes_more_at_a_time() -> None:
    N = 2056  # the last of its blocks are fewer, and half of the last one is missing
    assert blocks_at_a_time(LinearShape(256, N, 128).blocks) > blocks_at_a_time(8)
    for bits in (8, 16):
        check(LEVELS["amx"], 256, N, 128, "float16", True, bits, (17, 70))


def test_without_any_instruction_for_it() -> None:
    check(narrow_target(), 128, 24, 64, "float16", True, 16, (1, 3, 9))


@pytest.mark.parametrize("level", LEVELS)
def test_extremes_do_not_overflow(level: str) -> None:
    """Every product at its largest: weights of 15 with zero points of 0, and the reverse."""
    K, N, group = 256, 16, 128
    target = LEVELS[level]
    kernel = Kernel(dispatch.w4a16_linear(target, K, N, group, layout=BLOCKED), target)
    scales = np.full((K // group, N), 2.0**-8, np.float16)
    for q, z in ((15, 0), (0, 15)):
        stock = (
            reference.pack(np.full((K, N), q, np.uint8)),
            reference.pack(np.full((K // group, N), z, np.uint8)),
            scales,
        )
        for sign in (1, -1):
            for m in (1, 4, 20):
                x = np.full((m, K), 1.7 * sign, np.float16)
                out = poisoned((m, N), "float16")
                kernel(x, *reference.block(*stock), out)
                assert relative_error(out, reference.w4a16_linear(x, *stock)) < 1e-3


@pytest.mark.parametrize("level", LEVELS)
def test_what_is_not_a_number_is_not_hidden(level: str) -> None:
    K, N = 128, 16
    target = LEVELS[level]
    kernel = Kernel(dispatch.w4a16_linear(target, K, N, 32, layout=BLOCKED), target)
    weights = reference.block(*quantized(np.random.default_rng(), K, N, 32))
    for bad in (np.nan, np.inf, -np.inf):
        x = np.ones((20, K), np.float16)
        x[3, 77] = bad
        out = np.zeros((20, N), np.float16)
        kernel(x, *weights, out)
        assert not np.isfinite(out[3]).any()
        assert np.isfinite(np.delete(out, 3, 0)).all()


def test_zeros_give_zeros() -> None:
    target = LEVELS[max(LEVELS)]
    kernel = Kernel(dispatch.w4a16_linear(target, 64, 16, 32, layout=BLOCKED), target)
    weights = reference.block(*quantized(np.random.default_rng(), 64, 16, 32))
    out = poisoned((2, 16), "float16")
    kernel(np.zeros((2, 64), np.float16), *weights, out)
    assert not out.any()
