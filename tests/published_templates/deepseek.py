"""DeepSeek: tokenizer_config.json of the models named below.

mlc_llm writes no blank line after a system message of `deepseek` and `deepseek_v2`, and gives V3
and the R1 distillations a default system message; the publisher does neither. Of R1's templates
this is the second edition, which opens the answer with <think>; mlc_llm has the first.
"""

from __future__ import annotations

from mlcawq.build.model_tokens import ModelTokens
from published_templates.case import Published

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"


def tokens(bos_id: int, eos_id: int, **others: int) -> ModelTokens:
    return ModelTokens({BOS: bos_id, EOS: eos_id, **others}, BOS, (eos_id,), opens_with_bos=True)


DEEPSEEK = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ 'Assistant: ' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

DEEPSEEK_V3 = (
    "{% set ns = namespace(system_prompt='', is_first_sp=true) %}"
    "{%- for message in messages %}{%- if message['role'] == 'system' %}"
    "{%- if ns.is_first_sp %}{% set ns.system_prompt = ns.system_prompt + message['content'] %}"
    "{% set ns.is_first_sp = false %}"
    "{%- else %}{% set ns.system_prompt = ns.system_prompt + '\n\n' + message['content'] %}"
    "{%- endif %}{%- endif %}{%- endfor %}"
    "{{bos_token}}{{ns.system_prompt}}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'user' %}{{'<｜User｜>' + message['content']}}{%- endif %}"
    "{%- if message['role'] == 'assistant' and message['content'] is not none %}"
    "{{'<｜Assistant｜>' + message['content'] + '<｜end▁of▁sentence｜>'}}{%- endif %}"
    "{%- endfor -%}"
    "{% if add_generation_prompt %}{{'<｜Assistant｜>'}}{% endif %}"
)

DEEPSEEK_R1 = (
    "{% set ns = namespace(system_prompt='') %}"
    "{%- for message in messages %}{%- if message['role'] == 'system' %}"
    "{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}"
    "{{bos_token}}{{ns.system_prompt}}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'user' %}{{'<｜User｜>' + message['content']}}{%- endif %}"
    "{%- if message['role'] == 'assistant' %}{% set content = message['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}"
    "{%- endfor -%}"
    "{% if add_generation_prompt %}{{'<｜Assistant｜><think>\\n'}}{% endif %}"
)
_R1_BEYOND = {"an earlier answer with its reasoning": "white space after </think> stays"}


def _r1(model: str, its_tokens: ModelTokens) -> Published:
    return Published("deepseek-r1", model, DEEPSEEK_R1, its_tokens, EOS, beyond=_R1_BEYOND)


PUBLISHED = [
    Published(
        "deepseek", "deepseek-ai/deepseek-llm-7b-chat", DEEPSEEK, tokens(100000, 100001), EOS
    ),
    Published(
        "deepseek", "deepseek-ai/DeepSeek-V2-Lite-Chat", DEEPSEEK, tokens(100000, 100001), EOS
    ),
    Published("deepseek_v3", "deepseek-ai/DeepSeek-V3", DEEPSEEK_V3, tokens(0, 1), EOS),
    _r1("deepseek-ai/DeepSeek-R1", tokens(0, 1)),
    _r1("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", tokens(151646, 151643)),
    _r1("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", tokens(128000, 128001)),
]
