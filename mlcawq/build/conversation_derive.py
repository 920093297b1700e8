"""A conversation template in MLC's schema, read off the renderings of a Jinja chat template.

Short dialogues whose messages are marks are rendered with the model's own template. The text
between the marks is what the template writes there, and is cut into MLC's fields (system template,
roles, separators). Nothing of the Jinja source is interpreted. What the schema cannot say comes
out as a difference when the result is compared with further renderings (conversation_match).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mlcawq.build.chat_template import ChatTemplate, RenderRefusedError
from mlcawq.build.model_tokens import ModelTokens
from mlcawq.engine.conversation import PLACEHOLDERS, SYSTEM_PLACEHOLDER, Conversation

_SYSTEM, _USER, _ANSWER, _USER2, _ANSWER2 = (
    "SystemMark",
    "FirstQuestionMark",
    "FirstAnswerMark",
    "SecondQuestionMark",
    "SecondAnswerMark",
)
_THOUGHT = "ThoughtMark"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


class NotDerivableError(Exception):
    """The template does not even render a question, an answer and a question."""


@dataclass(frozen=True)
class _Turns:
    """What the template writes around messages without a system message.

    opening: before the first question; to_answer: between a question and its answer;
    to_question: between an answer and the next question; to_reply: after the last question,
    with the generation prompt; user_end, answer_end: after a last question or answer without one.
    """

    opening: str
    to_answer: str
    to_question: str
    to_reply: str
    user_end: str
    answer_end: str


def derive(template: ChatTemplate, tokens: ModelTokens, name: str) -> Conversation:
    """The Conversation that renders as `template` does. Raises NotDerivableError."""
    turns = _turns(template)
    bos = template.bos_token
    has_bos = bool(bos) and turns.opening.startswith(bos) and tokens.id_of(bos) is not None
    opening = turns.opening[len(bos) :] if has_bos else turns.opening

    user_prefix, answer_sep = _split_question(opening, turns)
    before_user = opening[: len(opening) - len(user_prefix)]
    user_sep, answer_prefix, reply_prefix = _split_answer(turns)
    stop_ids, stop_texts = _stops(turns, user_prefix, tokens, bos)
    common = _common_prefix(answer_prefix, reply_prefix)
    conversation = Conversation(
        name=name,
        roles={"user": user_prefix, "assistant": common},
        role_templates={
            "assistant": answer_prefix[len(common) :] + PLACEHOLDERS["assistant"],
        },
        role_empty_sep=reply_prefix[len(common) :],
        seps=(user_sep,) if user_sep == answer_sep else (user_sep, answer_sep),
        system_prefix_token_ids=(tokens.require(bos),) if has_bos else None,
        strip_reasoning_in_history=strips_reasoning(template),
        stop_token_ids=stop_ids,
        stop_str=stop_texts,
    )
    conversation = _with_system(
        conversation, template, bos if has_bos else "", before_user, user_prefix
    )
    return _tidy(conversation)


def strips_reasoning(template: ChatTemplate) -> bool:
    """Whether <think>…</think> in an earlier answer is left out of the prompt."""
    thinking = f"<think>\n{_THOUGHT}\n</think>\n\n{_ANSWER}"
    try:
        text = template.render([user(_USER), assistant(thinking), user(_USER2)])
    except RenderRefusedError:
        return False
    return _THOUGHT not in text and _ANSWER in text


def _between(text: str, marks: Sequence[str]) -> list[str] | None:
    """The len(marks) + 1 pieces around `marks`, or None unless each occurs once, in this order."""
    if any(text.count(mark) != 1 for mark in marks):
        return None
    pieces = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found:
            return None
        pieces.append(before)
    return [*pieces, text]


def _turns(template: ChatTemplate) -> _Turns:
    dialogue = [user(_USER), assistant(_ANSWER), user(_USER2)]
    marks = (_USER, _ANSWER, _USER2)
    try:
        pieces = _between(template.render(dialogue), marks)
        bare = _between(template.render(dialogue, add_generation_prompt=False), marks)
    except RenderRefusedError as error:
        raise NotDerivableError(
            f"it refuses a dialogue of user, assistant, user: {error}"
        ) from None
    if pieces is None or bare is None:
        raise NotDerivableError("it does not write each message once, in order")
    ended = None
    try:
        closed = template.render([*dialogue, assistant(_ANSWER2)], add_generation_prompt=False)
        ended = _between(closed, (*marks, _ANSWER2))
    except RenderRefusedError:
        pass
    opening, to_answer, to_question, to_reply = pieces
    answer_end = ended[-1] if ended else ""
    return _Turns(opening, to_answer, to_question, to_reply, bare[-1], answer_end)


def _split_question(opening: str, turns: _Turns) -> tuple[str, str]:
    """(prefix of a question, separator after an answer): between them they are `to_question`."""
    prefix = turns.to_question.removeprefix(turns.answer_end)
    if len(prefix) < len(turns.to_question) and opening.endswith(prefix):
        return prefix, turns.answer_end
    # The end of a dialogue is no guide (an eos only there, a bos before each turn): what the first
    # and a later question have in common is the prefix.
    prefix = _common_suffix(opening, turns.to_question)
    return prefix, turns.to_question[: len(turns.to_question) - len(prefix)]


def _split_answer(turns: _Turns) -> tuple[str, str, str]:
    """(separator after a question, prefix of an answer, prefix of the answer to be written)."""
    sep = turns.user_end
    if sep == turns.to_reply or not (
        turns.to_answer.startswith(sep) and turns.to_reply.startswith(sep)
    ):
        sep = ""
    return sep, turns.to_answer[len(sep) :], turns.to_reply[len(sep) :]


def _with_system(
    conversation: Conversation, template: ChatTemplate, bos: str, before_user: str, prefix: str
) -> Conversation:
    """Add the system fields. `before_user`: what comes before the first role when none is given."""
    try:
        rendered = template.render([system(_SYSTEM), user(_USER)])
    except RenderRefusedError:
        rendered = ""
    pieces = _between(rendered.removeprefix(bos), (_SYSTEM, _USER))
    if pieces is None:  # refused, ignored, or repeated: there is no place for a system message
        return replace(conversation, system_template=before_user)
    before, after, _ = pieces
    role_follows = after.endswith(prefix)
    if role_follows:
        after = after[: len(after) - len(prefix)]
        default = _middle(before_user, before, after)
    else:
        default = _middle(before_user + prefix, before, after)
    return replace(
        conversation,
        system_template=before + SYSTEM_PLACEHOLDER + after,
        add_role_after_system_message=role_follows,
        system_message=default or "",
        # Unless a default message was recognised, what opens a dialogue without one is a text of
        # its own: mostly nothing.
        system_optional=default is None,
        without_system=before_user if default is None else "",
    )


def _middle(text: str, before: str, after: str) -> str | None:
    """The default system message in `text`, or None when it is not `before`…`after`."""
    long_enough = text and len(text) >= len(before) + len(after)
    if long_enough and text.startswith(before) and text.endswith(after):
        return text[len(before) : len(text) - len(after)]
    return None


def _stops(
    turns: _Turns, user_prefix: str, tokens: ModelTokens, bos: str
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Stop ids (the model's ends of text, the control tokens that close an answer), stop texts.

    Where an answer is closed by plain text alone, the mark of the next question stops it: its
    first control token, or its text.
    """
    closing, after = (
        [tokens.id_of(text) for text in tokens.control_tokens_in(part) if text != bos]
        for part in (turns.answer_end, turns.to_question)
    )
    ids = closing or after[:1]
    stop_ids = dict.fromkeys([*tokens.eos_ids, *(i for i in ids if i is not None)])
    mark = user_prefix.strip()
    return tuple(stop_ids), (mark,) if not ids and len(mark) > 2 else ()


def _tidy(conversation: Conversation) -> Conversation:
    """Move the white space that ends both roles into role_content_sep, as MLC's own files do."""
    if conversation.role_templates["assistant"] != PLACEHOLDERS["assistant"]:
        return conversation
    ends = {re.search(r"\s*$", role).group() for role in conversation.roles.values()}  # type: ignore[union-attr]
    if len(ends) != 1:
        return conversation
    (end,) = ends
    keep = {role: text[: len(text) - len(end)] for role, text in conversation.roles.items()}
    return replace(
        conversation,
        roles=keep,
        role_content_sep=end,
        role_empty_sep=end + conversation.role_empty_sep,
    )


def _common_prefix(a: str, b: str) -> str:
    size = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    return a[: min(len(a), len(b)) if size is None else size]


def _common_suffix(a: str, b: str) -> str:
    return _common_prefix(a[::-1], b[::-1])[::-1]
