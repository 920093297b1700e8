"""Mistral 7B and later: tokenizer_config.json of the models named below.

The 7B models of version 0.1 and 0.2 were published with one template and have had another one
since; mistral-v0.1 is the first of these, mistral-v0.2 the later one.
"""

from __future__ import annotations

from mlcawq.build.model_tokens import ModelTokens
from published_templates.case import Published

TOKENS = ModelTokens({"<s>": 1, "</s>": 2}, bos="<s>", eos_ids=(2,), opens_with_bos=True)

MISTRAL_V01 = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token + ' ' }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "{% endfor %}"
)

MISTRAL_V02 = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.first and system_message is defined %}
            {{- " [INST] " + system_message + "\\n\\n" + message["content"] + " [/INST]" }}
        {%- else %}
            {{- " [INST] " + message["content"] + " [/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] + eos_token}}
    {%- else %}
        {{- raise_exception('Only user and assistant roles are supported!') }}
    {%- endif %}
{%- endfor %}
"""

# v0.3 puts the system message into the last question.
MISTRAL_V03 = (
    MISTRAL_V02.replace('" [INST] "', '"[INST] "')
    .replace('" [/INST]"', '"[/INST]"')
    .replace("loop.first", "loop.last")
    .replace('message["content"] + eos', 'message["content"]|trim + eos')
)

MISTRAL_V7 = """{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + message['content'] + '[/INST]' }}
    {%- elif message['role'] == 'system' %}
        {{- '[SYSTEM_PROMPT] ' + message['content'] + '[/SYSTEM_PROMPT]' }}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + message['content'] + eos_token }}
    {%- else %}
        {{- raise_exception('Only user, system and assistant roles are supported!') }}
    {%- endif %}
{%- endfor %}
"""

PUBLISHED = [
    Published(
        "mistral-v0.1",
        "mistralai/Mistral-7B-Instruct-v0.1 (2023)",
        MISTRAL_V01,
        TOKENS,
        "</s>",
    ),
    Published("mistral-v0.2", "mistralai/Mistral-7B-Instruct-v0.1", MISTRAL_V02, TOKENS, "</s>"),
    Published("mistral-v0.2", "mistralai/Mistral-7B-Instruct-v0.2", MISTRAL_V02, TOKENS, "</s>"),
    Published("mistral-v0.2", "mistralai/Mixtral-8x7B-Instruct-v0.1", MISTRAL_V02, TOKENS, "</s>"),
    Published(
        "mistral-v0.3",
        "mistralai/Mistral-7B-Instruct-v0.3",
        MISTRAL_V03,
        TOKENS,
        "</s>",
        beyond={
            "a second question after a system message": "the system message is in the last question"
        },
    ),
    Published("mistral-v7", "mistralai/Mistral-Large-Instruct-2411", MISTRAL_V7, TOKENS, "</s>"),
]
