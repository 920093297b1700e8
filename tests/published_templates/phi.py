"""Phi: tokenizer_config.json of the models named below; for Phi-2, which has no chat template, the
"QA format" of its model card.

mlc_llm calls phi-4 what Phi-4-mini was trained with. Phi-4 itself, of 14 billion parameters, has
another format.
"""

from __future__ import annotations

from mlcawq.build.conversation_derive import user
from mlcawq.build.model_tokens import ModelTokens
from published_templates.case import Documented, Published

PHI_3_TOKENS = ModelTokens(
    {
        "<s>": 1,
        "<|endoftext|>": 32000,
        "<|assistant|>": 32001,
        "<|system|>": 32006,
        "<|end|>": 32007,
        "<|user|>": 32010,
    },
    bos="<s>",
    eos_ids=(32000,),
)
PHI_4_MINI_TOKENS = ModelTokens(
    {
        "<|endoftext|>": 199999,
        "<|assistant|>": 200019,
        "<|end|>": 200020,
        "<|user|>": 200021,
        "<|system|>": 200022,
    },
    bos="<|endoftext|>",
    eos_ids=(199999,),
)
PHI_4_TOKENS = ModelTokens(
    {"<|endoftext|>": 100257, "<|im_start|>": 100264, "<|im_end|>": 100265, "<|im_sep|>": 100266},
    bos="<|endoftext|>",
    eos_ids=(100265,),
)

PHI_3 = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}"
    "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
PHI_3_5 = PHI_3.replace("== 'system' %}", "== 'system' and message['content'] %}")
PHI_3_VISION = (
    "{% for message in messages %}"
    "{{'<|' + message['role'] + '|>' + '\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}"
    "{{- '<|assistant|>\n' -}}{% endif %}"
)

PHI_4_MINI = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' and 'tools' in message and message['tools'] is not none %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|tool|>' + message['tools'] "
    "+ '<|/tool|>' + '<|end|>' }}"
    "{% else %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
PHI_4 = (
    "{% for message in messages %}"
    "{% if (message['role'] == 'system') %}"
    "{{'<|im_start|>system<|im_sep|>' + message['content'] + '<|im_end|>'}}"
    "{% elif (message['role'] == 'user') %}"
    "{{'<|im_start|>user<|im_sep|>' + message['content'] + '<|im_end|>'}}"
    "{% elif (message['role'] == 'assistant') %}"
    "{{'<|im_start|>assistant<|im_sep|>' + message['content'] + '<|im_end|>'}}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)

PUBLISHED = [
    Published("phi-3", "microsoft/Phi-3-mini-4k-instruct", PHI_3, PHI_3_TOKENS, "<|endoftext|>"),
    Published("phi-3", "microsoft/Phi-3.5-mini-instruct", PHI_3_5, PHI_3_TOKENS, "<|endoftext|>"),
    Published(
        "phi-3",
        "microsoft/Phi-3-vision-128k-instruct",
        PHI_3_VISION,
        PHI_3_TOKENS,
        "<|endoftext|>",
    ),
    Published(
        "phi-4", "microsoft/Phi-4-mini-instruct", PHI_4_MINI, PHI_4_MINI_TOKENS, "<|endoftext|>"
    ),
    Published(None, "microsoft/phi-4", PHI_4, PHI_4_TOKENS, "<|im_end|>"),
]

_QUESTION = "Write a detailed analogy between mathematics and a lighthouse."

DOCUMENTED = [
    Documented(
        "phi-2",
        "microsoft/phi-2",
        ModelTokens({"<|endoftext|>": 50256}, bos="<|endoftext|>", eos_ids=(50256,)),
        [([user(_QUESTION)], f"Instruct: {_QUESTION}\nOutput:")],
    ),
]
