"""Gorilla OpenFunctions: `get_prompt` in openfunctions/README.md of ShishirPatil/gorilla.

mlc_llm gives v1 the system message of Vicuna, and writes no space after "ASSISTANT:"; the publisher
has neither. Without functions the publisher leaves "<<function>>" out, which the schema cannot.
"""

from __future__ import annotations

from mlcawq.build.model_tokens import ModelTokens
from published_templates.case import Documented

V1_TOKENS = ModelTokens({"<s>": 1, "</s>": 2}, bos="<s>", eos_ids=(2,), opens_with_bos=True)
V2_TOKENS = ModelTokens(
    {"<｜begin▁of▁sentence｜>": 100000, "<｜end▁of▁sentence｜>": 100001, "<|EOT|>": 100015},
    bos="<｜begin▁of▁sentence｜>",
    eos_ids=(100015,),
    opens_with_bos=True,
)

FUNCTIONS = '[{"name": "uber.ride", "parameters": [{"name": "loc"}]}]'
_DIALOGUE = [{"role": "user", "content": "Call me an Uber ride."}]
_V2_SYSTEM = (
    "You are an AI programming assistant, utilizing the Gorilla LLM model, developed by Gorilla "
    "LLM, and you only answer questions related to computer science. For politically sensitive "
    "questions, security and privacy issues, and other non-computer science questions, you will "
    "refuse to answer."
)

DOCUMENTED = [
    Documented(
        "gorilla",
        "gorilla-llm/gorilla-openfunctions-v1",
        V1_TOKENS,
        [
            (
                _DIALOGUE,
                f"USER: <<question>> Call me an Uber ride. <<function>> {FUNCTIONS}\nASSISTANT: ",
            )
        ],
        functions=FUNCTIONS,
    ),
    Documented(
        "gorilla-openfunctions-v2",
        "gorilla-llm/gorilla-openfunctions-v2",
        V2_TOKENS,
        [
            (
                _DIALOGUE,
                f"{_V2_SYSTEM}\n### Instruction: <<function>>{FUNCTIONS}\n"
                "<<question>>Call me an Uber ride.\n### Response: ",
            )
        ],
        functions=FUNCTIONS,
    ),
]
