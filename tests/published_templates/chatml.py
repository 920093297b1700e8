"""ChatML: tokenizer_config.json of the models named below."""

from __future__ import annotations

from mlcawq.build.model_tokens import ModelTokens
from published_templates.case import Published

TOKENS = ModelTokens(
    {"<s>": 1, "</s>": 2, "<|im_end|>": 32000, "<|im_start|>": 32001}, bos="<s>", eos_ids=(32000, 2)
)

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

PUBLISHED = [
    Published("chatml", "teknium/OpenHermes-2.5-Mistral-7B", CHATML, TOKENS, "<|im_end|>"),
]
