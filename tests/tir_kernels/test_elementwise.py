"""Norms, activation, rotation, rows and pages against numpy."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from tests.tir_kernels.backends import Backend, Random
from tests.tir_kernels.kernels import poisoned, relative_error

EPS = 1e-5
PAGE = 16


def normalized(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * weight.astype(np.float64)


@pytest.mark.parametrize("size", [100, 30, 4104])
def test_rms_norm_and_residual(backend: Backend, size: int, rng: Random) -> None:
    x, residual, weight = rng.floats(5, size), rng.floats(5, size), rng.floats(size)
    out, total = poisoned((5, size), "float16"), poisoned((5, size), "float16")
    norm = backend.kernels.rms_norm(backend.target, size, EPS, "float16")
    backend.compile(norm)(x, weight, out)
    assert relative_error(out, normalized(x, weight)) < 1e-3, rng.seed
    add = backend.kernels.add_rms_norm(backend.target, size, EPS, "float16")
    backend.compile(add)(x, residual, weight, total, out)
    np.testing.assert_array_equal(total, x + residual)
    assert relative_error(out, normalized(x + residual, weight)) < 1e-3, rng.seed


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_rms_norm_of_other_types(gpu: Backend, name: str, rng: Random) -> None:
    if name == "bfloat16" and gpu.name == "vulkan":
        pytest.skip("WGSL has no bfloat16")
    dtype = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
    x, weight = rng.floats(3, 520, dtype=dtype), rng.floats(520, dtype=dtype)
    out = np.full((3, 520), np.nan, dtype)
    gpu.compile(gpu.kernels.rms_norm(gpu.target, 520, EPS, name))(x, weight, out)
    error = relative_error(out, normalized(x, weight))
    assert error < (4e-3 if name == "bfloat16" else 1e-6), rng.seed


def test_rms_norm_of_large_values(backend: Backend) -> None:
    # 300 squared is more than fp16 holds.
    x = np.full((1, 64), 300, np.float16)
    out = poisoned((1, 64), "float16")
    norm = backend.kernels.rms_norm(backend.target, 64, EPS, "float16")
    backend.compile(norm)(x, np.ones(64, np.float16), out)
    np.testing.assert_allclose(out, 1, rtol=1e-3)


@pytest.mark.parametrize(("q_heads", "kv_heads", "d"), [(14, 2, 80), (28, 4, 128)])
def test_qk_norm(backend: Backend, q_heads: int, kv_heads: int, d: int, rng: Random) -> None:
    heads = q_heads + 2 * kv_heads
    qkv, q_weight, k_weight = rng.floats(3, heads * d), rng.floats(d), rng.floats(d)
    out = poisoned(qkv.shape, "float16")
    norm = backend.kernels.qk_norm(backend.target, q_heads, kv_heads, d, EPS, "float16")
    backend.compile(norm)(qkv, q_weight, k_weight, out)
    given, got = qkv.reshape(3, heads, d), out.reshape(3, heads, d)
    rest = q_heads + kv_heads
    assert relative_error(got[:, :q_heads], normalized(given[:, :q_heads], q_weight)) < 1e-3
    k = slice(q_heads, rest)
    assert relative_error(got[:, k], normalized(given[:, k], k_weight)) < 1e-3, rng.seed
    np.testing.assert_array_equal(got[:, rest:], given[:, rest:])


@pytest.mark.parametrize("size", [48, 2056])
def test_silu_multiply(backend: Backend, size: int, rng: Random) -> None:
    x = (rng.standard_normal((3, 2 * size)) * 10).astype(np.float16)
    x[0, :3] = -200, 200, 0
    out = poisoned((3, size), "float16")
    backend.compile(backend.kernels.silu_multiply(backend.target, size, "float16"))(x, out)
    gate, up = x[:, :size].astype(np.float64), x[:, size:].astype(np.float64)
    assert relative_error(out, gate / (1 + np.exp(-gate)) * up) < 1e-3, rng.seed


@pytest.mark.parametrize(("q_heads", "kv_heads", "d"), [(14, 2, 80), (32, 8, 128)])
def test_split_rotary(backend: Backend, q_heads: int, kv_heads: int, d: int, rng: Random) -> None:
    qkv = rng.floats(4, q_heads + 2 * kv_heads, d)
    positions = np.array([0, 5, 700, 131071], np.int32)
    frequencies = (1 / 1e4 ** (np.arange(0, d, 2) / d)).astype(np.float32)
    q, k, v = (poisoned((4, heads, d), "float16") for heads in (q_heads, kv_heads, kv_heads))
    rotary = backend.kernels.split_rotary(backend.target, q_heads, kv_heads, d, "float16", 1.5)
    backend.compile(rotary)(qkv, positions, q, k, v, frequencies)
    # Models are trained with angles that are rounded to fp32.
    angles = (positions[:, None].astype(np.float32) * frequencies[None]).astype(np.float64)
    cos, sin = (np.concatenate([f(angles)] * 2, -1)[:, None] * 1.5 for f in (np.cos, np.sin))

    def rotated(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64)
        return x * cos + np.concatenate([-x[..., d // 2 :], x[..., : d // 2]], -1) * sin

    assert relative_error(q, rotated(qkv[:, :q_heads])) < 1e-3, rng.seed
    assert relative_error(k, rotated(qkv[:, q_heads : q_heads + kv_heads])) < 1e-3, rng.seed
    np.testing.assert_array_equal(v, qkv[:, q_heads + kv_heads :])


@pytest.mark.parametrize("width", [72, 5000])
def test_rows(backend: Backend, width: int, rng: Random) -> None:
    table = rng.floats(50, width)
    out = poisoned((4, width), "float16")
    take = backend.kernels.take_rows(backend.target, width, "float16")
    backend.compile(take)(table, np.array([3, -1, 49, 60], np.int32), out)
    np.testing.assert_array_equal(out, table[[3, 0, 49, 49]])
    last = poisoned((1, width), "float16")
    backend.compile(backend.kernels.last_row(backend.target, width, "float16"))(table, last)
    np.testing.assert_array_equal(last, table[-1:])


@pytest.mark.parametrize(("kv_heads", "d"), [(2, 8), (3, 80)])
def test_append_to_pages_and_read(backend: Backend, kv_heads: int, d: int, rng: Random) -> None:
    pages = rng.floats(3, 2, kv_heads, PAGE, d)
    want = pages.copy()
    k, v = rng.floats(4, kv_heads, d), rng.floats(4, kv_heads, d)
    append = backend.kernels.append_to_pages(backend.target, kv_heads, d, "float16")
    backend.compile(append)(pages, k, v, np.array([5, -1, 40, 0], np.int32))
    for row, slot in ((0, 5), (2, 40), (3, 0)):
        want[slot // PAGE, 0, :, slot % PAGE] = k[row]
        want[slot // PAGE, 1, :, slot % PAGE] = v[row]
    np.testing.assert_array_equal(pages, want)

    slots = np.array([0, 40, 5], np.int32)
    found = [poisoned((2, 3, kv_heads, d), "float16") for _ in range(2)]
    read = backend.kernels.read_slots(backend.target, 2, kv_heads, d, "float16")
    backend.compile(read)(pages, slots, *found, 1)
    for which, cached in enumerate((k, v)):
        np.testing.assert_array_equal(found[which][1], cached[[3, 2, 0]])
        assert np.isnan(found[which][0]).all()


def test_copy_page(backend: Backend, rng: Random) -> None:
    pages = rng.floats(4, 2, 3, PAGE, 40)
    want = pages.copy()
    want[3, :, :, :5] = pages[1, :, :, :5]
    backend.compile(backend.kernels.copy_page(backend.target, 3, 40, "float16"))(pages, 1, 3, 5)
    np.testing.assert_array_equal(pages[:3], want[:3])
    np.testing.assert_array_equal(pages[3, :, :, :5], want[3, :, :, :5])


def test_move_slots(backend: Backend, rng: Random) -> None:
    pages = rng.floats(3, 2, 2, PAGE, 24)
    want = pages.copy()
    # The second sequence's moves overlap: the later one reads what the first has not reached.
    moves = [[(7, 3)], [(20, 19), (22, 20)]]
    slots = np.array([move for sequence in moves for move in sequence], np.int32).T
    for source, target in slots.T:
        want[target // PAGE, :, :, target % PAGE] = want[source // PAGE, :, :, source % PAGE]
    function = backend.kernels.move_slots(backend.target, 2, 24, "float16")
    backend.compile(function)(pages, np.array([0, 1, 3], np.int32), np.ascontiguousarray(slots), 2)
    np.testing.assert_array_equal(pages, want)
