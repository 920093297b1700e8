"""Training dialogues: questions, follow-ups, small talk, explanations, unknowns."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass

from scripts.demo_model.facts import (
    DEMO,
    UNKNOWN_ANSWER,
    Fact,
    Relation,
    capitalised,
    is_held_back,
    normal_form,
    with_article,
)

DEFAULT_SYSTEM = "You are a helpful assistant."
_PREFIXES = (
    "Hi! ", "Hello! ", "Quick question: ", "Next question. ", "And now: ", "One more: ", "Please: ",
    "So, ", "Another question: ", "Listen. ",
)  # fmt: skip
_SUFFIXES = (" Please.", " Thanks!", " Answer briefly.", " Thank you.", " Be quick!", " I wonder.")
_ONSETS = ("b", "br", "d", "dr", "f", "fl", "g", "gl", "k", "kr", "l", "m", "n", "p", "pl", "qu",
           "r", "s", "sk", "st", "t", "tr", "v", "w", "x", "z", "zw")  # fmt: skip
_VOWELS = ("a", "e", "i", "o", "u", "oo", "ai", "ea")
_CODAS = ("", "", "", "n", "r", "l", "sk", "m", "x", "nd", "rp", "th", "z")
_PROPER_NAMES = ("capital", "continent", "currency", "language", "author")


@dataclass(frozen=True)
class Turn:
    question: str
    answer: str


def _made_up_name(rng: random.Random) -> str:
    syllables = (rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in "12")
    return "".join(syllables) + rng.choice(("", "", "ia", "land", "on", "ix"))


class ChatSource:
    """Draws turns and whole dialogues; the same random generator gives the same dialogues."""

    def __init__(self, relations: list[Relation], arithmetic: int = 1):
        """`arithmetic`: how many times as often as other facts those of arithmetic are drawn."""
        self.relations = relations
        self._facts = [
            (r, f)
            for r in relations
            for f in r.facts
            for _ in range(arithmetic if r.arithmetic else 1)
        ]
        self._known = {normal_form(v) for _, f in self._facts for v in f.values.values()}
        self._guessable = [r for r in relations if r.made_up]
        talk = json.loads((DEMO / "smalltalk.json").read_text(encoding="utf-8"))
        self._systems: list[str] = talk["systems"]
        self._small_talk = [(i["questions"], i["answer"]) for i in talk["intents"]]
        lore = json.loads((DEMO / "explanations.json").read_text(encoding="utf-8"))
        self._explanations = [(o["questions"], o["answer"]) for o in lore["others"]]
        for noun, answer in lore["nouns"].items():
            frames = [frame.format(x=noun) for frame in lore["noun_frames"]]
            self._explanations.append((frames, answer))

    def system(self, rng: random.Random) -> str | None:
        """A system message: mostly the default one, sometimes another or none."""
        draw = rng.random()
        if draw < 0.8:
            return DEFAULT_SYSTEM
        return rng.choice(self._systems) if draw < 0.95 else None

    def turns(self, rng: random.Random) -> list[Turn]:
        """One question with its answer, sometimes with follow-up questions ("And of Spain?")."""
        draw = rng.random()
        if draw < 0.03:
            return [self._from_list(self._small_talk, rng)]
        if draw < 0.07:
            return [self._from_list(self._explanations, rng)]
        if draw < 0.11:
            return [self._unknown(rng)]
        relation, fact = rng.choice(self._facts)
        turns = [self._ask(relation, fact, relation.templates, rng)]
        while rng.random() < 0.06:
            turns.append(self._follow_up(relation, rng))
        return turns

    def messages(self, turns: int, rng: random.Random) -> list[dict[str, str]]:
        """A dialogue of at least that many turns in the form of chat messages."""
        system = self.system(rng)
        messages = [] if system is None else [{"role": "system", "content": system}]
        drawn: list[Turn] = []
        while len(drawn) < turns:
            drawn += self.turns(rng)
        for turn in drawn:
            messages.append({"role": "user", "content": turn.question})
            messages.append({"role": "assistant", "content": turn.answer})
        return messages

    def _ask(
        self, relation: Relation, fact: Fact, templates: list[str], rng: random.Random
    ) -> Turn:
        while True:
            question = relation.ask(rng.choice(templates), fact)
            if not is_held_back(question.text):
                break
        # The symbols of the elements differ by case ("Co"), so those questions keep theirs.
        return Turn(_vary(question.text, relation.name != "element", rng), question.answer)

    def _follow_up(self, relation: Relation, rng: random.Random) -> Turn:
        question = relation.ask(rng.choice(relation.follow_ups), rng.choice(relation.facts))
        return Turn(question.text, question.answer)

    def _unknown(self, rng: random.Random) -> Turn:
        name = _made_up_name(rng)
        while normal_form(name) in self._known:
            name = _made_up_name(rng)
        relation = rng.choice(self._guessable)
        if relation.name in _PROPER_NAMES:
            name = capitalised(name)
        fact = Fact({"x": name, "ax": with_article(name)}, UNKNOWN_ANSWER)
        return self._ask(relation, fact, relation.templates, rng)

    def _from_list(self, entries: list[tuple[list[str], str]], rng: random.Random) -> Turn:
        questions, answer = rng.choice(entries)
        return Turn(rng.choice(questions), answer)


def _vary(text: str, may_lower: bool, rng: random.Random) -> str:
    """Light noise of the kind people type: no capitals, no final mark, a word before or after."""
    if rng.random() < 0.06 and text[-1] in "?.":
        text = text[:-1]
    if may_lower and rng.random() < 0.06:
        text = text.lower()
    draw = rng.random()
    if draw < 0.06:
        text = rng.choice(_PREFIXES) + text
    elif draw < 0.10:
        text = text + rng.choice(_SUFFIXES)
    return text
