"""Zephyr and TinyLlama: tokenizer_config.json of the models named below, which are the same."""

from __future__ import annotations

from mlcawq.build.model_tokens import ModelTokens
from published_templates.case import Published

TOKENS = ModelTokens({"<s>": 1, "</s>": 2}, bos="<s>", eos_ids=(2,), opens_with_bos=True)

ZEPHYR = (
    "{% for message in messages %}\n"
    "{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n"
    "{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n"
    "{% endfor %}"
)

PUBLISHED = [
    Published("zephyr", "HuggingFaceH4/zephyr-7b-beta", ZEPHYR, TOKENS, "</s>"),
    Published("zephyr", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", ZEPHYR, TOKENS, "</s>"),
]
