"""Scoring windows of text with one model, and against another one, as the logits stream by."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mlcawq.errors import UserError
from mlcawq.evaluate.metrics import (
    Estimate,
    estimate,
    kl_divergence,
    log_softmax,
    negative_log_likelihood,
)
from mlcawq.evaluate.scorers import Scorer, rows_at_once

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TextScore:
    """How well a model predicts a text.

    loss: nats per predicted token; perplexity is its exponential.
    tokens: how many tokens were predicted; windows: in how many windows of text.
    """

    loss: Estimate
    tokens: int
    windows: int
    window: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss.mean, 700.0))  # finite, as JSON needs, for any model


@dataclass(frozen=True)
class Divergence:
    """How far a model's predictions are from a reference's, token by token.

    kl: D(P_reference ‖ P_model) in nats per token; kl_median, kl_p99, kl_max: its distribution.
    top1: the fraction of tokens where both find the same token likeliest.
    loss_difference: model's loss - reference's on the same tokens, the logarithm of the ratio
        of perplexities. Paired, so its error is far smaller than that of either loss.
    """

    kl: Estimate
    kl_median: float
    kl_p99: float
    kl_max: float
    top1: Estimate
    loss_difference: Estimate


@dataclass(frozen=True)
class Comparison:
    """What scoring one text gave.

    losses: of the model at every predicted token [N]; kl: the divergence there, in nats.
    """

    model: TextScore
    reference: TextScore | None
    divergence: Divergence | None
    losses: np.ndarray
    kl: np.ndarray | None
    seconds: float


def _targets(windows: np.ndarray, rows: int) -> Iterator[np.ndarray]:
    for window in windows:
        predicted = window[1:]
        for start in range(0, len(predicted), rows):
            yield predicted[start : start + rows]


def score_windows(
    model: Scorer,
    windows: np.ndarray,
    reference: Scorer | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """As `score_models`, for one model."""
    return score_models([model], windows, reference, progress)[0]


def score_models(
    models: Sequence[Scorer],
    windows: np.ndarray,
    reference: Scorer | None = None,
    progress: Progress | None = None,
) -> list[Comparison]:
    """Score token ids int64 [W, T]; with a reference, compare the distributions as well.

    All models see the text side by side, so that it is run through the reference once. Only a run
    of logits of each is held at a time. Where models pad their vocabulary to different widths, all
    are cut to the narrowest one before the softmax.
    progress is called with the tokens predicted so far and in all.
    Raises UserError when a model's logits are not finite.
    """
    started = time.perf_counter()
    count, length = windows.shape
    total = count * (length - 1)
    scorers = [*models] if reference is None else [*models, reference]
    width = min(scorer.vocab_size for scorer in scorers)
    rows = rows_at_once(width)
    losses, kl, same_top = np.empty((3, len(models), total))
    reference_losses = np.empty(total)
    runs = [scorer.logits(windows, rows) for scorer in scorers]
    done = 0
    for targets in _targets(windows, rows):
        here = slice(done, done + len(targets))
        expected = None
        if reference is not None:
            expected = log_softmax(_finite(next(runs[-1]), reference)[:, :width])
            reference_losses[here] = negative_log_likelihood(expected, targets)
        for i, model in enumerate(models):
            log_probs = log_softmax(_finite(next(runs[i]), model)[:, :width])
            losses[i, here] = negative_log_likelihood(log_probs, targets)
            if expected is not None:
                kl[i, here] = kl_divergence(expected, log_probs)
                same_top[i, here] = expected.argmax(axis=-1) == log_probs.argmax(axis=-1)
        done += len(targets)
        if progress is not None:
            progress(done, total)

    def score(values: np.ndarray) -> TextScore:
        return TextScore(estimate(values), total, count, length)

    seconds = time.perf_counter() - started
    if reference is None:
        return [Comparison(score(loss), None, None, loss, None, seconds) for loss in losses]
    return [
        Comparison(
            model=score(losses[i]),
            reference=score(reference_losses),
            divergence=_divergence(kl[i], same_top[i], losses[i] - reference_losses),
            losses=losses[i],
            kl=kl[i],
            seconds=seconds,
        )
        for i in range(len(models))
    ]


def _divergence(kl: np.ndarray, same_top: np.ndarray, difference: np.ndarray) -> Divergence:
    """All [N], one value a token."""
    return Divergence(
        kl=estimate(kl),
        kl_median=float(np.median(kl)),
        kl_p99=float(np.quantile(kl, 0.99)),
        kl_max=float(kl.max()),
        top1=estimate(same_top),
        loss_difference=estimate(difference),
    )


def _finite(logits: np.ndarray, scorer: Scorer) -> np.ndarray:
    if not np.isfinite(logits).all():
        raise UserError.one(
            "its logits are not finite, so nothing can be said of its predictions",
            scorer.label,
            "the weights hold inf or nan, or overflow in the type they are computed in",
        )
    return logits
