"""The CUDA emulator itself: what it computes, and that it sees the mistakes it is there to see."""

from __future__ import annotations

import numpy as np
import pytest

from tests.tir_kernels.cuda_emulator import run_source

REVERSE = """
extern "C" __global__ void __launch_bounds__(64) reverse(float* x, float* y) {
  __shared__ alignas(16) float tile[64];
  tile[threadIdx.x] = x[threadIdx.x];
  %s
  y[threadIdx.x] = tile[63 - threadIdx.x];
}
"""


def test_threads_meet_at_barriers() -> None:
    x, y = np.arange(64, dtype=np.float32), np.full(64, np.nan, np.float32)
    run_source(REVERSE % "__syncthreads();", "reverse", (1,), (64,), x, y)
    np.testing.assert_array_equal(y, x[::-1])


def test_a_missing_barrier_is_a_race() -> None:
    x = np.arange(64, dtype=np.float32)
    with pytest.raises(RuntimeError, match="race in shared memory"):
        run_source(REVERSE % "", "reverse", (1,), (64,), x, x.copy())


def test_a_barrier_that_not_all_reach_is_an_error() -> None:
    source = """
extern "C" __global__ void stuck() {
  if (threadIdx.x < 32) __syncthreads();
}
"""
    with pytest.raises(RuntimeError, match=r"32 have returned, 32 wait in __syncthreads"):
        run_source(source, "stuck", (1,), (64,))
