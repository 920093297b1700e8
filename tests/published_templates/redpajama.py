"""RedPajama-INCITE-Chat: togethercomputer/OpenChatKit, docs/finetuning-RedPajama-3B.md for a prompt
and inference/conversation.py for a dialogue and for the text that may stand before it.
"""

from __future__ import annotations

from mlcawq.build.conversation_derive import assistant, system, user
from mlcawq.build.model_tokens import ModelTokens
from published_templates.case import Documented

DOCUMENTED = [
    Documented(
        "redpajama_chat",
        "togethercomputer/RedPajama-INCITE-Chat-3B-v1",
        ModelTokens({"<|endoftext|>": 0}, eos_ids=(0,)),
        [
            ([user("Who is Alan Turing?")], "<human>: Who is Alan Turing?\n<bot>:"),
            (
                [
                    system("Current Date: 2023-05-05\nCurrent Time: 10:00:00 AM UTC"),
                    user("Hello!"),
                    assistant("Hello human."),
                    user("What is today?"),
                ],
                "Current Date: 2023-05-05\nCurrent Time: 10:00:00 AM UTC\n\n"
                "<human>: Hello!\n<bot>: Hello human.\n<human>: What is today?\n<bot>:",
            ),
        ],
    ),
]
