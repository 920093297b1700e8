"""The control tokens of a checkpoint: which texts are tokens, and which of them end an answer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from mlcawq.build.chat_template import special_tokens
from mlcawq.checkpoint.config import load_json
from mlcawq.errors import UserError


@dataclass(frozen=True)
class ModelTokens:
    """added: the text and id of every added token (`<|im_end|>` and the like).

    bos: the text of the beginning-of-sequence token, empty where there is none.
    eos_ids: the tokens that end a generation, those of generation_config.json first.
    vocab_size: tokens that the tokenizer can produce, added ones included.
    opens_with_bos: whether the tokenizer puts bos before a plain text.
    """

    added: Mapping[str, int]
    bos: str = ""
    eos_ids: tuple[int, ...] = ()
    vocab_size: int = 0
    opens_with_bos: bool = False

    def id_of(self, text: str) -> int | None:
        return self.added.get(text)

    def require(self, text: str) -> int:
        return self.added[text]

    def control_tokens_in(self, text: str) -> list[str]:
        """The added tokens in `text`, from left to right, the longest first where two fit."""
        names = sorted((name for name in self.added if name), key=len, reverse=True)
        pattern = "|".join(map(re.escape, names))
        return re.findall(pattern, text) if pattern else []

    @classmethod
    def read(cls, folder: Path, source: Path | None = None) -> ModelTokens:
        """From `folder`/tokenizer.json; the other files are looked for in `source` (or `folder`).

        Raises UserError when tokenizer.json is not a valid tokenizer or names a token twice.
        """
        path = Path(folder) / "tokenizer.json"
        source = Path(source or folder)
        tokenizer = load_tokenizer(path)
        added = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items()}
        special = special_tokens(source)
        eos: list[int] = []
        for name in ("generation_config.json", "config.json"):
            content = load_json(source / name) if (source / name).is_file() else {}
            given = content.get("eos_token_id")
            eos += [i for i in (given if isinstance(given, list) else [given]) if type(i) is int]
        named = tokenizer.token_to_id(special.get("eos_token", ""))
        eos += [] if named is None else [named]
        bos_id = tokenizer.token_to_id(special.get("bos_token", ""))
        # A bos or eos may be an ordinary entry of the vocabulary; it is a control token too.
        for text in (special.get("bos_token", ""), special.get("eos_token", "")):
            i = tokenizer.token_to_id(text) if text else None
            if i is not None:
                added.setdefault(text, i)
        return cls(
            added=added,
            bos=special.get("bos_token", ""),
            eos_ids=tuple(dict.fromkeys(eos)),
            vocab_size=tokenizer.get_vocab_size(with_added_tokens=True),
            opens_with_bos=bos_id is not None and tokenizer.encode("").ids[:1] == [bos_id],
        )


def load_tokenizer(path: Path) -> tokenizers.Tokenizer:
    """tokenizer.json. Raises UserError when it is broken or holds an added token twice.

    A token listed twice (some releases did) makes the tokenizer library give ids that the model
    was not trained with.
    """
    content = load_json(path)
    texts = [token.get("content") for token in content.get("added_tokens") or []]
    twice = sorted({text for text in texts if texts.count(text) > 1})
    if twice:
        raise UserError.one(
            f"added tokens are listed twice: {', '.join(map(repr, twice))}",
            str(path),
            "remove the second entry of each",
        )
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UserError.one(
            f"not a tokenizer that `tokenizers` can read: {error}", str(path), "download it again"
        ) from None
