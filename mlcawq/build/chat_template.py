"""A checkpoint's own chat template (Jinja), found and rendered as transformers does it.

transformers keeps the template in chat_template.jinja, or under "chat_template" in
tokenizer_config.json (a string, or a list of named ones), and renders it in a sandboxed Jinja
environment whose settings decide about white space. Rendering here needs neither transformers nor
torch, takes a date (templates may print today's), and turns a template's refusal into a value.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from mlcawq.checkpoint.config import load_json
from mlcawq.errors import UserError

Dialogue = Sequence[Mapping[str, str]]

_SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class RenderRefusedError(Exception):
    """The template raised: it does not take this dialogue (no system role, order of roles)."""


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`, transformers' mark of answers: a plain block."""

    tags: set[str] = {"generation"}  # noqa: RUF012 - jinja2 declares the attribute so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template with the special tokens that it may name."""

    source: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    @property
    def bos_token(self) -> str:
        return self.special_tokens.get("bos_token", "")

    @cached_property
    def takes_parts(self) -> bool:
        """Whether a content must be a list of parts, as in templates of image-text processors.

        Some of them take a question as text, but a system message only as a list.
        """
        question = [("user", "QuestionMark")]
        return any(
            not self._writes(texts, as_parts=False) and self._writes(texts, as_parts=True)
            for texts in (question, [("system", "SystemMark"), *question])
        )

    def _writes(self, texts: Sequence[tuple[str, str]], *, as_parts: bool) -> bool:
        messages = [{"role": role, "content": text} for role, text in texts]
        try:
            rendered = self._render(_in_parts(messages) if as_parts else messages)
        except RenderRefusedError:
            return False
        return all(text in rendered for _, text in texts)

    def render(
        self,
        dialogue: Dialogue,
        *,
        add_generation_prompt: bool = True,
        now: datetime | None = None,
        **variables: Any,
    ) -> str:
        """The prompt for `dialogue`. Raises RenderRefusedError when the template does not take it.

        Contents are texts; a template that takes lists of parts gets each as a list of one.
        now: what the template sees as the date; None takes `strftime_now` away, so that a
        template which prints the date falls back on the one written in it, and gives the day of
        this process to a template that has none.
        """
        messages: Sequence[Mapping[str, Any]] = dialogue
        return self._render(
            _in_parts(messages) if self.takes_parts else messages,
            now,
            add_generation_prompt=add_generation_prompt,
            **variables,
        )

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        now: datetime | None = None,
        **variables: Any,
    ) -> str:
        given = {
            "messages": [dict(message) for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
            **self.special_tokens,
            **variables,
        }
        try:
            return _compiled(self.source, now).render(given)
        except jinja2.UndefinedError as error:
            if now is None and "strftime_now" in str(error):
                return self._render(messages, _today(), **variables)
            raise RenderRefusedError(str(error)) from None
        except (jinja2.TemplateError, TypeError, KeyError, ValueError, AttributeError) as error:
            raise RenderRefusedError(str(error)) from None

    def check(self) -> None:
        """Raises jinja2.TemplateError when the source is not valid Jinja."""
        _compiled(self.source, None)


def _in_parts(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]


@lru_cache(maxsize=1)
def _today() -> datetime:
    """One day for all prompts of a process, also of one that runs past midnight."""
    return datetime.now()


@lru_cache(maxsize=16)
def _compiled(source: str, now: datetime | None) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    if now is not None:
        environment.globals["strftime_now"] = now.strftime
    return environment.from_string(source)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def special_tokens(folder: Path) -> dict[str, str]:
    """{"bos_token": "<s>", …} of a checkpoint folder; tokens that it does not have are left out."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = Path(folder) / name
        content = load_json(path) if path.is_file() else {}
        for key in _SPECIAL_TOKENS:
            value = content.get(key)
            if isinstance(value, Mapping):
                value = value.get("content")
            if isinstance(value, str):
                found[key] = value
    return found


def find_chat_template(folder: Path) -> ChatTemplate | None:
    """The chat template of a checkpoint folder, or None where it has none.

    Looked for where transformers looks: chat_template.jinja, tokenizer_config.json, and the older
    chat_template.json. Of several named templates the one called "default" is taken.
    Raises UserError when the template is not valid Jinja.
    """
    folder = Path(folder)
    finders: list[Callable[[], tuple[Any, str]]] = [
        lambda: _read_text(folder / "chat_template.jinja"),
        lambda: _read_key(folder / "tokenizer_config.json"),
        lambda: _read_key(folder / "chat_template.json"),
    ]
    for find in finders:
        source, where = find()
        if isinstance(source, list):
            named = {entry["name"]: entry["template"] for entry in source if "template" in entry}
            source = named.get("default") or next(iter(named.values()), None)
        if isinstance(source, str) and source.strip():
            template = ChatTemplate(source, special_tokens(folder))
            try:
                template.check()
            except jinja2.TemplateError as error:
                raise UserError.one(
                    f"the chat template is not valid Jinja: {error}",
                    where,
                    "mend it, or choose a template with --conv-template",
                ) from None
            return template
    return None


def _read_text(path: Path) -> tuple[str | None, str]:
    return (path.read_text(encoding="utf-8") if path.is_file() else None), str(path)


def _read_key(path: Path) -> tuple[Any, str]:
    content = load_json(path) if path.is_file() else {}
    return content.get("chat_template"), str(path)
