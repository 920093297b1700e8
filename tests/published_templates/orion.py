"""Orion: tokenizer_config.json of OrionStarAI/Orion-14B-Chat; a system message is left out."""

from __future__ import annotations

from mlcawq.build.model_tokens import ModelTokens
from published_templates.case import Published

TOKENS = ModelTokens({"<s>": 1, "</s>": 2}, bos="<s>", eos_ids=(2,), opens_with_bos=True)

ORION = (
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{{ 'Human: ' + message['content'] + '\n\nAssistant: ' + eos_token }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)

PUBLISHED = [Published("orion", "OrionStarAI/Orion-14B-Chat", ORION, TOKENS, "</s>")]
