"""How likely a model finds given continuations of given contexts, many at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mlcawq.evaluate.metrics import log_softmax
from mlcawq.evaluate.scorers import Scorer, rows_at_once

# Windows are filled up to a multiple of this, so that few different lengths are run. What follows
# a token changes nothing before it.
_STEP = 64


@dataclass(frozen=True)
class Continuation:
    """Token ids. context has at least one, for the first token is predicted from it."""

    context: Sequence[int]
    tokens: Sequence[int]


@dataclass(frozen=True)
class Likelihood:
    """log P(continuation | context) in nats, and whether each of its tokens was the likeliest."""

    log_probability: float
    greedy: bool


def likelihoods(
    scorer: Scorer,
    continuations: Sequence[Continuation],
    progress: Callable[[int, int], None] | None = None,
) -> list[Likelihood]:
    """Of every continuation. What is too long for the model loses the beginning of its context."""
    by_length: dict[int, list[int]] = defaultdict(list)
    windows: list[list[int]] = []
    for i, continuation in enumerate(continuations):
        window = [*continuation.context, *continuation.tokens][-scorer.longest :]
        windows.append(window)
        length = max(2, min(-(-len(window) // _STEP) * _STEP, scorer.longest))
        by_length[length].append(i)
    found: dict[int, Likelihood] = {}
    rows = rows_at_once(scorer.vocab_size)
    for length, members in sorted(by_length.items()):
        ids: np.ndarray = np.zeros((len(members), length), np.int64)
        for row, i in zip(ids, members, strict=True):
            row[: len(windows[i])] = windows[i]
        runs = scorer.logits(ids, rows)
        for i in members:
            count = len(continuations[i].tokens)
            first = len(windows[i]) - count - 1  # the position that predicts the first token
            targets = windows[i][-count:] if count else []
            found[i] = _likelihood(runs, rows, length, first, targets)
            if progress is not None:
                progress(len(found), len(continuations))
    return [found[i] for i in range(len(continuations))]


def _likelihood(
    runs: Iterator[np.ndarray], rows: int, length: int, first: int, targets: Sequence[int]
) -> Likelihood:
    """From the logits of one window of `length` tokens, of which all runs are taken."""
    total, greedy = 0.0, True
    for start in range(0, length - 1, rows):
        logits = next(runs)
        low, high = max(first, start), min(first + len(targets), start + len(logits))
        if low < high:
            log_probs = log_softmax(logits[low - start : high - start])
            wanted = np.asarray(targets[low - first : high - first])
            total += float(log_probs[np.arange(high - low), wanted].sum())
            greedy = greedy and bool((log_probs.argmax(axis=-1) == wanted).all())
    return Likelihood(total, greedy)
