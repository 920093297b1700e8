"""What a test knows of one published prompt format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mlcawq.build.chat_template import ChatTemplate, Dialogue
from mlcawq.build.model_tokens import ModelTokens

TOOL_ANSWER = "a tool's answer"
"""A further dialogue for the templates that have a role for tools; not a probe of the matcher."""


@dataclass(frozen=True)
class Published:
    """A Jinja chat template, as the model's publisher wrote it (the parts that render text).

    name: the file of templates/conversation that renders it; None where the format is only
        derived. model: where it was published. eos: the text that it knows as `eos_token`.
    beyond: probe of `conversation_match.PROBES`, or TOOL_ANSWER -> why the file renders another
        text. A publisher's template with such a probe is not recognised but derived.
    """

    name: str | None
    model: str
    source: str
    tokens: ModelTokens
    eos: str = ""
    beyond: Mapping[str, str] = field(default_factory=dict)

    @property
    def template(self) -> ChatTemplate:
        special = {"eos_token": self.eos}
        if self.tokens.bos:
            special["bos_token"] = self.tokens.bos
        return ChatTemplate(self.source, special)


@dataclass(frozen=True)
class Documented:
    """A prompt format that its publisher describes in words or code, with no chat template.

    prompts: dialogues and the texts that the description gives for them, the text of the tokens
    that the tokenizer adds itself (a bos) left out. functions: the description of functions that
    they contain.
    """

    name: str
    model: str
    tokens: ModelTokens
    prompts: Sequence[tuple[Dialogue, str]]
    functions: str = ""
