"""What counts as the same logits: noise passes, every kind of fault does not."""

from __future__ import annotations

import numpy as np
import pytest

from mlcawq.build.compare_logits import compare_logits

LIMIT = 2e-2


@pytest.fixture
def expected() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 3, (40, 5000)).astype(np.float32)


def noisy(logits: np.ndarray, level: float) -> np.ndarray:
    noise = np.random.default_rng(1).normal(0, level * logits.std(), logits.shape)
    return (logits + noise).astype(np.float32)


def test_noise_below_the_limit_passes(expected: np.ndarray) -> None:
    result = compare_logits(noisy(expected, 0.8 * LIMIT), expected, LIMIT, "text", "prefill", 7)
    assert result.faults == ()
    assert result.relative_error == pytest.approx(0.8 * LIMIT, rel=0.02)
    assert result.positions == 40
    assert 7 <= result.worst_position < 47
    assert result.agreeing == result.decided >= 15


def test_noise_above_the_limit_fails(expected: np.ndarray) -> None:
    result = compare_logits(noisy(expected, 1.2 * LIMIT), expected, LIMIT, "text", "prefill")
    assert "relative error 0.024, limit 0.02" in result.faults[0]


def test_one_wrong_position_is_found_and_named(expected: np.ndarray) -> None:
    got = expected.copy()
    got[13] = noisy(expected[13:14], 0.11)[0]
    result = compare_logits(got, expected, LIMIT, "text", "prefill", first=100)
    assert result.relative_error < LIMIT
    assert (result.worst_position, len(result.faults)) == (113, 1)
    assert "position 113" in result.faults[0]


def test_one_wrong_logit_is_found_and_named(expected: np.ndarray) -> None:
    got = expected.copy()
    got[:, 77] += 0.6 * 3
    result = compare_logits(got, expected, LIMIT, "text", "prefill")
    assert result.relative_error < LIMIT
    assert "token 77" in "\n".join(result.faults)


def test_another_likeliest_token_is_found(expected: np.ndarray) -> None:
    expected[5, 10] = expected[5].max() + 1.0
    got = expected.copy()
    got[5, 10] -= 1.2
    result = compare_logits(got, expected, LIMIT, "text", "prefill")
    assert result.agreeing == result.decided - 1
    assert "position 5: likeliest token" in "\n".join(result.faults)
    # A near tie may fall either way.
    expected[5, 10] = np.sort(expected[5])[-2] + 0.01
    got = expected.copy()
    got[5, 10] -= 0.02
    assert compare_logits(got, expected, LIMIT, "text", "prefill").faults == ()


def test_what_is_not_finite_is_found(expected: np.ndarray) -> None:
    got = expected.copy()
    got[3, 4] = np.nan
    result = compare_logits(got, expected, LIMIT, "text", "prefill")
    assert result.faults[0] == "position 3: 1 not finite"
