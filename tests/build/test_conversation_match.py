"""Templates found, derived and compared, against chat templates in their published form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from published_templates import PUBLISHED, Published, published
from published_templates.gemma import GEMMA_3_TOKENS
from published_templates.llama import LLAMA_2_TOKENS, LLAMA_3_2, LLAMA_3_TOKENS
from published_templates.qwen import TOKENS as QWEN
from published_templates.qwen import chatml_with_default

from mlcawq.build.chat_template import ChatTemplate, RenderRefusedError, find_chat_template
from mlcawq.build.conversation_derive import derive
from mlcawq.build.conversation_match import PROBES, choose, compare
from mlcawq.build.conversation_presets import bind, presets
from mlcawq.build.model_tokens import ModelTokens
from mlcawq.errors import UserError


def template_of(name: str) -> tuple[ChatTemplate, ModelTokens]:
    case = published(name)
    return case.template, case.tokens


def derived_only(model: str) -> tuple[ChatTemplate, ModelTokens]:
    case = next(case for case in PUBLISHED if case.model == model)
    return case.template, case.tokens


@pytest.mark.parametrize("case", [c for c in PUBLISHED if c.name is None], ids=lambda c: c.model)
def test_plain_text_formats_are_derived(case: Published) -> None:
    choice = choose(case.template, case.tokens)
    assert choice.origin == "derived"
    assert choice.differences == ()


def test_a_system_message_in_the_last_question_is_reported() -> None:
    choice = choose(*template_of("mistral-v0.3"))
    assert choice.origin == "derived"
    assert [d.probe for d in choice.differences] == ["a second question after a system message"]
    report = "\n".join(choice.report())
    assert "warning: 1 of 6 test dialogues" in report
    assert "[INST] You answer in verse." in report


@pytest.mark.parametrize("name", ["mistral-v0.3", "deepseek-r1"])
def test_a_shipped_template_differs_only_where_the_schema_ends(name: str) -> None:
    template, tokens = template_of(name)
    shipped = compare(bind(presets()[name], tokens), template, tokens)
    derived = compare(derive(template, tokens, "derived"), template, tokens)
    assert [d.probe for d in shipped] == [d.probe for d in derived]
    assert len(shipped) == 1


def test_token_ids_are_those_of_the_model() -> None:
    template, tokens = template_of("llama-3")
    conversation = choose(template, tokens).conversation
    assert list(conversation.system_prefix_token_ids or ()) == [128000]
    assert set(conversation.stop_token_ids) == {128001, 128009}
    chatml, tokens = template_of("chatml")
    assert choose(chatml, tokens).conversation.system_prefix_token_ids is None
    assert set(derive(chatml, tokens, "x").stop_token_ids) == {32000, 2}


def test_a_text_format_stops_at_the_next_question() -> None:
    assert choose(*derived_only("alpaca")).conversation.stop_str == ("### Instruction:",)
    assert choose(*derived_only("lmsys/vicuna-7b-v1.5")).conversation.stop_str == ()
    template, tokens = template_of("nemotron")
    marked = derive(template, tokens, "x")
    assert marked.stop_str == ()
    assert set(marked.stop_token_ids) == {tokens.require("</s>"), tokens.require("<extra_id_1>")}


def test_the_default_system_message_is_found() -> None:
    source = chatml_with_default("You are a pirate.")
    choice = choose(ChatTemplate(source), QWEN)
    assert choice.origin == "derived"
    assert choice.conversation.system_message == "You are a pirate."
    assert choice.differences == ()


def test_reasoning_in_earlier_answers_is_noticed() -> None:
    template, tokens = template_of("qwen3")
    assert derive(template, tokens, "x").strip_reasoning_in_history
    template, tokens = template_of("chatml")
    assert not derive(template, tokens, "x").strip_reasoning_in_history


def test_a_date_is_frozen_and_said() -> None:
    template = ChatTemplate(LLAMA_3_2, {"bos_token": "<|begin_of_text|>"})
    choice = choose(template, LLAMA_3_TOKENS)
    assert choice.conversation.name == "llama-3_1"
    assert any("today's date" in note for note in choice.notes)
    fixed, tokens = template_of("llama-3_1")
    assert not any("today's date" in note for note in choose(fixed, tokens).notes)


def test_a_bos_that_the_model_lacks_does_not_decide() -> None:
    """Without its bos the template of Hermes 3 renders as that of Qwen 2 does, for any model."""
    template, tokens = template_of("qwen2")
    assert bind(presets()["hermes3_llama-3_1"], tokens).system_prefix_token_ids is None
    assert choose(template, tokens).conversation.name == "qwen2"


def test_prefix_tokens_of_a_family_are_kept_for_it_alone() -> None:
    glm = presets()["glm"]
    assert bind(glm, template_of("glm")[1]).system_prefix_token_ids == (64790, 64792)
    assert bind(glm, QWEN).system_prefix_token_ids is None
    assert bind(glm, LLAMA_2_TOKENS).system_prefix_token_ids == (1,)


def test_content_is_given_as_parts_where_the_template_wants_them() -> None:
    assert template_of("llava")[0].takes_parts
    assert not template_of("gemma3_instruction")[0].takes_parts
    assert not template_of("gemma_instruction")[0].takes_parts
    assert not ChatTemplate("{{ raise_exception('no') }}").takes_parts
    gemma_3 = published("gemma3_instruction").source
    first_edition = gemma_3.replace("messages[0]['content'] is string", "false")
    assert ChatTemplate(first_edition).takes_parts
    choice = choose(ChatTemplate(first_edition, {"bos_token": "<bos>"}), GEMMA_3_TOKENS)
    assert choice.conversation.name == "gemma3_instruction"


def test_a_template_with_no_date_of_its_own_gets_the_day_of_the_build() -> None:
    source = "{{ 'Today: ' + strftime_now('%Y-%m-%d') + '\n' }}" + published("chatml").source
    choice = choose(ChatTemplate(source), QWEN)
    assert choice.differences == ()
    opening = choice.conversation.without_system
    assert opening.startswith("Today: 20")
    assert ChatTemplate(source).render([]).startswith(opening)
    assert any("the day of the build" in note for note in choice.notes)


def test_trimmed_and_refused_content_is_noted() -> None:
    notes = choose(*template_of("gemma_instruction")).notes
    assert any("white space" in note for note in notes)
    assert any("no system message" in note for note in notes)
    assert not choose(*template_of("chatml")).notes


def test_a_refused_system_message_is_refused_by_the_built_folder_too() -> None:
    template, tokens = template_of("gemma_instruction")
    conversation = derive(template, tokens, "x")
    with pytest.raises(RenderRefusedError):
        template.render(PROBES["a question after a system message"])
    with pytest.raises(UserError):
        conversation.render(PROBES["a question after a system message"])


def test_no_chat_template_means_plain_continuation() -> None:
    choice = choose(None, LLAMA_2_TOKENS)
    assert choice.origin == "none"
    assert choice.conversation.is_plain
    assert choice.conversation.stop_token_ids == (2,)
    assert "plain text" in "\n".join(choice.report())
    bos_first = ModelTokens({"<s>": 1}, bos="<s>", opens_with_bos=True)
    assert choose(None, bos_first).conversation.system_prefix_token_ids == (1,)


def test_a_template_can_be_asked_for_by_name_and_its_differences_are_shown() -> None:
    template, tokens = template_of("qwen2")
    choice = choose(template, tokens, "chatml")
    assert choice.origin == "given"
    assert {d.probe for d in choice.differences} == {
        "one question",
        "a second question",
        "a third question",
        "an earlier answer with its reasoning",
    }
    first = choice.differences[0]
    assert "system" in (first.expected or "")
    assert "differs from character 12" in str(first)


def test_a_template_can_be_given_as_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    content = {"roles": {"user": "Q: ", "assistant": "A:"}, "seps": ["\n"], "stop_token_ids": [9]}
    path.write_text(json.dumps(content))
    choice = choose(None, LLAMA_2_TOKENS, str(path))
    assert choice.conversation.name == "mine"
    assert choice.conversation.stop_token_ids == (9, 2)
    with pytest.raises(UserError, match="no conversation template 'missing'"):
        choose(None, LLAMA_2_TOKENS, "missing")
    with pytest.raises(UserError, match=r"did you mean llama-3_1 or "):
        choose(None, LLAMA_2_TOKENS, "llama-3.1")


def test_an_inexpressible_template_is_an_error_that_names_the_way_out() -> None:
    source = "{% for m in messages %}{{ m['content'] }} {{ m['content'] }}{% endfor %}"
    with pytest.raises(UserError, match="--conv-template"):
        choose(ChatTemplate(source), LLAMA_2_TOKENS)


def test_templates_are_found_where_transformers_keeps_them(tmp_path: Path) -> None:
    assert find_chat_template(tmp_path) is None
    config = {
        "bos_token": {"content": "<s>"},
        "chat_template": [
            {"name": "tool_use", "template": "tools"},
            {"name": "default", "template": "{{ bos_token }}default"},
        ],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    found = find_chat_template(tmp_path)
    assert found is not None
    assert found.render([]) == "<s>default"
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    found = find_chat_template(tmp_path)
    assert found is not None
    assert found.render([{"role": "user", "content": "x"}]) == "x"
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(UserError, match="not valid Jinja"):
        find_chat_template(tmp_path)


def test_rendering_equals_transformers(tmp_path: Path) -> None:
    """White space rules, tojson, loop controls and the generation tag, as transformers has them."""
    from tiny_models import make_tokenizer

    tokenizer = make_tokenizer()
    sources = [
        *(case.source for case in PUBLISHED if "strftime_now" not in case.source),
        "{% for m in messages %}\n  {% if loop.index > 2 %}{% break %}{% endif %}\n"
        "  {{ m | tojson }}\n{% generation %}{{ m['content'] }}{% endgeneration %}\n{% endfor %}\n",
    ]
    rendered = 0
    for source in sources:
        tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
        special = dict(tokenizer.special_tokens_map)
        for dialogue in PROBES.values():
            template = ChatTemplate(source, special)
            try:
                ours = template.render(dialogue)
            except RenderRefusedError:
                continue
            rendered += 1
            messages: list[dict] = [dict(message) for message in dialogue]
            if template.takes_parts:
                for message in messages:
                    message["content"] = [{"type": "text", "text": message["content"]}]
            theirs = tokenizer.apply_chat_template(
                messages, chat_template=source, tokenize=False, add_generation_prompt=True
            )
            assert ours == theirs
    assert rendered > 5 * len(sources)
