"""StableLM: tokenizer_config.json of the Zephyr models named below, the README of
Stability-AI/StableLM for the tuned alpha models, and the model card of StableLM 2 Zephyr.
"""

from __future__ import annotations

from mlcawq.build.conversation_derive import assistant, system, user
from mlcawq.build.model_tokens import ModelTokens
from published_templates.case import Documented, Published

ALPHA_TOKENS = ModelTokens(
    {
        "<|endoftext|>": 0,
        "<|padding|>": 1,
        "<|SYSTEM|>": 50277,
        "<|USER|>": 50278,
        "<|ASSISTANT|>": 50279,
    },
    eos_ids=(0,),
)
ZEPHYR_3B_TOKENS = ModelTokens({"<|endoftext|>": 0}, bos="<|endoftext|>", eos_ids=(0,))
ZEPHYR_2_TOKENS = ModelTokens({"<|endoftext|>": 100257}, bos="<|endoftext|>", eos_ids=(100257,))

ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>
'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

_ALPHA_SYSTEM = """<|SYSTEM|># StableLM Tuned (Alpha version)
- StableLM is a helpful and harmless open-source AI language model developed by StabilityAI.
- StableLM is excited to be able to help the user, but will refuse to do anything that could be \
considered harmful to the user.
- StableLM is more than just an information source, StableLM is also able to write poetry, short \
stories, and make jokes.
- StableLM will refuse to participate in anything that could harm a human.
"""

PUBLISHED = [
    Published(
        "stablelm-3b",
        "stabilityai/stablelm-zephyr-3b",
        ZEPHYR,
        ZEPHYR_3B_TOKENS,
        "<|endoftext|>",
    ),
]

DOCUMENTED = [
    Documented(
        "stablelm",
        "stabilityai/stablelm-tuned-alpha-7b",
        ALPHA_TOKENS,
        [
            (
                [user("What's your mood today?")],
                _ALPHA_SYSTEM + "<|USER|>What's your mood today?<|ASSISTANT|>",
            ),
            (
                [system("..."), user("..."), assistant("..."), user("...")],
                "<|SYSTEM|>...<|USER|>...<|ASSISTANT|>...<|USER|>...<|ASSISTANT|>",
            ),
        ],
    ),
    Documented(
        "stablelm-3b",
        "stabilityai/stablelm-2-zephyr-1_6b",
        ZEPHYR_2_TOKENS,
        [
            (
                [user("Which famous math number begins with 1.6 ...?")],
                "<|user|>\nWhich famous math number begins with 1.6 ...?<|endoftext|>\n"
                "<|assistant|>\n",
            ),
        ],
    ),
]
