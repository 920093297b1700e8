"""CUDA's linears on emulated GPUs against the numpy reference."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from tests.tir_kernels.backends import Random
from tests.tir_kernels.cuda_emulator import emulate
from tests.tir_kernels.kernels import poisoned, relative_error
from tir_kernels import reference
from tir_kernels._tvm import Target
from tir_kernels.cuda.dense import dense_function
from tir_kernels.cuda.epilogue import Epilogue
from tir_kernels.cuda.w4a16 import w4a16_function
from tir_kernels.layouts import TILED, LinearShape

DTYPES: dict[str, Any] = {
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float32": np.float32,
}
TOLERANCE = {"float16": 2e-3, "bfloat16": 8e-3, "float32": 1e-5}


def target_of(arch: str) -> Target:
    return Target({"kind": "cuda", "arch": arch}, host={"kind": "llvm"})


def check_w4a16(
    rng: Random,
    shape: LinearShape,
    multiply: Any,
    rows: tuple[int, ...],
    *,
    layout: str = TILED,
    dtype: str = "float16",
    out_dtype: str | None = None,
    bias: bool = False,
    silu: bool = False,
    arch: str = "sm_80",
) -> None:
    """Compare a function with the reference, for random weights and every m of `rows`.

    multiply: Epilogue -> the inline (m, x, parameters, bias, out) that it consists of.
    """
    K, N, G = shape.K, shape.N, shape.group_size
    epilogue = Epilogue(N, out_dtype or dtype, silu)
    function = w4a16_function(shape, layout, dtype, bias, epilogue, multiply(epilogue))
    kernel = emulate(function, target_of(arch))
    stock = (
        rng.integers(-(2**31), 2**31, (K, N // 8), dtype=np.int64).astype(np.int32),
        rng.integers(-(2**31), 2**31, (K // G, N // 8), dtype=np.int64).astype(np.int32),
        (rng.random((K // G, N)) * 0.02 + 0.001).astype(np.float16),
    )
    weights = reference.tile(*stock, silu) if layout == TILED else stock
    offset = rng.floats(N, dtype=DTYPES[dtype]) if bias else None
    for m in rows:
        x = rng.floats(m, K, dtype=DTYPES[dtype])
        out = poisoned((m, epilogue.stored), DTYPES[epilogue.out_dtype])
        kernel(x, *weights, *([offset] if bias else []), out)
        expected = reference.w4a16_linear(x, *stock, offset)
        if silu:
            expected = reference.silu_multiply(expected)
        error = relative_error(out, expected)
        assert error < TOLERANCE[epilogue.out_dtype], (m, error, rng.seed)


def check_dense(
    rng: Random,
    K: int,
    N: int,
    multiply: Any,
    rows: tuple[int, ...],
    dtype: str,
    out_dtype: str,
    bias: bool,
    arch: str = "sm_80",
) -> None:
    """The same for unquantized weights [N, K]."""
    epilogue = Epilogue(N, out_dtype)
    kernel = emulate(dense_function(K, dtype, bias, epilogue, multiply(epilogue)), target_of(arch))
    weight = rng.floats(N, K, dtype=DTYPES[dtype])
    offset = rng.floats(N, dtype=DTYPES[dtype]) if bias else None
    for m in rows:
        x = rng.floats(m, K, dtype=DTYPES[dtype])
        out = poisoned((m, N), DTYPES[out_dtype])
        kernel(x, weight, *([offset] if bias else []), out)
        error = relative_error(out, reference.dense_linear(x, weight, offset))
        assert error < TOLERANCE[out_dtype], (m, error, rng.seed)
