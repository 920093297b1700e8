"""RWKV World: API_DEMO_CHAT.py of BlinkDL/ChatRWKV, which opens every chat with a greeting.

No space comes after the last "Assistant:" (README.md): the model begins its answer with one.
"""

from __future__ import annotations

from mlcawq.build.conversation_derive import assistant, user
from mlcawq.build.model_tokens import ModelTokens
from published_templates.case import Documented

_OPENING = (
    "User: hi\n\nAssistant: Hi. I am your assistant and I will provide expert full response in "
    "full details. Please feel free to ask any question and I will always answer it.\n\n"
)

DOCUMENTED = [
    Documented(
        "rwkv_world",
        "BlinkDL/rwkv-7-world",
        ModelTokens({"<|endoftext|>": 0}, eos_ids=(0,)),
        [
            ([user("Where is Rome?")], _OPENING + "User: Where is Rome?\n\nAssistant:"),
            (
                [user("Where is Rome?"), assistant("In Italy."), user("And Bern?")],
                _OPENING + "User: Where is Rome?\n\nAssistant: In Italy.\n\n"
                "User: And Bern?\n\nAssistant:",
            ),
        ],
    ),
]
