"""One evaluation from what the user named to a report: all checks first, then the work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mlcawq.checkpoint.source import resolve
from mlcawq.errors import Problem, UserError, raise_all
from mlcawq.evaluate.compare import Comparison, TextScore, score_windows
from mlcawq.evaluate.folders import Kind, folder_kind, folder_label
from mlcawq.evaluate.questions import Answered, ask, open_answerer, read_questions
from mlcawq.evaluate.scorers import Scorer, open_scorer
from mlcawq.evaluate.tasks import TaskRequest, Tasks, TaskScore
from mlcawq.evaluate.text import cut_windows, open_tokenizer, read_text, vocabulary_problems

T = TypeVar("T")
Progress = Callable[[str, int, int], None]
_Subject = tuple[Path, Kind, str]  # a folder, what it is, and the device that it runs on if built


@dataclass(frozen=True)
class Request:
    """What to evaluate: see `mlcawq eval --help` for the meaning of each."""

    model: str
    against: str | None = None
    device: str = "auto"
    text: str | Path | None = None
    questions: Path | None = None
    tasks: TaskRequest | None = None
    window: int | None = None
    max_tokens: int | None = None
    max_new_tokens: int = 64


@dataclass(frozen=True)
class Report:
    """What came out. What is the reference's is empty without a model to compare against."""

    model: str
    against: str | None
    labels: tuple[str, ...]
    comparison: Comparison | None
    answers: list[Answered] = field(default_factory=list)
    reference_answers: list[Answered] = field(default_factory=list)
    tasks: list[TaskScore] = field(default_factory=list)
    reference_tasks: list[TaskScore] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """One JSON document. Losses and divergences are in nats per token."""
        document: dict[str, Any] = {"model": self.model, "model_kind": self.labels[0]}
        if self.against is not None:
            document |= {"against": self.against, "against_kind": self.labels[1]}
        if self.comparison is not None:
            document["text"] = _text_json(self.comparison)
        if self.answers:
            document["questions"] = _questions_json(self.answers)
        if self.reference_answers:
            document["against_questions"] = _questions_json(self.reference_answers)
        if self.tasks:
            document["tasks"] = [asdict(score) for score in self.tasks]
        if self.reference_tasks:
            document["against_tasks"] = [asdict(score) for score in self.reference_tasks]
        return document


def _text_json(comparison: Comparison) -> dict[str, Any]:
    def score(given: TextScore) -> dict[str, Any]:
        return {"perplexity": given.perplexity, "loss": asdict(given.loss)}

    model = comparison.model
    document: dict[str, Any] = {
        "tokens": model.tokens,
        "windows": model.windows,
        "window": model.window,
        "seconds": comparison.seconds,
        "model": score(model),
    }
    if comparison.reference is not None and comparison.divergence is not None:
        document["against"] = score(comparison.reference)
        document["divergence"] = asdict(comparison.divergence)
    return document


def _questions_json(answers: Sequence[Answered]) -> dict[str, Any]:
    return {
        "right": sum(answer.right for answer in answers),
        "total": len(answers),
        "wrong": [
            {
                "question": answer.question.question,
                "answer": answer.question.answer,
                "said": answer.said,
            }
            for answer in answers
            if not answer.right
        ],
    }


class _Checks:
    """Runs checks that may each raise UserError, and raises everything found at once."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def __call__(self, check: Callable[..., T], *arguments: Any) -> T | None:
        try:
            return check(*arguments)
        except UserError as error:
            self.problems.extend(error.problems)
            return None

    def done(self) -> None:
        raise_all(dict.fromkeys(self.problems))  # what was checked twice is told once


def _locate(model: str) -> tuple[Path, Kind]:
    folder = Path(model).expanduser()
    if not folder.exists():
        folder = resolve(model)  # a hub name, or an error that says so
    kind = folder_kind(folder)
    if isinstance(kind, Problem):
        raise UserError(kind)
    return folder, kind


def evaluate(request: Request, progress: Progress | None = None) -> Report:
    """Check everything, then score the text, ask the questions and run the tasks.

    progress is called with (what is being done, done so far, in all).
    Raises UserError with all problems that can be found before the first weight is read.
    """
    checks = _Checks()
    names = [request.model] + ([request.against] if request.against is not None else [])
    text = checks(read_text, request.text) if request.text else None
    questions = checks(read_questions, request.questions) if request.questions else None
    tasks = checks(Tasks, request.tasks) if request.tasks else None
    located = [checks(_locate, name) for name in names]
    checks.done()
    subjects: list[_Subject] = [
        (*subject, device)
        for subject, device in zip(located, (request.device, "auto"), strict=False)
        if subject is not None
    ]

    prepared = checks(_prepare_text, request, subjects, text) if text is not None else None
    answerers = [checks(open_answerer, *subject) for subject in subjects if questions is not None]
    checks.done()

    comparison = None
    if prepared is not None:
        windows, scorers = prepared
        comparison = score_windows(
            scorers[0],
            windows,
            scorers[1] if len(scorers) > 1 else None,
            progress=_named(progress, "scoring text"),
        )
        scorers.clear()  # a built model's weights go before its questions load them again
    answered: list[list[Answered]] = []
    for name, answerer in zip(names, answerers, strict=False):
        if answerer is not None and questions is not None:
            said = _named(progress, f"asking {name}")
            answered.append(ask(answerer, questions, request.max_new_tokens, said))
    scores: list[list[TaskScore]] = []
    if tasks is not None:
        for name, subject in zip(names, subjects, strict=True):
            scores.append(tasks.run(*subject, _named(progress, f"tasks of {name}")))
    return Report(
        model=request.model,
        against=request.against,
        labels=tuple(folder_label(folder, kind) for folder, kind, _ in subjects),
        comparison=comparison,
        answers=answered[0] if answered else [],
        reference_answers=answered[1] if len(answered) > 1 else [],
        tasks=scores[0] if scores else [],
        reference_tasks=scores[1] if len(scores) > 1 else [],
    )


def _prepare_text(
    request: Request, subjects: Sequence[_Subject], text: str
) -> tuple[np.ndarray, list[Scorer]]:
    """The windows of text [W, T] and the opened models, known to go together."""
    checks = _Checks()
    opened = [checks(open_scorer, *subject) for subject in subjects]
    tokenizers = [checks(open_tokenizer, subject[0]) for subject in subjects]
    checks.done()
    scorers = [scorer for scorer in opened if scorer is not None]
    known = [tokenizer for tokenizer in tokenizers if tokenizer is not None]
    if len(known) > 1:
        raise_all(vocabulary_problems(known[0], known[1], f"{request.model}, {request.against}"))
    windows = cut_windows(
        known[0].encode(text),
        window=request.window,
        longest=min(scorer.longest for scorer in scorers),
        max_tokens=request.max_tokens,
        where=str(request.text),
    )
    narrowest = min(scorers, key=lambda scorer: scorer.vocab_size)
    if windows.max() >= narrowest.vocab_size:
        raise UserError.one(
            f"the text has token {windows.max()}, and the model predicts only "
            f"{narrowest.vocab_size} tokens",
            request.model,
            "the tokenizer belongs to another model: copy the right one into the folder",
        )
    return windows, scorers


def _named(progress: Progress | None, what: str) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    return lambda done, total: progress(what, done, total)
