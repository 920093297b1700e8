"""Rows of token ids for training: dialogues and prose, each row starting where a model starts."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerFast

from scripts.demo_model.chats import ChatSource
from scripts.demo_model.prose import book_paragraphs, prose
from scripts.demo_model.tokenizer import END_OF_TEXT

_CHAT_LENGTHS = ((64, 0.3), (96, 0.3), (192, 0.25), (512, 0.15))
_PROSE_LENGTHS = ((256, 0.7), (512, 0.2), (1024, 0.1))
_QUESTION_SHARE = 0.2  # of the tokens of questions, the rest of a dialogue is answers
_IGNORED = -100


@dataclass(frozen=True)
class Rows:
    """`tokens` [rows, length] int64 and `targets`, the same shifted by one, -100 where no loss."""

    tokens: torch.Tensor
    targets: torch.Tensor


def _draw(lengths: tuple[tuple[int, float], ...], rng: random.Random) -> int:
    return rng.choices([n for n, _ in lengths], [w for _, w in lengths])[0]


class RowSource:
    def __init__(self, tokenizer: PreTrainedTokenizerFast, chats: ChatSource):
        self._tokenizer = tokenizer
        self._encode = tokenizer.backend_tokenizer.encode
        self._chats = chats
        self._books = book_paragraphs()
        self._pad = tokenizer.convert_tokens_to_ids(END_OF_TEXT)

    def chat_rows(self, tokens: int, rng: random.Random) -> Rows:
        """Dialogues, one a row, as many turns as fit. The loss counts every token of the answers
        and a random share of the others, so that the whole text is modelled at little cost."""
        length = _draw(_CHAT_LENGTHS, rng)
        return self._stack([self._dialogue(length, rng) for _ in range(tokens // length)], length)

    def prose_rows(self, tokens: int, rng: random.Random) -> Rows:
        length = _draw(_PROSE_LENGTHS, rng)
        rows = []
        for _ in range(tokens // length):
            ids: list[int] = []
            while len(ids) <= length:
                text = prose(self._chats.relations, self._books, 6 * (length - len(ids)), rng)
                ids += [*self._encode(text).ids, self._pad]
            rows.append((ids[: length + 1], [True] * (length + 1)))
        return self._stack(rows, length)

    def _dialogue(self, length: int, rng: random.Random) -> tuple[list[int], list[bool]]:
        system = self._chats.system(rng)
        head = "" if system is None else f"<|im_start|>system\n{system}<|im_end|>\n"
        ids = list(self._encode(head).ids)
        counted = [False] * len(ids)
        while True:
            for turn in self._chats.turns(rng):
                ask = f"<|im_start|>user\n{turn.question}<|im_end|>\n<|im_start|>assistant\n"
                asked = self._encode(ask).ids
                answered = self._encode(f"{turn.answer}<|im_end|>\n").ids
                if len(ids) + len(asked) + len(answered) > length + 1:
                    return ids, counted
                ids += asked + answered
                counted += [rng.random() < _QUESTION_SHARE for _ in asked]
                counted += [True] * len(answered)

    def _stack(self, rows: list[tuple[list[int], list[bool]]], length: int) -> Rows:
        tokens = torch.full((len(rows), length), self._pad)
        targets = torch.full((len(rows), length), _IGNORED)
        for i, (ids, counted) in enumerate(rows):
            row = torch.tensor(ids)
            tokens[i, : len(ids[:length])] = row[:length]
            kept = torch.where(torch.tensor(counted), row, _IGNORED)
            targets[i, : len(ids) - 1] = kept[1:]
        return Rows(tokens, targets)
