"""LLaVA 1.5: chat_template of the processor of the model named below.

It takes a message's content as a list of parts. The processor's tokenizer puts bos before what the
template renders, here written as `bos_token`. mlc_llm opens the prompt with a line break.
"""

from __future__ import annotations

from mlcawq.build.model_tokens import ModelTokens
from published_templates.case import Published

TOKENS = ModelTokens(
    {"<s>": 1, "</s>": 2, "<image>": 32000}, bos="<s>", eos_ids=(2,), opens_with_bos=True
)

LLAVA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{# Render all text next #}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}"
    "{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

PUBLISHED = [Published("llava", "llava-hf/llava-1.5-7b-hf", LLAVA, TOKENS, "</s>")]
