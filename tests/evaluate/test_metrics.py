"""The metrics against straightforward sums in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mlcawq.evaluate.metrics import estimate, kl_divergence, log_softmax, negative_log_likelihood


def _probabilities(row: np.ndarray) -> list[float]:
    powers = [math.exp(float(value)) for value in row]
    return [power / sum(powers) for power in powers]


def test_likelihood_and_divergence_are_the_plain_sums() -> None:
    generator = np.random.default_rng(0)
    p_logits, q_logits = generator.normal(0, 2, (2, 7, 11)).astype(np.float32)
    targets = generator.integers(0, 11, 7)
    p_log, q_log = log_softmax(p_logits), log_softmax(q_logits)
    assert p_log.dtype == np.float64
    for t in range(7):
        p, q = _probabilities(p_logits[t]), _probabilities(q_logits[t])
        assert negative_log_likelihood(p_log, targets)[t] == pytest.approx(
            -math.log(p[targets[t]]), rel=1e-12
        )
        expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        assert kl_divergence(p_log, q_log)[t] == pytest.approx(expected, rel=1e-12)


def test_large_logits_do_not_overflow() -> None:
    log_probs = log_softmax(np.array([[3e4, -3e4, 2.9e4]], np.float32))
    assert log_probs[0, 0] == pytest.approx(0.0)
    assert kl_divergence(log_probs, log_probs)[0] == 0.0


def test_standard_error_of_independent_tokens_is_the_textbook_one() -> None:
    values = np.random.default_rng(1).normal(5, 3, 64_000)
    found = estimate(values)
    assert found.mean == pytest.approx(values.mean(), rel=1e-12)
    assert found.standard_error == pytest.approx(3 / math.sqrt(64_000), rel=0.1)


def test_standard_error_sees_that_neighbours_move_together() -> None:
    # 1000 independent values, each held for 8 tokens: the mean is as uncertain as that of 1000.
    values = np.random.default_rng(2).normal(0, 1, 1000).repeat(8)
    assert estimate(values).standard_error == pytest.approx(1 / math.sqrt(1000), rel=0.2)


def test_no_standard_error_from_a_single_run() -> None:
    assert estimate(np.ones(64)).standard_error is None
    assert estimate(np.ones(65)).standard_error == pytest.approx(0.0)
