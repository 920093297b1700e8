"""The CUDA emulator itself: what it computes, and that it sees the mistakes it is there to see."""

from __future__ import annotations

import importlib
import pkgutil
import re
import secrets

import numpy as np
import pytest

import tir_kernels.cuda
from tests.tir_kernels.cuda_emulator import counted_matrix_loads, run_source, why_not
from tir_kernels.cuda import device

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

REVERSE = """
extern "C" __global__ void __launch_bounds__(64) reverse(float* x, float* y) {
  __shared__ alignas(16) float tile[64];
  tile[threadIdx.x] = x[threadIdx.x];
  %s
  y[threadIdx.x] = tile[63 - threadIdx.x];
}
"""


def ramp(n: int) -> np.ndarray:
    return np.arange(n, dtype=np.float32)


def test_threads_meet_at_barriers() -> None:
    x, y = ramp(64), np.full(64, np.nan, np.float32)
    run_source(REVERSE % "__syncthreads();", "reverse", (1,), (64,), x, y)
    np.testing.assert_array_equal(y, x[::-1])


@pytest.mark.parametrize("instead", ["", "__syncwarp();"])
def test_a_missing_barrier_is_a_race(instead: str) -> None:
    with pytest.raises(RuntimeError, match="race in shared memory"):
        run_source(REVERSE % instead, "reverse", (1,), (64,), ramp(64), ramp(64))


@pytest.mark.parametrize("barrier", [True, False])
def test_writing_what_others_still_read_is_a_race(barrier: bool) -> None:
    source = """
extern "C" __global__ void twice(float* y) {
  __shared__ float tile[64];
  for (int i = 0; i < 2; ++i) {
    tile[threadIdx.x] = threadIdx.x;
    __syncthreads();
    y[threadIdx.x] = tile[threadIdx.x ^ 32];
    %s
  }
}
"""
    y = ramp(64)
    if barrier:
        run_source(source % "__syncthreads();", "twice", (1,), (64,), y)
        np.testing.assert_array_equal(y, np.arange(64) ^ 32)
    else:
        with pytest.raises(RuntimeError, match="race in shared memory"):
            run_source(source % "", "twice", (1,), (64,), y)


@pytest.mark.parametrize("barrier", ["__syncwarp();", ""])
def test_lanes_of_a_warp_are_ordered_by_syncwarp_alone(barrier: str) -> None:
    source = """
extern "C" __global__ void rotate(float* y) {
  extern __shared__ __align__(16) float tile[];
  tile[threadIdx.x] = threadIdx.x;
  %s
  y[threadIdx.x] = tile[threadIdx.x ^ 1];
}
"""
    y = ramp(64)
    if barrier:
        run_source(source % barrier, "rotate", (1,), (64,), y, dynamic_shared=256)
        np.testing.assert_array_equal(y, np.arange(64) ^ 1)
    else:
        with pytest.raises(RuntimeError, match="race"):
            run_source(source % barrier, "rotate", (1,), (64,), y, dynamic_shared=256)


def test_a_barrier_that_not_all_reach_is_an_error() -> None:
    source = """
extern "C" __global__ void stuck() {
  if (threadIdx.x < 32) __syncthreads();
}
"""
    with pytest.raises(RuntimeError, match=r"32 have returned, 32 wait in __syncthreads"):
        run_source(source, "stuck", (1,), (64,))


def test_a_shuffle_that_not_all_reach_is_an_error() -> None:
    source = """
extern "C" __global__ void stuck(int* y) {
  if (threadIdx.x %% 2) y[0] = __shfl_sync(0xffffffff, 1, 0);
  %s
}
"""
    with pytest.raises(RuntimeError, match=r"16 wait in __shfl_sync with mask ffffffff"):
        run_source(source % "", "stuck", (1,), (32,), np.zeros(1, np.int32))
    with pytest.raises(RuntimeError, match="different operations"):
        run_source(source % "else __syncwarp();", "stuck", (1,), (32,), np.zeros(1, np.int32))


def test_shared_memory_starts_as_nan() -> None:
    source = """
extern "C" __global__ void peek(float* y) {
  __shared__ float tile[2];
  extern __shared__ __align__(16) float dynamic[];
  y[0] = tile[1];
  y[1] = dynamic[1];
  tile[1] = dynamic[1] = 3.0f;
}
"""
    y = np.zeros(2, np.float32)
    run_source(source, "peek", (2,), (1,), y, dynamic_shared=8)
    assert np.isnan(y).all()


def test_dynamic_shared_memory_has_one_type_for_a_name() -> None:
    kernel = """
extern "C" __global__ void take_TYPE(TYPE* y) {
  extern __shared__ __align__(16) TYPE dynamic[];
  dynamic[0] = y[0];
}
"""
    source = kernel.replace("TYPE", "float") + kernel.replace("TYPE", "half")
    with pytest.raises(ValueError, match=r"float dynamic\[\]` and `half dynamic"):
        run_source(source, "take_float", (1,), (1,), ramp(1), dynamic_shared=16)


@pytest.mark.parametrize("alignment", [16, 128, 1024])
def test_shared_memory_is_as_aligned_as_declared(alignment: int) -> None:
    source = """
extern "C" __global__ void low_bits(int* y) {
  extern __shared__ __align__(ALIGNMENT) float dynamic[];
  y[0] = (int)((size_t)dynamic % min(2 * ALIGNMENT, 1024));
}
""".replace("ALIGNMENT", str(alignment))
    y = np.full(1, -1, np.int32)
    run_source(source, "low_bits", (1,), (1,), y, dynamic_shared=64)
    assert y[0] == (alignment if alignment < 1024 else 0)


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("x[66] = 0.0f;", "write of 4 bytes .* beyond every allocation"),
        ("x[0] = x[-1];", "read of 4 bytes .* beyond every allocation"),
        ("*(float4*)(x + 64) = make_float4(0, 0, 0, 0);", "beyond every allocation"),
        ("*(float4*)(x + 1) = make_float4(0, 0, 0, 0);", "misaligned"),
        ("dynamic[16] = 0.0f;", "at byte 64 of 64 of dynamic shared memory"),
        ("tile[n] = 0.0f;", "index 4194304 beyond the array"),
        ("float* y = tile; x[0] = y[n];", "beyond every allocation"),
        ("x[0] = 1 << n;", "shift by 4194304"),
    ],
)
def test_accesses_outside_of_memory_are_errors(statement: str, message: str) -> None:
    source = """
extern "C" __global__ void wild(float* x, int n) {
  __shared__ float tile[4];
  extern __shared__ __align__(16) float dynamic[];
  STATEMENT
}
""".replace("STATEMENT", statement)
    with pytest.raises(RuntimeError, match=message):
        run_source(source, "wild", (1,), (1,), ramp(66), 1 << 22, dynamic_shared=64)


COPY = (
    device.copy_async.source
    + device.commit_copies.source
    + "".join(device.wait_copies(n).source for n in (0, 1))
    + """
extern "C" __global__ void copy(float* x, float* y) {
  extern __shared__ __align__(16) float tile[];
  for (int i = 0; i < 2; ++i) {
    tir_copy_async(tile + 4 * threadIdx.x + 128 * i, x + 4 * threadIdx.x + 128 * i, 16 - 16 * i);
    tir_commit_copies();
  }
  WAIT
  __syncthreads();
  y[threadIdx.x] = tile[127 - threadIdx.x];
  y[threadIdx.x + 32] = tile[128 + threadIdx.x];
}
"""
)


def test_asynchronous_copies_land_at_the_wait_that_covers_them() -> None:
    x = ramp(256)
    for wait, landed in (("", (False, False)), ("1", (True, False)), ("0", (True, True))):
        y = np.zeros(64, np.float32)
        source = COPY.replace("WAIT", f"tir_wait_copies_{wait}();" if wait else "")
        run_source(source, "copy", (1,), (32,), x, y, dynamic_shared=1024)
        expected = x[127:95:-1] if landed[0] else np.full(32, np.nan)
        np.testing.assert_array_equal(y[:32], expected)
        # The second copy reads nothing and fills with zeros.
        np.testing.assert_array_equal(y[32:], np.zeros(32) if landed[1] else np.full(32, np.nan))


def test_copying_over_what_others_still_read_is_a_race() -> None:
    source = COPY.replace(
        "WAIT",
        "tir_wait_copies_0(); __syncthreads(); y[0] = tile[0];"
        "tir_copy_async(tile + 4 * threadIdx.x, x, 16);",
    )
    with pytest.raises(RuntimeError, match="race in shared memory"):
        run_source(source, "copy", (1,), (32,), ramp(256), ramp(64), dynamic_shared=1024)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_mma(dtype: str) -> None:
    # Fragments are gathered here by the figures of the PTX manual, written out once more.
    source = (
        device.mma(dtype).source
        + f"""
extern "C" __global__ void multiply(unsigned short* a, unsigned short* b, float* d) {{
  int g = threadIdx.x / 4, t = threadIdx.x % 4;
  unsigned x[4], y[2];
  float z[4];
  for (int r = 0; r < 4; ++r) {{
    int row = r == 0 || r == 2 ? g : g + 8, column = r < 2 ? 2 * t : 2 * t + 8;
    x[r] = a[row * 16 + column] | a[row * 16 + column + 1] << 16;
    z[r] = d[(r < 2 ? g : g + 8) * 8 + 2 * t + r % 2];
  }}
  for (int r = 0; r < 2; ++r) {{
    int row = 2 * t + 8 * r;
    y[r] = b[row * 8 + g] | b[(row + 1) * 8 + g] << 16;
  }}
  {device.mma(dtype).name}(z, x, y);
  for (int r = 0; r < 4; ++r) d[(r < 2 ? g : g + 8) * 8 + 2 * t + r % 2] = z[r];
}}
"""
    )
    seed = secrets.randbits(32)
    rng = np.random.default_rng(seed)
    a, b, d = (rng.standard_normal(s).astype(np.float32) for s in ((16, 16), (16, 8), (16, 8)))
    if dtype == "float16":
        a_bits, b_bits = a.astype(np.float16).view(np.uint16), b.astype(np.float16).view(np.uint16)
        a, b = a.astype(np.float16).astype(np.float64), b.astype(np.float16).astype(np.float64)
    else:
        a_bits, b_bits = (v.view(np.uint32) >> 16 for v in (a, b))
        a, b = ((v.astype(np.uint32) << 16).view(np.float32) for v in (a_bits, b_bits))
        a_bits, b_bits = a_bits.astype(np.uint16), b_bits.astype(np.uint16)
    expected = a.astype(np.float64) @ b.astype(np.float64) + d
    run_source(source, "multiply", (1,), (32,), a_bits, b_bits, d)
    np.testing.assert_allclose(d, expected, rtol=1e-5, atol=1e-5, err_msg=f"seed {seed}")


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [2, 4])
def test_ldmatrix(count: int, transposed: bool) -> None:
    load = device.ldmatrix(count, transposed)
    source = (
        load.source
        + f"""
extern "C" __global__ void fragments(unsigned* y) {{
  __shared__ alignas(16) unsigned short tile[256];
  for (int i = threadIdx.x; i < 256; i += 32) tile[i] = i;
  __syncthreads();
  {load.name}(y + 4 * threadIdx.x, tile + 8 * threadIdx.x);
}}
"""
    )
    y = np.zeros((32, 4), np.uint32)
    run_source(source, "fragments", (1,), (32,), y)
    for lane in range(32):
        for i in range(count):
            first = (lane // 4, 2 * (lane % 4))
            second = (lane // 4, 2 * (lane % 4) + 1)
            if transposed:
                first, second = first[::-1], second[::-1]
            low, high = (64 * i + 8 * r + c for r, c in (first, second))
            assert y[lane, i] == high << 16 | low


@pytest.mark.parametrize(("pitch", "wavefronts"), [(8, 1), (64, 8), (72, 1), (16, 2), (0, 1)])
def test_bank_conflicts_of_ldmatrix(pitch: int, wavefronts: int) -> None:
    load = device.ldmatrix(2)
    source = f"""{load.source}
extern "C" __global__ void fragments(unsigned* y) {{
  __shared__ alignas(128) unsigned short tile[16 * 72];
  for (int i = threadIdx.x; i < 16 * 72; i += 32) tile[i] = i;
  __syncthreads();
  {load.name}(y + 2 * threadIdx.x, tile + {pitch} * (threadIdx.x % 16));
}}
"""
    with counted_matrix_loads() as loads:
        run_source(source, "fragments", (3,), (32,), np.zeros((32, 2), np.uint32))
    assert (loads.matrices, loads.wavefronts) == (6, 6 * wavefronts)


def test_mma_needs_a_whole_warp() -> None:
    source = (
        device.mma("float16").source
        + """
extern "C" __global__ void alone() {
  unsigned a[4], b[2];
  float d[4];
  tir_mma_f16(d, a, b);
}
"""
    )
    with pytest.raises(RuntimeError, match="lacks lanes"):
        run_source(source, "alone", (1,), (16,))


def test_shuffles_and_votes() -> None:
    source = """
extern "C" __global__ void ask(int* y) {
  int lane = threadIdx.x, i = 0;
  y[32 * i++ + lane] = __shfl_sync(0xffffffff, lane, 5, 8);
  y[32 * i++ + lane] = __shfl_xor_sync(0xffffffff, lane, 3);
  y[32 * i++ + lane] = __shfl_up_sync(0xffffffff, lane, 2, 16);
  y[32 * i++ + lane] = __shfl_down_sync(0xffffffff, lane, 2, 16);
  y[32 * i++ + lane] = __ballot_sync(0xffffffff, lane % 3 == 0);
  y[32 * i++ + lane] = __any_sync(0xffffffff, lane == 7) * 2 + __all_sync(0xffffffff, lane < 31);
}
"""
    y = np.full((6, 32), -7, np.int32)
    run_source(source, "ask", (1,), (32,), y)
    lane = np.arange(32)
    np.testing.assert_array_equal(y[0], lane // 8 * 8 + 5)
    np.testing.assert_array_equal(y[1], lane ^ 3)
    np.testing.assert_array_equal(y[2], np.where(lane % 16 >= 2, lane - 2, lane))
    np.testing.assert_array_equal(y[3], np.where(lane % 16 < 14, lane + 2, lane))
    assert set(y[4].view(np.uint32)) == {sum(1 << i for i in range(0, 32, 3))}
    assert set(y[5]) == {2}


def test_atomics_of_many_threads_are_no_race() -> None:
    source = """
extern "C" __global__ void count(int* y) {
  __shared__ int n[1];
  if (threadIdx.x + threadIdx.y == 0) n[0] = 0;
  __syncthreads();
  atomicAdd(n, 1);
  __syncthreads();
  if (threadIdx.x + threadIdx.y == 0) atomicAdd(y, n[0]);
}
"""
    y = np.zeros(1, np.int32)
    run_source(source, "count", (3, 2), (32, 4), y)
    assert y[0] == 6 * 128


def test_half_and_bfloat16_are_rounded_after_every_operation() -> None:
    source = """
extern "C" __global__ void add(float* y) {
  half a = __float2half(2048.0f), b = __float2half(1.0f);
  y[0] = __half2float(a + b + b);
  nv_bfloat16 c = __float2bfloat16(256.0f), d = __float2bfloat16(1.0f);
  y[1] = __bfloat162float(c + d + d);
  y[2] = __bfloat162float(__float2bfloat16(1.00390625f));
  y[3] = __bfloat162float(__float2bfloat16(1.01171875f));
}
"""
    y = np.zeros(4, np.float32)
    run_source(source, "add", (1,), (1,), y)
    np.testing.assert_array_equal(y, np.float32([2048, 256, 1, 1.015625]))


def _device_functions() -> list[device.DeviceFunction]:
    found = []
    for entry in pkgutil.iter_modules(tir_kernels.cuda.__path__, "tir_kernels.cuda."):
        values = list(vars(importlib.import_module(entry.name)).values())
        for value in values:
            if isinstance(value, dict):
                values.extend(value.values())
            elif isinstance(value, tuple):
                values.extend(value)
            elif isinstance(value, device.DeviceFunction) and value not in found:
                found.append(value)
    return found


def test_device_functions_have_twins() -> None:
    hidden = [function for function in _device_functions() if not function.portable]
    assert device.wait_copies(3) in hidden
    assert device.mma("float16") in hidden
    checks = []
    for i, function in enumerate(hidden):
        signature = re.search(r"__device__ (.+?) (\w+)\(([^)]*)\)", function.source)
        assert signature
        returned, name, parameters = signature.groups()
        arguments = ", ".join(re.findall(r"(\w+)(?:,|$)", parameters))
        checks.append(f"{returned} call{i}({parameters}) {{ return {name}({arguments}); }}\n")
    source = 'extern "C" __global__ void nothing() {\n}\n'
    run_source("".join(checks) + source, "nothing", (1,), (1,))
