"""All subjects on one text against their original, in one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlcawq.checkpoint.source import resolve
from mlcawq.comparison.subjects import Subject
from mlcawq.errors import Problem, UserError, raise_all
from mlcawq.evaluate.compare import Comparison, score_models
from mlcawq.evaluate.folders import folder_kind
from mlcawq.evaluate.metrics import Estimate, estimate
from mlcawq.evaluate.scorers import Scorer, open_scorer
from mlcawq.evaluate.text import cut_windows, open_tokenizer, read_text, vocabulary_problems


@dataclass(frozen=True)
class Measurement:
    """One subject on the text. behind: its divergence less the best one's, paired token by token;
    None for the best itself.
    """

    comparison: Comparison
    behind: Estimate | None


class Bench:
    """Text, original and subjects, opened and known to go together; nothing is read yet.

    text: a file, or a data set's name. device: what built folders run on.
    Raises UserError with everything that is in the way.
    """

    def __init__(
        self,
        subjects: Sequence[Subject],
        original: str,
        text: str,
        *,
        device: str = "auto",
        window: int | None = None,
        max_tokens: int | None = None,
    ) -> None:
        problems: list[Problem] = []
        folders = [subject.folder for subject in subjects if subject.folder is not None]
        content = ""
        try:
            content = read_text(text)
        except UserError as error:
            problems += error.problems
        try:
            named = Path(original).expanduser()
            folders.append(named if named.exists() else resolve(original))
        except UserError as error:
            problems += error.problems
        raise_all(problems)
        scorers, tokenizers = [], []
        for folder in folders:
            try:
                scorers.append(_open(folder, device))
                tokenizers.append(open_tokenizer(folder))
            except UserError as error:
                problems += error.problems
        raise_all(problems)
        for folder, tokenizer in zip(folders[:-1], tokenizers, strict=False):
            where = f"{folder}, {folders[-1]}"
            problems += vocabulary_problems(tokenizer, tokenizers[-1], where)
        raise_all(problems)
        *self._models, self._original = scorers
        self._windows = cut_windows(
            tokenizers[-1].encode(content),
            window=window,
            longest=min(scorer.longest for scorer in scorers),
            max_tokens=max_tokens,
            where=text,
        )
        narrowest = min(scorer.vocab_size for scorer in scorers)
        if self._windows.max() >= narrowest:
            raise UserError.one(
                f"the text has token {self._windows.max()}, and a model predicts only "
                f"{narrowest} tokens",
                original,
                "the tokenizer belongs to another model: copy the right one into the folder",
            )

    def run(self, progress: Callable[[int, int], None] | None = None) -> list[Measurement]:
        """Measure every subject, in the order in which they were given."""
        found = score_models(self._models, self._windows, self._original, progress)
        divergences = [one.kl for one in found if one.kl is not None]
        best = min(range(len(found)), key=lambda i: float(divergences[i].mean()))
        return [
            Measurement(one, None if i == best else _paired(divergences[i], divergences[best]))
            for i, one in enumerate(found)
        ]


def _paired(values: np.ndarray, best: np.ndarray) -> Estimate:
    return estimate(values - best)


def _open(folder: Path, device: str) -> Scorer:
    kind = folder_kind(folder)
    if isinstance(kind, Problem):
        raise UserError(kind)
    return open_scorer(folder, kind, device)
