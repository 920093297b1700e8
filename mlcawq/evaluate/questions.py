"""Questions with one right answer: how many does a model answer exactly, chatting greedily?"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mlcawq.errors import Problem, UserError
from mlcawq.evaluate.folders import Kind

_SHOWN_PROBLEMS = 10


@dataclass(frozen=True)
class Question:
    question: str
    answer: str


@dataclass(frozen=True)
class Answered:
    """A question, what was said to it, and whether that is the answer but for outer spaces."""

    question: Question
    said: str

    @property
    def right(self) -> bool:
        return self.said.strip() == self.question.answer.strip()


class Answerer(Protocol):
    """A model that chats: one user message, no system prompt but the template's own, greedy."""

    def answers(self, questions: Sequence[str], max_new_tokens: int) -> Iterator[tuple[int, str]]:
        """Yields (index into questions, answer text) once for every question, in any order."""
        ...


def open_answerer(folder: Path, kind: Kind, device: str = "auto") -> Answerer:
    """device: what a built folder runs on, as for an engine.

    Raises UserError when the folder cannot chat (no chat template, missing files, no such device).
    """
    if kind == "built":
        from mlcawq.evaluate.built_answerer import BuiltAnswerer

        return BuiltAnswerer(folder, device)
    from mlcawq.evaluate.checkpoint_answerer import CheckpointAnswerer

    return CheckpointAnswerer(folder)


def read_questions(path: Path) -> list[Question]:
    """A .jsonl file of {"question": …, "answer": …}. Raises UserError naming the broken lines."""
    if not path.is_file():
        raise UserError.one("no such file", str(path), "give a .jsonl file with --questions")
    questions: list[Question] = []
    problems: list[Problem] = []
    try:
        # Not splitlines: JSON strings may hold U+2028 and other ends of lines as they are.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UserError.one(f"cannot be read: {error.strerror}", str(path)) from None
    except UnicodeDecodeError as error:
        raise UserError.one(f"not UTF-8 text: {error}", str(path)) from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if isinstance(entry, dict) and all(
            isinstance(entry.get(key), str) and entry[key].strip() for key in ("question", "answer")
        ):
            questions.append(Question(entry["question"], entry["answer"]))
        else:
            problems.append(
                Problem('not {"question": text, "answer": text}', f"{path}, line {number}")
            )
    if problems:
        more = len(problems) - _SHOWN_PROBLEMS
        if more > 0:
            problems[_SHOWN_PROBLEMS:] = [Problem(f"and {more} more lines", str(path))]
        raise UserError(*problems)
    if not questions:
        raise UserError.one("no questions in it", str(path))
    return questions


def ask(
    answerer: Answerer,
    questions: Sequence[Question],
    max_new_tokens: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[Answered]:
    """Every question on its own, in the file's order."""
    said: list[str] = [""] * len(questions)
    texts = [question.question for question in questions]
    for done, (i, answer) in enumerate(answerer.answers(texts, max_new_tokens), 1):
        said[i] = answer
        if progress is not None:
            progress(done, len(questions))
    return [Answered(question, text) for question, text in zip(questions, said, strict=True)]
