"""Token ids to text while they are being generated.

A token may end in the middle of a character, so text comes out only when it is complete; and a
stop string may begin in one token and end in another, so text that could become one is held
back. Both work on a bounded window: the cost does not grow with the length of the answer.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Sequence
from typing import Protocol

from tokenizers import Tokenizer

REPLACEMENT = "\ufffd"
_LONGEST_CHARACTER = 4  # bytes in UTF-8
_WINDOW = 6  # tokens known before the new one; one with a text of its own would do


class Detokenizer(Protocol):
    def push(self, token: int) -> str:
        """The text that this token completes; may be empty."""

    def flush(self) -> str:
        """What is left at the end, without the bytes of an unfinished character."""


def make_detokenizer(
    tokenizer: Tokenizer, special_ids: Iterable[int], context: Sequence[int] = ()
) -> Detokenizer:
    """A detokenizer for one answer.

    special_ids are never printed. context: the last tokens before the answer when it continues
    a text; sentencepiece-like tokenizers drop the leading space of a text's first word.
    """
    special = frozenset(special_ids)
    if is_byte_level(tokenizer):
        return ByteLevelDetokenizer(tokenizer, special)
    return WindowDetokenizer(tokenizer, special, context)


def is_byte_level(tokenizer: Tokenizer) -> bool:
    """Does decoding only map each token's characters to bytes, as in GPT-2's tokenizer?"""
    return _decoder_types(tokenizer) == ["ByteLevel"]


def _decoder_types(tokenizer: Tokenizer) -> list[str]:
    if tokenizer.decoder is None:
        return []
    decoder = json.loads(tokenizer.decoder.__getstate__())
    parts = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    return [part["type"] for part in parts]


def _byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes, read backwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    table = {chr(b): b for b in printable}
    table.update({chr(256 + i): b for i, b in enumerate(others)})
    return table


_BYTE_OF_CHARACTER = _byte_of_character()


class ByteLevelDetokenizer:
    """Byte-level BPE: every token is a run of bytes, decoded with one incremental decoder."""

    def __init__(self, tokenizer: Tokenizer, special: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return "" if token in self._special else self._decoder.decode(self._bytes(token))

    def flush(self) -> str:
        self._decoder.reset()
        return ""

    def _bytes(self, token: int) -> bytes:
        text = self._tokenizer.id_to_token(token)
        if text is None:  # an id beyond the tokenizer's vocabulary
            return b""
        try:
            return bytes(_BYTE_OF_CHARACTER[c] for c in text)
        except KeyError:  # an added token, kept as plain text
            return str(text).encode()


class WindowDetokenizer:
    """Any tokenizer: decodes each token after a few known ones; the difference is its text.

    Whatever the decoder does at the beginning of a text (dropping a space) happens to both and
    cancels. Byte tokens (`<0xE2>`, sentencepiece's for unknown characters) go through one
    incremental decoder of their own.
    """

    def __init__(
        self, tokenizer: Tokenizer, special: frozenset[int], context: Sequence[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._byte_fallback = "ByteFallback" in _decoder_types(tokenizer)
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._known = [t for t in context if t not in special][-_WINDOW:]
        self._known_text = self._decode(self._known)
        self._new: list[int] = []

    def push(self, token: int) -> str:
        if token in self._special:
            return ""
        if self._byte_fallback:
            byte = _byte_value(self._tokenizer.id_to_token(token))
            if byte is not None:
                self._know([token])
                return self._bytes.decode(bytes([byte]))
            text = self._bytes.decode(b"", final=True) + self._fresh([token])
            self._know([token])
            return text
        # Nothing is known about this decoder but that an unfinished character shows as U+FFFD.
        # One that more tokens than a character has bytes do not finish, never will be.
        self._new.append(token)
        text = self._fresh(self._new)
        if text.endswith(REPLACEMENT) and len(self._new) < _LONGEST_CHARACTER:
            return ""
        self._know(self._new)
        self._new = []
        return text

    def flush(self) -> str:
        self._bytes.reset()
        text = self._fresh(self._new) if self._new else ""
        self._new = []
        return text.rstrip(REPLACEMENT)

    def _fresh(self, ids: list[int]) -> str:
        return self._decode(self._known + ids)[len(self._known_text) :]

    def _know(self, ids: list[int]) -> None:
        self._known = (self._known + ids)[-_WINDOW:]
        self._known_text = self._decode(self._known)

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False)) if ids else ""


def _byte_value(token: str | None) -> int | None:
    if token is not None and len(token) == 6 and token.startswith("<0x") and token[5] == ">":
        return int(token[3:5], 16)
    return None


class StopStrings:
    """Passes text on up to the first stop string, holding back what may be the start of one.

    The first is the one that is complete first, however the text is cut into pieces.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(s for s in stops if s)
        self._longest = max((len(s) for s in self._stops), default=0)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that may be shown now, and whether a stop string has come."""
        if not self._stops:
            return text, False
        text = self._held + text
        starts = {s: text.find(s) for s in self._stops}
        found = [(start + len(s), start) for s, start in starts.items() if start >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        keep = self._undecided(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """The text held back, when the answer has ended without a stop string."""
        held, self._held = self._held, ""
        return held

    def _undecided(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            tail = text[len(text) - length :]
            if any(s.startswith(tail) for s in self._stops):
                return length
        return 0
