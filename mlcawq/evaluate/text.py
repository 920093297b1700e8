"""From a text to the windows of token ids that models are scored on.

The protocol is that of the GPTQ and AWQ papers for WikiText-2, as their scripts and AutoAWQ's have
it: the rows of the test split are joined by empty lines, the whole text is tokenized at once (with
the special tokens that the tokenizer itself adds, so usually one at the very front and none at a
later window's) and cut into windows of 2048 tokens that do not overlap; what is left over at the
end is not scored. Every token of a window but its first is predicted from those before it in the
window. The scripts weigh windows, this one tokens: with windows of one length it is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from mlcawq.checkpoint.source import load_tokenizer
from mlcawq.errors import Problem, UserError
from mlcawq.hub_data import HubData, hub_rows

DEFAULT_WINDOW = 2048
HUB_TEXTS = {"wikitext2": HubData("Salesforce/wikitext", "wikitext-2-raw-v1", "test")}


class TextTokenizer(Protocol):
    """What is needed of a tokenizer here, whichever library it comes from."""

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """special: with the tokens that the tokenizer adds to every text."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some tokens, special ones left out."""

    def vocabulary(self) -> dict[str, int]: ...


class _FastTokenizer:
    """tokenizer.json, as the `tokenizers` library reads it."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for every broken file
            raise UserError.one(f"not a tokenizer: {error}", str(path)) from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def vocabulary(self) -> dict[str, int]:
        return dict(self._tokenizer.get_vocab(with_added_tokens=True))


class _SlowTokenizer:
    """Any other tokenizer that transformers knows (tokenizer.model, vocab.json with merges)."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = load_tokenizer(folder)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        found = self._tokenizer(text, verbose=False, add_special_tokens=special)
        return list(found["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def vocabulary(self) -> dict[str, int]:
        return dict(self._tokenizer.get_vocab())


def open_tokenizer(folder: Path) -> TextTokenizer:
    """The tokenizer of a model folder of any kind. Raises UserError when there is none."""
    fast = folder / "tokenizer.json"
    return _FastTokenizer(fast) if fast.is_file() else _SlowTokenizer(folder)


def vocabulary_problems(a: TextTokenizer, b: TextTokenizer, where: str) -> list[Problem]:
    """What makes the ids of two tokenizers mean different things; empty when nothing does."""
    first, second = a.vocabulary(), b.vocabulary()
    if first == second:
        return []
    differing = sorted(
        token for token in first.keys() | second.keys() if first.get(token) != second.get(token)
    )
    example = differing[0]
    return [
        Problem(
            f"the vocabularies differ in {len(differing)} tokens (for one, {example!r} is "
            f"{first.get(example, 'absent')} in the one and {second.get(example, 'absent')} in "
            "the other)",
            where,
            "compare models that share a tokenizer: only then is each token's distribution over "
            "the same things",
        )
    ]


def read_text(source: str | Path) -> str:
    """The whole of a UTF-8 text file, or of a data set of `HUB_TEXTS` by its name.

    Raises UserError when it is missing, out of reach, empty or not text.
    """
    if str(source) in HUB_TEXTS and not Path(source).is_file():
        rows = hub_rows(
            str(source),
            HUB_TEXTS[str(source)],
            option=f"--text {source}",
            instead="give a text file with --text",
        )
        return "\n\n".join(row["text"] for row in rows)
    path = Path(source)
    if not path.is_file():
        raise UserError.one(
            "no such file",
            str(path),
            f"give a text file with --text, or one of: {', '.join(HUB_TEXTS)}",
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError.one(f"cannot be read: {error.strerror}", str(path)) from None
    except UnicodeDecodeError as error:
        raise UserError.one(f"not UTF-8 text: {error}", str(path)) from None
    if not text.strip():
        raise UserError.one("the file is empty", str(path), "give a text with --text")
    return text


def cut_windows(
    ids: Sequence[int],
    *,
    window: int | None,
    longest: int,
    max_tokens: int | None = None,
    where: str = "",
) -> np.ndarray:
    """Token ids -> int64 [W, T] of windows that do not overlap.

    window: T as the user gave it; None takes the smallest of 2048, `longest` and the text.
    longest: the most tokens that every model concerned takes at once.
    max_tokens: at most this many tokens of the text are used.
    Raises UserError when not even one window can be cut.
    """
    available = len(ids) if max_tokens is None else min(len(ids), max_tokens)
    length = min(DEFAULT_WINDOW, longest, available) if window is None else window
    problems = []
    if length > longest:
        problems.append(
            Problem(
                f"a window of {length} tokens is longer than the {longest} that the model takes",
                where,
                f"--window {longest} or less",
            )
        )
    if available < 2:
        problems.append(Problem(f"only {available} token to score", where, "give a longer text"))
    elif length > available:
        problems.append(
            Problem(
                f"{available} tokens are fewer than one window of {length}",
                where,
                f"--window {available} or less, or a longer text",
            )
        )
    elif length < 2:
        problems.append(Problem("a window holds at least 2 tokens", where, "--window 2 or more"))
    if problems:
        raise UserError(*problems)
    count = available // length
    return np.asarray(ids[: count * length], np.int64).reshape(count, length)
