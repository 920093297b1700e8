"""What is computed from logits, one token at a time, in float64.

All logarithms are natural: likelihoods and divergences are in nats per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Neighbouring tokens share their context, so their errors move together. Standard errors are
# taken over the means of runs of this many tokens, which hardly do.
RUN = 64


@dataclass(frozen=True)
class Estimate:
    """A mean over tokens and its standard error; None where there are too few tokens for one."""

    mean: float
    standard_error: float | None


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Logits [T, V] of any float type -> log-probabilities float64 [T, V]."""
    shifted: np.ndarray = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def negative_log_likelihood(log_probs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-log P(target) for every row: log-probabilities [T, V], token ids [T] -> [T]."""
    return -log_probs[np.arange(len(targets)), targets]


def kl_divergence(reference: np.ndarray, model: np.ndarray) -> np.ndarray:
    """D(P_reference ‖ P_model) for every row of two arrays of log-probabilities [T, V] -> [T]."""
    return (np.exp(reference) * (reference - model)).sum(axis=-1)


def estimate(values: np.ndarray, run: int = RUN) -> Estimate:
    """The mean of one value per token, in the text's order, with its standard error.

    The error is that of batch means: the values are cut into runs of `run` tokens (the last one
    may be shorter and counts for less), and the spread of the runs' sums gives the error.
    """
    count = len(values)
    mean = float(values.mean())
    starts = np.arange(0, count, run)
    if len(starts) < 2:
        return Estimate(mean, None)
    sums = np.add.reduceat(values, starts)
    lengths: np.ndarray = np.diff(np.append(starts, count))
    spread = np.square(sums - lengths * mean).sum() * len(starts) / (len(starts) - 1)
    return Estimate(mean, float(np.sqrt(spread) / count))
