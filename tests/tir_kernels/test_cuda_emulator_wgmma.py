"""Hopper's wgmma on the CUDA emulator: layouts, when sums are there, and the fence it wants."""

from __future__ import annotations

import secrets

import numpy as np
import pytest

from tests.tir_kernels.cuda_emulator import run_source, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

WGMMA = """
extern "C" __global__ void multiply(unsigned short* a, unsigned short* b, float* d, int swizzle) {
  extern __shared__ __align__(1024) unsigned char tile[];
  const int bytes = 256 >> swizzle, t = threadIdx.x, lane = t % 32;
  // B [N, bytes / 2], 16 bytes at a time, each where the swizzle has it.
  for (int i = t; i < N * bytes / 16; i += 128) {
    int row = i / (bytes / 16), column = i % (bytes / 16);
    int place = row * bytes + 16 * (column ^ (row * bytes / 128 & (bytes / 16 - 1)));
    *(uint4*)(tile + place) = *(uint4*)(b + row * K + column * 8);
  }
  FENCE
  __syncthreads();
  float sums[N / 2];
  unsigned x[K / 16][4];
  emulator::wgmma_fence();
  for (int k = 0; k < bytes / 2; k += 16) {
    for (int r = 0; r < 4; ++r) {
      int row = t / 32 * 16 + lane / 4 + r % 2 * 8, column = k + lane % 4 * 2 + r / 2 * 8;
      x[STEP][r] = a[row * K + column] | a[row * K + column + 1] << 16;
    }
    unsigned long long matrix = (unsigned long long)swizzle << 62 |
        (unsigned long long)(8 * bytes >> 4) << 32 | (2 * k >> 4);
    emulator::wgmma(emulator::Element::kHalf, N, sums, x[STEP], matrix, k > 0);
  }
  emulator::wgmma_commit();
  WAIT
  for (int i = 0; i < N / 2; ++i) {
    int row = t / 32 * 16 + lane / 4 + i % 4 / 2 * 8;
    d[row * N + i / 4 * 8 + lane % 4 * 2 + i % 2] = sums[i];
  }
}
"""


def kernel(
    N: int,
    K: int,
    fence: str = "emulator::proxy_fence();",
    wait: str = "emulator::wgmma_wait(0);",
    step: str = "k / 16",
) -> str:
    parts = {"FENCE": fence, "WAIT": wait, "STEP": step}
    source = f"constexpr int N = {N}, K = {K};{WGMMA}"
    for name, text in parts.items():
        source = source.replace(name, text)
    return source


@pytest.mark.parametrize("swizzle", [1, 2, 3])
@pytest.mark.parametrize("wait", [True, False])
def test_wgmma(swizzle: int, wait: bool) -> None:
    N, K = 24, 128 >> swizzle
    source = kernel(N, K, wait="emulator::wgmma_wait(0);" if wait else "")
    seed = secrets.randbits(32)
    rng = np.random.default_rng(seed)
    a, b = (rng.standard_normal(shape).astype(np.float16) for shape in ((64, K), (N, K)))
    d = np.zeros((64, N), np.float32)
    run_source(
        source, "multiply", (1,), (128,), a.view(np.uint16), b.view(np.uint16), d, swizzle,
        dynamic_shared=N * 2 * K, arch="sm_90",
    )  # fmt: skip
    expected = a.astype(np.float64) @ b.astype(np.float64).T
    if wait:
        np.testing.assert_allclose(d, expected, rtol=1e-4, atol=1e-4, err_msg=f"seed {seed}")
    else:
        assert np.isnan(d).all()


def test_wgmma_wants_its_operands_handed_over() -> None:
    source = kernel(8, 64, fence="")
    x, d = np.zeros((64, 64), np.uint16), np.zeros((64, 8), np.float32)
    with pytest.raises(RuntimeError, match=r"fence\.proxy\.async"):
        run_source(source, "multiply", (1,), (128,), x, x, d, 1, dynamic_shared=1024, arch="sm_90")


def test_wgmma_reads_its_registers_until_the_wait() -> None:
    a = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)
    b, d = np.zeros((8, 64), np.uint16), np.zeros((64, 8), np.float32)
    with pytest.raises(RuntimeError, match="before the wait"):
        run_source(
            kernel(8, 64, step="0"), "multiply", (1,), (128,), a, b, d, 1,
            dynamic_shared=1024, arch="sm_90",
        )  # fmt: skip
