r"""ChatGLM3: chat_template in tokenizer_config.json of the model named below.

mlc_llm's `glm` is "问: …\n\n答:", which ChatGLM2 used with numbered rounds ("[Round 1]\n\n问：…");
ours is the format of ChatGLM3, whose architecture mlc_llm builds under this name.
"""

from __future__ import annotations

from mlcawq.build.model_tokens import ModelTokens
from published_templates.case import TOOL_ANSWER, Published

TOKENS = ModelTokens(
    {
        "</s>": 2,
        "[gMASK]": 64790,
        "sop": 64792,
        "<|system|>": 64794,
        "<|user|>": 64795,
        "<|assistant|>": 64796,
        "<|observation|>": 64797,
    },
    eos_ids=(2, 64795, 64797),
)

CHATGLM_3 = (
    "{% for message in messages %}{% if loop.first %}"
    "[gMASK]sop<|{{ message['role'] }}|>\n {{ message['content'] }}"
    "{% else %}<|{{ message['role'] }}|>\n {{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

PUBLISHED = [
    Published(
        "glm",
        "THUDM/chatglm3-6b",
        CHATGLM_3,
        TOKENS,
        "</s>",
        beyond={TOOL_ANSWER: "the role is called observation there, and tool here"},
    )
]
