"""Write the demo's test questions and its calibration text from the facts, by seed.

python -m scripts.demo_model.write_data
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from scripts.demo_model.chats import ChatSource
from scripts.demo_model.facts import DEMO, held_back_questions, load_relations
from scripts.demo_model.prose import book_paragraphs, prose

_DIALOGUES, _TURNS = 70, 10
_PASSAGES, _PASSAGE = 24, 900


def calibration_lines(chats: ChatSource, rng: random.Random) -> list[dict]:
    """Dialogues and passages of prose as training draws them, mixed."""
    books = book_paragraphs()
    lines: list[dict] = [{"messages": chats.messages(_TURNS, rng)} for _ in range(_DIALOGUES)]
    lines += [{"text": prose(chats.relations, books, _PASSAGE, rng)} for _ in range(_PASSAGES)]
    rng.shuffle(lines)
    return lines


def _write(path: Path, rows: list[dict]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")


def main() -> None:
    relations = load_relations()
    _write(DEMO / "questions.jsonl", held_back_questions(relations, random.Random(7)))
    lines = calibration_lines(ChatSource(relations), random.Random(8))
    _write(DEMO / "calibration.jsonl", lines)


if __name__ == "__main__":
    main()
