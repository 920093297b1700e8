"""Aya 23: tokenizer_config.json of the model named below.

The publisher's template knows a default system message but never writes it (`false == true`);
mlc_llm's `aya-23` always does.
"""

from __future__ import annotations

from mlcawq.build.model_tokens import ModelTokens
from published_templates.case import Published

TOKENS = ModelTokens(
    {
        "<BOS_TOKEN>": 5,
        "<|START_OF_TURN_TOKEN|>": 255000,
        "<|END_OF_TURN_TOKEN|>": 255001,
        "<|USER_TOKEN|>": 255006,
        "<|CHATBOT_TOKEN|>": 255007,
        "<|SYSTEM_TOKEN|>": 255008,
    },
    bos="<BOS_TOKEN>",
    eos_ids=(255001,),
    opens_with_bos=True,
)

AYA_23 = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}"
    "{% elif false == true %}{% set loop_messages = messages %}"
    "{% set system_message = 'You are Command-R, a brilliant, sophisticated, AI-assistant trained "
    "to assist human users by providing thorough responses. You are trained by Cohere.' %}"
    "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% if system_message != false %}"
    "{{ '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' + system_message + '<|END_OF_TURN_TOKEN|>' }}"
    "{% endif %}"
    "{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}{% set content = message['content'] %}"
    "{% if message['role'] == 'user' %}"
    "{{ '<|START_OF_TURN_TOKEN|><|USER_TOKEN|>' + content.strip() + '<|END_OF_TURN_TOKEN|>' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>'  + content.strip() + '<|END_OF_TURN_TOKEN|>' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
)

PUBLISHED = [Published("aya-23", "CohereForAI/aya-23-8B", AYA_23, TOKENS, "<|END_OF_TURN_TOKEN|>")]
