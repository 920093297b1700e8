"""Running prose: books out of copyright, stories from a grammar, and facts told in sentences."""

from __future__ import annotations

import random

from scripts.demo_model.facts import DEMO, Relation
from scripts.demo_model.stories import story


def book_paragraphs() -> list[str]:
    """The paragraphs of demo/prose in reading order (demo/prose_heldout.txt is no part of it)."""
    paragraphs: list[str] = []
    for path in sorted((DEMO / "prose").glob("*.txt")):
        paragraphs += path.read_text(encoding="utf-8").strip().split("\n\n")
    return paragraphs


def fact_paragraph(relations: list[Relation], rng: random.Random) -> str:
    """Four to nine facts as plain sentences, mostly of one relation."""
    relation = rng.choice(relations)
    sentences = []
    for _ in range(rng.randint(4, 9)):
        if rng.random() < 0.1:
            relation = rng.choice(relations)
        sentences.append(
            relation.state(rng.choice(relation.statements), rng.choice(relation.facts))
        )
    return " ".join(sentences)


def prose(relations: list[Relation], books: list[str], size: int, rng: random.Random) -> str:
    """About `size` characters of paragraphs: a passage of a book, stories, or plain facts."""
    kind = rng.random()
    parts: list[str] = []
    length = 0
    at = rng.randrange(len(books))
    while length < size:
        if kind < 0.55:
            parts.append(books[at % len(books)])
            at += 1
        elif kind < 0.85:
            parts.append(story(rng))
        else:
            parts.append(fact_paragraph(relations, rng))
        length += len(parts[-1]) + 2
    return "\n\n".join(parts)
