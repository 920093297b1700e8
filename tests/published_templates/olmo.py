"""OLMo and OLMo 2: tokenizer_config.json of the models named below.

OLMo opens with its end-of-text token and has no bos; a system message is left out.
"""

from __future__ import annotations

from mlcawq.build.model_tokens import ModelTokens
from published_templates.case import Published

OLMO_TOKENS = ModelTokens({"<|padding|>": 1, "<|endoftext|>": 50279}, eos_ids=(50279,))
OLMO_2_TOKENS = ModelTokens({"<|endoftext|>": 100257}, bos="<|endoftext|>", eos_ids=(100257,))

OLMO = """{{ eos_token }}{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>
' + message['content'] }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>
'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

OLMO_2 = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ '<|system|>\n' + message['content'] + '\n' }}"
    "{% elif message['role'] == 'user' %}{{ '<|user|>\n' + message['content'] + '\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{% if not loop.last %}"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token + '\n' }}"
    "{% else %}{{ '<|assistant|>\n'  + message['content'] + eos_token }}{% endif %}"
    "{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    "{% endfor %}"
)

PUBLISHED = [
    Published("olmo", "allenai/OLMo-7B-Instruct", OLMO, OLMO_TOKENS, "<|endoftext|>"),
    Published("olmo2", "allenai/OLMo-2-1124-7B-Instruct", OLMO_2, OLMO_2_TOKENS, "<|endoftext|>"),
]
