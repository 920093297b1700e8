"""The CPU kernels on Arm: what instructions they are made of, and what they compute under QEMU."""

from __future__ import annotations

import functools
import secrets
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mlcawq.build.cpu_target import level_target
from tests.tir_kernels.arm import ArmKernel, instructions, missing_programs
from tests.tir_kernels.kernels import poisoned, relative_error
from tests.tir_kernels.test_linears import quantized
from tir_kernels import dispatch, reference
from tir_kernels._tvm import PrimFunc, Target
from tir_kernels.layouts import AUTOAWQ, BLOCKED
from tir_kernels.levels import levels_of

LEVELS = {level.name: level_target(level) for level in levels_of("aarch64")}
# The first 64-bit processor of Arm's has neither dot products nor arithmetic in float16.
CPUS = {"armv8": "cortex-a53", "dotprod": "max"}
PRODUCTS = {"armv8": "smull", "dotprod": "sdot"}
K, N, GROUP = 128, 72, 64

needs_qemu = pytest.mark.skipif(bool(missing_programs()), reason=f"no {missing_programs()}")


def linear(target: Target, layout: str) -> PrimFunc:
    return dispatch.w4a16_linear(target, K, N, GROUP, layout=layout)


@functools.cache
def code_of(level: str, layout: str) -> Counter[str]:
    return instructions(linear(LEVELS[level], layout), LEVELS[level])


@pytest.mark.parametrize("level", LEVELS)
def test_integer_products_are_the_level_s_own(level: str) -> None:
    found = code_of(level, BLOCKED)
    assert found[PRODUCTS[level]] > 0
    assert not any(found[other] for name, other in PRODUCTS.items() if name != level)


@pytest.mark.parametrize("layout", [AUTOAWQ, BLOCKED])
@pytest.mark.parametrize("level", LEVELS)
def test_vectors_and_float16_are_the_processor_s(level: str, layout: str) -> None:
    found = code_of(level, layout)
    assert found["fcvtl"] > 0  # four float16 at once
    assert found["prfm"] > 0
    assert not any("hf" in name for name in found if name.startswith("bl "))  # __extendhfsf2


@needs_qemu
@pytest.mark.slow
@pytest.mark.parametrize("layout", [AUTOAWQ, BLOCKED])
@pytest.mark.parametrize("level", LEVELS)
def test_linears(level: str, layout: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed := secrets.randbits(32))
    kernel = ArmKernel(linear(LEVELS[level], layout), LEVELS[level], CPUS[level], tmp_path)
    stock = quantized(rng, K, N, GROUP)
    weights = reference.block(*stock) if layout == BLOCKED else stock
    for m in (1, 2, 5, 17):
        x = rng.standard_normal((m, K)).astype(np.float16)
        out = poisoned((m, N), "float16")
        kernel(x, *weights, out)
        error = relative_error(out, reference.w4a16_linear(x, *stock))
        assert error < 1e-3, (m, error, seed)


@needs_qemu
@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_dense_linear(level: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed := secrets.randbits(32))
    function = dispatch.dense_linear(LEVELS[level], K, N, out_dtype="float32")
    kernel = ArmKernel(function, LEVELS[level], CPUS[level], tmp_path)
    weight = rng.standard_normal((N, K)).astype(np.float16)
    for m in (1, 3, 9):
        x = rng.standard_normal((m, K)).astype(np.float16)
        out = poisoned((m, N), "float32")
        kernel(x, weight, out)
        expected = x.astype(np.float64) @ weight.astype(np.float64).T
        assert relative_error(out, expected) < 1e-6, (m, seed)
