"""Hermes: tokenizer_config.json of the models named below (Hermes 2 Pro's template "default").

mlc_llm opens every one with a long system message that the publisher's cards give as an example;
the publisher's templates have none (OpenHermes, NeuralHermes, Hermes 2 Pro) or a short one.
"""

from __future__ import annotations

from mlcawq.build.model_tokens import ModelTokens
from published_templates.case import Published
from published_templates.chatml import CHATML
from published_templates.chatml import TOKENS as MISTRAL_TOKENS


def llama_3_tokens(im_start: int, im_end: int) -> ModelTokens:
    return ModelTokens(
        {"<|begin_of_text|>": 128000, "<|im_start|>": im_start, "<|im_end|>": im_end},
        bos="<|begin_of_text|>",
        eos_ids=(im_end,),
        opens_with_bos=True,
    )


HERMES_3 = (
    "{{bos_token}}{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

PUBLISHED = [
    Published("chatml", "mlabonne/NeuralHermes-2.5-Mistral-7B", CHATML, MISTRAL_TOKENS),
    Published(
        "hermes2_pro_llama3",
        "NousResearch/Hermes-2-Pro-Llama-3-8B",
        "{{bos_token}}" + CHATML,
        llama_3_tokens(128002, 128003),
        "<|im_end|>",
    ),
    Published(
        "hermes3_llama-3_1",
        "NousResearch/Hermes-3-Llama-3.1-8B",
        HERMES_3,
        llama_3_tokens(128039, 128040),
        "<|im_end|>",
    ),
]
