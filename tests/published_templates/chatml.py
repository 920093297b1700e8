"""ChatML: tokenizer_config.json of the models named below.

mlc_llm's `chatml` opens with a system message of its own where none is given.
"""

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

YI_1_5 = (
    "{% if messages[0]['role'] == 'system' %}{% set system_message = messages[0]['content'] %}"
    "{% endif %}{% if system_message is defined %}{{ system_message }}{% endif %}"
    "{% for message in messages %}{% set content = message['content'] %}"
    "{% if message['role'] == 'user' %}"
    "{{ '<|im_start|>user\\n' + content + '<|im_end|>\\n<|im_start|>assistant\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ content + '<|im_end|>' + '\\n' }}{% endif %}"
    "{% endfor %}"
)
YI_TOKENS = ModelTokens(
    {"<|startoftext|>": 1, "<|endoftext|>": 2, "<|im_start|>": 6, "<|im_end|>": 7},
    bos="<|startoftext|>",
    eos_ids=(7,),
)

PUBLISHED = [
    Published("chatml", "teknium/OpenHermes-2.5-Mistral-7B", CHATML, TOKENS, "<|im_end|>"),
    Published("chatml_nosystem", "01-ai/Yi-1.5-6B-Chat", YI_1_5, YI_TOKENS, "<|im_end|>"),
]
