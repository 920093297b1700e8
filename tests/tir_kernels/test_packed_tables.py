"""8-bit heads, and rows of packed tables, against numpy on every instruction set that is here."""

from __future__ import annotations

import secrets
from pathlib import Path

import numpy as np
import pytest

from tests.tir_kernels.arm import ArmKernel, instructions
from tests.tir_kernels.kernels import (
    Kernel,
    narrow_target,
    poisoned,
    relative_error,
    targets_that_run_here,
)
from tests.tir_kernels.test_arm import CPUS, PRODUCTS, needs_qemu
from tests.tir_kernels.test_arm import LEVELS as ARM
from tir_kernels import dispatch, int8_weights, reference
from tir_kernels._tvm import Target
from tir_kernels.cpu.w8a16 import w8a16_linear
from tir_kernels.int8_weights import Int8Shape
from tir_kernels.layouts import BLOCKED, BlockedShape

LEVELS = targets_that_run_here()
BEST = [*LEVELS.values()][-1]
ENDS = [*LEVELS][:1] + [*LEVELS][1:][-1:]
ROWS = (1, 2, 4, 5, 9, 17)
TOLERANCE = {("float16", 16): 1e-3, ("float32", 16): 1e-4, ("float16", 8): 2e-2}


def int8_weight(rng: np.random.Generator, K: int, N: int, group: int) -> tuple[np.ndarray, ...]:
    """Packed arrays, and the weight [N, K] in float64 that they stand for."""
    q = rng.integers(-127, 128, (N, K)).astype(np.int8)
    scales = (rng.random((N, K // group)) * 0.02 + 0.001).astype(np.float16)
    weight = q * scales.astype(np.float64).repeat(group, axis=1)
    return int8_weights.pack(q), int8_weights.pack_scales(scales), weight


def check(
    target: Target, K: int, N: int, group: int, dtype: str, bits: int, rows: tuple[int, ...] = ROWS
) -> None:
    seed = secrets.randbits(32)
    rng = np.random.default_rng(seed)
    function = w8a16_linear(target, Int8Shape(K, N, group), dtype, "float32", act_bits=bits)
    kernel = Kernel(function, target)
    *arrays, weight = int8_weight(rng, K, N, group)
    for m in rows:
        x = rng.standard_normal((m, K)).astype(dtype)
        out = poisoned((m, N), "float32")
        kernel(x, *arrays, out)
        error = relative_error(out, x.astype(np.float64) @ weight.T)
        assert error < TOLERANCE[dtype, bits], (m, error, seed)


@pytest.mark.parametrize("level", LEVELS)
def test_int8_linears(level: str) -> None:
    check(LEVELS[level], 96, 37, 32, "float16", 16)  # a block of 5 outputs


@pytest.mark.parametrize(
    ("K", "N", "group", "dtype", "bits"),
    [(256, 48, 128, "float32", 16), (192, 8, 64, "float16", 8)],
)
def test_other_shapes_and_types(K: int, N: int, group: int, dtype: str, bits: int) -> None:
    check(BEST, K, N, group, dtype, bits)


def test_without_any_instruction_for_it() -> None:
    check(narrow_target(), 128, 24, 64, "float16", 16, (1, 3, 9))


def test_many_rows() -> None:
    """More than are quantized at a time."""
    check(BEST, 64, 24, 32, "float16", 16, (512, 515))


@pytest.mark.parametrize("level", LEVELS)
def test_extremes_do_not_overflow(level: str) -> None:
    K, N = 256, 16
    kernel = Kernel(dispatch.w8a16_linear(LEVELS[level], K, N, 128), LEVELS[level])
    scales = int8_weights.pack_scales(np.full((N, K // 128), 2.0**-8, np.float16))
    for q in (127, -127):
        words = int8_weights.pack(np.full((N, K), q, np.int8))
        for sign in (1, -1):
            for m in (1, 3, 9):
                out = poisoned((m, N), "float16")
                kernel(np.full((m, K), sign, np.float16), words, scales, out)
                np.testing.assert_allclose(out, sign * q, rtol=1e-3)


@pytest.mark.parametrize(("dtype", "K", "N", "group"), [("float16", 96, 37, 32)])
def test_what_is_not_finite_stays_so(dtype: str, K: int, N: int, group: int) -> None:
    kernel = Kernel(dispatch.w8a16_linear(BEST, K, N, group, dtype), BEST)
    *arrays, _ = int8_weight(np.random.default_rng(), K, N, group)
    for value in (np.nan, np.inf):
        x = np.zeros((2, K), dtype)
        x[1, 5] = value
        out = poisoned((2, N), dtype)
        kernel(x, *arrays, out)
        assert (out[0] == 0).all()
        assert not np.isfinite(out[1]).any()


@pytest.mark.parametrize("level", ENDS)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rows(level: str, dtype: str) -> None:
    seed = secrets.randbits(32)
    rng = np.random.default_rng(seed)
    K, N, target = 192, 43, LEVELS[level]
    *int8, weight = int8_weight(rng, K, N, 64)
    int4, stock_weight = int4_weight(rng, K, N, 32)
    numbers = np.array([0, 15, 16, N - 1, 7, 7, N + 5, -1], np.int32)
    for bits, group, arrays, expected in ((8, 64, int8, weight), (4, 32, int4, stock_weight)):
        function = dispatch.take_packed_rows(target, bits, N, K, group, dtype)
        kernel = Kernel(function, target)
        out = poisoned((len(numbers), K), dtype)
        kernel(*arrays, numbers, out)
        wanted = expected[np.clip(numbers, 0, N - 1)].astype(dtype)
        np.testing.assert_array_equal(out, wanted, err_msg=f"{bits} {seed}")


def int4_weight(
    rng: np.random.Generator, K: int, N: int, group: int
) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """Arrays of the blocked layout for any N, and the weight [N, K] in float64."""
    padded = -(-N // 8) * 8
    q = rng.integers(0, 16, (K, padded)).astype(np.uint8)
    z = rng.integers(0, 16, (K // group, padded)).astype(np.uint8)
    scales = (rng.random((K // group, padded)) * 0.02 + 0.001).astype(np.float16)
    stock = reference.pack(q), reference.pack(z), scales
    shapes = BlockedShape(K, N, group).parameters(BLOCKED).values()
    arrays = reference.block(*stock)
    assert [array.shape for array in arrays] == [shape for shape, _ in shapes]
    return arrays, reference.dequantize(*stock).T[:N]


@pytest.mark.parametrize("level", ENDS)
def test_int4_heads_have_any_number_of_outputs(level: str) -> None:
    seed = secrets.randbits(32)
    rng = np.random.default_rng(seed)
    K, N, target = 96, 43, LEVELS[level]
    function = dispatch.w4a16_linear(target, K, N, 32, "float16", False, "float32", layout=BLOCKED)
    kernel = Kernel(function, target)
    arrays, weight = int4_weight(rng, K, N, 32)
    for m in (1, 3, 9):
        x = rng.standard_normal((m, K)).astype(np.float16)
        out = poisoned((m, N), "float32")
        kernel(x, *arrays, out)
        error = relative_error(out, x.astype(np.float64) @ weight.T)
        assert error < 1e-3, (m, error, seed)


def test_packing_is_reversible() -> None:
    rng = np.random.default_rng()
    words, scales, weight = int8_weight(rng, 64, 37, 32)
    shapes = Int8Shape(64, 37, 32).parameters()
    assert (words.shape, str(words.dtype)) == shapes["qweight"]
    assert (scales.shape, str(scales.dtype)) == shapes["scales"]
    np.testing.assert_array_equal(int8_weights.dequantize(words, scales, 37), weight)
    # The format itself: byte j of word (b, k, n) is 128 + q of input 4k + j of output 16b + n.
    byte = (words.view(np.uint32)[1, 3, 4] >> 16) & 255
    q = weight[20, 14] / scales[1, 0, 4].astype(np.float64)
    assert byte == 128 + round(q)
    padding = words[2, :, 5:].view(np.uint32)
    assert (padding == 0x80808080).all()
    assert (scales[2, :, 5:] == 0).all()


@pytest.mark.parametrize("level", ARM)
def test_arm_has_the_products_of_its_level(level: str) -> None:
    found = instructions(dispatch.w8a16_linear(ARM[level], 128, 37, 64), ARM[level])
    assert found[PRODUCTS[level]] > 0
    assert not any(found[other] for name, other in PRODUCTS.items() if name != level)


@needs_qemu
@pytest.mark.slow
@pytest.mark.parametrize("level", ARM)
def test_heads_on_arm(level: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed := secrets.randbits(32))
    K, N, target = 128, 37, ARM[level]
    function = dispatch.w8a16_linear(target, K, N, 64, "float16", "float32")
    kernel = ArmKernel(function, target, CPUS[level], tmp_path)
    *arrays, weight = int8_weight(rng, K, N, 64)
    for m in (1, 2, 5, 17):
        x = rng.standard_normal((m, K)).astype(np.float16)
        out = poisoned((m, N), "float32")
        kernel(x, *arrays, out)
        error = relative_error(out, x.astype(np.float64) @ weight.T)
        assert error < 1e-3, (m, error, seed)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="group size"):
        dispatch.w8a16_linear(narrow_target(), 64, 8, 16)
    with pytest.raises(ValueError, match="K=96"):
        dispatch.w8a16_linear(narrow_target(), 96, 8, 64)
    with pytest.raises(ValueError, match="N=0"):
        Int8Shape(64, 0, 32)
    webgpu = Target({"kind": "webgpu"}, host={"kind": "llvm"})
    with pytest.raises(ValueError, match="packed tables on webgpu"):
        dispatch.w8a16_linear(webgpu, 64, 8, 32)
    with pytest.raises(ValueError, match="packed tables on webgpu"):
        dispatch.take_packed_rows(webgpu, 8, 8, 64, 32)
