"""DeepSeek: tokenizer_config.json of the models named below."""

from __future__ import annotations

from mlcawq.build.model_tokens import ModelTokens
from published_templates.case import Published

R1_TOKENS = ModelTokens(
    {
        "<｜begin▁of▁sentence｜>": 0,
        "<｜end▁of▁sentence｜>": 1,
        "<｜User｜>": 128803,
        "<｜Assistant｜>": 128804,
        "<think>": 128798,
        "</think>": 128799,
    },
    "<｜begin▁of▁sentence｜>",
    (1,),
    opens_with_bos=True,
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

PUBLISHED = [
    Published(
        "deepseek-r1",
        "deepseek-ai/DeepSeek-R1",
        DEEPSEEK_R1,
        R1_TOKENS,
        "<｜end▁of▁sentence｜>",
        beyond={
            "an earlier answer with its reasoning": "white space after </think> stays",
        },
    ),
]
