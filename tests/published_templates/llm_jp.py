"""LLM-jp: tokenizer_config.json of the model named below, and the use that its card shows.

The publisher's template writes one fixed sentence for a system message, whatever that says; ours
writes the message, which is that sentence where the card is followed. mlc_llm writes the sentence
also where no system message is given.
"""

from __future__ import annotations

from mlcawq.build.model_tokens import ModelTokens
from published_templates.case import Documented, Published

TOKENS = ModelTokens({"<s>": 1, "</s>": 2}, bos="<s>", eos_ids=(2,), opens_with_bos=True)

SENTENCE = "以下は、タスクを説明する指示です。要求を適切に満たす応答を書きなさい。"
LLM_JP = (
    "{{bos_token}}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '\\n\\n### 指示:\\n' + message['content'] }}"
    "{% elif message['role'] == 'system' %}"
    "{{ '以下は、タスクを説明する指示です。要求を適切に満たす応答を書きなさい。' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '\\n\\n### 応答:\\n' + message['content'] + eos_token }}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '\\n\\n### 応答:\\n' }}{% endif %}{% endfor %}"
)
_FIXED = "the publisher writes its own sentence in place of the message"

PUBLISHED = [
    Published(
        "llm-jp",
        "llm-jp/llm-jp-3-1.8b-instruct",
        LLM_JP,
        TOKENS,
        "</s>",
        beyond={
            "a question after a system message": _FIXED,
            "a second question after a system message": _FIXED,
        },
    )
]
DOCUMENTED = [
    Documented(
        "llm-jp",
        "llm-jp/llm-jp-3-1.8b-instruct",
        TOKENS,
        [
            (
                [
                    {"role": "system", "content": SENTENCE},
                    {"role": "user", "content": "自然言語処理とは何か"},
                ],
                f"{SENTENCE}\n\n### 指示:\n自然言語処理とは何か\n\n### 応答:\n",
            )
        ],
    )
]
