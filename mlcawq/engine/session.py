"""One conversation with an engine: its history, settings and numbers, without any printing."""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

from mlcawq.engine.engine import Delta, Engine, RequestStats
from mlcawq.engine.sampling import SamplingParams
from mlcawq.errors import Problem, UserError

_NUMBERS = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "seed": int,
    "max_tokens": int,
}
SETTINGS = (*_NUMBERS, "stop")
_ANSWER_SHARE = 4  # one in so many tokens of the context window is kept free for the answer


@dataclass
class Totals:
    """Sums over the answers of a session: tokens, and seconds."""

    answers: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decoded_tokens: int = 0  # without each answer's first, which the prefill computes

    def add(self, stats: RequestStats) -> None:
        self.answers += 1
        self.prompt_tokens += stats.prompt_tokens
        self.cached_tokens += stats.cached_tokens
        self.completion_tokens += stats.completion_tokens
        self.prefill_seconds += stats.prefill_seconds
        self.decode_seconds += stats.decode_seconds
        self.decoded_tokens += max(stats.completion_tokens - 1, 0)


@dataclass
class ChatSession:
    """Questions and answers with one engine.

    system: the user's system message; None leaves the template's own.
    left_out: so many of the oldest turns no longer fit into the context window; they are kept
    here, and the model does not see them.
    On a model without a chat template every input is a text to continue, and none is remembered.
    """

    engine: Engine
    params: SamplingParams
    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)
    left_out: int = 0
    last: RequestStats | None = None
    totals: Totals = field(default_factory=Totals)

    @property
    def is_plain(self) -> bool:
        return self.engine.conversation.is_plain

    def messages(self) -> list[dict[str, str]]:
        """The conversation so far, with the system message that the user has set."""
        return [*self._system_message(), *self.turns]

    def seen(self) -> list[dict[str, str]]:
        """The part of `messages` that the model is given."""
        return [*self._system_message(), *self.turns[self.left_out :]]

    def _system_message(self) -> list[dict[str, str]]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def ask(self, text: str) -> Generator[Delta, None, None]:
        """The answer to `text`, as it comes. What has come when the iterator is closed stays in
        the history as the answer.

        Raises UserError when the question does not fit into the context window. A question
        whose answer never began is forgotten.
        """
        return self._answer(text)

    def regenerate(self) -> Generator[Delta, None, None]:
        """Another answer to the last question. Raises UserError when there is none.

        The old answer stays when the new one never begins.
        """
        if not self.turns:
            raise UserError.one("there is no answer to replace yet", fix="ask something first")
        return self._answer(self.turns[-2]["content"], again=True)

    def reset(self) -> None:
        """Forget the conversation; settings and system message stay."""
        self.turns.clear()
        self.left_out = 0

    def set_system(self, text: str | None) -> None:
        """A new system message (None: the template's own) and a new conversation.

        Raises UserError when the model has no chat template, or one without a place for it.
        """
        if self.is_plain:
            raise UserError.one(
                "this model has no chat template, so it takes no system message",
                fix="put it into the text",
            )
        if text:
            self.engine.conversation.segments([{"role": "system", "content": text}])
        self.system = text
        self.reset()

    def set_option(self, assignment: str) -> tuple[str, Any]:
        """Change one sampling setting, written key=value; "none" unsets seed, max_tokens, stop.

        Returns its name and new value. Raises UserError for unknown names and bad values.
        """
        name, equals, text = assignment.partition("=")
        name = name.strip().lstrip("-").replace("-", "_")
        text = text.strip()
        if not equals or name not in SETTINGS:
            raise UserError.one(
                f"{assignment.strip()!r} is no setting",
                fix=f"write key=value, with a key of: {', '.join(SETTINGS)}",
            )
        value: Any
        if text.lower() in ("none", "") and name in ("seed", "max_tokens", "stop"):
            value = () if name == "stop" else None
        elif name == "stop":
            value = (unescape(text),)
        else:
            try:
                value = _NUMBERS[name](text)
            except ValueError:
                kind = "a whole number" if _NUMBERS[name] is int else "a number"
                raise UserError(Problem(f"{name} is {text!r}", fix=f"it must be {kind}")) from None
        self.params = replace(self.params, **{name: value})
        return name, value

    def transcript(self) -> str:
        """The conversation as Markdown."""
        titles = {"system": "System", "user": "User", "assistant": "Assistant"}
        return "\n".join(
            f"## {titles[message['role']]}\n\n{message['content']}\n" for message in self.messages()
        )

    def _answer(self, text: str, *, again: bool = False) -> Generator[Delta, None, None]:
        replaced = self.turns.pop() if again else None
        if replaced is None:
            self.turns.append({"role": "user", "content": text})
        left_out = self.left_out
        parts: list[str] = []
        stats: RequestStats | None = None
        try:
            if not self.is_plain:
                self._leave_out_what_does_not_fit()
            prompt = text if self.is_plain else self.seen()
            with closing(self.engine.generate(prompt, self.params)) as deltas:
                for delta in deltas:
                    parts.append(delta.text)
                    stats = delta.stats
                    yield delta
        finally:
            if stats is None or not stats.completion_tokens:
                self.left_out = left_out
                if replaced is None:
                    self.turns.pop()  # it never began: as if it had not been asked
                else:
                    self.turns.append(replaced)
            else:
                self.turns.append({"role": "assistant", "content": "".join(parts)})
                self.last = stats
                self.totals.add(stats)

    def _leave_out_what_does_not_fit(self) -> None:
        """Move `left_out` on when the conversation leaves too little room for an answer.

        What stays fills half of the window at most: the next questions then find it in the KV
        cache, where leaving out one turn at a time would compute all of it again for each.
        """
        window = self.engine.context_window_size
        room = min(self.params.max_tokens or window, window // _ANSWER_SHARE)
        if len(self.engine.encode(self.seen())) + room <= window:
            return
        while (
            len(self.turns) - self.left_out > 1
            and len(self.engine.encode(self.seen())) > window // 2
        ):
            self.left_out += 2


def unescape(text: str) -> str:
    r"""\n, \t, \r and \\ of a typed stop string as the characters they stand for."""
    known = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
    return re.sub(r"\\([ntr\\])", lambda match: known[match.group(1)], text)
