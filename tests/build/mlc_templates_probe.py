"""Runs in an interpreter that has mlc_llm: its conversation templates, and what they render.

Reads {"plugin": path, "dialogues": {name: messages}, "ours": {name: JSON}} from stdin and prints
one object: "accepted" (the names that gen_config takes), for each registered name "templates" (its
JSON) and "prompts" (dialogue -> prompt), and "read" (the same prompts for the JSON of ours).
"""

from __future__ import annotations

import json
import runpy
import sys
from typing import Any


def prompt(template: Any, dialogue: list[dict[str, str]]) -> str:
    conversation = template.model_copy(deep=True)
    for message in dialogue:
        if message["role"] == "system":
            conversation.system_message = message["content"]
        else:
            conversation.messages.append((message["role"], message["content"]))
    conversation.messages.append(("assistant", None))
    return "".join(conversation.as_prompt())


def prompts(template: Any, dialogues: dict[str, list[dict[str, str]]]) -> dict[str, str]:
    return {name: prompt(template, dialogue) for name, dialogue in dialogues.items()}


def main() -> None:
    asked = json.load(sys.stdin)
    runpy.run_path(asked["plugin"], run_name="plugin")["make_importable"]()
    from mlcawq.build.mlc_plugin.compatibility import import_mlc_llm

    import_mlc_llm()
    from mlc_llm.conversation_template import ConvTemplateRegistry
    from mlc_llm.interface.gen_config import CONV_TEMPLATES
    from mlc_llm.protocol.conversation_protocol import Conversation

    dialogues = asked["dialogues"]
    registered = ConvTemplateRegistry._conv_templates
    found = {
        "accepted": sorted(CONV_TEMPLATES),
        "templates": {name: template.to_json_dict() for name, template in registered.items()},
        "prompts": {name: prompts(template, dialogues) for name, template in registered.items()},
        "read": {
            name: prompts(Conversation.from_json_dict(fields), dialogues)
            for name, fields in asked["ours"].items()
        },
    }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
