"""Scoring whole models: against transformers' own loss, against themselves, against a plain sum."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import make_tiny_model
from transformers import AutoModelForCausalLM

from mlcawq.errors import UserError
from mlcawq.evaluate.compare import score_windows
from mlcawq.evaluate.metrics import kl_divergence, log_softmax
from mlcawq.evaluate.scorers import open_scorer


class ArrayScorer:
    """Logits from an array [W, T-1, V] given beforehand."""

    label = "array"
    longest = 10_000

    def __init__(self, logits: np.ndarray) -> None:
        self._logits = logits
        self.vocab_size = logits.shape[-1]
        self.largest_run = 0

    def logits(self, windows: np.ndarray, rows: int) -> Iterator[np.ndarray]:
        for window in self._logits:
            for start in range(0, len(window), rows):
                run = window[start : start + rows]
                self.largest_run = max(self.largest_run, len(run))
                yield run


def _windows(count: int, length: int, vocab: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab, (count, length))


def test_runs_are_put_back_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlcawq.evaluate.compare.rows_at_once", lambda vocab: 4)
    generator = np.random.default_rng(3)
    logits, reference = generator.normal(0, 1, (2, 3, 9, 13)).astype(np.float32)
    windows = _windows(3, 10, 13)
    model = ArrayScorer(logits)
    found = score_windows(model, windows, ArrayScorer(reference))
    assert model.largest_run == 4
    p, q = log_softmax(reference), log_softmax(logits)
    kl = kl_divergence(p.reshape(27, 13), q.reshape(27, 13))
    targets = windows[:, 1:].reshape(-1)
    nll = -q.reshape(27, 13)[np.arange(27), targets]
    assert found.model.tokens == 27
    assert found.model.perplexity == pytest.approx(math.exp(nll.mean()), rel=1e-12)
    assert found.divergence is not None
    assert found.divergence.kl.mean == pytest.approx(kl.mean(), rel=1e-12)
    assert found.kl is not None
    np.testing.assert_allclose(found.kl, kl, rtol=1e-12)
    assert found.divergence.kl_max == pytest.approx(kl.max(), rel=1e-12)
    assert found.divergence.top1.mean == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())
    assert found.reference is not None
    assert found.divergence.loss_difference.mean == pytest.approx(
        found.model.loss.mean - found.reference.loss.mean
    )


def test_padded_vocabularies_are_cut_to_the_narrower() -> None:
    logits = np.random.default_rng(4).normal(0, 1, (1, 9, 8)).astype(np.float32)
    padded = np.concatenate([logits, np.full((1, 9, 4), 3, np.float32)], axis=-1)
    found = score_windows(ArrayScorer(padded), _windows(1, 10, 8), ArrayScorer(logits))
    assert found.divergence is not None
    assert found.divergence.kl.mean == 0.0


def test_a_hopeless_model_has_a_perplexity() -> None:
    logits = np.zeros((1, 9, 8), np.float32)
    logits[..., 0] = 3000.0
    found = score_windows(ArrayScorer(logits), np.ones((1, 10), np.int64))
    assert found.model.loss.mean == pytest.approx(3000)
    assert 1e300 < found.model.perplexity < math.inf


def test_logits_that_are_not_finite_are_an_error() -> None:
    logits = np.zeros((1, 9, 8), np.float32)
    logits[0, 5, 2] = np.nan
    with pytest.raises(UserError, match="not finite"):
        score_windows(ArrayScorer(logits), _windows(1, 10, 8))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_loss_is_the_one_of_transformers(tmp_path: Path, family: str) -> None:
    folder = make_tiny_model(tmp_path / family, family, tie=family == "qwen3")
    scorer = open_scorer(folder, "checkpoint")
    windows = _windows(3, 50, scorer.vocab_size)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.from_numpy(windows)
    with torch.no_grad():
        losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in ids]
    found = score_windows(scorer, windows)
    assert found.model.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)


def test_a_model_does_not_diverge_from_itself(tiny_llama: Path) -> None:
    scorer, again = (open_scorer(tiny_llama, "checkpoint") for _ in range(2))
    found = score_windows(scorer, _windows(2, 64, scorer.vocab_size), again)
    assert found.divergence is not None
    assert abs(found.divergence.kl.mean) < 1e-9
    assert found.divergence.top1.mean == 1.0


def test_hidden_states_in_several_rounds_give_the_same(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = open_scorer(tiny_llama, "checkpoint")
    windows = _windows(5, 32, scorer.vocab_size)
    whole = np.concatenate(list(scorer.logits(windows, 7)))
    monkeypatch.setattr("mlcawq.evaluate.checkpoint_scorer._HIDDEN_BYTES", 2 * 32 * 128 * 4)
    monkeypatch.setattr("mlcawq.evaluate.checkpoint_scorer._LOGIT_BYTES", 1)
    rounds = np.concatenate(list(scorer.logits(windows, 7)))
    assert whole.shape == (5 * 31, scorer.vocab_size)
    np.testing.assert_allclose(rounds, whole, rtol=0, atol=1e-4)
