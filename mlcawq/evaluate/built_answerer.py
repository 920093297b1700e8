"""Chatting greedily with a built folder, through the engine that `mlcawq chat` uses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from mlcawq.engine.artifact import read_folder
from mlcawq.engine.devices import choose_device
from mlcawq.engine.engine import Engine
from mlcawq.engine.sampling import SamplingParams
from mlcawq.errors import UserError

# More than any chat template adds around a question, its own system prompt included.
_TEMPLATE_TOKENS = 1024


class BuiltAnswerer:
    """An `Answerer` over a folder of `mlcawq build` (or of mlc_llm) with a chat template.

    The folder's files are checked here; weights are loaded when the first question is asked.
    """

    def __init__(self, folder: Path, device: str = "auto") -> None:
        self._folder, self._device = folder, device
        built = read_folder(folder)
        choose_device(built, device)
        if built.conversation.is_plain:
            raise UserError.one(
                "no chat template, so it cannot be asked questions",
                str(folder),
                "build it with --conv-template, or leave --questions out",
            )

    def answers(self, questions: Sequence[str], max_new_tokens: int) -> Iterator[tuple[int, str]]:
        """See `Answerer.answers`."""
        # A token is at least a byte: enough of a cache for the longest, not for the whole context.
        longest = max(len(question.encode()) for question in questions)
        room = longest + _TEMPLATE_TOKENS + max_new_tokens
        engine = Engine(self._folder, self._device, max_batch=1, max_total_tokens=room)
        greedy = SamplingParams(temperature=0.0, max_tokens=max_new_tokens)
        for i, question in enumerate(questions):
            deltas = engine.generate([{"role": "user", "content": question}], greedy)
            yield i, "".join(delta.text for delta in deltas)
