"""Small stories, drawn from a grammar: endless simple prose for a model that reads little."""

from __future__ import annotations

import random

_PEOPLE = (
    ("Anna", "she", "her", "her"), ("Tom", "he", "him", "his"), ("Mira", "she", "her", "her"),
    ("Jonas", "he", "him", "his"), ("Lena", "she", "her", "her"), ("Peter", "he", "him", "his"),
    ("Clara", "she", "her", "her"), ("Samuel", "he", "him", "his"), ("Ruth", "she", "her", "her"),
    ("Oskar", "he", "him", "his"), ("Nadia", "she", "her", "her"), ("Felix", "he", "him", "his"),
    ("the miller", "he", "him", "his"), ("the old sailor", "he", "him", "his"),
    ("the young teacher", "she", "her", "her"), ("the baker's daughter", "she", "her", "her"),
)  # fmt: skip
_ANIMALS = ("fox", "dog", "cat", "goat", "owl", "hare", "donkey", "crow", "mouse", "duck", "horse")
_PLACES = (
    "at the edge of a dark forest", "in a small town by the sea", "near the old stone bridge",
    "in a valley between two mountains", "on a farm outside the village", "beside a wide river",
    "in a tall house with a red roof", "on an island with only one tree", "behind the market",
)  # fmt: skip
_GOALS = (
    "the library", "the market", "the harbour", "the old mill", "the hill", "the lake",
    "the school", "the railway station", "the garden", "the top of the tower", "the cave",
    "the bakery",
)  # fmt: skip
_THINGS = (
    "key", "letter", "basket", "lantern", "map", "coin", "bell", "book", "ring", "clock", "hat",
    "blanket", "feather", "box", "violin", "kite", "spoon", "ladder", "rope", "mirror",
)  # fmt: skip
_ADJECTIVES = (
    "small", "old", "silver", "heavy", "broken", "strange", "beautiful", "blue", "green", "wooden",
    "golden", "dusty", "tiny", "white", "useful", "forgotten", "warm", "red",
)  # fmt: skip
_FOODS = ("bread", "apples", "cheese", "warm soup", "honey", "a piece of cake", "nuts", "berries")
_WEATHER = (
    "It was a cold morning and there was snow on the roofs.", "The sun was shining.",
    "It had rained all night, and the road was full of puddles.",
    "A strong wind came from the west.",
    "The sky was grey, and nobody was in the street.", "It was the first warm day of spring.",
    "It was late in the autumn, and the leaves were falling.", "The stars were already out.",
)  # fmt: skip
_MOODS = ("happy", "tired", "curious", "worried", "angry", "proud", "sad", "surprised", "hungry")
_MORALS = (
    "From that day on they were good friends.",
    "And so {name} learned that a little patience is worth more than a great deal of strength.",
    "{Name} never told anybody what had happened that day.",
    "Since then {name} has always looked twice before going by.",
    "In the evening {name} went home and slept until late in the morning.",
    "Nobody in the village ever forgot it.",
    "{Name} smiled, because a promise is a promise.",
    "And if you go there today, you can still see the {thing}.",
)
_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


class _Cast:
    """The words of one story: who, what and where, fixed once."""

    def __init__(self, rng: random.Random):
        name, he, him, his = rng.choice(_PEOPLE)
        friend = rng.choice([p for p in _PEOPLE if p[0] != name])
        animal = rng.choice(_ANIMALS)
        adjective, thing = rng.choice(_ADJECTIVES), rng.choice(_THINGS)
        goal, second = rng.sample(_GOALS, 2)
        self.words = {
            "name": name, "Name": _upper(name), "he": he, "He": _upper(he), "him": him, "his": his,
            "friend": friend[0], "Friend": _upper(friend[0]),
            "animal": animal, "an_animal": _article(animal), "adjective": adjective,
            "thing": thing, "a_thing": _article(f"{adjective} {thing}"),
            "place": rng.choice(_PLACES),
            "goal": goal, "second": second, "food": rng.choice(_FOODS), "mood": rng.choice(_MOODS),
            "weekday": rng.choice(_WEEKDAYS),
            "number": rng.choice(("two", "three", "four", "seven")),
            "other_thing": rng.choice([t for t in _THINGS if t != thing]),
        }  # fmt: skip


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


_OPENINGS = (
    "Once upon a time {name} lived {place}.",
    "{Name} lived {place} with {an_animal} that could not keep a secret.",
    "One {weekday} {name} went to {goal} to look for {a_thing}.",
    "There was once {an_animal} that lived {place} and was never {mood}.",
    "Early on {weekday} morning {name} woke up and felt {mood}.",
    "Every {weekday} {name} walked from {goal} to {second}.",
    "{Name} had {a_thing}, and everybody {place} knew it.",
)
_MIDDLES = (
    "On the way {he} met {an_animal} that was carrying {a_thing}.",
    "{He} had nothing with {him} but {food} and {a_thing}.",
    '"Where are you going?" asked the {animal}. "To {goal}," said {name}.',
    '"Have you seen my {thing}?" asked {friend}. {Name} shook {his} head.',
    "Under a stone near {goal} {he} found {a_thing}.",
    "{He} looked at it for a long time, but {he} did not know what it was for.",
    "Then {friend} came along and asked {him} for help.",
    "The {animal} was {mood}, because it had lost its {thing} near {second}.",
    "{He} gave the {animal} some {food}, and it began to speak.",
    '"If you bring me {a_thing}," said the {animal}, "I will show you the way to {second}."',
    "They walked for {number} hours until they came to {second}.",
    "{He} knocked {number} times, but nobody opened the door.",
    "Suddenly there was a loud noise, and the {thing} fell to the ground.",
    "{Friend} laughed and said that there was no such thing as {a_thing}.",
    "{He} waited for {number} days, and on the next {weekday} the {thing} was gone.",
    "So {he} sold the {other_thing} and bought {food} with the money.",
    "{Name} was {mood}, but {he} did not say a word.",
    '"I am {mood}," said {name}, "and I want to go home."',
    "In the night {he} heard the {animal} singing {place}.",
    "{He} put the {thing} into {his} pocket and ran to {goal} as fast as {he} could.",
    "{Friend} had seen everything from the window.",
    "When {he} opened the {other_thing}, there was {a_thing} inside.",
    "It was too dark to see anything, so {he} lit a lamp.",
    "The people at {goal} had never seen such {a_thing} before.",
)
_ENDINGS = (
    "In the end {friend} gave {him} the {thing} back.",
    "At last {he} found the {thing} where {he} had left it, {place}.",
    '"Thank you," said the {animal}, and it ran away into the dark.',
    "Together they carried the {thing} to {second}, where it belongs.",
    "They sat down and ate {food}, and {friend} told them the whole story.",
    "When {he} came home, the {animal} was already sitting at the door.",
)


def story(rng: random.Random) -> str:
    """One story of five to fourteen sentences, in one or two paragraphs."""
    words = _Cast(rng).words
    sentences = [rng.choice(_OPENINGS)]
    if rng.random() < 0.6:
        sentences.append(rng.choice(_WEATHER))
    middles = rng.sample(_MIDDLES, rng.randint(3, 9))
    sentences += middles
    sentences.append(rng.choice(_ENDINGS))
    if rng.random() < 0.7:
        sentences.append(rng.choice(_MORALS))
    text = [s.format(**words) for s in sentences]
    if len(text) > 8:
        cut = len(text) // 2
        return " ".join(text[:cut]) + "\n\n" + " ".join(text[cut:])
    return " ".join(text)
