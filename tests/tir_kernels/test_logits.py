"""Logit functions against numpy."""

from __future__ import annotations

import numpy as np
import pytest

from tests.tir_kernels.backends import Backend, Random
from tests.tir_kernels.kernels import poisoned


@pytest.mark.parametrize("vocabulary", [403, 9003])
def test_softmax_with_temperature(backend: Backend, vocabulary: int, rng: Random) -> None:
    logits = (rng.standard_normal((4, vocabulary)) * 8).astype(np.float32)
    logits[3, 7] = logits[3, vocabulary - 3] = 99  # two largest share the probability
    temperature = np.array([1.0, 0.25, 3.0, 0.0], np.float32)
    out = poisoned(logits.shape, "float32")
    softmax = backend.kernels.softmax_with_temperature(backend.target)
    backend.compile(softmax)(logits, temperature, out)
    scaled = logits[:3].astype(np.float64) / temperature[:3, None]
    want = np.exp(scaled - scaled.max(-1, keepdims=True))
    want /= want.sum(-1, keepdims=True)
    np.testing.assert_allclose(out[:3], want, rtol=1e-4, atol=1e-9, err_msg=str(rng.seed))
    assert out[3, 7] == out[3, vocabulary - 3] == 0.5
    assert out[3].sum() == 1


def test_logit_bias(backend: Backend, rng: Random) -> None:
    logits = rng.floats(3, 50, dtype="float32")
    want = logits.copy()
    want[2, 4] += 1.5
    want[0, 49] -= 2
    rows, tokens = np.array([2, 0], np.int32), np.array([4, 49], np.int32)
    apply = backend.kernels.apply_logit_bias_inplace(backend.target)
    backend.compile(apply)(logits, rows, tokens, np.array([1.5, -2], np.float32))
    np.testing.assert_array_equal(logits, want)


def test_penalties(backend: Backend) -> None:
    logits = np.zeros((2, 8), np.float32)
    logits[1] = np.arange(8) - 4
    # One sequence, in row 1: token 7 (logit 3) came twice, token 0 (logit -4) once.
    backend.compile(backend.kernels.apply_penalty_inplace(backend.target))(
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


def test_bitmask(backend: Backend) -> None:
    logits = np.ones((2, 300), np.float32)
    mask = np.full((2, 10), -1, np.int32)
    mask[1, 0] &= ~(1 << 3)
    mask[1, 0] = np.int32(mask[1, 0] & 0x7FFFFFFF)
    mask[1, 1] &= ~1
    mask[1, 9] &= ~(1 << 11)
    apply = backend.kernels.apply_bitmask_inplace(backend.target)
    backend.compile(apply)(logits, np.array([1], np.int32), mask)
    ruled_out = np.flatnonzero(logits[1] < -3.4e38)
    assert ruled_out.tolist() == [3, 31, 32, 299]
    assert (logits[0] == 1).all()
