"""Nemotron Mini: tokenizer_config.json and model card of nvidia/Nemotron-Mini-4B-Instruct.

The ids of <extra_id_0> and <extra_id_1> are made up. The model's own chat template writes the
generation prompt whether it is asked for or not.
"""

from __future__ import annotations

from mlcawq.build.model_tokens import ModelTokens
from published_templates.case import Published

TOKENS = ModelTokens(
    {"<s>": 2, "</s>": 3, "<extra_id_0>": 10, "<extra_id_1>": 11}, bos="<s>", eos_ids=(3,)
)

NEMOTRON_MINI = (
    "{{'<extra_id_0>System'}}"
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{'\n' + message['content'].strip()}}"
    "{% if tools or contexts %}{{'\n'}}{% endif %}{% endif %}{% endfor %}"
    "{% if tools %}{% for tool in tools %}{{ '\n<tool> ' + tool|tojson + ' </tool>' }}"
    "{% endfor %}{% endif %}"
    "{% if contexts %}{% if tools %}{{'\n'}}{% endif %}{% for context in contexts %}"
    "{{ '\n<context> ' + context.strip() + ' </context>' }}{% endfor %}{% endif %}"
    "{{'\n\n'}}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}"
    "{{ '<extra_id_1>User\n' + message['content'].strip() + '\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<extra_id_1>Assistant\n' + message['content'].strip() + '\n' }}"
    "{% elif message['role'] == 'tool' %}"
    "{{ '<extra_id_1>Tool\n' + message['content'].strip() + '\n' }}"
    "{% endif %}{% endfor %}"
    "{{'<extra_id_1>Assistant\n'}}"
)

PUBLISHED = [
    Published("nemotron", "nvidia/Nemotron-Mini-4B-Instruct", NEMOTRON_MINI, TOKENS, "</s>"),
]
