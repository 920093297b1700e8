"""Choosing the conversation template of a built folder, and saying how faithful it is.

The standard is the model's own chat template: whatever is chosen is rendered side by side with it
on a set of dialogues, and every difference is reported. A template of templates/conversation whose
rendering is the same is taken for its name; otherwise one is derived from the rendering itself.
"""

from __future__ import annotations

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
from mlcawq.build.model_tokens import ModelTokens
from mlcawq.checkpoint.config import load_json
from mlcawq.engine.conversation import Conversation
from mlcawq.errors import UserError
from mlcawq.resources import templates_dir

PLAIN = "LM"
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


def presets() -> dict[str, Conversation]:
    """The shipped templates by name."""
    out = {}
    for path in sorted(templates_dir("conversation").glob("*.json")):
        out[path.stem] = Conversation.from_dict(load_json(path), str(path))
    return out


def bind(conversation: Conversation, tokens: ModelTokens) -> Conversation:
    """`conversation` with this model's token ids.

    A shipped template names tokens by their text. Stop strings that are tokens become stop ids,
    beside the model's own ends of text; prefix ids, which can only be those of the model that
    somebody wrote the template for, become this model's bos (or nothing, where it has none).
    """
    ids = [*tokens.eos_ids, *(tokens.id_of(text) for text in conversation.stop_str)]
    bos = tokens.id_of(tokens.bos)
    prefix: tuple[int, ...] | None = None
    if conversation.system_prefix_token_ids is not None and bos is not None:
        prefix = (bos,)
    return replace(
        conversation,
        stop_token_ids=tuple(dict.fromkeys(i for i in ids if i is not None)),
        system_prefix_token_ids=prefix,
    )


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
        plain = bind(presets()[PLAIN], tokens)
        if tokens.opens_with_bos:
            plain = replace(plain, system_prefix_token_ids=(tokens.require(tokens.bos),))
        return TemplateChoice(plain, "none")
    for preset in presets().values():
        bound = bind(preset, tokens)
        if not bound.is_plain and not compare(bound, template, tokens):
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
            f"choose one with --conv-template ({', '.join(presets())}, or a JSON file)",
        ) from None
    found = compare(conversation, template, tokens)
    return TemplateChoice(conversation, "derived", tuple(found), tuple(notes(template)))


def compare(
    conversation: Conversation, template: ChatTemplate, tokens: ModelTokens
) -> list[Difference]:
    """The probes that `conversation` renders otherwise than the model's template does."""
    texts = {i: text for text, i in tokens.added.items()}
    prefix = "".join(texts.get(i, f"<{i}>") for i in conversation.system_prefix_token_ids or ())
    found = []
    for name, dialogue in PROBES.items():
        expected: str | None
        got: str | None
        try:
            expected = template.render(dialogue)
        except RenderRefusedError:
            expected = None
        try:
            got = prefix + conversation.render(dialogue)
        except UserError:
            got = None
        ignored = got is None and expected is not None and _ignores_system(template, dialogue)
        if expected != got and not ignored:
            found.append(Difference(name, expected, got))
    return found


def notes(template: ChatTemplate) -> list[str]:
    """What the model's template does that MLC's schema has no words for."""
    out = []
    try:
        dates = [template.render([user("Hi")], now=datetime(year, 3, 4)) for year in (2019, 2031)]
        if dates[0] != dates[1]:
            out.append(
                "the model's template writes today's date into the prompt; the built folder keeps "
                "the date that the template falls back on"
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


def _ignores_system(template: ChatTemplate, dialogue: Dialogue) -> bool:
    """Whether the template drops the system message of `dialogue`: refusing it is then right."""
    if dialogue[0]["role"] != "system":
        return False
    try:
        return dialogue[0]["content"] not in template.render(dialogue)
    except RenderRefusedError:
        return False


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
    known = presets()
    if asked in known:
        return known[asked]
    path = Path(asked)
    if not path.is_file():
        raise UserError.one(
            f"no conversation template {asked!r}",
            "--conv-template",
            f"give a JSON file, or one of {', '.join(known)}",
        )
    content = load_json(path)
    conversation = Conversation.from_dict(content.get("conv_template", content), str(path))
    if conversation.name is None:
        conversation = replace(conversation, name=path.stem)
    return conversation


def _asked(asked: str, tokens: ModelTokens) -> Conversation:
    """--conv-template for this model; the token ids of a file are left as they are."""
    conversation = read_asked(asked)
    if asked in presets():
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
