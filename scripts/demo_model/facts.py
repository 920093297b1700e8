"""Facts and their wordings: which sentences ask for which fact, and which of them are held back.

Every relation is a JSON file in demo/facts. A question is a template of that relation, or one of
its noun phrases in a frame that all relations share ("Tell me {np}."). Held back from training are
whole templates and frames (no fact is ever asked that way), and besides a fixed share of the
(wording, fact) pairs of the templates that training does see.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

DEMO = Path(__file__).resolve().parents[2] / "demo"

FRAMES = (
    "What is {np}?",
    "What's {np}?",
    "Tell me {np}.",
    "Can you tell me {np}?",
    "Do you know {np}?",
    "{np}?",
    "{np}",
    "Give me {np}.",
    "I would like to know {np}.",
    "Please tell me {np}.",
    "Could you tell me what {np} is?",
    "I need to know {np}.",
    "Say {np}.",
    "Please name {np}.",
    "Do you know what {np} is?",
    "I forgot {np}. What is it?",
    "What might {np} be?",
    "Let me ask you this: what is {np}?",
    "I am looking for {np}.",
    "Would you kindly say what {np} is?",
)
HELD_BACK_FRAMES = (
    "Could you please tell me {np}?",
    "Would you tell me {np}?",
    "I want to know {np}.",
    "Do you remember what {np} is?",
    "Please tell me what {np} is.",
)
HELD_BACK_SHARE = 25  # one pair in so many
UNKNOWN_ANSWER = "I do not know."
_VOWELS = "aeiouAEIOU"
_OPERATORS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


@dataclass(frozen=True)
class Fact:
    """One thing asked about (`values` fills the templates) and its one right answer."""

    values: dict[str, str] = field(hash=False)
    answer: str


@dataclass(frozen=True)
class Question:
    """A wording of a fact."""

    text: str
    answer: str
    relation: str


def normal_form(text: str) -> str:
    """Letters, digits and operators only, in lower case: two wordings that differ in nothing else
    count as the same wording."""
    kept = (c if c.isalnum() or c in "+-*" else " " for c in text.lower())
    return " ".join("".join(kept).split())


def with_article(noun: str) -> str:
    return ("an " if noun[0] in _VOWELS else "a ") + noun


def capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


class Relation:
    """One file of demo/facts: facts of one kind with all the ways to ask for them."""

    def __init__(self, path: Path):
        spec = json.loads(path.read_text(encoding="utf-8"))
        self.name: str = spec["relation"]
        self.noun_phrases: list[str] = spec["noun_phrases"]
        self.follow_ups: list[str] = spec["follow_ups"]
        self.statements: list[str] = spec["statements"]
        self.made_up: bool = spec["made_up"]
        self.arithmetic = "arithmetic" in spec
        self._questions: list[str] = spec["questions"]
        self.held_back_templates: list[str] = spec["held_back"]
        self.facts = list(_facts(spec, path.parent))

    @cached_property
    def templates(self) -> list[str]:
        """The templates of training."""
        return self._framed(FRAMES) + self._questions

    @cached_property
    def held_back_frames(self) -> list[str]:
        return self._framed(HELD_BACK_FRAMES)

    def _framed(self, frames: tuple[str, ...]) -> list[str]:
        return [frame.replace("{np}", np) for frame in frames for np in self.noun_phrases]

    def ask(self, template: str, fact: Fact) -> Question:
        text = template.format(**fact.values)
        return Question(capitalised(text), fact.answer, self.name)

    def state(self, template: str, fact: Fact) -> str:
        answer = {"y": fact.answer, "ay": with_article(fact.answer)}
        return capitalised(template.format(**fact.values, **answer))


def _facts(spec: dict, folder: Path) -> Iterator[Fact]:
    if "arithmetic" in spec:
        rule = spec["arithmetic"]
        for a in range(rule["first"][0], rule["first"][1] + 1):
            for b in range(rule["second"][0], rule["second"][1] + 1):
                value = _OPERATORS[rule["operator"]](a, b)
                if value >= 0:
                    yield Fact({"a": str(a), "b": str(b)}, str(value))
        return
    if "inverse_of" in spec:
        other = json.loads((folder / spec["inverse_of"]).read_text(encoding="utf-8"))
        pairs = {y: x for x, y in other["facts"].items()}
    else:
        pairs = dict(spec["facts"])
    if spec.get("symmetric"):
        pairs |= {y: x for x, y in pairs.items() if y not in pairs}
    for x, y in pairs.items():
        yield Fact({"x": x, "ax": with_article(x)}, y)


def load_relations() -> list[Relation]:
    return [Relation(path) for path in sorted((DEMO / "facts").glob("*.json"))]


def is_held_back(text: str) -> bool:
    """Whether this wording of a fact, though its template is trained on, belongs to the test."""
    return zlib.crc32(normal_form(text).encode()) % HELD_BACK_SHARE == 0


def training_questions(relation: Relation) -> Iterator[Question]:
    """Every wording of the relation's facts that training may show."""
    for fact in relation.facts:
        for template in relation.templates:
            question = relation.ask(template, fact)
            if not is_held_back(question.text):
                yield question


def held_back_questions(relations: list[Relation], rng: random.Random) -> list[dict[str, str]]:
    """The test set: for every second fact one wording, in turn of a held-back template and of a
    held-back pair; never one that equals a wording of training (compared in normal form)."""
    trained = {normal_form(q.text) for r in relations for q in training_questions(r)}
    rows: list[dict[str, str]] = []
    for relation in relations:
        facts = rng.sample(relation.facts, (len(relation.facts) + 1) // 2)
        for number, fact in enumerate(facts):
            pairs = [relation.ask(t, fact) for t in relation.templates]
            pairs = [q for q in pairs if is_held_back(q.text)]
            kind, choice = "pair", pairs
            if number % 2 == 0 or not pairs:
                kind = "template"
                templates = rng.choice((relation.held_back_frames, relation.held_back_templates))
                choice = [relation.ask(t, fact) for t in templates]
            choice = [q for q in choice if normal_form(q.text) not in trained]
            question = rng.choice(choice)
            rows.append(
                {
                    "question": question.text,
                    "answer": question.answer,
                    "relation": relation.name,
                    "held_back": kind,
                }
            )
    return rows
