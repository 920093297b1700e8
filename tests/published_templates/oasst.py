"""OpenAssistant: "Message Format v2" in LAION-AI/Open-Assistant, MESSAGE_AND_TOKEN_FORMAT.md.

"A prefix could be placed before the first prompter message": that is where a system message goes.
"""

from __future__ import annotations

from mlcawq.build.conversation_derive import assistant, system, user
from mlcawq.build.model_tokens import ModelTokens
from published_templates.case import Documented

DOCUMENTED = [
    Documented(
        "oasst",
        "OpenAssistant/oasst-sft-4-pythia-12b-epoch-3.5",
        ModelTokens({"<|endoftext|>": 0}, eos_ids=(0,)),
        [
            ([user("Hello!")], "<|prompter|>Hello!<|endoftext|><|assistant|>"),
            (
                [
                    system("You are a large language model that wants to be helpful"),
                    user("Hello!"),
                ],
                "You are a large language model that wants to be helpful"
                "<|prompter|>Hello!<|endoftext|><|assistant|>",
            ),
            (
                [
                    user("What is red and round?"),
                    assistant("Hmm, a red balloon?"),
                    user("No, smaller"),
                ],
                "<|prompter|>What is red and round?<|endoftext|>"
                "<|assistant|>Hmm, a red balloon?<|endoftext|>"
                "<|prompter|>No, smaller<|endoftext|><|assistant|>",
            ),
        ],
    ),
]
