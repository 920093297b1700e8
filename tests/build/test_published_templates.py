"""Every shipped conversation template renders what its model's publisher published."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from published_templates import DOCUMENTED, PUBLISHED, Documented, Published
from published_templates.case import TOOL_ANSWER

from mlcawq.build.conversation_derive import derive
from mlcawq.build.conversation_match import PROBES, choose, compare
from mlcawq.build.conversation_presets import ALIASES, bind, preset, preset_names, presets
from mlcawq.engine.conversation import Conversation
from mlcawq.errors import UserError

SHIPPED = [case for case in PUBLISHED if case.name is not None]
FAITHFUL = [case for case in SHIPPED if not set(case.beyond) & set(PROBES)]
WITH_TOOLS = [case for case in SHIPPED if case.name and "tool" in presets()[case.name].roles]


def by_model(cases):
    return pytest.mark.parametrize("case", cases, ids=[case.model for case in cases])


@by_model(SHIPPED)
def test_the_shipped_file_renders_what_the_publisher_published(case: Published) -> None:
    """One turn and several, with and without a system message, all but what `beyond` declares."""
    shipped = bind(presets()[case.name], case.tokens)
    differences = compare(shipped, case.template, case.tokens)
    assert {d.probe for d in differences} == set(case.beyond) - {TOOL_ANSWER}, "\n".join(
        map(str, differences)
    )


@by_model(FAITHFUL)
def test_the_published_template_is_recognised_as_its_own_file(case: Published) -> None:
    choice = choose(case.template, case.tokens)
    assert (choice.origin, choice.conversation.name) == ("matched", case.name)
    assert choice.differences == ()


@by_model(PUBLISHED)
def test_what_is_derived_from_it_is_as_good(case: Published) -> None:
    derived = derive(case.template, case.tokens, "derived")
    differences = compare(derived, case.template, case.tokens)
    assert {d.probe for d in differences} <= set(case.beyond), "\n".join(map(str, differences))


@by_model(SHIPPED)
def test_an_answer_stops_where_the_publisher_ends_it(case: Published) -> None:
    bound = bind(presets()[case.name], case.tokens)
    derived = derive(case.template, case.tokens, "derived")
    assert set(derived.stop_token_ids) <= set(bound.stop_token_ids)


@by_model(WITH_TOOLS)
def test_a_tool_answers_as_the_publisher_has_it(case: Published) -> None:
    dialogue = [
        {"role": "user", "content": "Will it rain?"},
        {"role": "assistant", "content": "weather()"},
        {"role": "tool", "content": "sunny"},
    ]
    bound = bind(presets()[case.name], case.tokens)
    texts = {i: text for text, i in case.tokens.added.items()}
    prefix = "".join(texts[i] for i in bound.system_prefix_token_ids or ())
    same = prefix + bound.render(dialogue) == case.template.render(dialogue)
    assert same == (TOOL_ANSWER not in case.beyond)


@by_model([case for case in SHIPPED if case.name in ("ministral3", "ministral3_reasoning")])
def test_functions_stand_where_the_publisher_has_them(case: Published) -> None:
    """The marks around them belong to the text of the functions: without any they vanish too."""
    tools = [{"type": "function", "function": {"name": "weather"}}]
    marked = f"[AVAILABLE_TOOLS]{json.dumps(tools)}[/AVAILABLE_TOOLS]"
    shipped = replace(presets()[case.name], function_string=marked)
    dialogue = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Rain?"}]
    assert "<s>" + shipped.render(dialogue) == case.template.render(dialogue, tools=tools)


@by_model(DOCUMENTED)
def test_the_shipped_file_renders_the_documented_prompts(case: Documented) -> None:
    shipped = replace(bind(presets()[case.name], case.tokens), function_string=case.functions)
    for dialogue, text in case.prompts:
        assert shipped.render(dialogue) == text


def test_every_shipped_file_is_held_against_a_publisher() -> None:
    held = {case.name for case in [*SHIPPED, *DOCUMENTED]}
    assert set(presets()) == held


def test_the_files_are_what_they_are_called_and_read_back() -> None:
    for name, conversation in presets().items():
        assert conversation.name == name
        assert Conversation.from_dict(conversation.to_dict()) == conversation


@by_model([*SHIPPED, *DOCUMENTED])
def test_ids_in_the_file_are_those_of_the_model(case: Published | Documented) -> None:
    """A file that is read without its model (by hand, into another folder) is right for one."""
    shipped = presets()[case.name]
    first = next(c for c in [*SHIPPED, *DOCUMENTED] if c.name == case.name)
    if first is case and shipped.stop_token_ids:
        bound = bind(shipped, case.tokens)
        assert set(shipped.stop_token_ids) == set(bound.stop_token_ids)
        prefixes = [shipped.system_prefix_token_ids, bound.system_prefix_token_ids]
        assert list(prefixes[0] or ()) == list(prefixes[1] or ())


def test_no_two_files_render_alike() -> None:
    """Otherwise which of them is recognised would hang on the alphabet; one would be an alias."""

    def rendered(conversation: Conversation) -> tuple[str | None, ...]:
        out: list[str | None] = [str(bool(conversation.system_prefix_token_ids))]
        for dialogue in PROBES.values():
            try:
                out.append(conversation.render(dialogue))
            except UserError:
                out.append(None)
        return tuple(out)

    seen: dict[tuple[str | None, ...], str] = {}
    for name, conversation in presets().items():
        assert seen.setdefault(rendered(conversation), name) == name


def test_other_names_lead_to_files() -> None:
    assert not set(ALIASES) & set(presets())
    for name in preset_names():
        found = preset(name)
        assert found is not None
        assert found.name == ALIASES.get(name, name)
    assert preset("no such template") is None
