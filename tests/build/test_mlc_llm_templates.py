"""Every template name of mlc_llm's is accepted; what each renders, beside mlc_llm's own."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlc_llm_templates import DIFFERENCES, NAMES, UNREGISTERED, VERSION

from mlcawq.build import mlc_plugin
from mlcawq.build.conversation_derive import user
from mlcawq.build.conversation_match import PROBES, choose
from mlcawq.build.conversation_presets import preset, presets
from mlcawq.build.model_tokens import ModelTokens
from mlcawq.engine.conversation import SYSTEM_PLACEHOLDER, Conversation
from mlcawq.errors import UserError

PROBE = Path(__file__).with_name("mlc_templates_probe.py")
TOKENS = ModelTokens({"<s>": 1, "</s>": 2}, bos="<s>", eos_ids=(2,), opens_with_bos=True)


def without_our_fields(conversation: Conversation) -> Conversation:
    """As mlc_llm reads it."""
    return replace(conversation, system_optional=False, without_system="")


@pytest.mark.parametrize("name", NAMES)
def test_every_name_of_mlc_llm_is_a_template_of_ours(name: str) -> None:
    choice = choose(None, TOKENS, name)
    assert choice.origin == "given"
    assert "How are you?" in choice.conversation.render([user("How are you?")])
    assert 2 in choice.conversation.stop_token_ids


@pytest.mark.parametrize("name", sorted(presets()))
def test_a_reader_that_ignores_our_fields_renders_every_message(name: str) -> None:
    """It only opens otherwise where no system message is given."""
    shipped, read = presets()[name], without_our_fields(presets()[name])
    for dialogue in PROBES.values():
        first = dialogue[0]["content"]
        if dialogue[0]["role"] != "system":
            texts = [conversation.render(dialogue) for conversation in (shipped, read)]
            after_opening = [text[text.index(first) :] for text in texts]
            assert after_opening[0] == after_opening[1]
        elif SYSTEM_PLACEHOLDER in read.system_template:
            assert read.render(dialogue) == shipped.render(dialogue)


@pytest.fixture(scope="module")
def theirs(mlc_python: Path) -> dict[str, Any]:
    asked = {
        "plugin": str(Path(mlc_plugin.__file__).with_name("__main__.py")),
        "dialogues": {name: list(dialogue) for name, dialogue in PROBES.items()},
        "ours": {name: conversation.to_dict() for name, conversation in presets().items()},
    }
    done = subprocess.run(
        [str(mlc_python), str(PROBE)],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.mlc_llm
def test_the_list_of_names_is_that_of_the_installed_mlc_llm(theirs: dict[str, Any]) -> None:
    here = f"; the list is of {VERSION}"
    assert set(theirs["accepted"]) == set(NAMES), here
    assert set(theirs["templates"]) == set(NAMES) - UNREGISTERED, here


@pytest.mark.mlc_llm
def test_a_template_renders_here_as_in_mlc_llm(theirs: dict[str, Any]) -> None:
    """The schema means the same to both, in mlc_llm's templates and in ours."""
    for name, fields in theirs["templates"].items():
        assert_same_prompts(Conversation.from_dict(fields, name), theirs["prompts"][name])
    for name, conversation in presets().items():
        assert_same_prompts(without_our_fields(conversation), theirs["read"][name])


def assert_same_prompts(conversation: Conversation, prompts: dict[str, str]) -> None:
    for probe, dialogue in PROBES.items():
        with_system = dialogue[0]["role"] == "system"
        if with_system and SYSTEM_PLACEHOLDER not in conversation.system_template:
            with pytest.raises(UserError):  # mlc_llm drops the message
                conversation.render(dialogue)
        else:
            assert conversation.render(dialogue) == prompts[probe], (conversation.name, probe)


@pytest.mark.mlc_llm
def test_ours_differ_from_mlc_llms_where_it_is_written(theirs: dict[str, Any]) -> None:
    differing = {name for name in theirs["templates"] if _differs(name, theirs)}
    assert differing == set(DIFFERENCES)


def _differs(name: str, theirs: dict[str, Any]) -> bool:
    ours = preset(name)
    assert ours is not None
    opens = bool(theirs["templates"][name].get("system_prefix_token_ids"))
    # Plain text opens as the tokenizer of the model says, whatever the file holds.
    if bool(ours.system_prefix_token_ids) != opens and not ours.is_plain:
        return True
    for probe, dialogue in PROBES.items():
        try:
            if ours.render(dialogue) != theirs["prompts"][name][probe]:
                return True
        except UserError:
            return True
    return False
