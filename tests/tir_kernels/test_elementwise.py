"""Norms, activation, rotation and logit functions against numpy."""

from __future__ import annotations

import numpy as np
import pytest

from tests.tir_kernels.kernels import HOST, Kernel, poisoned, relative_error
from tir_kernels import cpu

EPS = 1e-5


def normalized(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * weight.astype(np.float64)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("size", [96, 100, 30])
def test_rms_norm_and_residual(size: int, rng: np.random.Generator) -> None:
    x, residual = (rng.standard_normal((5, size)).astype(np.float16) for _ in range(2))
    weight = rng.standard_normal(size).astype(np.float16)
    out, total = poisoned((5, size), "float16"), poisoned((5, size), "float16")
    Kernel(cpu.rms_norm(HOST, size, EPS, "float16"))(x, weight, out)
    assert relative_error(out, normalized(x, weight)) < 1e-3
    Kernel(cpu.add_rms_norm(HOST, size, EPS, "float16"))(x, residual, weight, total, out)
    np.testing.assert_array_equal(total, x + residual)
    assert relative_error(out, normalized(x + residual, weight)) < 1e-3


def test_rms_norm_of_large_values(rng: np.random.Generator) -> None:
    # 300 squared is more than fp16 holds.
    x = np.full((1, 64), 300, np.float16)
    out = poisoned((1, 64), "float16")
    Kernel(cpu.rms_norm(HOST, 64, EPS, "float16"))(x, np.ones(64, np.float16), out)
    np.testing.assert_allclose(out, 1, rtol=1e-3)


def test_qk_norm(rng: np.random.Generator) -> None:
    qkv = rng.standard_normal((3, 8 * 16)).astype(np.float16)
    q_weight, k_weight = (rng.standard_normal(16).astype(np.float16) for _ in range(2))
    out = poisoned(qkv.shape, "float16")
    Kernel(cpu.qk_norm(HOST, 4, 2, 16, EPS, "float16"))(qkv, q_weight, k_weight, out)
    heads, got = qkv.reshape(3, 8, 16), out.reshape(3, 8, 16)
    assert relative_error(got[:, :4], normalized(heads[:, :4], q_weight)) < 1e-3
    assert relative_error(got[:, 4:6], normalized(heads[:, 4:6], k_weight)) < 1e-3
    np.testing.assert_array_equal(got[:, 6:], heads[:, 6:])


def test_silu_multiply(rng: np.random.Generator) -> None:
    x = (rng.standard_normal((3, 96)) * 10).astype(np.float16)
    x[0, :3] = -200, 200, 0
    out = poisoned((3, 48), "float16")
    Kernel(cpu.silu_multiply(HOST, 48, "float16"))(x, out)
    gate, up = x[:, :48].astype(np.float64), x[:, 48:].astype(np.float64)
    assert relative_error(out, gate / (1 + np.exp(-gate)) * up) < 1e-3


def test_split_rotary(rng: np.random.Generator) -> None:
    qkv = rng.standard_normal((3, 8, 16)).astype(np.float16)
    positions = np.array([0, 5, 700], np.int32)
    frequencies = (1 / 1e4 ** (np.arange(0, 16, 2) / 16)).astype(np.float32)
    q, k, v = (poisoned((3, heads, 16), "float16") for heads in (4, 2, 2))
    kernel = Kernel(cpu.split_rotary(HOST, 4, 2, 16, "float16", 1.5))
    kernel(qkv, positions, q, k, v, frequencies)
    angles = positions[:, None] * frequencies[None]
    cos, sin = (np.concatenate([f(angles)] * 2, -1)[:, None] * 1.5 for f in (np.cos, np.sin))

    def rotated(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64)
        return x * cos + np.concatenate([-x[..., 8:], x[..., :8]], -1) * sin

    assert relative_error(q, rotated(qkv[:, :4])) < 1e-3
    assert relative_error(k, rotated(qkv[:, 4:6])) < 1e-3
    np.testing.assert_array_equal(v, qkv[:, 6:])


def test_softmax_with_temperature(rng: np.random.Generator) -> None:
    logits = (rng.standard_normal((4, 403)) * 8).astype(np.float32)
    logits[3, 7] = logits[3, 400] = 99  # two largest share the probability
    temperature = np.array([1.0, 0.25, 3.0, 0.0], np.float32)
    out = poisoned(logits.shape, "float32")
    Kernel(cpu.softmax_with_temperature(HOST))(logits, temperature, out)
    scaled = logits[:3].astype(np.float64) / temperature[:3, None]
    want = np.exp(scaled - scaled.max(-1, keepdims=True))
    np.testing.assert_allclose(out[:3], want / want.sum(-1, keepdims=True), rtol=1e-4, atol=1e-9)
    assert out[3, 7] == out[3, 400] == 0.5
    assert out[3].sum() == 1


def test_logit_bias(rng: np.random.Generator) -> None:
    logits = rng.standard_normal((3, 50)).astype(np.float32)
    want = logits.copy()
    want[2, 4] += 1.5
    want[0, 49] -= 2
    rows, tokens = np.array([2, 0], np.int32), np.array([4, 49], np.int32)
    Kernel(cpu.apply_logit_bias_inplace(HOST))(
        logits, rows, tokens, np.array([1.5, -2], np.float32)
    )
    np.testing.assert_array_equal(logits, want)


def test_penalties() -> None:
    logits = np.zeros((2, 8), np.float32)
    logits[1] = np.arange(8) - 4
    # One sequence, in row 1: token 7 (logit 3) came twice, token 0 (logit -4) once.
    Kernel(cpu.apply_penalty_inplace(HOST))(
        logits,
        np.array([1], np.int32),
        np.array([0, 0], np.int32),
        np.array([7, 0], np.int32),
        np.array([2, 1], np.int32),
        np.array([[0.5, 0.25, 2.0]], np.float32),
    )
    assert logits[1, 7] == (3 - 0.5 - 2 * 0.25) / 2
    assert logits[1, 0] == (-4 - 0.5 - 0.25) * 2
    assert (logits[0] == 0).all()
    assert (logits[1, 1:7] == np.arange(1, 7) - 4).all()


def test_bitmask() -> None:
    logits = np.ones((2, 40), np.float32)
    mask = np.full((2, 2), -1, np.int32)
    mask[1, 0] &= ~(1 << 3)
    mask[1, 0] = np.int32(mask[1, 0] & 0x7FFFFFFF)
    mask[1, 1] &= ~1
    Kernel(cpu.apply_bitmask_inplace(HOST))(logits, np.array([1], np.int32), mask)
    ruled_out = np.flatnonzero(logits[1] == np.finfo(np.float32).min)
    assert ruled_out.tolist() == [3, 31, 32]
    assert (logits[0] == 1).all()
