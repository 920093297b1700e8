"""Choosing the conversation template of a built folder, and saying how faithful it is.

The standard is the model's own chat template: whatever is chosen is rendered side by side with it
on a set of dialogues, and every difference is reported. A template of templates/conversation whose
rendering is the same is taken for its name; otherwise one is derived from the rendering itself.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from mlcawq.build.chat_template import ChatTemplate, Dialogue, RenderRefusedError
from mlcawq.build.conversation_derive import (
    NotDerivableError,
    assistant,
    derive,
    system,
    user,
)
from mlcawq.build.conversation_presets import PLAIN, bind, preset, preset_names, presets
from mlcawq.build.model_tokens import ModelTokens
from mlcawq.checkpoint.config import load_json
from mlcawq.engine.conversation import Conversation
from mlcawq.errors import UserError

DERIVED = "from-chat-template"

_PROSE = "Name three rivers.\nThen say:  which is longest? (Größe, 東京, 1+1=2)"
_LIST = "1. Nile\n2. Amazon\n3. Danube"
PROBES: dict[str, Dialogue] = {
    "one question": [user("Hello there")],
    "a question after a system message": [system("Be brief."), user("Hello there")],
    "a second question": [user("Hi"), assistant("Good day."), user(_PROSE)],
    "a second question after a system message": [
        system("You answer in verse.\nAlways."),
        user(_PROSE),
        assistant(_LIST),
        user("And in Asia?"),
    ],
    "a third question": [
        user("One?"),
        assistant("Two."),
        user("Three?"),
        assistant("Four."),
        user("Five?"),
    ],
    "an earlier answer with its reasoning": [
        user("What is 2+2?"),
        assistant("<think>\nTwo and two.\n</think>\n\n4"),
        user("And 3+3?"),
    ],
}


@dataclass(frozen=True)
class Difference:
    """One dialogue that renders differently; None stands for a refusal to render it."""

    probe: str
    expected: str | None
    got: str | None

    def __str__(self) -> str:
        if self.expected is None:
            return f"{self.probe}: the model's template refuses it, the built folder renders it"
        if self.got is None:
            return f"{self.probe}: the model's template renders it, the built folder refuses it"
        at = _first_difference(self.expected, self.got)
        return (
            f"{self.probe}: differs from character {at} on\n"
            f"    model's template: {_excerpt(self.expected, at)}\n"
            f"    built folder:     {_excerpt(self.got, at)}"
        )


@dataclass(frozen=True)
class TemplateChoice:
    """conversation: what goes into mlc-chat-config.json, token ids filled in.

    origin: "matched" (a shipped template with the same rendering), "derived", "given" by the
        user, or "none" (no chat template: plain continuation).
    differences: dialogues that render differently; empty means that the two agree.
    notes: behaviour of the model's template that a built folder does not have.
    """

    conversation: Conversation
    origin: str
    differences: tuple[Difference, ...] = ()
    notes: tuple[str, ...] = ()

    def report(self) -> list[str]:
        """What a user should read about the choice, one entry a line or a block of lines."""
        name = self.conversation.name
        lines = {
            "matched": [f"conversation template: {name}"],
            "derived": ["conversation template: derived from the model's own chat template"],
            "given": [f"conversation template: {name}, as asked"],
            "none": [
                "conversation template: none; the checkpoint has no chat template, so chat will "
                "continue plain text (choose one with --conv-template)"
            ],
        }[self.origin]
        if self.differences:
            lines.append(
                f"warning: {len(self.differences)} of {len(PROBES)} test dialogues render "
                "differently from the model's own template:"
            )
            lines += [f"  {difference}" for difference in self.differences]
        return lines + [f"note: {note}" for note in self.notes]


def choose(
    template: ChatTemplate | None, tokens: ModelTokens, asked: str | None = None
) -> TemplateChoice:
    """The conversation template for a model.

    template: the model's own, None where it has none; asked: --conv-template, a name or a file.
    Raises UserError when `asked` is neither, or when no template can be derived.
    """
    if asked is not None:
        conversation = _asked(asked, tokens)
        if template is None:
            return TemplateChoice(conversation, "given")
        found = compare(conversation, template, tokens)
        return TemplateChoice(conversation, "given", tuple(found), tuple(notes(template)))
    if template is None:
        return TemplateChoice(bind(presets()[PLAIN], tokens), "none")
    expected = _render_probes(template)
    bound_presets = [bind(shipped, tokens) for shipped in presets().values()]
    # A template that opens with a bos, for a model that has none, may have come to render what
    # another one is made for (Hermes 3 and Qwen 2 differ in the bos alone): those are tried last.
    lost = [
        shipped.system_prefix_token_ids is not None and bound.system_prefix_token_ids is None
        for shipped, bound in zip(presets().values(), bound_presets, strict=True)
    ]
    for _, bound in sorted(zip(lost, bound_presets, strict=True), key=lambda pair: pair[0]):
        if not bound.is_plain and not any(_differences(bound, expected, tokens)):
            return TemplateChoice(
                _with_derived_stops(bound, template, tokens),
                "matched",
                notes=tuple(notes(template)),
            )
    try:
        conversation = derive(template, tokens, DERIVED)
    except NotDerivableError as error:
        raise UserError.one(
            f"no conversation template can be made from the model's chat template: {error}",
            "chat_template",
            f"choose one with --conv-template ({', '.join(preset_names())}, or a JSON file)",
        ) from None
    found = compare(conversation, template, tokens)
    return TemplateChoice(conversation, "derived", tuple(found), tuple(notes(template)))


def compare(
    conversation: Conversation, template: ChatTemplate, tokens: ModelTokens
) -> list[Difference]:
    """The probes that `conversation` renders otherwise than the model's template does."""
    return list(_differences(conversation, _render_probes(template), tokens))


@dataclass(frozen=True)
class _Expected:
    """What the model's template makes of one probe.

    text: None where it refuses. drops_system: it renders the rest and leaves the system message
    out; refusing such a dialogue is then right.
    """

    text: str | None
    drops_system: bool


def _render_probes(template: ChatTemplate) -> dict[str, _Expected]:
    expected = {}
    for name, dialogue in PROBES.items():
        try:
            text = template.render(dialogue)
        except RenderRefusedError:
            expected[name] = _Expected(None, drops_system=False)
            continue
        first = dialogue[0]
        drops_system = first["role"] == "system" and first["content"] not in text
        expected[name] = _Expected(text, drops_system)
    return expected


def _differences(
    conversation: Conversation, expected: Mapping[str, _Expected], tokens: ModelTokens
) -> Iterator[Difference]:
    """Rendered one probe at a time, so that a template that is not the one is soon given up."""
    texts = {i: text for text, i in tokens.added.items()}
    prefix = "".join(texts.get(i, f"<{i}>") for i in conversation.system_prefix_token_ids or ())
    for name, dialogue in PROBES.items():
        got: str | None
        try:
            got = prefix + conversation.render(dialogue)
        except UserError:
            got = None
        if expected[name].text != got and not (got is None and expected[name].drops_system):
            yield Difference(name, expected[name].text, got)


def notes(template: ChatTemplate) -> list[str]:
    """What the model's template does that MLC's schema has no words for."""
    out = []
    try:
        dates = [template.render([user("Hi")], now=datetime(year, 3, 4)) for year in (2019, 2031)]
        if dates[0] != dates[1]:
            out.append(
                "the model's template writes today's date into the prompt; the built folder keeps "
                "one date: the template's own where it has one, else the day of the build"
            )
        padded = template.render([user("  Hi \n")])
        if "  Hi \n" not in padded and "Hi" in padded:
            out.append("the model's template strips white space around a message; send none")
    except RenderRefusedError:
        pass
    try:
        if "Be brief." not in template.render([system("Be brief."), user("Hi")]):
            out.append("the model's template ignores system messages; chat refuses them")
    except RenderRefusedError:
        out.append("the model's template takes no system message")
    if "enable_thinking" in template.source:
        out.append("thinking is left as the model's template has it by default (enable_thinking)")
    return out


def _with_derived_stops(
    bound: Conversation, template: ChatTemplate, tokens: ModelTokens
) -> Conversation:
    """A matched template also stops at the tokens that close an answer in the model's own."""
    try:
        own = derive(template, tokens, DERIVED).stop_token_ids
    except NotDerivableError:
        own = ()
    ids = dict.fromkeys([*bound.stop_token_ids, *own])
    return replace(bound, stop_token_ids=tuple(ids))


def read_asked(asked: str) -> Conversation:
    """--conv-template as it is written: a shipped name, or a JSON file.

    Raises UserError when it is neither.
    """
    shipped = preset(asked)
    if shipped is not None:
        return shipped
    path = Path(asked)
    if not path.is_file():
        near = difflib.get_close_matches(asked, preset_names(), n=3)
        raise UserError.one(
            f"no conversation template {asked!r}",
            "--conv-template",
            (f"did you mean {' or '.join(near)}? Else " if near else "")
            + f"give a JSON file, or one of {', '.join(preset_names())}",
        )
    content = load_json(path)
    conversation = Conversation.from_dict(content.get("conv_template", content), str(path))
    if conversation.name is None:
        conversation = replace(conversation, name=path.stem)
    return conversation


def _asked(asked: str, tokens: ModelTokens) -> Conversation:
    """--conv-template for this model; the token ids of a file are left as they are."""
    conversation = read_asked(asked)
    if preset(asked) is not None:
        return bind(conversation, tokens)
    ids = [*conversation.stop_token_ids, *tokens.eos_ids]
    return replace(conversation, stop_token_ids=tuple(dict.fromkeys(ids)))


def _first_difference(a: str, b: str) -> int:
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def _excerpt(text: str, at: int, before: int = 24, after: int = 48) -> str:
    start = max(0, at - before)
    head = "…" if start else ""
    tail = "…" if at + after < len(text) else ""
    return f"{head}{text[start : at + after]!r}{tail}"
