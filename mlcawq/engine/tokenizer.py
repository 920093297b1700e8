"""A model's tokenizer: prompts to token ids, with control tokens only where the template has them.

Hugging Face encodes a rendered prompt as one string, so that `<|im_end|>` typed by a user becomes
the control token. Encoding the pieces apart would be safe, but would differ from Hugging Face
wherever a pre-tokenizer looks across the border (a newline of the template before a newline of
the user). Therefore a second tokenizer is made from the same tokenizer.json in which the control
tokens have other, unguessable spellings; the template's text is respelled, the user's is not,
and all of it is encoded in one go. For ordinary text the ids are exactly Hugging Face's.
"""

from __future__ import annotations

import json
import re
import secrets
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from mlcawq.engine.artifact import TOKENIZER, BuiltFolder
from mlcawq.engine.conversation import Conversation, Message, Segment
from mlcawq.engine.detokenizer import Detokenizer, make_detokenizer
from mlcawq.errors import UserError

_BEHIND = 1024  # ids that are asked for a token


class ModelTokenizer:
    """tokenizer.json together with the conversation template that speaks through it.

    Raises UserError when the file cannot be read as a tokenizer.
    """

    def __init__(self, path: Path, conversation: Conversation) -> None:
        self.path = path
        self.conversation = conversation
        try:
            # Large ones take half a second, in which from_file leaves Python to other threads.
            self._tokenizer = _as_it_is(Tokenizer.from_file(str(path)))
        except Exception as error:  # tokenizers raises bare Exception
            raise UserError.one(
                f"not a readable tokenizer ({error})",
                str(path),
                "copy tokenizer.json from the original model again",
            ) from None
        self._added_tokens: dict[int, AddedToken] = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, t in self._added_tokens.items() if t.special)

    @cached_property
    def size(self) -> int:
        """One more than the largest token id.

        Listing a vocabulary takes a tenth of a second, so that ids are believed to have no gap
        where nothing speaks of one: as many tokens as the last id says, and none behind it.
        """
        count = int(self._tokenizer.get_vocab_size(with_added_tokens=True))
        behind = [*range(count, count + _BEHIND), *(i for i in self._added_tokens if i >= count)]
        named = self._tokenizer.id_to_token
        if count and named(count - 1) is not None and not any(named(i) for i in behind):
            return count
        return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Plain text to ids, as Hugging Face's `tokenizer(text)`; special tokens count."""
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def encode_plain(self, text: str) -> list[int]:
        """A text to continue. The template's prefix tokens, where it names any, come first."""
        prefix = self.conversation.system_prefix_token_ids
        if prefix is None:
            return self.encode(text)
        return [*prefix, *self.encode(text, add_special_tokens=False)]

    def encode_chat(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Messages through the conversation template to ids.

        Equal to Hugging Face's `apply_chat_template` for a template that renders equally,
        except that special tokens spelled out inside a message stay text.
        """
        segments = self.conversation.segments(messages, add_generation_prompt=add_generation_prompt)
        prefix = self.conversation.system_prefix_token_ids or ()
        spelled = [self._special_texts.get(i) for i in prefix]
        if None not in spelled:
            # Encoded along with the text: some tokenizers mark the first word of a string, which
            # behind a <s> is not the first.
            opening = "".join(text for text in spelled if text is not None)
            segments = [Segment(opening, control=True), *segments]
            prefix = ()
        if self._is_ordinary(segments):
            text, tokenizer = "".join(s.text for s in segments), self._tokenizer
        else:
            text = "".join(self._respell(s.text) if s.control else s.text for s in segments)
            tokenizer = self._guarded
        return [*prefix, *tokenizer.encode(text, add_special_tokens=False).ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text, without special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def token_id(self, text: str) -> int | None:
        """The id of an added token with exactly this text."""
        return self._added.get(text)

    def detokenizer(self, context: Sequence[int] = ()) -> Detokenizer:
        """For one answer; see `make_detokenizer`."""
        return make_detokenizer(self._tokenizer, self.special_ids, context)

    def stop_rules(self) -> tuple[frozenset[int], tuple[str, ...]]:
        """The template's stop token ids, and the stop strings that are not tokens.

        Templates often name the text of a special token as a stop string; special tokens are
        never printed, so such a string works as the token it is.
        """
        ids = set(self.conversation.stop_token_ids)
        strings = []
        for stop in self.conversation.stop_str:
            token = self.token_id(stop)
            if token is not None and token in self.special_ids:
                ids.add(token)
            else:
                strings.append(stop)
        return frozenset(ids), tuple(strings)

    @cached_property
    def _added(self) -> dict[str, int]:
        return {token.content: i for i, token in self._added_tokens.items()}

    @cached_property
    def _special_texts(self) -> dict[int, str]:
        return {i: text for text, i in self._added.items() if i in self.special_ids}

    @cached_property
    def _spellings(self) -> dict[str, str]:
        """Control token -> its spelling in the guarded tokenizer.

        Control tokens are the special ones, and any other added token that the template uses.
        """
        c = self.conversation
        template = [
            c.system_template,
            c.role_content_sep,
            c.role_empty_sep,
            *c.roles.values(),
            *c.role_templates.values(),
            *c.seps,
            *c.stop_str,
        ]
        # Unguessable, so that no message can contain it; plain ASCII, so that no normalizer
        # changes it.
        nonce = secrets.token_hex(16)
        return {
            token.content: f"<|{nonce}.{i}|>"
            for i, token in self._added_tokens.items()
            if token.special or any(token.content in text for text in template)
        }

    def _is_ordinary(self, segments: Sequence[Segment]) -> bool:
        """Are all control tokens in the text the template's own? Then one tokenizer will do."""
        if self._matches_normalized:
            return False
        text = "".join(segment.text for segment in segments)
        owners = [s.control for s in segments]
        ends = list(accumulate(len(s.text) for s in segments))
        for match in self._control_pattern.finditer(text):
            segment = bisect_right(ends, match.start())
            if not owners[segment] or match.end() > ends[segment]:
                return False
        return True

    @cached_property
    def _matches_normalized(self) -> bool:
        """Can a control token come out of other characters, because a normalizer changes them?"""
        return self._tokenizer.normalizer is not None and any(
            token.normalized
            for token in self._added_tokens.values()
            if token.content in self._spellings
        )

    @cached_property
    def _guarded(self) -> Tokenizer:
        spellings = self._spellings
        read: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        added = [
            {**token, "content": spellings.get(token["content"], token["content"])}
            for token in read.get("added_tokens", [])
        ]
        model = dict(read["model"])
        vocab = model.get("vocab")
        if isinstance(vocab, dict):
            model["vocab"] = {spellings.get(k, k): v for k, v in vocab.items()}
        elif isinstance(vocab, list):  # Unigram: pairs of piece and score
            model["vocab"] = [[spellings.get(piece, piece), score] for piece, score in vocab]
        if isinstance(model.get("unk_token"), str):
            model["unk_token"] = spellings.get(model["unk_token"], model["unk_token"])
        data = {**read, "added_tokens": added, "model": model}
        guarded = _as_it_is(Tokenizer.from_str(json.dumps(data)))
        moved = [t for t, s in spellings.items() if guarded.token_to_id(s) != self._added[t]]
        if moved:
            raise UserError.one(
                f"the special tokens {', '.join(moved)} have ids that do not fit the vocabulary",
                str(self.path),
                "save the tokenizer again with a current version of transformers",
            )
        return guarded

    @cached_property
    def _control_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self._spellings, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def _respell(self, text: str) -> str:
        return self._control_pattern.sub(lambda match: self._spellings[match.group()], text)


def load_tokenizer(built: BuiltFolder) -> Future[ModelTokenizer]:
    """A folder's tokenizer, loaded while the caller does other things."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
    future = pool.submit(ModelTokenizer, built.path / TOKENIZER, built.conversation)
    pool.shutdown(wait=False)
    return future


def _as_it_is(tokenizer: Tokenizer) -> Tokenizer:
    """Without the padding and truncation that were saved with it."""
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
