"""MLC's conversation template: its schema, and the prompt that it renders from a list of messages.

The schema is the `conv_template` object of mlc-chat-config.json, as mlc_llm writes and reads it:

    <system> <roles[user]><role_content_sep><message><seps[0]> <roles[assistant]>... <seps[1]>
    ... <roles[assistant]><role_empty_sep>

A prompt is rendered into segments that say whether a piece of text comes from the template or
from a message. The tokenizer needs to know: `<|im_end|>` written by the template is a control
token, the same characters typed by a user are only text.

Pure Python: build/ imports this to write and to check templates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from mlcawq.errors import Problem, UserError

SYSTEM_PLACEHOLDER = "{system_message}"
FUNCTION_PLACEHOLDER = "{function_string}"
PLACEHOLDERS = {
    "user": "{user_message}",
    "assistant": "{assistant_message}",
    "tool": "{tool_message}",
}

Message = Mapping[str, Any]
"""{"role": "system"|"user"|"assistant"|"tool", "content": text or [{"type": "text", "text": …}]}"""


@dataclass(frozen=True)
class Segment:
    """A run of prompt text. `control`: written by the template, so special tokens in it count."""

    text: str
    control: bool


@dataclass(frozen=True)
class Conversation:
    """One conversation template. Field names and defaults are those of mlc_llm's `Conversation`.

    Two fields are ours, and mlc_llm ignores them. With `system_optional` an empty system message
    leaves the system template out, as most Hugging Face templates have it; without it the system
    template is rendered around the empty text, as mlc_llm does. `without_system` is what stands
    in place of a system template that is left out: often nothing, in some formats an empty block.
    """

    roles: Mapping[str, str]
    seps: Sequence[str]
    name: str | None = None
    system_template: str = SYSTEM_PLACEHOLDER
    system_message: str = ""
    system_prefix_token_ids: Sequence[int] | None = None
    add_role_after_system_message: bool = True
    role_templates: Mapping[str, str] = field(default_factory=dict)
    messages: Sequence[tuple[str, Any]] = ()
    role_content_sep: str = ""
    role_empty_sep: str = ""
    stop_str: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    strip_reasoning_in_history: bool = False
    function_string: str = ""
    use_function_calling: bool = False
    system_optional: bool = False
    without_system: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "role_templates", {**PLACEHOLDERS, **self.role_templates})

    # ------------------------------------------------------------------ reading and writing

    @classmethod
    def from_dict(cls, data: object, where: str = "conv_template") -> Conversation:
        """Read the `conv_template` object of mlc-chat-config.json.

        Raises UserError with every wrong or missing field. A field that this version does not
        know is an error when it is set, because it would change the prompt.
        """
        if not isinstance(data, Mapping):
            raise UserError.one(
                f"conv_template is {_brief(data)}, not an object"
                + (" (only the name of a template)" if isinstance(data, str) else ""),
                where,
                "write the whole template there: run `mlcawq gen-config` with --conv-template",
            )
        problems: list[Problem] = []
        values: dict[str, Any] = {}
        known = {f.name for f in fields(cls)}
        for key, value in data.items():
            if key not in known:
                if value:
                    problems.append(
                        Problem(f"unknown field {key!r} = {_brief(value)}", where, "remove it")
                    )
                continue
            if value is None and key in ("name", "system_prefix_token_ids"):
                continue
            expected, valid = _CHECKS[key]
            if not valid(value):
                problems.append(
                    Problem(f"{key} is {_brief(value)}", where, f"it must be {expected}")
                )
            else:
                values[key] = value
        problems.extend(
            Problem(f"{key} is missing", where, f"it must be {_CHECKS[key][0]}")
            for key in ("roles", "seps")
            if key not in data
        )
        if "roles" in values:
            problems.extend(
                Problem(f"roles lacks {role!r}", where, "add its prefix (it may be empty)")
                for role in ("user", "assistant")
                if role not in values["roles"]
            )
        if problems:
            raise UserError(*problems)
        if "messages" in values:
            values["messages"] = tuple((role, content) for role, content in values["messages"])
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object for mlc-chat-config.json; `from_dict` reads it back equal."""
        out: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in _OURS and not value:
                continue
            if isinstance(value, Mapping):
                value = dict(value)
            elif value is not None and not isinstance(value, (str, bool)):
                value = [list(v) if isinstance(v, tuple) else v for v in value]
            out[f.name] = value
        return out

    @property
    def is_plain(self) -> bool:
        """True when the template adds no text: the model continues the prompt as it stands."""
        texts = [*self.roles.values(), *self.seps, self.role_content_sep, self.role_empty_sep]
        texts.append(self.without_system)
        bare_system = self.system_template in ("", SYSTEM_PLACEHOLDER)
        bare_roles = all(self.role_templates[r] == PLACEHOLDERS[r] for r in ("user", "assistant"))
        return not any(texts) and bare_system and bare_roles and not self.messages

    # ---------------------------------------------------------------------------- rendering

    def segments(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> list[Segment]:
        """Render messages to prompt segments, neighbours of one kind joined, none empty.

        A first message of role "system" takes the place of the template's own system message.
        `add_generation_prompt` appends the assistant's role, for the model to answer.
        Raises UserError for roles and contents that the template cannot render.
        """
        system, turns = self._split_system(messages)
        turns = [*self.messages, *turns]
        if add_generation_prompt:
            turns.append(("assistant", None))
        if self.strip_reasoning_in_history:
            turns = _strip_reasoning(turns)

        out = _SegmentList()
        had_system = self._add_system(out, system)
        separators = [self.seps[0], self.seps[-1]]
        for i, (role, content) in enumerate(turns):
            prefix = self.roles[role]
            if content is None:
                out.add(prefix + self.role_empty_sep, control=True)
                continue
            # Templates in the manner of [INST] <<SYS>> open the first turn with the system text.
            if self.add_role_after_system_message or not had_system or i > 0:
                out.add(prefix + self.role_content_sep, control=True)
            for text in _texts(content, role):
                self._add_filled(out, self.role_templates[role], PLACEHOLDERS[role], text)
            out.add(separators[role == "assistant"], control=True)
        return self._fill_function_string(out.segments)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The prompt of `segments` as one string; system_prefix_token_ids come before it."""
        rendered = self.segments(messages, add_generation_prompt=add_generation_prompt)
        return "".join(segment.text for segment in rendered)

    def _split_system(self, messages: Sequence[Message]) -> tuple[str, list[tuple[str, Any]]]:
        system = self.system_message
        turns: list[tuple[str, Any]] = []
        problems: list[Problem] = []
        for i, message in enumerate(messages):
            role, content = str(message.get("role")), message.get("content")
            where = f"message {i}"
            if role == "system":
                if i > 0:
                    problems.append(Problem("a system message after the first", where, "move it"))
                elif content and SYSTEM_PLACEHOLDER not in self.system_template:
                    problems.append(
                        Problem(
                            "this model's conversation template has no place for a system message",
                            where,
                            "leave it out, or put it into the first user message",
                        )
                    )
                else:
                    system = "".join(_texts("" if content is None else content, "system"))
            elif role not in self.roles or role not in self.role_templates:
                known = ", ".join(["system", *self.roles])
                problems.append(Problem(f"unknown role {role!r}", where, f"use one of: {known}"))
            else:
                turns.append((role, "" if content is None else content))
        if problems:
            raise UserError(*problems)
        return system, turns

    def _add_system(self, out: _SegmentList, system: str) -> bool:
        """Open the prompt. Returns whether the system template wrote something."""
        if self.system_optional and not system:
            out.add(self.without_system, control=True)
            return False
        self._add_filled(out, self.system_template, SYSTEM_PLACEHOLDER, system)
        return bool(out.segments)

    @staticmethod
    def _add_filled(out: _SegmentList, template: str, placeholder: str, text: str) -> None:
        for i, piece in enumerate(template.split(placeholder)):
            if i > 0:
                out.add(text, control=False)
            out.add(piece, control=True)

    def _fill_function_string(self, segments: list[Segment]) -> list[Segment]:
        """The last function placeholder of the template gets the functions, others vanish."""
        holders = [
            i for i, s in enumerate(segments) if s.control and FUNCTION_PLACEHOLDER in s.text
        ]
        out = list(segments)
        for i in holders:
            text = segments[i].text
            if i == holders[-1]:
                text = self.function_string.join(text.rsplit(FUNCTION_PLACEHOLDER, 1))
            out[i] = Segment(text.replace(FUNCTION_PLACEHOLDER, ""), control=True)
        return [segment for segment in out if segment.text]


class _SegmentList:
    """Segments being collected: empty texts dropped, neighbours of one kind joined."""

    def __init__(self) -> None:
        self.segments: list[Segment] = []

    def add(self, text: str, *, control: bool) -> None:
        if not text:
            return
        if self.segments and self.segments[-1].control == control:
            text = self.segments.pop().text + text
        self.segments.append(Segment(text, control))


def _texts(content: Any, role: str) -> list[str]:
    """The text parts of a message's content (a string, or OpenAI's list of parts)."""
    if isinstance(content, str):
        return [content]
    if isinstance(content, Sequence):
        kinds = [part.get("type") if isinstance(part, Mapping) else None for part in content]
        if all(kind == "text" for kind in kinds):
            return [str(part.get("text", "")) for part in content]
        odd = next(kind for kind in kinds if kind != "text")
        what = f"a part of type {odd!r}"
    else:
        what = f"a content that is {_brief(content)}"
    raise UserError.one(f"a {role} message has {what}", fix="only text can be rendered")


def _strip_reasoning(turns: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Drop <think>…</think> from the answers before the last user turn, as Qwen3's template."""
    last_user = max((i for i, (role, _) in enumerate(turns) if role == "user"), default=-1)
    out = []
    for i, (role, content) in enumerate(turns):
        if role == "assistant" and i < last_user and isinstance(content, str):
            content = (
                content.rsplit("</think>", 1)[1].lstrip("\n") if "</think>" in content else content
            )
        out.append((role, content))
    return out


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)


def _is_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _is_string_map(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(k, str) and isinstance(v, str) for k, v in value.items()
    )


def _is_turns(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(v, (list, tuple)) and len(v) == 2 and isinstance(v[0], str) for v in value
    )


_OURS = ("system_optional", "without_system")
"""Fields that mlc_llm does not have: written only where they say something."""

_STRING = ("a string", lambda v: isinstance(v, str))
_BOOL = ("true or false", lambda v: isinstance(v, bool))
_IDS = ("a list of token ids", _is_ids)
_STRINGS = ("a list of strings", _is_strings)
_STRING_MAP = ("an object of strings", _is_string_map)
_CHECKS: dict[str, tuple[str, Any]] = {
    "name": _STRING,
    "system_template": _STRING,
    "system_message": _STRING,
    "system_prefix_token_ids": _IDS,
    "add_role_after_system_message": _BOOL,
    "roles": _STRING_MAP,
    "role_templates": _STRING_MAP,
    "messages": ("a list of [role, text] pairs", _is_turns),
    "seps": ("a list of one or two strings", lambda v: _is_strings(v) and len(v) in (1, 2)),
    "role_content_sep": _STRING,
    "role_empty_sep": _STRING,
    "stop_str": _STRINGS,
    "stop_token_ids": _IDS,
    "strip_reasoning_in_history": _BOOL,
    "function_string": _STRING,
    "use_function_calling": _BOOL,
    "system_optional": _BOOL,
    "without_system": _STRING,
}
